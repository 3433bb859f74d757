# SPDX-License-Identifier: Apache-2.0
"""The demo leaves nothing behind that nobody was told of."""

import tempfile

import pytest

from edge_runtime.errors import TrainingError
from tools import demo


@pytest.fixture
def failing(monkeypatch, tmp_path):
    """A demo that writes something and then fails, in a temporary folder of its own."""

    def start(folder):
        (folder / "runs").mkdir(parents=True)
        raise TrainingError("the loss is nan")

    monkeypatch.setattr(demo, "Demo", start)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_demo_that_fails_takes_its_folder_away(failing, command):
    assert command(demo.main)[0] == 9
    assert not list((failing / "tmp").iterdir())


@pytest.mark.parametrize("args", [["--keep"], ["--folder", "demo"]])
def test_a_folder_that_was_asked_for_stays(failing, command, args):
    assert command(demo.main, *args)[0] == 9
    assert (failing / "demo" / "runs").is_dir()
    code, _, err = command(demo.main, *args)
    assert (code, "demo holds runs; remove it" in err) == (2, True)
