# SPDX-License-Identifier: Apache-2.0
"""Real processes, killed at random moments. ``make test-crash`` kills a thousand."""

from tests.conftest import RunOnDisk
from tests.crash.kills import in_process


def test_killed_processes_and_two_writers_lose_nothing(tmp_path):
    run = RunOnDisk(tmp_path / "tiny")
    for number in range(4):
        run.add(number)
    options = {"--kills": 20, "--commands": 1, "--updates": 10, "--run": run.path}
    results = in_process(*(word for option in options.items() for word in option))
    assert [counts["bad"] for counts in results.values()] == [0, 0, 0]
    assert results["killed at work"]["kills"] == 20
    assert results["two writers"]["updates"] == 20
