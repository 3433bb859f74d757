# SPDX-License-Identifier: Apache-2.0
"""Files that have no name until they are complete.

A process that is killed, or a disk that is full, leaves nothing behind: what has no
name is gone with whoever wrote it. Where the file system has no such files (some
network and FAT ones), a hidden name beside the goal stands in, and an error removes it.
"""

import ctypes
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from errno import EEXIST, EINVAL, EISDIR, ENOENT, ENOTEMPTY, EOPNOTSUPP
from pathlib import Path
from typing import Self

from edge_runtime.errors import ConfigError
from edge_runtime.files import Files
from edge_runtime.reading import strangers

TMPFILE: int | None = getattr(os, "O_TMPFILE", None)
_OPENED = "/proc/self/fd"
_WITHOUT = frozenset((EINVAL, EISDIR, ENOENT, EOPNOTSUPP))
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE


class StagedFile:
    """A file that is written at any place, and gets its name in the end.

    Attributes:
        path: Where to read what was written, as long as it is open.
    """

    def __init__(self, goal: Path, mode: int = 0o666) -> None:
        """Begin a file.

        Args:
            goal: Where it is to be, or another name on the same file system.
            mode: Its own, less the umask.

        Raises:
            OSError: It cannot be written there.
        """
        self._goal, self._hidden = goal, False
        self._handle = _open_nameless(goal.parent, mode)
        if self._handle is None:
            self._hidden = True
            self.path = Files().temporary(goal, ".new")
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            self._handle = os.open(self.path, flags, mode)
        else:
            self.path = Path(_OPENED, str(self._handle))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._open())
        self._handle = None
        if self._hidden:
            Files().unlink(self.path)

    def _open(self) -> int:
        if self._handle is None:
            raise ValueError("the file is closed")
        return self._handle

    def write_at(self, data: bytes | memoryview, at: int) -> None:
        """Write bytes at a place.

        Raises:
            OSError: The disk refuses.
        """
        left = memoryview(data)
        try:
            while left:
                written = os.pwrite(self._open(), left, at)
                left, at = left[written:], at + written
        except OSError as err:
            raise OSError(err.errno, err.strerror, str(self._goal)) from err

    def link(self, path: Path) -> None:
        """Give it a name that is free; all of it is on the disk then.

        Raises:
            FileExistsError: The name is taken.
            OSError: The disk refuses.
        """
        Files().sync(self._open())
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # With a folder's handle Python asks for the link to be followed.
            os.link(self.path, path.name, dst_dir_fd=folder, follow_symlinks=True)
        except FileExistsError:
            raise
        except OSError:
            if not self._hidden or os.path.lexists(path):
                raise
            self.path.rename(path)  # FAT has no links
        finally:
            os.close(folder)


def _open_nameless(folder: Path, mode: int) -> int | None:
    if TMPFILE is None or not Path(_OPENED).is_dir():
        return None
    try:
        return os.open(folder, TMPFILE | os.O_RDWR, mode)
    except OSError as err:
        if err.errno in _WITHOUT and folder.is_dir():
            return None
        raise OSError(err.errno, err.strerror, str(folder)) from err


def check_free(path: Path, own: Mapping[str, object] | None, *, force: bool) -> None:
    """Insist that something may be written under a name, before the work.

    Args:
        path: The name.
        own: The names of what a folder shall hold; None for a file.
        force: Whether what is there may be replaced.

    Raises:
        ConfigError: Something is there, or what is there is never replaced.
    """
    if not os.path.lexists(path):
        return
    if (own is None) == path.is_dir() or (own is None and not path.is_file()):
        kind, found = ("a file", "a folder") if own is None else ("a folder", "a file")
        found = found if path.is_dir() or path.is_file() else "no ordinary file"
        raise ConfigError(
            f"{path} is {found}, expected a name for {kind}; give another"
        )
    others = strangers(path, ()) if own is not None else "it"
    if others and not force:
        raise ConfigError(
            f"{path} is there already; give another name, or --force to replace it"
        )
    if own is not None and (others := strangers(path, own)):
        raise ConfigError(
            f"{path} holds other files too ({others}), which --force does not remove; "
            "give another name"
        )


def name_file(file: StagedFile, path: Path, *, force: bool) -> None:
    """Give a finished file its name.

    Args:
        file: The file.
        path: The name.
        force: In place of what has it.

    Raises:
        OSError: The disk refuses, or the name is taken; what had it still has it.
    """
    files = Files()
    if force and os.path.lexists(path):
        with files.replacing(path) as part:
            file.link(part)
    else:
        file.link(path)
        files.sync_folder(path.parent)


def name_folder(parts: Mapping[str, StagedFile], path: Path, *, force: bool) -> None:
    """Give finished files their names in one new folder, all at once.

    Args:
        parts: The files by name.
        path: The folder.
        force: In place of one that is there, with these names in it.

    Raises:
        OSError: The disk refuses, or the name is taken; what had it still has it.
    """
    files = Files()
    new = files.temporary(path, ".new")
    files.mkdir(new)
    try:
        if path.is_dir():  # who could not look into it cannot look into this one
            new.chmod(stat.S_IMODE(path.stat().st_mode) | stat.S_IRWXU)
        for name, file in parts.items():
            file.link(new / name)
        files.sync_folder(new)
        try:
            new.rename(path)  # takes the place of an empty folder only
        except OSError as err:
            if not force or err.errno not in (EEXIST, ENOTEMPTY):
                raise
            _exchange(new, path)
        files.sync_folder(path.parent)
    finally:
        # What it holds now: these names, and nothing that came in meanwhile.
        with suppress(FileNotFoundError):
            for name in parts:
                files.unlink(new / name)
            files.rmdir(new)


def _exchange(new: Path, path: Path) -> None:
    """Exchange two folders: at no time is one of them not there."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(new), os.fsencode(path)
    if libc.renameat2(_HERE, names[0], _HERE, names[1], _EXCHANGE):
        reason = "cannot be exchanged on this file system; remove it, and try again"
        raise OSError(ctypes.get_errno(), reason, str(path))
