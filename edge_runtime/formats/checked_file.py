# SPDX-License-Identifier: Apache-2.0
"""A file that is hashed first, and then read: only bytes that were hashed.

A patch is larger than a small board's memory may be, so it is read twice: once for its
hash, and then piece by piece. Whoever can write to the file could change it in between.
So what is small is kept from the first reading, and of the rest a digest of each block:
what is read again has to match it.
"""

import io
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from hashlib import blake2b
from tempfile import TemporaryFile, gettempdir
from typing import BinaryIO

from edge_runtime.errors import PatchFormatError, PatchIntegrityError
from edge_runtime.files import naming

BLOCK_BYTES = 1 << 16
KEPT_BLOCKS = 64  # in memory: more than the sections that are read side by side


class CheckedFile(io.RawIOBase):
    """The rest of a file from some point on; positions are the file's own."""

    def __init__(
        self, file: BinaryIO, start: int, size: int, see: Callable[[bytes], object]
    ) -> None:
        """Read the rest of a file for the first time.

        Args:
            file: At the point from which on it is wanted. A pipe is copied into a
                nameless file, unless it is small.
            start: How many bytes stand before that point.
            size: How many bytes should follow.
            see: Called with all of them, in order: a hash.

        Raises:
            PatchFormatError: More follow, or fewer.
            OSError: The file cannot be read, or a pipe not be copied.
        """
        super().__init__()
        self._file, self._start, self._size = file, start, size
        self._at = start
        self._digests: list[bytes] = []
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        fits = size <= KEPT_BLOCKS * BLOCK_BYTES
        copy = None if fits or file.seekable() else TemporaryFile()
        with ExitStack() as unless_whole:
            if copy:
                unless_whole.callback(copy.close)
            for number, chunk in enumerate(_chunks(file, size)):
                see(chunk)
                self._keep(number, chunk)
                if not fits:
                    self._digests.append(_digest(chunk))
                if copy:
                    with naming(gettempdir()):
                        copy.write(chunk)
            unless_whole.pop_all()
        if copy:
            file.close()
            self._file, self._offset = copy, 0
        else:
            self._offset = start

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()

    def seekable(self) -> bool:
        """Return True."""
        return True

    def readable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position from the start, or to the end."""
        end = self._start + self._size
        self._at = offset + (end if whence == io.SEEK_END else 0)
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes, fewer only at the end.

        Raises:
            PatchIntegrityError: They are not what they were.
            OSError: The file cannot be read.
        """
        at = self._at - self._start
        stop = self._size if size < 0 else min(self._size, at + size)
        parts = []
        while at < stop:
            number, skip = divmod(at, BLOCK_BYTES)
            parts.append(self._block(number)[skip : skip + stop - at])
            at += len(parts[-1])
        self._at = self._start + at
        return b"".join(parts)

    def _block(self, number: int) -> bytes:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        self._file.seek(self._offset + number * BLOCK_BYTES)
        block = self._file.read(min(BLOCK_BYTES, self._size - number * BLOCK_BYTES))
        if _digest(block) != self._digests[number]:
            raise PatchIntegrityError(
                "the patch was changed while it was read; fetch it again",
                expected=self._digests[number].hex(),
                actual=_digest(block).hex(),
            )
        self._keep(number, block)
        return block

    def _keep(self, number: int, block: bytes) -> None:
        self._kept[number] = block
        if len(self._kept) > KEPT_BLOCKS:
            self._kept.popitem(last=False)


def _digest(block: bytes) -> bytes:
    return blake2b(block, digest_size=32).digest()


def _chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield exactly so many bytes in blocks; insist that the file ends with them."""
    left = size
    while left and (chunk := _exactly(file, min(BLOCK_BYTES, left))):
        left -= len(chunk)
        yield chunk
    if left or file.read(1):
        found = f"{left} bytes are missing" if left else "something follows it"
        raise PatchFormatError(
            f"the patch does not end where its header says: {found}; fetch it again"
        )


def _exactly(file: BinaryIO, size: int) -> bytes:
    """Read a block, of a pipe too, which gives what it has."""
    block = file.read(size)
    while len(block) < size and (more := file.read(size - len(block))):
        block += more
    return block
