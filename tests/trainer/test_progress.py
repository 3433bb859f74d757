# SPDX-License-Identifier: Apache-2.0
"""Progress: nothing is estimated before there is a pace, and found rounds give none."""

import io

import pytest

from trainer import progress
from trainer.rounds.round import Progress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def shown(bar, stream, *report):
    stream.seek(0)
    stream.truncate()
    bar.show(Progress(*report))
    return stream.getvalue().removeprefix(progress.CLEAR)


def test_the_time_left_is_that_of_the_epochs_and_not_of_the_imports(clock):
    stream = io.StringIO()
    bar = progress.Bar(stream)
    bar.note("loading torch")
    clock[0] += 100  # imports, data, export
    assert "left" not in shown(bar, stream, 0, 5, "full", 1, 20)
    clock[0] += 0.5
    text = shown(bar, stream, 0, 5, "full", 2, 20)
    assert text.endswith("about 0:49 left")  # 98 epochs of half a second
    assert "  2 %  round_00 full" in text


def test_rounds_that_were_there_already_do_not_count_as_quick(clock):
    stream = io.StringIO()
    bar = progress.Bar(stream)
    assert "left" not in shown(bar, stream, 4, 5, "full", 1, 20)
    clock[0] += 2
    assert shown(bar, stream, 4, 5, "full", 2, 20).endswith("about 0:36 left")


def test_the_last_epoch_leaves_nothing(clock):
    stream = io.StringIO()
    bar = progress.Bar(stream)
    shown(bar, stream, 4, 5, "sparse", 19, 20)
    clock[0] += 1
    text = shown(bar, stream, 4, 5, "done", 20, 20)
    assert "100 %" in text
    assert "left" not in text
