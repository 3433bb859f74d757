# SPDX-License-Identifier: Apache-2.0
"""Files and folders of others, read with care: bounded, and never passed over."""

import io
import os
import stat
from collections.abc import Collection
from errno import EINVAL, ELOOP
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from edge_runtime.errors import DpuError, KeyFileError
from edge_runtime.limits import limits
from edge_runtime.text import listed, printable

READ_BYTES = 1 << 20
Source = str | PathLike[str] | bytes | BinaryIO
_NAMED = 5  # of the things found in a folder


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder, in order; none where there is no folder.

    ``Path.glob`` finds nothing either where a folder may not be read, or where a link
    leads to what is not mounted: whoever asks for a gate or a witness must know.

    Raises:
        OSError: It cannot be read, is none, or a link leads nowhere.
    """
    try:
        return sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        if any(p.is_symlink() and not p.exists() for p in (folder, *folder.parents)):
            raise
        return []


def strangers(folder: Path, own: Collection[str] = ()) -> str:
    """Name files of others in a folder, in words; empty if there are none.

    Args:
        folder: Where something is to be written.
        own: Names that are no obstacle.

    Raises:
        OSError: The folder cannot be read, or is none.
    """
    found = [printable(name) for name in names_in(folder) if name not in own]
    return listed(found, _NAMED)


def open_regular(path: Path) -> io.BufferedReader:
    """Open an ordinary file to read it; refuse pipes, devices and links.

    A pipe would wait for ever, a device never end, and a link lead anywhere.

    Raises:
        OSError: It cannot be opened, or is no ordinary file.
    """

    def careful(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK | os.O_NOFOLLOW)

    try:
        file = open(path, "rb", opener=careful)
    except OSError as err:
        if err.errno != ELOOP:
            raise
        words = "a link, expected the file itself; copy it"
        raise OSError(ELOOP, words, str(path)) from err
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(EINVAL, "no ordinary file; remove it", str(path))
    return file


def read_bounded(
    path: Path, limit: str, what: str, error: type[DpuError], *, regular: bool = False
) -> bytes:
    """Read a whole file once, if it is not over its limit.

    Args:
        path: The file.
        limit: Which of :class:`edge_runtime.limits.Limits` bounds it.
        what: What to call it in an error.
        error: What to raise where it is larger.
        regular: Whether it must be an ordinary file (:func:`open_regular`).

    Raises:
        OSError: It cannot be read.
        DpuError: It is larger.
    """
    most: int = getattr(limits(), limit)
    with open_regular(path) if regular else open(path, "rb") as file:
        # What it is and how large may change while it is read: only bytes count.
        data = io.BytesIO()  # which gives its bytes away without a copy
        while data.tell() <= most and (chunk := file.read(READ_BYTES)):
            data.write(chunk)
        size = max(data.tell(), os.fstat(file.fileno()).st_size)
    if data.tell() > most:
        raise error(limits().problem(limit, size, what))
    return data.getvalue()


def open_source(source: Source) -> BinaryIO:
    """Open what is to be read: a file by its path, bytes, or a file that is open.

    Raises:
        OSError: The file cannot be opened.
    """
    if isinstance(source, bytes):
        return io.BytesIO(source)
    return Path(source).open("rb") if isinstance(source, str | PathLike) else source


def read_key_file(path: Path) -> bytes:
    """Read a file that should hold a key, as far as keys go.

    Raises:
        OSError: It cannot be read.
        KeyFileError: It is larger than any key.
    """
    return read_bounded(path, "key_bytes", str(path), KeyFileError)
