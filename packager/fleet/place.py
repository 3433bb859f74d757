# SPDX-License-Identifier: Apache-2.0
"""Where releases are published to.

Two operations carry everything. :meth:`Place.create` gives a name to bytes once: what
has a name never changes. :meth:`Place.swap` replaces a file only if it still is what
was read, so that of two publishers one notices the other. Folders do both under a lock
with the atomic writes of :mod:`edge_runtime.files`, object stores by conditional
requests (:mod:`packager.fleet.object_place`).
"""

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EINVAL
from pathlib import Path
from typing import Protocol

from edge_runtime.errors import StoreError
from edge_runtime.files import Files
from edge_runtime.limits import limits
from packager.build import write_file

LOCK_NAME = ".publish.lock"
PROBES = ".probe/"  # what a killed publisher leaves there is removed by prune


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a place, as a listing shows it.

    Attributes:
        path: The file.
        size: Its bytes.
        modified: When it was written, in seconds since 1970.
        tag: Changes with the content; it is compared with other listings alone.
    """

    path: str
    size: int
    modified: float
    tag: str


class Place(Protocol):
    """A tree of files that devices read and one or more publishers write.

    Attributes:
        name: Where it is, for messages and the ledger.
    """

    name: str

    def read(self, path: str, most: int = -1) -> tuple[bytes, str] | None:
        """Return a file and the tag of its content; None if there is none.

        Args:
            path: The file.
            most: How many bytes of it are wanted, by default as many as
                :func:`most_of` says; of a larger one there is one more.
        """

    def create(self, path: str, data: bytes) -> bool:
        """Write a file that is not there yet; False if it is there, with this content.

        Raises:
            StoreError: Something else has this name.
        """

    def swap(self, path: str, data: bytes, tag: str | None) -> bool:
        """Replace a file if it still has the tag; False if it has not.

        Args:
            path: The file.
            data: Its new content.
            tag: As :meth:`read` returned it; None if there must be none.
        """

    def entries(self, folder: str, *, deep: bool = True) -> Iterator[Entry]:
        """Yield the files below a folder, by path; below ``""`` all that there are.

        Args:
            folder: With or without a slash in the end.
            deep: Those in folders below it too.
        """

    def names(self, folder: str) -> Iterator[tuple[str, int]]:
        """Yield those that are no publisher's own, with their sizes."""
        for entry in self.entries(folder):
            if not any(part.startswith(".") for part in entry.path.split("/")):
                yield entry.path, entry.size

    def remove(self, path: str) -> None:
        """Remove a file, where there is one; nothing may need it any more."""


def most_of(path: str) -> int:
    """Return how many bytes a file of a place may have, by its name."""
    if path.endswith(".head"):
        return limits().head_bytes
    return limits().tuf_bytes if path.endswith(".json") else limits().member_bytes


class FolderPlace(Place):
    """A folder, from which a web server, rsync or a stick takes it to devices."""

    def __init__(self, root: Path) -> None:
        """Use a folder; it is made when something is written."""
        self.root, self.name, self._files = root, str(root), Files()

    def read(self, path: str, most: int = -1) -> tuple[bytes, str] | None:
        """Return a file and the tag of its content; None if there is none."""
        found, most = self.root / path, most if most >= 0 else most_of(path)
        if found.exists() and not found.is_file():  # a pipe would wait for ever
            raise OSError(EINVAL, "no ordinary file; remove it", str(found))
        try:
            with found.open("rb") as file:
                data = file.read(min(most, os.fstat(file.fileno()).st_size) + 1)
        except FileNotFoundError:
            return None
        return data, hashlib.sha256(data).hexdigest()

    def create(self, path: str, data: bytes) -> bool:
        """Write a file that is not there yet; False if it is there."""
        with self._locked():
            found = self.read(path, len(data))
            if found is None:
                write_file(data, self.root / path)
        return found is None or insist_same(f"{self.name}/{path}", found[0], data)

    def swap(self, path: str, data: bytes, tag: str | None) -> bool:
        """Replace a file if it still has the tag; False if it has not."""
        with self._locked():
            found = self.read(path)
            if (found and found[1]) != tag:
                return False
            write_file(data, self.root / path)
        return True

    def entries(self, folder: str, *, deep: bool = True) -> Iterator[Entry]:
        """Yield the files below a folder, by path."""
        prefix = folder.rstrip("/") + "/" * bool(folder)
        yield from sorted(_walk(self.root, prefix, deep), key=lambda e: e.path)

    def remove(self, path: str) -> None:
        """Remove a file, where there is one."""
        with self._locked():
            self._files.unlink(self.root / path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with self._files.locked(self.root / LOCK_NAME, wait=True):
            yield


def _walk(root: Path, folder: str, deep: bool) -> Iterator[Entry]:
    # Of 100,000 reports pathlib's patterns take twenty times as long.
    try:
        with os.scandir(root / folder) as found:
            items = list(found)
    except FileNotFoundError:
        return
    for item in items:
        path = f"{folder}{item.name}"
        if deep and item.is_dir(follow_symlinks=False):
            yield from _walk(root, f"{path}/", deep)
            continue
        try:
            status = item.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue  # another publisher's part, which has its name by now
        if stat.S_ISREG(status.st_mode):
            tag = f"{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"
            yield Entry(path, status.st_size, status.st_mtime, tag)


def insist_same(path: str, found: bytes, wanted: bytes) -> bool:
    """Return False for the same content, as nothing was written."""
    if found != wanted:
        raise StoreError(
            f"{path} holds something else than its name says; remove it and publish "
            "again"
        )
    return False
