# SPDX-License-Identifier: Apache-2.0
"""The names of tests hang on the code alone: processes that share them out agree."""

import os
import subprocess
import sys

# Eleven days later: the clock is moved before any test file is read.
LATER = """
import sys, time, pytest
for name, unit in (("time", 1), ("time_ns", 10**9)):
    setattr(time, name, lambda clock=getattr(time, name), by=10**6 * unit: clock() + by)
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def test_the_same_tests_are_found_at_any_time_and_under_any_hash_seed(request):
    found_here = [item.nodeid for item in request.session.items]
    files = dict.fromkeys(name.partition("::")[0] for name in found_here)
    command = [sys.executable, "-c", LATER, *files]
    env = os.environ | {"PYTHONHASHSEED": "1", "PYTEST_ADDOPTS": ""}
    run = subprocess.run(
        command, cwd=request.config.rootpath, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    asked_for = set(found_here)
    assert [name for name in run.stdout.splitlines() if name in asked_for] == found_here
