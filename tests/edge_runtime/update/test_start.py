# SPDX-License-Identifier: Apache-2.0
"""However the runtime is installed, its trial starts, and with no code of others."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from edge_runtime import Device
from edge_runtime.cli.main import main
from edge_runtime.update.programs import own_command, own_environment
from packager.build import pack_round
from packager.bundles.from_round import build_bundle
from packager.rounds.folder import read_round

CHECKOUT = Path(__file__).parents[3]
BASE = getattr(sys, "_base_executable", sys.executable)
VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
# What anybody may have put into the folder in which a command is typed.
STRAY = ("ast.py", "numpy.py", "onnxruntime.py", "json.py", "zstandard.py", "click.py")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """Our wheel, built of a copy of the packages, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("edge_runtime", "packager", "trainer"):
        shutil.copytree(
            CHECKOUT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for path in CHECKOUT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, folder)
    code = "import sys, setuptools.build_meta as b; print(b.build_wheel(sys.argv[1]))"
    pytest.importorskip("setuptools")
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=folder, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture
def dependencies(tmp_path):
    """A path file that leads to what the runtime depends on, and not to itself."""
    names = ("numpy", "zstandard", "click", "onnxruntime", "cryptography", "cffi")
    found = (importlib.util.find_spec(name) for name in names)
    return "".join(f"{Path(spec.origin).parents[1]}\n" for spec in found if spec)


def unpack(wheel, folder, dependencies):
    folder.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    (folder / "dependencies.pth").write_text(dependencies)


def user(wheel, path, dependencies):
    """As ``pip install --user``."""
    folder = path / "user" / "lib" / VERSION / "site-packages"
    unpack(wheel, folder, dependencies)
    return [BASE, script(path)], {"PYTHONUSERBASE": str(path / "user")}


def system_wide(wheel, path, dependencies):
    """In the own packages of an interpreter that nobody else uses."""
    venv = [BASE, "-m", "venv", "--without-pip", str(path / "own")]
    subprocess.run(venv, check=True)
    folder = path / "own" / "lib" / VERSION / "site-packages"
    unpack(wheel, folder / "ours", dependencies)
    for name in (folder / "ours").iterdir():
        name.rename(folder / name.name)
    return [str(path / "own" / "bin" / "python"), script(path)], {}


def zipped(wheel, path, dependencies):
    """The wheel itself, on the path."""
    folder = path / "deps" / "lib" / VERSION / "site-packages"
    folder.mkdir(parents=True)
    (folder / "dependencies.pth").write_text(dependencies)
    env = {"PYTHONUSERBASE": str(path / "deps"), "PYTHONPATH": str(wheel)}
    return [BASE, script(path)], env


def checkout(wheel, path, dependencies):
    """The checkout, on the path."""
    _, env = zipped(wheel, path, dependencies)
    return [BASE, script(path)], env | {"PYTHONPATH": str(CHECKOUT)}


def editable(*_):
    """The environment of these tests."""
    return [sys.executable, str(Path(sys.executable).with_name("dpu-edge"))], {}


def script(path):
    """What pip writes as ``dpu-edge``."""
    (path / "bin").mkdir(exist_ok=True)
    text = "import sys\nfrom edge_runtime.__main__ import main\nsys.exit(main())\n"
    (path / "bin" / "dpu-edge").write_text(text)
    return str(path / "bin" / "dpu-edge")


@pytest.fixture
def site(tmp_path, run):
    """A store at round 0, patches, and a folder with code of somebody else's."""
    run.add(2)
    rounds = [read_round(run.path / f"round_{n:02d}") for n in range(3)]
    Device.install(tmp_path / "store", build_bundle(rounds[0]).data)
    folder = tmp_path / "downloads"
    folder.mkdir()
    for round_ in rounds[1:]:
        (folder / f"{round_.path.name}.dpu").write_bytes(pack_round(round_).data)
    for name in STRAY:
        text = f"open({str(tmp_path / 'taken')!r}, 'a').write({name!r})\n"
        (folder / name).write_text(text + "raise ImportError('a stray file')\n")
    return tmp_path


def clean(env):
    """The environment of these tests, without what would find a checkout."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return kept | env


def run_in(folder, command, env):
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("install", [user, system_wide, zipped, checkout, editable])
def test_installed_anyhow_it_applies_and_serves_from_a_hostile_folder(
    wheel, site, dependencies, install
):
    command, env = install(wheel, site, dependencies)
    command += ["--store", site / "store"]
    downloads, env = site / "downloads", clean(env)
    assert "now at round 1" in run_in(
        downloads, [*command, "apply", "round_01.dpu"], env
    )
    unit = run_in(downloads, [*command, "service", downloads], env)
    (start,) = re.findall(r"^ExecStart=(.*)$", unit, re.M)
    # systemd knows nothing of what this environment says.
    run_in(downloads, [*shlex.split(start), "--once"], clean({}))
    assert Device.open(site / "store").status()["round"] == 2
    assert not (site / "taken").exists()


@pytest.mark.parametrize("variable", ["PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME"])
def test_a_trial_reads_no_variable_of_pythons(site, command, monkeypatch, variable):
    stray = site / "downloads" / "sitecustomize.py"
    stray.write_text((site / "downloads" / "ast.py").read_text())
    value = stray if variable == "PYTHONSTARTUP" else stray.parent
    monkeypatch.setenv(variable, str(value))
    words = ("apply", site / "downloads" / "round_01.dpu")
    assert command(main, "--store", site / "store", *words)[0] == 0
    assert not (site / "taken").exists()
    assert variable not in own_environment()


def test_a_folder_on_the_path_by_chance_is_none_of_a_trials(site, monkeypatch):
    """As with ``python -m edge_runtime``, which has its own folder there."""
    downloads = site / "downloads"
    monkeypatch.syspath_prepend(downloads)
    monkeypatch.chdir(downloads)
    assert str(downloads) not in own_command("edge_runtime.update.trial_process")
    device = Device.open(site / "store")
    assert device.update("round_01.dpu") == "applied"
    assert not (site / "taken").exists()


def test_a_store_may_be_named_from_the_current_folder(site, monkeypatch, command):
    monkeypatch.chdir(site)
    words = ("apply", "downloads/round_01.dpu")
    assert command(main, "--store", "store", *words)[0] == 0
