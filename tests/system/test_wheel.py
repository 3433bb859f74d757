# SPDX-License-Identifier: Apache-2.0
"""The built wheel, outside of the checkout: its commands, and its types."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools.wheels import PACKAGES, SOURCES, build_wheel, commit_tag

ROOT = Path(__file__).parents[2]
NO_NETWORK = "--no-build-isolation"
PROGRAM = """
from edge_runtime import Device, Predictor, StorePredictor, UpdateResult
from packager import PackedPatch, pack_round, read_round
from trainer import PartialUpdater, RoundRecord

device = Device.open("store")
reveal_type(device)
reveal_type(device.update("round_01.dpu"))
reveal_type(device.predictor())
reveal_type(pack_round(read_round("round_01")))
reveal_type(PartialUpdater([]))
device.update(3)
device.no_such_method()
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, built without a network and unpacked, as pip would."""
    folder = tmp_path_factory.mktemp("wheel")
    wheel = build_wheel(folder, NO_NETWORK)
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def checkout(tmp_path):
    """A clone of a project like this one, with next to no code."""
    source = tmp_path / "checkout"
    for name in PACKAGES:
        (source / name).mkdir(parents=True)
        (source / name / "__init__.py").write_text("")
    for name in set(SOURCES) - set(PACKAGES):
        shutil.copy(ROOT / name, source)
    subprocess.run(["git", "init", "--quiet", source], check=True)
    return source


def commit(source, code, date):
    (source / "edge_runtime" / "__init__.py").write_text(code)
    who = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    dated = os.environ | {"GIT_COMMITTER_DATE": date, "GIT_AUTHOR_DATE": date}
    for words in (["add", "--all"], [*who, "commit", "--quiet", "--message", "code"]):
        subprocess.run(["git", "-C", source, *words], check=True, env=dated)


def upgrade(folder, environment):
    """Install what is newest in a folder, as docs/installing.md has it."""
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    only = ["--no-index", "--no-deps", "--find-links", folder]
    subprocess.run([*pip, "--upgrade", *only, "dpu-edge"], check=True, cwd=folder)
    code = (
        "import edge_runtime, importlib.metadata as found; "
        "print(edge_runtime.CODE, found.version('dpu-edge'))"
    )
    told = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True)
    return told.stdout.split()


def test_what_travels_and_what_does_not(installed):
    here = {str(p.relative_to(installed)) for p in installed.rglob("*") if p.is_file()}
    for package in ("edge_runtime", "packager", "trainer"):
        assert f"{package}/py.typed" in here
        sources = (ROOT / package).rglob("*.py")
        assert {str(path.relative_to(ROOT)) for path in sources} <= here
    assert "edge_runtime/FORMAT.md" in here
    assert any(name.endswith("licenses/LICENSE") for name in here)
    assert not [name for name in here if name.startswith(("tests/", "tools/", "docs/"))]


EVERY_COMMAND = """
import sys, importlib
from pathlib import Path
import click

site = Path(sys.argv[1])
sys.path.insert(0, str(site))
MAINS = (
    ("edge_runtime.cli.main", "main"),
    ("packager.cli.pack", "pack"),
    ("packager.cli.pack", "patch"),
    ("trainer.cli", "main"),
)


def walk(command, words):
    yield words
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, [*words, name])


for module, name in MAINS:
    found = importlib.import_module(module)
    assert site in Path(found.__file__).parents, found.__file__
    for words in walk(getattr(found, name), []):
        try:
            getattr(found, name).main([*words, "--help"], prog_name=name)
        except SystemExit as end:
            assert not end.code, words
        print("ran", name, *words)
"""


def test_every_command_runs_from_the_wheel(installed, tmp_path):
    done = subprocess.run(
        [sys.executable, "-I", "-c", EVERY_COMMAND, str(installed)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ran = [line for line in done.stdout.splitlines() if line.startswith("ran ")]
    for line in ("ran main apply", "ran pack", "ran patch info", "ran main run"):
        assert line in ran


def test_type_checkers_know_every_name_from_outside(installed, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "program.py"],
        cwd=tmp_path,
        env={"MYPYPATH": "", "PYTHONPATH": str(installed), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    revealed = [line.split('"')[1] for line in lines if "Revealed type" in line]
    assert [name.split(".")[-1].split(" ")[0] for name in revealed] == [
        "Device",
        "UpdateResult",
        "StorePredictor",
        "PackedPatch",
        "PartialUpdater",
    ], done.stdout
    errors = [line for line in lines if ": error:" in line]
    assert len(errors) == 2, done.stdout
    assert "[arg-type]" in errors[0]
    assert "[attr-defined]" in errors[1]


def test_a_wheel_of_a_later_commit_replaces_the_one_that_is_installed(
    checkout, tmp_path
):
    environment, folder = tmp_path / "env", tmp_path / "dist"
    venv = [sys.executable, "-m", "venv", "--without-pip", environment]
    subprocess.run(venv, check=True)
    assert commit_tag(tmp_path) == "", "no clone"
    commit(checkout, "CODE = 1", "2026-11-29T09:00:00 +0000")
    build_wheel(folder, NO_NETWORK, source=checkout)
    code, first = upgrade(folder, environment)
    assert (code, first.split(".g")[0]) == ("1", "0.1.0+20261129090000")
    # Earlier on the clock of its author, later in time.
    commit(checkout, "CODE = 2", "2026-11-29T08:30:00 -0100")
    wheel = build_wheel(folder, NO_NETWORK, source=checkout)
    assert list(folder.iterdir()) == [wheel], "the older one is gone"
    code, second = upgrade(folder, environment)
    assert (code, second.split(".g")[0]) == ("2", "0.1.0+20261129093000")
    (checkout / "edge_runtime" / "__init__.py").write_text("CODE = 3")
    build_wheel(folder, NO_NETWORK, source=checkout)
    assert upgrade(folder, environment) == ["3", f"{second}.changed"]


def test_no_target_packs_what_an_earlier_build_left(checkout, tmp_path):
    commit(checkout, "CODE = 1", "2026-11-29T09:00:00 +0000")
    left = checkout / "build" / "lib" / "edge_runtime"
    left.mkdir(parents=True)
    (left / "gone.py").write_text("")
    wheel = build_wheel(tmp_path / "dist", NO_NETWORK, source=checkout)
    names = zipfile.ZipFile(wheel).namelist()
    assert "edge_runtime/__init__.py" in names
    assert "edge_runtime/gone.py" not in names
    assert not list(checkout.glob("*.egg-info")), "of this version, for all that ask"
    assert "pip wheel" not in (ROOT / "Makefile").read_text(), "python -m tools.wheels"
