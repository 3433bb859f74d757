"""Every live predictor tells in ``STORE/live`` what its session was made from.

One file each, named after its process as no other process ever is: by boot, PID
namespace, PID, and the time that the process started. So what a dead process left is
known as such, also after its PID was given to another, and goes when somebody looks.
"""

import json
import logging
import os
import re
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from enum import StrEnum
from itertools import count
from pathlib import Path
from typing import Any

from edge_runtime.files import Files
from edge_runtime.store import GRAPH_NAME, Store
from edge_runtime.weights import (
    CHUNK_BYTES,
    FILE_NAME,
    fingerprint_chunks,
    fingerprint_file,
)

_log = logging.getLogger("edge_runtime")
_numbers = count()
_NAME = re.compile(r"([0-9a-f]+)-(\d+)-(\d{1,7})-(\d+)-\d+\.(json|part)")


class Status(StrEnum):
    """What a predictor, or a proof about it, says of its session."""

    LOADED = "loaded"
    LOADING = "loading"  # between two sessions: either may answer
    CHANGED = "changed"  # its files changed while they were loaded
    EMPTY = "empty"  # no session: calls fail
    UNKNOWN = "unknown"  # cannot be read, or its process cannot be seen from here


def measure(folder: Path) -> dict[str, Any] | None:
    """Hash the files of a slot, and say which weight file it was.

    Returns:
        ``fingerprint`` and ``graph`` (SHA-256), ``device`` and ``inode`` of the weight
        file, and ``changed_ns``, when that inode last changed (by a write, a rename, a
        chmod); None if a file cannot be read.
    """
    try:
        with open(folder / FILE_NAME, "rb") as file:
            chunks = iter(lambda: file.read(CHUNK_BYTES), b"")
            fingerprint = fingerprint_chunks(chunks)
            status = os.fstat(file.fileno())  # of what was hashed, whatever its name
        return {
            "fingerprint": fingerprint,
            "graph": fingerprint_file(folder / GRAPH_NAME),
            "device": status.st_dev,
            "inode": status.st_ino,
            "changed_ns": status.st_ctime_ns,
        }
    except OSError:
        return None


class Entry:
    """What one predictor tells; withdrawn when the predictor is gone.

    Attributes:
        path: The file.
        pending: Whether the disk did not take what is to be told.
    """

    def __init__(self, store: Store, predictor: object) -> None:
        """Prepare to tell, and clear away what dead processes told."""
        self._store = store
        self._text = b""
        self.pending = False
        name = f"{_process_name()}-{next(_numbers)}.json"
        self.path = store.root / "live" / name
        weakref.finalize(predictor, _withdraw, store.files, self.path, os.getpid())
        list(read_entries(store))

    def tell(
        self, folder: Path, status: Status, source: dict[str, Any] | None = None
    ) -> None:
        """Say what answers now.

        Args:
            folder: The slot that it was made from.
            status: What is known.
            source: What :func:`measure` found, where that is certain.
        """
        known = source | {"loaded": utc_now()} if source else {}
        record = known | {"slot": folder.name, "status": status}
        self._text = json.dumps(record, sort_keys=True).encode()
        self.try_again()

    def try_again(self) -> None:
        """Write what was to be told last. A disk that refuses must stop no answers."""
        files, part = self._store.files, self.path.with_suffix(".part")
        try:
            files.mkdir(self.path.parent)
            files.write(part, [self._text])
            files.rename(part, self.path)
            self.pending = False
        except OSError as err:
            for path in (part, self.path):  # better nothing than what was true once
                with suppress(OSError):
                    files.unlink(path)
            if not self.pending:
                _log.warning("proofs cannot vouch for this process: %s", err)
            self.pending = True


def _withdraw(files: Files, path: Path, pid: int) -> None:
    if os.getpid() == pid:  # a forked child does not speak for its parent
        with suppress(OSError):
            files.unlink(path)


def read_entries(store: Store) -> Iterator[dict[str, Any]]:
    """Yield what live predictors tell, with their ``pid``; remove what dead ones told.

    The status is ``unknown`` where a process runs in another container or is hidden.
    """
    for path in sorted(store.root.glob("live/*")):
        match = _NAME.fullmatch(path.name)
        if not match:
            continue
        lives = _lives(*match.groups()[:4])
        if lives is False:
            with suppress(OSError):
                store.files.unlink(path)
        elif match[5] == "json":
            record = {"status": Status.UNKNOWN}
            with suppress(OSError, ValueError, TypeError):
                record = json.loads(path.read_bytes()) | {} if lives else record
            yield record | {"pid": int(match[3]), "started": int(match[4])}


def untold(store: Store, known: set[int]) -> list[int]:
    """Return processes that map a slot's weights and are not among the known ones.

    Such as a forked child, or one that may not write to the store. Only processes of
    the same user are seen, or all by root; and only while they keep a mapping, as ONNX
    Runtime does for the tensors that it did not copy.
    """
    found, slots = [], f" {(store.root / 'slots').resolve()}/"
    for path in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # ended, or another user's
            if int(path.parent.name) not in known and slots in path.read_text():
                found.append(int(path.parent.name))
    return sorted(found)


def utc_now() -> str:
    """Return the time by the device's own clock."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _process_name() -> str:
    try:
        return "-".join((*_here(), str(os.getpid()), _started("self")))
    except OSError:
        return f"0-0-{os.getpid()}-0"  # without /proc nobody can judge it


def _here() -> tuple[str, str]:
    namespace = re.sub(r"\D", "", str(Path("/proc/self/ns/pid").readlink()))
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8], namespace
    except OSError:
        return "0", namespace  # a service's hardening may hide it


def _started(pid: str) -> str:
    """Return a process's start in clock ticks since boot; "" if it has ended."""
    # Its program's name, in brackets, may hold anything.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]


def _lives(boot: str, namespace: str, pid: str, started: str) -> bool | None:
    """Whether a process lives; None if that cannot be told from here."""
    here = _here()
    if boot != here[0] and "0" not in (boot, here[0]):
        return False
    if namespace != here[1]:
        return None
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    try:
        return _started(pid) == started
    except OSError:
        return None  # /proc may hide it
