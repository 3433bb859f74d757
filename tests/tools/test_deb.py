# SPDX-License-Identifier: Apache-2.0
"""The Debian package, built by dpkg-deb from a wheelhouse of tiny wheels.

That apt installs the real one, on emulated Arm too, is ``make test-deb``.
"""

import os
import shutil
import stat
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import click
import pytest

from tools.deb.package import (
    SCRIPT_NAMES,
    SCRIPTS,
    build,
    check_host,
    depends,
    our_version,
)
from tools.deb.tree import oldest_glibc, unpack, wheels_for

DATE = 1_700_000_000
HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"
SHELL = [*SCRIPT_NAMES, "compile", "rtupdate"]
needs_dpkg = pytest.mark.skipif(
    shutil.which("dpkg-deb") is None, reason="not run: no dpkg-deb (Debian's dpkg)"
)


def write_wheel(folder, name, files):
    with zipfile.ZipFile(folder / name, "w") as archive:
        for place, data in files.items():
            archive.writestr(place, data)


@pytest.fixture
def wheels(tmp_path):
    folder = tmp_path / "wheels"
    folder.mkdir()
    ours = {
        "edge_runtime/__init__.py": "VALUE = 7\n",
        "edge_runtime/__main__.py": "def main():\n    print('started')\n",
        "trainer/__init__.py": "",
        "dpu_edge-1.dist-info/RECORD": "x",
        "dpu_edge-1.dist-info/METADATA": "Name: dpu-edge\nVersion: 1\n",
    }
    write_wheel(folder, "dpu_edge-1-py3-none-any.whl", ours)
    abi3 = "cryptography-1-cp311-abi3-manylinux_2_34_x86_64.whl"
    write_wheel(folder, abi3, {"cryptography/rust.abi3.so": b"\x7fELF" * 99})
    for tag in ("cp311", "cp313"):
        files = {
            "numpy/__init__.py": f"# {tag}\n",
            "numpy.libs/libopenblas.so": b"\x7fELF" * 10_000,
            "numpy/tests/test_it.py": "",
        }
        platform = "manylinux_2_27_x86_64.manylinux_2_28_x86_64"
        write_wheel(folder, f"numpy-2-{tag}-{tag}-{platform}.whl", files)
    return folder


@pytest.fixture
def package(wheels, tmp_path):
    return build(wheels, "amd64", "1.0+2", tmp_path / "out", DATE, "gzip")


def unpacked(package, folder):
    subprocess.run(["dpkg-deb", "-R", package.path, folder], check=True)
    return folder


@needs_dpkg
def test_two_builds_are_equal_byte_for_byte(package, wheels, tmp_path):
    for path in wheels.iterdir():
        os.utime(path, (0, 0))
    old = os.umask(0o077)
    try:
        again = build(wheels, "amd64", "1.0+2", tmp_path / "again", DATE, "gzip")
    finally:
        os.umask(old)
    assert again.path.read_bytes() == package.path.read_bytes()
    assert package.path.name == "dpu-edge_1.0+2_amd64.deb"


@needs_dpkg
def test_every_python_finds_its_own_modules_and_what_is_equal_lies_there_once(
    package, tmp_path
):
    tree = unpacked(package, tmp_path / "tree") / "opt/dpu-edge/lib"
    for number, tag in {"3.11": "cp311", "3.13": "cp313"}.items():
        site = tree / f"python{number}/site-packages"
        assert (site / "numpy/__init__.py").read_text() == f"# {tag}\n"
        assert (site / "cryptography/rust.abi3.so").stat().st_nlink == 2
        assert (site / "numpy.libs/libopenblas.so").stat().st_nlink == 2
        assert not (site / "trainer").exists()
        assert not (site / "numpy/tests").exists()
        assert [p.name for p in site.glob("*.dist-info/*")] == ["METADATA"]
    assert package.shared > 40_000
    assert package.size < package.installed < 60_000


