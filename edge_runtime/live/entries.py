# SPDX-License-Identifier: Apache-2.0
"""Every live predictor tells in ``STORE/live`` what its session was made from.

One file each, which its process keeps locked (``flock``) as long as the predictor
lives. The kernel lets go of the lock when the process ends, however it ends and
whichever container it is in. So what a dead process left is known as such, also after
its PID was given to another, and goes when somebody looks. Nothing is synced: what is
told matters to nobody after a power cut.
"""

import fcntl
import hashlib
import json
import logging
import os
import stat
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from enum import StrEnum
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from edge_runtime.errors import StoreError
from edge_runtime.formats.json_file import parse_record
from edge_runtime.formats.json_record import Record
from edge_runtime.formats.layout import Layout
from edge_runtime.formats.model_folder import GRAPH_NAME, WEIGHTS_NAME
from edge_runtime.formats.weights import CHUNK_BYTES, fingerprint_file
from edge_runtime.limits import limits
from edge_runtime.reading import names_in, open_regular
from edge_runtime.store.store import Store
from edge_runtime.text import printable
from edge_runtime.times import utc

_log = logging.getLogger("edge_runtime")
_TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
_SLOT = "[0-9a-f]{32}|[0-9a-f]{64}"
_SIZE = 1024  # of a file: one write replaces all that it said


class Status(StrEnum):
    """What a predictor, or a proof about it, says of its session."""

    LOADED = "loaded"
    LOADING = "loading"  # between two sessions: either may answer
    CHANGED = "changed"  # its files changed while they were loaded
    EMPTY = "empty"  # no session: calls fail
    UNKNOWN = "unknown"  # what it tells cannot be read


def measure(folder: Path, layout: Layout | None = None) -> dict[str, Any] | None:
    """Hash the files of a slot, and say which weight file it was.

    Args:
        folder: The slot.
        layout: Also hash the weight file's header and each tensor of it.

    Returns:
        ``fingerprint`` and ``graph`` (SHA-256); ``bytes``, ``device`` and ``inode`` of
        the weight file, and ``changed_ns``, when that inode last changed (by a write, a
        rename, a chmod); with a layout, ``header`` and ``tensors``. None if a file
        cannot be read.
    """
    try:
        with open(folder / WEIGHTS_NAME, "rb") as file:
            whole, size = hashlib.file_digest(file, "sha256"), file.tell()
            status = os.fstat(file.fileno())  # of what was hashed, whatever its name
            found: dict[str, Any] = {
                "fingerprint": whole.hexdigest(),
                "graph": fingerprint_file(folder / GRAPH_NAME),
                "bytes": size,
                "device": status.st_dev,
                "inode": status.st_ino,
                "changed_ns": status.st_ctime_ns,
            }
            if layout is not None:
                file.seek(0)
                found["header"] = _piece(file, len(layout.header))
                parts = {t.name: _piece(file, t.stop - t.start) for t in layout.tensors}
                found["tensors"] = parts
    except OSError:
        return None
    return found


