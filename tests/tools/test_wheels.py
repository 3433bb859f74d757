# SPDX-License-Identifier: Apache-2.0
"""What is built takes the place of what was built before, and of nothing else."""

import shutil

import pytest

from tools import release, wheels
from tools.arm64 import samples
from tools.deb import __main__ as deb


@pytest.fixture
def failing(tmp_path, monkeypatch):
    """A place where nothing can be built: pip has no index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")  # no git is asked for it
    monkeypatch.setattr(release, "CHECKOUT", tmp_path)
    monkeypatch.setattr(deb, "CHECKOUT", tmp_path)
    text = '[project]\nname = "dpu-edge"\nversion = "2"\n'
    (tmp_path / "pyproject.toml").write_text(text)
    (tmp_path / "dist").mkdir()
    return tmp_path / "dist"


def test_a_folder_with_other_files_is_refused_and_kept(failing, command):
    (failing / "sub").mkdir()
    (failing / "thesis.txt").write_text("thesis")
    code, _, err = command(wheels.main, "--folder", failing)
    assert (code, "holds sub, thesis.txt, expected wheels alone" in err) == (2, True)
    assert (failing / "thesis.txt").read_text() == "thesis"


def test_a_run_is_not_taken_for_a_sample(tmp_path, command):
    (tmp_path / "digits" / "round_00").mkdir(parents=True)
    code, _, err = command(samples.main, tmp_path, "digits")
    assert (code, "digits holds round_00; remove it" in err) == (2, True)
    assert (tmp_path / "digits" / "round_00").is_dir()


@pytest.mark.parametrize(
    ("program", "args", "name"),
    [
        (wheels, ["--folder"], "dpu_edge-1-py3-none-any.whl"),
        (wheels, ["--ours", "--folder"], "dpu_edge-1-py3-none-any.whl"),
        (release, [], "dpu_edge-1.tar.gz"),
        (deb, ["--arch=amd64", "--keep-wheels", "--folder"], "dpu-edge_1_amd64.deb"),
    ],
)
def test_what_was_built_stays_where_building_fails(
    failing, command, program, args, name
):
    if program is deb and shutil.which("dpkg-deb") is None:
        pytest.skip("not run: no dpkg-deb (Debian's dpkg)")
    (failing / name).write_text("the last good one")
    assert command(program.main, *args, *([failing] if args else []))[0] == 2
    assert [path.name for path in failing.iterdir()] == [name]


def test_what_is_built_replaces_what_has_its_pattern(tmp_path):
    for name in ("a-1.whl", "b-1.whl", "notes"):
        (tmp_path / name).write_text("old")
    with wheels.replacing(tmp_path, "a-*.whl", "b-*.whl") as made:
        (made / "a-2.whl").write_text("new")
        (made / "b-1.whl").write_text("new")
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"a-2.whl": "new", "b-1.whl": "new", "notes": "old"}
