"""Hooks: the owner's own programs, run before and after the weights change.

``STORE/hooks/before-apply.d`` may refuse an update (stop a service, check a battery);
``STORE/hooks/after-apply.d`` learns of every change, a rollback too. As with
``run-parts``, a folder's executables run in the order of their names; a file that is
not executable is left alone.
"""

import os
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen, TimeoutExpired
from typing import IO

from edge_runtime.errors import HeldError

TIMEOUT_S = 60.0  # for each program


def run_hooks(
    folder: Path, facts: Mapping[str, str], *, timeout_s: float = TIMEOUT_S
) -> None:
    """Run the programs in a folder, one after the other.

    Args:
        folder: Where they are; it need not exist.
        facts: Environment variables for them.
        timeout_s: Kill a program, and all that it started, after this many seconds.

    Raises:
        HeldError: One failed or took too long; those after it did not run.
    """
    for path in sorted(folder.glob("*")):
        if not path.is_file() or not os.access(path, os.X_OK):
            continue
        with tempfile.TemporaryFile() as output:  # a pipe could be held open for ever
            problem = _run(path, facts, timeout_s, output)
            output.seek(0)
            said = output.read(1 << 16).decode(errors="replace").strip()
        if problem:
            last = said.splitlines()[-1:] or ["it said nothing"]
            raise HeldError(f"the hook {path.name} {problem}: {last[0]}")


def _run(
    path: Path, facts: Mapping[str, str], timeout_s: float, output: IO[bytes]
) -> str:
    """Run one program; return what went wrong with it."""
    env = os.environ | facts
    try:
        process = Popen(
            path, stdin=DEVNULL, stdout=output, stderr=STDOUT, env=env, process_group=0
        )
        code = process.wait(timeout_s)
    except OSError as err:
        return f"cannot be run ({err.strerror})"
    except TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"did not end within {timeout_s:g} s"
    return f"ended with {code}" if code else ""