def _piece(file: BinaryIO, size: int) -> str:
    """Return the SHA-256 of a file's next bytes, of fewer where it ends before."""
    digest = hashlib.sha256()
    while size and (chunk := file.read(min(size, CHUNK_BYTES))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


class Entry:
    """The file in which one predictor says what it answers with; it ends with it.

    Attributes:
        pending: Whether the disk did not take what is to be told.
    """

    def __init__(self, store: Store) -> None:
        """Prepare to tell, and clear away what dead processes told."""
        self._folder = store.root / "live"
        self._about = {"pid": os.getpid(), "started": utc()}
        self._text = b""
        self._file: FileIO | None = None
        self.pending = False
        list(read_entries(store))

    def declare(
        self, folder: Path, status: Status, source: dict[str, Any] | None = None
    ) -> None:
        """Say which weights the predictor answers with now.

        Args:
            folder: The slot that it was made from.
            status: What is known.
            source: What :func:`measure` found, where that is certain.
        """
        known = source | {"loaded": utc()} if source else {}
        record = self._about | known | {"slot": folder.name, "status": status}
        self._text = json.dumps(record).encode().ljust(_SIZE)
        self.try_again()

    def try_again(self) -> None:
        """Write the last status again; an error of the disk must not stop answers."""
        try:
            if self._file is None:
                self._file = _create(self._folder)
                self._end = weakref.finalize(self, _withdraw, self._file, os.getpid())
            # Whoever reads it meanwhile finds the old or the new, or no JSON at all.
            os.pwrite(self._file.fileno(), self._text, 0)
            self.pending = False
        except OSError as err:
            if self._file is not None:  # better nothing than what was true once
                self._file = self._end()
            if not self.pending:
                _log.warning("proofs cannot vouch for this process: %s", printable(err))
            self.pending = True


def _create(folder: Path) -> FileIO:
    """Create a file and lock it; again if a reader removed it before the lock."""
    with suppress(FileExistsError):
        folder.mkdir()
        with suppress(PermissionError):  # FAT has one mode for all
            # Whatever the umask: proofs are made by other users too.
            folder.chmod(stat.S_IMODE(folder.stat().st_mode) | 0o755)
    while True:
        path = folder / f"{os.getpid()}-{time.time_ns()}.json"
        file = open(path, "xb", buffering=0)
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink:
                return file
        file.close()


def _withdraw(file: FileIO, pid: int) -> None:
    if os.getpid() == pid:  # a forked child does not speak for its parent
        with suppress(OSError):
            Path(str(file.name)).unlink()
    file.close()


def read_entries(store: Store) -> Iterator[dict[str, Any]]:
    """Yield what live predictors tell; remove what dead ones told.

    What cannot be read, or is more than may be looked at, is one of unknown status.
    """
    unknown: dict[str, Any] = {"pid": 0, "status": Status.UNKNOWN}
    folder, most = store.root / "live", limits().live_files
    try:
        names = [name for name in names_in(folder) if name.endswith(".json")]
    except OSError:  # silence would say that nobody is there
        yield unknown
        return
    if len(names) > most:
        yield unknown
    for path in (folder / name for name in names[:most]):
        record = unknown
        with suppress(OSError, StoreError):
            if (text := _read(path)) is None:
                continue
            record = _parse(
                parse_record(text, "live_bytes", f"live/{path.name}", StoreError)
            )
        yield record


def _parse(record: Record) -> dict[str, Any]:
    """Return the fields of an entry, each checked; other fields are left out."""
    status = Status(record.one_of("status", list(Status)))
    told: dict[str, Any] = {
        "pid": record.integer("pid", most=(1 << 31) - 1),
        "started": record.matching("started", _TIME, "a time"),
        "slot": record.matching("slot", _SLOT, "the name of a slot"),
        "status": status,
    }
    if status is Status.LOADED:
        told |= {name: record.digest(name) for name in ("fingerprint", "graph")}
        numbers = ("bytes", "device", "inode", "changed_ns")
        told |= {name: record.integer(name) for name in numbers}
        told["loaded"] = record.matching("loaded", _TIME, "a time")
    return told


def _read(path: Path) -> bytes | None:
    """Return the content of an entry; where its predictor is dead, remove the file."""
    with suppress(FileNotFoundError), open_regular(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read(limits().live_bytes + 1)
        with suppress(OSError):
            path.unlink()
    return None


def undeclared_processes(store: Store, known: set[int]) -> list[int]:
    """Return processes that map a slot's weights and are not among the known ones.

    Such as a forked child, or one that may not write to the store. Only processes of
    the same user are seen, or all by root; and only while they keep a mapping, as ONNX
    Runtime does for the tensors that it did not copy.
    """
    # Bytes: any process's file may have a name that is no UTF-8.
    found, slots = [], os.fsencode(f" {os.path.realpath(store.root / 'slots')}/")
    for path in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # ended, or another user's
            if int(path.parent.name) not in known and slots in path.read_bytes():
                found.append(int(path.parent.name))
    return sorted(found)
