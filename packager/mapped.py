# SPDX-License-Identifier: Apache-2.0
"""Files that are mapped, not read: in memory are the pages that are looked at."""

import mmap
import stat
from collections.abc import Iterator
from errno import EINVAL
from os import fstat
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from edge_runtime.errors import WeightsError
from edge_runtime.formats.layout import Layout, Tensor, read_layout
from edge_runtime.formats.weights import Weights

KEPT_BYTES = 16 << 20  # of a mapping, before its pages are given back


class MappedFile:
    """A file in memory, page by page as it is looked at.

    Attributes:
        path: The file.
        data: All of its bytes, read-only.
    """

    def __init__(self, path: Path) -> None:
        """Map a file.

        Raises:
            OSError: It cannot be read, or is no ordinary file.
        """
        self.path, self.data = path, memoryview(b"")
        self._map: mmap.mmap | None = None
        self._seen = 0
        with path.open("rb") as file:
            status = fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(EINVAL, "no ordinary file; give a file", str(path))
            if status.st_size:  # nothing cannot be mapped
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self.data = memoryview(self._map)

    def saw(self, size: int) -> None:
        """Count what was read in order, and give its pages back now and then."""
        self._seen += size
        if self._seen >= KEPT_BYTES:
            self.forget()

    def forget(self) -> None:
        """Give all pages back; whoever looks at them again gets them again."""
        self._seen = 0
        if self._map:
            self._map.madvise(mmap.MADV_DONTNEED)


def map_weights(path: Path) -> Weights:
    """Map a weight file that is in canonical form.

    Raises:
        OSError: It cannot be read.
        WeightsError: Malformed, truncated or not canonical.
    """
    with path.open("rb") as file:
        layout = read_layout(file)
    mapped = MappedFile(path)
    weights = _MappedWeights(layout, mapped)
    if mapped.data[: len(layout.header)] != layout.header:
        raise WeightsError("the weight file was changed while it was read; try again")
    return weights


class _MappedWeights(Weights):
    """A weight file that gives its pages back."""

    def __init__(self, layout: Layout, file: MappedFile) -> None:
        super().__init__(layout, file.data)
        self._file = file

    def bits(self, tensor: Tensor, start: int, stop: int) -> NDArray[Any]:
        found = super().bits(tensor, start, stop)
        self._file.saw(found.nbytes)
        return found

    def chunks(self) -> Iterator[memoryview]:
        for chunk in super().chunks():
            yield chunk
            self._file.saw(len(chunk))
