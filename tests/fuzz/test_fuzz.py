"""The corpus replays clean, and a bounded run of the fuzzer finds nothing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.target import attempt

CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_the_corpus_replays_clean(path):
    attempt(path.read_bytes())


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
