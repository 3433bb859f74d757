# SPDX-License-Identifier: Apache-2.0
"""Bytes that are written in order and read afterwards: in memory while they are few.

What a patch is made of may be larger than the memory that is there. So a section that
grows goes into a file that has no name, and is gone when nobody looks at it any more.
"""

from collections.abc import Iterator
from itertools import pairwise
from os import pread
from tempfile import TemporaryFile, gettempdir
from typing import IO
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from edge_runtime.files import naming

KEPT_BYTES = 8 << 20  # in memory
READ_BYTES = 1 << 20


class Spool:
    """What was written, in parts.

    Attributes:
        size: Bytes that were written.
        stops: Where each part ends; whoever writes says so.
        packed: What it is as a section of a patch, where that is known, by level.
    """

    def __init__(self) -> None:
        self.size, self.stops = 0, list[int]()
        self.packed: dict[int, tuple[int, bytes]] = {}
        self._memory = bytearray()
        self._file: IO[bytes] | None = None

    def __iter__(self) -> Iterator[bytes]:
        """Yield the parts."""
        for start, stop in pairwise([0, *self.stops]):
            yield self.read(start, stop)

    def write(self, data: bytes | bytearray | NDArray[np.uint8]) -> None:
        """Add bytes.

        Raises:
            OSError: There is no room for temporary files.
        """
        view = data if isinstance(data, bytes | bytearray) else data.data
        self.size += len(view)
        if self._file is None and self.size <= KEPT_BYTES:
            self._memory += view
            return
        with naming(gettempdir()):
            if self._file is None:
                self._file = TemporaryFile(buffering=1 << 20)
                finalize(self, self._file.close)
                self._file.write(self._memory)
                self._memory = bytearray()
            self._file.write(view)

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from ``start`` up to ``stop``."""
        if self._file is None:
            return bytes(self._memory[start:stop])
        with naming(gettempdir()):
            self._file.flush()
        data = b""
        while left := stop - start - len(data):  # two gigabytes are given at most
            data += pread(self._file.fileno(), left, start + len(data))
        return data

    def pieces(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Yield the bytes from ``start`` up to ``stop``, or to the end, in pieces."""
        stop = self.size if stop is None else stop
        for at in range(start, stop, READ_BYTES):
            yield self.read(at, min(at + READ_BYTES, stop))
