# SPDX-License-Identifier: Apache-2.0
"""The built wheel, outside of the checkout: its commands, and its types."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for name in ("edge_runtime", "packager", "trainer"):
        (source / name).symlink_to(ROOT / name)
    code = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


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
