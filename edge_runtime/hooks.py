"""Hooks: the owner's own programs, run before and after the weights change.

``STORE/hooks/before-apply.d`` may refuse an update (stop a service, check a battery);
``STORE/hooks/after-apply.d`` learns of every change, a rollback too. As with
``run-parts``, a folder's executables run in the order of their names; a file that is
not executable is left alone.
"""

import os
import signal
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen, TimeoutExpired

from edge_runtime.errors import HeldError

TIMEOUT_S = 60.0  # for each program
_SAID_BYTES = 1 << 16  # of what a program says, the last so many are looked at


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
        try:
            code, said = run_program([str(path)], facts, timeout_s)
        except OSError as err:
            raise HeldError(
                f"the hook {path.name} cannot be run ({err.strerror})"
            ) from err
        if code != 0:
            late = f"did not end within {timeout_s:g} s"
            problem = late if code is None else f"ended with {code}"
            raise HeldError(f"the hook {path.name} {problem}: {said}")


def run_program(
    command: Sequence[str],
    facts: Mapping[str, str],
    timeout_s: float,
    given: bytes = b"",
) -> tuple[int | None, str]:
    """Run a program in a process group of its own.

    Args:
        command: The program and its arguments.
        facts: Environment variables for it, beside those of this process.
        timeout_s: Kill it, and all that it started, after this many seconds.
        given: What it finds on standard input.

    Returns:
        What it ended with, None if it was killed for its time; the last line it said.

    Raises:
        OSError: It cannot be run.
    """
    env = os.environ | facts
    with tempfile.TemporaryFile() as output:  # a pipe could be held open for ever
        process = Popen(
            command, stdin=PIPE, stdout=output, stderr=STDOUT, env=env, process_group=0
        )
        try:
            with suppress(TimeoutExpired):
                process.communicate(given, timeout_s)
        finally:
            code = process.poll()
            if code is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(max(0, output.seek(0, os.SEEK_END) - _SAID_BYTES))
        said = output.read().decode(errors="replace").strip()
    return code, (said.splitlines() or ["it said nothing"])[-1]
