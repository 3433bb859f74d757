"""Real processes, killed at random moments. ``make test-crash`` kills a thousand."""

import json
import subprocess
import sys
from pathlib import Path


def test_killed_processes_and_two_writers_lose_nothing():
    command = [sys.executable, "-m", "tests.crash.kills", "20", "10"]
    done = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    result = json.loads(done.stdout)
    assert result["killed"]["bad"] == 0
    assert result["killed"]["kills"] == 20
    assert result["updates"] == result["made"] == 20
