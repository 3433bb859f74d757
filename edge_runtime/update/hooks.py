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
from edge_runtime.store.state import Slot

TIMEOUT_S = 60.0  # for each program
_SAID_BYTES = 1 << 16  # of what a program says, the last so many are looked at


def run_hooks(
    root: Path, when: str, event: str, slot: Slot, *, timeout_s: float = TIMEOUT_S
) -> None:
    """Run the owner's programs, one after the other.

    Args:
        root: The store's directory.
        when: ``before-apply`` or ``after-apply``.
        event: What happens, in the words of the history.
        slot: What it leads to.
        timeout_s: Kill a program, and all that it started, after this many seconds.

    Raises:
        HeldError: One failed or took too long; those after it did not run.
    """
    facts = {"DPU_STORE": str(root), "DPU_EVENT": event, "DPU_ROUND": str(slot.round)}
    facts["DPU_FINGERPRINT"] = slot.target
    for path in sorted(root.glob(f"hooks/{when}.d/*")):
        if not path.is_file() or not os.access(path, os.X_OK):
            continue
        try:
            _, problem = run_program([str(path)], facts, timeout_s)
        except OSError as err:
            problem = f"cannot be run ({err.strerror})"
        if problem:
            raise HeldError(f"the hook {path.name} {problem}")


def run_program(
    command: Sequence[str],
    facts: Mapping[str, str],
    timeout_s: float,
    given: bytes = b"",
) -> tuple[int, str]:
    """Run a program in a process group of its own.

    Args:
        command: The program and its arguments.
        facts: Environment variables for it, beside those of this process.
        timeout_s: Kill it, and all that it started, after this many seconds.
        given: What it finds on standard input.

    Returns:
        What it ended with; and, unless that is 0, what went wrong, in words, with the
        last line that it said.

    Raises:
        OSError: It cannot be run.
    """
    env = os.environ | facts
    with tempfile.TemporaryFile() as output:  # a pipe could be held open for ever
        process = Popen(
            command, stdin=PIPE, stdout=output, stderr=STDOUT, env=env, process_group=0
        )
        problem = f"did not end within {timeout_s:g} s"
        try:
            with suppress(TimeoutExpired):
                process.communicate(given, timeout_s)
                problem = f"ended with {process.returncode}"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        output.seek(max(0, output.seek(0, os.SEEK_END) - _SAID_BYTES))
        said = output.read().decode(errors="replace").strip()
    last = (said.splitlines() or ["it said nothing"])[-1]
    return code, f"{problem}: {last}" if code else ""
