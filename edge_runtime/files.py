# SPDX-License-Identifier: Apache-2.0
"""All file operations of a store, in one class that tests can replace.

Every change that a store makes to its files goes through the primitive operations
below, so that a test can record them, fail any one of them, and enumerate what a power
cut could leave behind.
"""

import fcntl
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from errno import EDQUOT, EINVAL, ENOLCK, ENOSPC, ENOSYS, ENOTSUP
from pathlib import Path
from typing import BinaryIO

_SHOWN = 40  # characters of a name that its temporary one repeats: names are bounded
FULL = frozenset({ENOSPC, EDQUOT})  # no block, no inode, or a quota is used up
_LAST_BYTES, _LAST_INODES = 1 << 16, 4  # less is as good as nothing
_ABSENT = frozenset({EINVAL, ENOLCK, ENOSYS, ENOTSUP})  # what a file system lacks


def lock_file(file: int | BinaryIO, path: Path, *, wait: bool = False) -> None:
    """Lock an open file for this process alone.

    Args:
        file: The file.
        path: Its name, for errors.
        wait: Whether to wait for another process that holds it.

    Raises:
        BlockingIOError: Another process holds it.
        OSError: It cannot be locked, with its name.
    """
    with _naming(path, "locked"):
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


@contextmanager
def _naming(path: Path, done: str) -> Iterator[None]:
    """Add the file, and what to do about it where that is known, to system errors."""
    try:
        yield
    except OSError as err:
        reason = err.strerror
        if err.errno in _ABSENT:
            reason = (
                f"cannot be {done} ({reason}): the file system does not support it; "
                "use a folder on a local disk"
            )
        raise OSError(err.errno, reason, err.filename or str(path)) from err


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Name a file, or its folder, in system errors that do not, as of a full disk."""
    try:
        yield
    except OSError as err:
        if err.errno is not None:  # else its words are all it has
            err.filename = err.filename or str(path)
        raise


def mode_for(path: Path) -> int:
    """Return the mode of what is to take a name: nobody may read it who could not."""
    return stat.S_IMODE(path.stat().st_mode) & 0o666 if path.is_file() else 0o666


class Files:
    """File operations with the durability that each of them promises."""

    # Primitives: one change each, durable only after a sync ------------------------

    def mkdir(self, path: Path) -> None:
        """Create a folder; an existing one is kept."""
        path.mkdir(exist_ok=True)

    def write(
        self,
        path: Path,
        chunks: Iterable[bytes | memoryview],
        *,
        mode: int = 0o666,
        durable: bool = True,
    ) -> None:
        """Write a new file; its content is on the disk when this returns.

        The name is durable only after :meth:`sync_folder` on the parent. What had
        the name before is left alone: it may be in use, or have a second name that a
        cut rename left behind. ``mode``, less the umask, is its own from the start.
        A link that somebody else puts there meanwhile is never followed. What need
        not be durable is not synced.
        """

        def exclusive(name: str, flags: int) -> int:
            return os.open(name, flags | os.O_NOFOLLOW, mode)

        self.unlink(path)
        with naming(path), open(path, "xb", opener=exclusive) as file:
            for chunk in chunks:
                at, size = file.tell(), file.write(chunk)
                if sys.platform == "linux":
                    # There it begins to write what the disk does not have yet, and
                    # keeps it in memory. Less is left to wait for in the end. It is
                    # advice: a sandbox that forbids it must not cost the update.
                    with suppress(OSError):
                        os.posix_fadvise(
                            file.fileno(), at, size, os.POSIX_FADV_DONTNEED
                        )
            file.flush()
            if durable:
                with _naming(path, "synced"):
                    self.sync(file.fileno())

    def hardlink(self, source: Path, target: Path) -> None:
        """Give a file a second name."""
        target.hardlink_to(source)

    def symlink(self, link: Path, folder: str) -> None:
        """Create a symbolic link."""
        link.symlink_to(folder, target_is_directory=True)

    def rename(self, source: Path, target: Path) -> None:
        """Rename atomically, replacing a file or link of the target's name."""
        source.replace(target)

    def unlink(self, path: Path) -> None:
        """Remove a file or link, where there is one."""
        path.unlink(missing_ok=True)

    def rmdir(self, path: Path) -> None:
        """Remove an empty folder."""
        path.rmdir()

    def sync(self, handle: int) -> None:
        """Put an open file's content, or an open folder's names, on the disk."""
        os.fsync(handle)

    def open_lock(self, path: Path) -> BinaryIO:
        """Open a file to lock it.

        Who can read it can hold its lock for ever: so only who may write its folder.
        """
        group = 0o060 if path.parent.stat().st_mode & stat.S_IWGRP else 0
        mode = 0o600 | group
        file = open(path, "ab", opener=lambda name, flags: os.open(name, flags, mode))
        if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & ~mode:  # of before
            with suppress(PermissionError):  # another user's
                os.fchmod(file.fileno(), mode)
        return file

    @contextmanager
    def locked(self, path: Path, *, wait: bool = False) -> Iterator[None]:
        """Hold the lock of a file, which is made where there is none.

        Raises:
            BlockingIOError: Another process holds it, and nobody waits.
            OSError: It cannot be locked, with its name.
        """
        with self.open_lock(path) as file:
            lock_file(file, path, wait=wait)
            yield

    # Made of them ------------------------------------------------------------------

    def replace(
        self,
        path: Path,
        data: bytes | memoryview,
        *,
        mode: int | None = None,
        durable: bool = True,
        suffix: str = ".new",
    ) -> None:
        """Give a file new content, all at once: readers see the old one or the new.

        The one way to replace a file in this project. A link of that name is replaced
        itself; what it leads to stays as it is.

        Args:
            path: The file; it need not be there.
            data: All that it shall hold.
            mode: Who may read it, less the umask; by default as before.
            durable: Whether content and name are on the disk when this returns.
            suffix: As :meth:`replacing` takes it.

        Raises:
            OSError: The disk refuses, or something else than a file has the name; the
                file is as it was.
        """
        mode = mode_for(path) if mode is None else mode & 0o666
        with self.replacing(path, durable=durable, suffix=suffix) as part:
            self.write(part, [data], mode=mode, durable=durable)

    @contextmanager
    def replacing(
        self, path: Path, *, durable: bool = True, suffix: str = ".new"
    ) -> Iterator[Path]:
        """Yield a temporary path; in the end what is there gets the name ``path``.

        Nobody can foresee the name, so nobody can put a link there.

        Args:
            path: What is to be replaced.
            durable: Whether the name is on the disk in the end.
            suffix: What the name ends with: ``.part`` in a store under its lock, which
                removes what a killed process left under such names.

        Raises:
            OSError: The disk refuses, or something else than a file has the name.
        """
        if path.exists() and not path.is_file():  # /dev/null and its like stay
            raise OSError(EINVAL, "no ordinary file; choose another name", str(path))
        part = self.temporary(path, suffix)
        try:
            yield part
            self.rename(part, path)
        except BaseException as err:  # an interrupt must leave nothing either
            with suppress(OSError):
                self.unlink(part)
            # The name that the caller knows; the other one is gone.
            if isinstance(err, OSError) and err.filename == str(part):
                raise OSError(err.errno, err.strerror, str(path)) from err
            raise
        if durable:
            self.sync_folder(path.parent)

    def temporary(self, path: Path, suffix: str) -> Path:
        """Return the name of a temporary file beside another; nobody can guess it."""
        return path.with_name(f".{path.name[:_SHOWN]}.{secrets.token_hex(8)}{suffix}")

    def forget(self, path: Path) -> None:
        """Remove the temporary files that killed processes left beside a file.

        To be called only where no other process replaces it.
        """
        for left in self.left_of(path):
            self.unlink(left)

    def left_of(self, path: Path) -> list[Path]:
        """Return the temporary files that are there for a file."""
        pattern = rf"\.{re.escape(path.name[:_SHOWN])}\.[0-9a-f]{{16}}\.new"
        with os.scandir(path.parent) as entries:
            names = [e.name for e in entries if re.fullmatch(pattern, e.name)]
        return [path.parent / name for name in names]

    def make_folder(self, path: Path) -> None:
        """Create a folder and its parents, durably; an existing one is kept."""
        missing = [parent for parent in path.parents if not parent.is_dir()]
        for folder in (*reversed(missing), path):
            self.mkdir(folder)
            self.sync_folder(folder.parent)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name, or copy it where the file system has no links."""
        try:
            self.hardlink(source, target)
        except OSError:
            # FAT and some network file systems; the graph is small.
            self.write(target, [source.read_bytes()])

    def point(self, link: Path, folder: str) -> None:
        """Make a symbolic link point to a folder beside it, atomically."""
        part = link.with_name(link.name + ".part")
        self.unlink(part)
        self.symlink(part, folder)
        self.rename(part, link)

    def remove(self, path: Path) -> None:
        """Remove a file or a whole folder."""
        if not path.is_dir() or path.is_symlink():
            self.unlink(path)
            return
        for child in sorted(path.iterdir()):
            self.remove(child)
        self.rmdir(path)

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable."""
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with _naming(path, "synced"):
                self.sync(handle)
        finally:
            os.close(handle)

    def is_full(self, path: Path) -> bool:
        """Return whether hardly a block or an inode is left below ``path``."""
        status = os.statvfs(path)
        no_inodes = status.f_files > 0 and status.f_favail < _LAST_INODES
        return no_inodes or status.f_bavail * status.f_frsize < _LAST_BYTES

    def free_bytes(self, path: Path) -> int:
        """Return how many bytes can still be written below ``path``."""
        return shutil.disk_usage(path).free
