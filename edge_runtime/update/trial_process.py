# SPDX-License-Identifier: Apache-2.0
"""The process that a trial runs in: :func:`main` judges a slot and ends with a code.

It ends with its parent, and the model runs under limits. With what it ends says who is
at fault (:mod:`edge_runtime.update.trial_ends`).
"""

import ctypes
import math
import os
import resource
import signal
import sys
from pathlib import Path

from edge_runtime.formats.model_folder import GRAPH_NAME, WEIGHTS_NAME
from edge_runtime.limits import limits
from edge_runtime.update.trial_ends import BEGUN, BLOCKED, PASSED, THREADS, end_code

# Of the weight file: a session takes 3 times its size, and a large graph's values more.
WEIGHTS_FACTOR = 8
_PR_SET_PDEATHSIG = 1
_CACHED = ("inactive_file ", "active_file ")  # given back when memory runs short


def main() -> int:
    """Judge the slot that the arguments name; return what to end with."""
    parent, timeout_s, slot, model, golden = sys.argv[1:]
    try:
        _end_with(int(parent))
        _judge(Path(slot), Path(model), bool(golden), float(timeout_s))
    # Whatever it is, how this process ends says whose fault it is.
    except Exception as err:  # noqa: BLE001
        print(_words(err), file=sys.stderr)
        return end_code(err)
    return 0


def _words(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"not enough memory ({error})" if str(error) else "not enough memory"
    return str(error) or repr(error)


def _judge(slot: Path, model: Path, golden: bool, timeout_s: float) -> None:
    # Imported late, so that a package that is missing is told as such.
    from edge_runtime.inference.session import Backend, choose_backend
    from edge_runtime.update.trial import Expected, read_all, try_slot

    choose_backend(Backend.AUTO)  # imports the runtime, before there are limits
    for name in (GRAPH_NAME, WEIGHTS_NAME):
        read_all(slot / name)
    expected = Expected(golden=golden, values=sys.stdin.buffer.read())
    limit_memory((slot / WEIGHTS_NAME).stat().st_size)
    limit_time(timeout_s)
    out = sys.stdout.fileno()
    try_slot(slot, model, expected, begin=lambda: _tell(out, BEGUN))
    _tell(out, PASSED)


def _tell(out: int, words: bytes) -> None:
    os.write(out, words)


# Ends and limits ---------------------------------------------------------------------


def _end_with(parent: int) -> None:
    """End this process when its parent ends: nobody waits for its answer then."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:  # Linux alone has it
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it ended before that
        sys.exit(BLOCKED)


def limit_memory(weights_bytes: int) -> None:
    """Bound what this process may take from here on.

    By the weight file, and by what the system can give without hurting others. Private
    memory is what counts; the address space, with some room for mapped files, bounds
    what is shared.
    """
    from edge_runtime.inference.predictor import available_memory

    wanted = limits().trial_bytes + WEIGHTS_FACTOR * weights_bytes
    for free in filter(None, (available_memory(), left_to_the_group())):
        wanted = min(wanted, free - free // 8)
    sizes = _sizes()
    _lower(resource.RLIMIT_DATA, sizes.get("VmData", 1 << 30) + wanted)
    mapped = weights_bytes + (1 << 30)
    _lower(resource.RLIMIT_AS, sizes.get("VmSize", 1 << 32) + wanted + mapped)


def limit_time(timeout_s: float) -> None:
    """Bound the time of all processors together, and leave no core file behind."""
    _lower(resource.RLIMIT_CPU, THREADS * math.ceil(timeout_s))
    _lower(resource.RLIMIT_CORE, 0)


def left_to_the_group(
    own: Path = Path("/proc/self/cgroup"), groups: Path = Path("/sys/fs/cgroup")
) -> int:
    """Return what ``MemoryMax=`` of a service leaves; 0 where there is no limit."""
    try:
        folder = groups / own.read_text("ascii").rpartition("0::/")[2].strip()
        most = int((folder / "memory.max").read_text("ascii"))
        taken = int((folder / "memory.current").read_text("ascii"))
        lines = (folder / "memory.stat").read_text("ascii").splitlines()
        cached = sum(int(li.split()[1]) for li in lines if li.startswith(_CACHED))
        return max(most - taken + cached, 1)
    except (OSError, ValueError):  # no such group, hidden, or "max"
        return 0


def _lower(kind: int, limit: int) -> None:
    soft, hard = resource.getrlimit(kind)
    known = [n for n in (soft, hard) if n != resource.RLIM_INFINITY]
    resource.setrlimit(kind, (min([limit, *known]), hard))


def _sizes() -> dict[str, int]:
    """Return what this process has of each kind of memory, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text("ascii", "replace").splitlines()
    except FileNotFoundError:  # no Linux, or hidden
        return {}
    fields = (line.split() for line in lines if line.startswith("Vm"))
    return {name.rstrip(":"): int(kib) << 10 for name, kib, *_ in fields}
