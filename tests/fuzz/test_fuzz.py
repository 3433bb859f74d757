# SPDX-License-Identifier: Apache-2.0
"""The corpus replays clean, and a bounded run of the fuzzer finds nothing."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.fuzz import readers
from tests.fuzz.edits import Edits
from tests.fuzz.readers import READERS, reader
from tests.fuzz.target import attempt

CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_the_corpus_replays_clean(path):
    attempt(path.read_bytes())


class NoEdits(Edits):
    """Leaves everything as it is."""

    def record(self, record):
        return copy.deepcopy(record)

    def bytes(self, data):
        return data


@pytest.mark.parametrize("name", READERS)
def test_the_good_file_of_every_reader_is_accepted(name, monkeypatch):
    """Else its edits would prove nothing: all of them end where the good one does."""
    monkeypatch.setattr(readers, "Edits", NoEdits)
    found = READERS[name][0](b"\1" * 9)
    if name == "report":
        assert (found.device, found.proved) == ("board7", True)


@pytest.mark.parametrize("name", READERS)
def test_a_reader_refuses_hostile_files_by_our_errors_alone(name):
    """With checksums mended: what a longer run of the fuzzer does, for a moment."""
    attempt_file, rng = reader(name), np.random.default_rng(0)
    for _ in range(500):
        attempt_file(rng.bytes(int(rng.integers(1, 60))))


def test_a_bounded_run_finds_nothing(tmp_path):
    command = [sys.executable, "-m", "tests.fuzz.fuzz", "-runs=20000", "-seed=1"]
    done = subprocess.run(
        [*command, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(re.findall(r"Done (\d+) runs", done.stderr)[0]) >= 20000
