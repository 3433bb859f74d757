# SPDX-License-Identifier: Apache-2.0
"""Programs that a device starts: the owner's hooks, and this project's own code.

Python, started in the usual way, runs code of others: ``python -m`` looks for every
module in the current folder first, and the environment names more places. So our own
code starts with ``-I -S`` (no such folder, no environment, no start-up files) and is
given the places where this process itself finds modules: after the standard library,
without the current folder and the script's. ``LD_PRELOAD`` and ``LD_LIBRARY_PATH``
stay: boards need them for their runtimes, and this process was started with them too.
"""

import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import BinaryIO

_SAID_BYTES = 1 << 16  # of what a program says, the last so many are looked at
# What our own code may need: found where this process found it, wherever that is.
_PACKAGES = ("edge_runtime", "numpy", "zstandard", "onnxruntime", "click")
_START = (
    'import sys; n = sys.argv.index("--"); sys.path += sys.argv[1:n]; '
    "del sys.argv[1:n + 1]; from importlib import import_module; "
    "sys.exit(import_module(sys.argv.pop(1)).main())"
)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended.

    Attributes:
        code: Its exit code; minus the number of the signal that ended it; None where
            the system told somebody else, or nobody.
        said: What it said last, on both its outputs.
        printed: The beginning of its standard output, where that was asked for.
        timeout_s: It was ended after so many seconds; else zero.
    """

    code: int | None
    said: str = ""
    printed: bytes = b""
    timeout_s: float = 0

    @property
    def problem(self) -> str:
        """What went wrong, in words, with the last line that it said; or nothing."""
        if self.code == 0 and not self.timeout_s:
            return ""
        how = f"ended with {self.code}"
        if self.code is None:
            how = (
                "ended, and how is not known (this process ignores SIGCHLD, or waits "
                "for children that others started: let it do neither)"
            )
        elif self.code < 0:
            with suppress(ValueError):
                how = f"was ended by {signal.Signals(-self.code).name}"
        if self.timeout_s:
            how = f"did not end within {self.timeout_s:g} s"
        return f"{how}: {(self.said.splitlines() or ['it said nothing'])[-1]}"


def run_program(
    command: Sequence[str],
    env: Mapping[str, str],
    timeout_s: float,
    *,
    given: bytes = b"",
    folder: Path | None = None,
    apart: int = 0,
) -> Ended:
    """Run a program in a process group of its own.

    Args:
        command: The program and its arguments.
        env: All of its environment.
        timeout_s: Kill it, and all that it started, after this many seconds.
        given: What it finds on standard input.
        folder: Where it works; by default where this process does.
        apart: How many bytes of standard output to return as ``printed``; by default
            it goes where standard error goes.

    Raises:
        OSError: It cannot be run.
    """
    # Files: a pipe could be held open for ever.
    new = tempfile.TemporaryFile
    with new() as asked, new() as said, new() as printed:
        asked.write(given)
        asked.seek(0)
        process = Popen(
            command,
            stdin=asked,
            stdout=printed if apart else said,
            stderr=said,
            env=env,
            cwd=folder,
            process_group=0,
        )
        timed_out = True
        with suppress(TimeoutExpired):
            try:
                code = _wait(process, timeout_s)
                timed_out = False
            finally:
                if process.returncode is None:
                    with suppress(ProcessLookupError):  # it ended just now
                        os.killpg(process.pid, signal.SIGKILL)
                    code = _wait(process, math.inf)
        printed.seek(0)
        return Ended(
            code, _tail(said), printed.read(apart), timeout_s if timed_out else 0
        )


def _wait(process: Popen[bytes], timeout_s: float) -> int | None:
    """Return the exit code of a program that has ended; None where it is not known.

    ``Popen.wait`` would call it 0 where the system keeps no exit code for us: where
    SIGCHLD is ignored, or other code in this process waits for any child.

    Raises:
        TimeoutExpired: It has not ended within so many seconds.
    """
    until, pause = time.monotonic() + timeout_s, 0.0005
    while True:
        try:
            pid, status = os.waitpid(process.pid, os.WNOHANG)
        except ChildProcessError:
            process.returncode = 0  # so that Popen looks no more for it
            return None
        if pid:
            process.returncode = code = os.waitstatus_to_exitcode(status)
            return code
        if time.monotonic() > until:
            raise TimeoutExpired(process.args, timeout_s)
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def _tail(file: BinaryIO) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - _SAID_BYTES))
    return file.read().decode(errors="replace").strip()


def own_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs ``main()`` of a module of ours, and no other code.

    Args:
        module: For example ``edge_runtime.update.trial_process``.
        arguments: What it finds in ``sys.argv[1:]``.
    """
    flags = ["-I", "-S", "-X", "utf8", *(["-B"] if sys.dont_write_bytecode else [])]
    places = dict.fromkeys((*_inherited(), *_roots()))
    return [sys.executable, *flags, "-c", _START, *places, "--", module, *arguments]


def own_environment() -> dict[str, str]:
    """Return this process's environment without what Python would load code by."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}


def _inherited() -> Iterator[str]:
    """Yield the import path of this process, less what Python adds by itself."""
    chance = {Path(sys.argv[0]).resolve().parent} if sys.argv else set()
    with suppress(FileNotFoundError):  # removed meanwhile
        chance.add(Path.cwd())
    for place in map(Path, sys.path):
        if place.is_absolute() and place.exists() and place.resolve() not in chance:
            yield str(place)


def _roots() -> Iterator[str]:
    """Yield where the packages lie that run here, a checkout or a zip file too."""
    for name in _PACKAGES:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file:
            yield str(Path(file).absolute().parents[1])
