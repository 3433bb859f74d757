# SPDX-License-Identifier: Apache-2.0
"""Run a command in the memory of a small board, and see how much of it it takes."""

import os
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

# Of 512 MB a Raspberry Pi keeps about 100 for its firmware, kernel and services.
BOARD_MB = 400
TIMEOUT_S = 600.0  # out of memory, the emulator may spin for ever instead of failing
SAMPLED_S = 0.02
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Finished:
    """How a command ended.

    Attributes:
        code: Its exit code; negative for a signal.
        out: Standard output.
        err: Standard error.
        peak_mb: Most memory resident at one time in it and its children, pages that
            they share counted for each; sampled.
        wall_s: How long it took.
    """

    code: int
    out: str
    err: str
    peak_mb: float
    wall_s: float


def run(command: list[str], *, data_mb: int | None = None) -> Finished:
    """Run a command to its end.

    Args:
        command: The program and its arguments.
        data_mb: Private memory that each of its processes may have; None for no limit.
    """
    if data_mb is not None:
        command = ["prlimit", f"--data={data_mb << 20}", *command]
    start, peak = time.monotonic(), 0
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        while process.poll() is None:
            peak = max(peak, _resident(process.pid))
            if time.monotonic() - start > TIMEOUT_S:
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(SAMPLED_S)
        said, complained = _text(out), _text(err)
    wall_s = round(time.monotonic() - start, 1)
    return Finished(process.returncode, said, complained, peak / 1e6, wall_s)


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _resident(session: int) -> int:
    """Return the resident bytes of a session; a trial is a process group in it."""
    total = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The name, in brackets, may hold spaces.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if int(fields[3]) == session:
            total += int(fields[21]) * _PAGE
    return total