@needs_dpkg
@pytest.mark.skipif(HERE not in ("3.11", "3.13"), reason="needs one of its Pythons")
def test_the_entry_runs_with_the_modules_of_the_package_alone(package, tmp_path):
    root = unpacked(package, tmp_path / "tree") / "opt/dpu-edge"
    (root / "bin/python3").unlink()
    base = Path(sys.base_prefix) / "bin/python3"
    (root / "bin/python3").symlink_to(base)
    (root / "pyvenv.cfg").write_text(
        (root / "pyvenv.cfg").read_text().replace("/usr/bin", str(base.parent))
    )
    entry = tmp_path / "tree/usr/bin/dpu-edge"
    assert entry.read_text().startswith("#!/opt/dpu-edge/bin/python3 -I\n")
    # What else is on the machine, and where it is started, decide nothing.
    (tmp_path / "edge_runtime.py").write_text("raise SystemExit('not this one')\n")
    done = subprocess.run(
        [root / "bin/python3", "-I", entry],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert done.stdout == "started\n", done.stderr


@needs_dpkg
def test_files_are_roots_and_programs_can_be_run(package):
    listed = subprocess.run(
        ["dpkg-deb", "-c", package.path], capture_output=True, text=True, check=True
    ).stdout
    lines = [line.split() for line in listed.splitlines()]
    assert {words[1] for words in lines} == {"root/root"}
    modes = {words[5]: words[0] for words in lines}
    assert modes["./usr/bin/dpu-edge"] == "-rwxr-xr-x"
    assert modes["./opt/dpu-edge/lib/compile"] == "-rwxr-xr-x"
    assert modes["./usr/lib/systemd/system/dpu-edge-agent@.service"] == "-rw-r--r--"
    # Nothing of the owner's: dpkg removes only what it knows.
    assert not [place for place in modes if place.startswith("./var")]
    assert [place for place in modes if place.startswith("./etc/")] == [
        "./etc/",
        "./etc/dpu-edge/",
    ]


@needs_dpkg
def test_units_start_the_packages_program_as_two_users(package, tmp_path):
    units = unpacked(package, tmp_path / "tree") / "usr/lib/systemd/system"
    agent = (units / "dpu-edge-agent@.service").read_text().splitlines()
    sync = (units / "dpu-edge-sync@.service").read_text().splitlines()
    start = "ExecStart=/usr/bin/dpu-edge --store /var/lib/dpu-edge/%i"
    assert f"{start} agent /var/lib/dpu-edge-sync/%i" in agent
    assert f"{start} sync ${{DPU_URL}} /var/lib/dpu-edge-sync/%i" in sync
    assert "User=dpu-edge" in agent
    assert "User=dpu-edge-sync" in sync


@needs_dpkg
def test_the_control_file_asks_for_the_pythons_that_are_in_it(package):
    fields = ["Depends", "Version", "Architecture", "Installed-Size"]
    said = subprocess.run(
        ["dpkg-deb", "-f", package.path, *fields], capture_output=True, text=True
    ).stdout
    assert "Version: 1.0+2\n" in said
    assert "Architecture: amd64\n" in said
    assert (
        "python3 (>= 3.11~), python3 (<< 3.12~) | python3 (>= 3.13~), "
        "python3 (<< 3.14~)"
    ) in said
    assert "libc6 (>= 2.34)" in said


def test_pythons_beside_each_other_need_no_gap():
    said = depends(["3.11", "3.12"], "2.28")
    assert "python3 (>= 3.11~), python3 (<< 3.13~), adduser" in said
    assert "|" not in said


def test_wheels_of_another_python_are_left_alone(wheels):
    names = [path.name.split("-")[0] for path in wheels_for(wheels, "3.13")]
    assert names == ["cryptography", "dpu_edge", "numpy"]
    assert [p.name.split("-")[2] for p in wheels_for(wheels, "3.13")][2] == "cp313"
    assert oldest_glibc(list(wheels.iterdir())) == "2.34"


def test_no_wheel_writes_outside_of_its_folder(tmp_path):
    write_wheel(tmp_path, "evil-1-py3-none-any.whl", {"../outside.py": "x"})
    with pytest.raises(ValueError, match="leave its folder"):
        unpack([tmp_path / "evil-1-py3-none-any.whl"], tmp_path / "site")
    assert not (tmp_path / "outside.py").exists()


def test_a_folder_without_wheels_is_named(tmp_path):
    with pytest.raises(click.ClickException, match=r"no wheels.*make wheelhouse"):
        build(tmp_path, "amd64", "1.0", tmp_path / "out", DATE)


def test_a_package_has_the_version_of_our_wheel_in_it(tmp_path):
    version = "0.1.0+20261129140928.gc040d69.changed"
    (tmp_path / f"dpu_edge-{version}-py3-none-any.whl").touch()
    assert our_version(tmp_path) == version
    (tmp_path / "dpu_edge-0.1.0-py3-none-any.whl").touch()
    with pytest.raises(click.ClickException, match=r"2 wheels.*make wheelhouse"):
        our_version(tmp_path)


@needs_dpkg
def test_a_package_of_a_later_commit_is_newer_for_apt():
    commit = "0.1.0+20261129140928.gc040d69"
    ordered = ["0.1.0", commit, f"{commit}.changed", "0.1.0+20261130000000.g0000000"]
    for older, newer in pairwise(ordered):
        words = ["dpkg", "--compare-versions", older, "lt", newer]
        subprocess.run(words, check=True)


def test_a_missing_dpkg_deb_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(click.ClickException, match="install the package dpkg"):
        check_host()


@pytest.mark.parametrize("name", SHELL)
def test_scripts_are_clean_shell(name):
    path = SCRIPTS / name
    assert path.read_text().startswith("#!/bin/sh\n")
    assert stat.S_IMODE(path.stat().st_mode) & 0o111
    subprocess.run(["sh", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", path], check=True)


def purge(root):
    """Run postrm as dpkg does on a purge, with another root."""
    text = (SCRIPTS / "postrm").read_text()
    for folder in ("/var/", "/etc/"):
        text = text.replace(f" {folder}", f" {root}{folder}")
    return subprocess.run(
        ["sh", "-c", text, "postrm", "purge"],
        capture_output=True,
        text=True,
        check=True,
    )


def test_a_purge_keeps_what_is_the_owners_and_says_how_to_remove_it(tmp_path):
    stores = tmp_path / "var/lib/dpu-edge"
    wants = tmp_path / "etc/systemd/system/multi-user.target.wants"
    for folder in (stores / "digits", tmp_path / "var/lib/dpu-edge-sync", wants):
        folder.mkdir(parents=True)
    (stores / "digits/device.key").write_text("secret")
    for unit in ("dpu-edge-agent@digits", "dpu-edge-sync@digits", "ssh"):
        (wants / f"{unit}.service").symlink_to(f"/lib/systemd/system/{unit}.service")
    said = purge(tmp_path)
    assert (stores / "digits/device.key").read_text() == "secret"
    assert f"to remove it too: rm -r {stores}" in said.stderr
    assert not (tmp_path / "var/lib/dpu-edge-sync").exists(), "it was empty"
    assert [path.name for path in wants.iterdir()] == ["ssh.service"]
    shutil.rmtree(stores / "digits")
    assert purge(tmp_path).stderr == ""
    assert not stores.exists()
