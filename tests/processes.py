# SPDX-License-Identifier: Apache-2.0
"""Whether processes are still there, and waiting for what they do."""

import time

LONG_S = 60  # more than anything here takes


def is_running(pid):
    """Tell whether a process is there; one that ended and nobody waited for is not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition):
    """Wait until something is so."""
    deadline = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
