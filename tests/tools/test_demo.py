# SPDX-License-Identifier: Apache-2.0
"""The demo leaves nothing behind that nobody was told of, and shows what it did."""

import json
import re
import tempfile
from pathlib import Path

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


def row(number, patch_bytes):
    return demo.Row(number, "updated", 5, patch_bytes, 1000, 0.5, 0.5, 0.0, True)


def test_a_board_that_was_away_is_shown_with_what_it_took():
    fetched = [{1: [110], 2: [120]}, {1: None, 2: [170]}]
    fleet = demo.Fleet(fetched, 2, Path("fleet.html"))
    lines = list(demo.table([row(0, 90), row(1, 100), row(2, 110)], fleet))
    assert [line.split()[-2:] for line in lines[1:4]] == [
        ["bundle", "bundle"],
        ["110", "away"],
        ["120", "170"],
    ]
    told = "board 2 missed round 1, and caught up in round 2 by one patch of 170 bytes"
    assert f"{told} instead of 230" in lines


def test_a_small_demo_verifies_each_round_and_says_so_in_its_row(
    tmp_path, command, monkeypatch
):
    whole, small = demo.Demo, ["run.rounds=2", "train.epochs=2"]
    fleet = demo.Fleet([{1: [110]}] * 3, 3, tmp_path / "fleet.html")
    monkeypatch.setattr(demo, "Demo", lambda folder: whole(folder, small))
    monkeypatch.setattr(demo, "follow", lambda *_: fleet)  # a test of its own, below
    code, out, err = command(demo.main, "--folder", tmp_path / "d")
    assert code == 0, err
    head, *rows = out.splitlines()[:3]
    columns = ["round", "outcome", "changed", "patch B", "full B", "smaller"]
    columns += ["server", "device", "verified", "board 1", "board 2", "board 3"]
    assert re.split("  +", head) == columns
    for number, row in enumerate(map(str.split, rows)):
        assert len(row) == len(columns)
        assert (row[0], row[1], row[8]) == (str(number), "updated", "yes")
        assert 0 < int(row[3]) < int(row[4])
        assert row[6] == row[7]
    assert "2 updates in" in out
    assert "verified: the device's weight file has the server's SHA-256" in out


@pytest.mark.fleet
def test_three_boards_follow_the_demo_and_one_catches_up(tmp_path, command):
    code, out, err = command(demo.main, "--folder", tmp_path / "d", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["proved"] == 3
    fetched = [board["fetched"] for board in found["boards"]]
    missed, back, *_ = fetched[0]
    assert fetched[2][missed] is None
    assert len(fetched[2][back]) == 1
    assert "3 of 3 devices prove" in Path(found["page"]).read_text()
