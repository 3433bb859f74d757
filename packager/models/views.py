# SPDX-License-Identifier: Apache-2.0
"""Weights that lie in files of others: each tensor is a view of where it is.

A checkpoint of many gigabytes is mapped, not read: nothing of it is in memory but the
pages that are looked at, and those the system may take back at any time.
"""

from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.layout import Tensor, make_layout
from edge_runtime.formats.weights import CHUNK_BYTES, Weights
from packager.mapped import MappedFile

# How many times the bytes of its files a model's tensors may have together: the same
# values may be there under several names, and a few bytes could pretend to be many.
REPEATS = 16


class View(NamedTuple):
    """A tensor that lies somewhere.

    Attributes:
        dtype: Its type code.
        shape: Its shape.
        raw: (bytes,) uint8, its bytes in C order.
        file: The mapping that ``raw`` is a part of, if any.
        start: Where in that file it begins.
    """

    dtype: str
    shape: tuple[int, ...]
    raw: NDArray[np.uint8]
    file: MappedFile | None = None
    start: int = 0


class ViewedWeights(Weights):
    """A weight file that need not be anywhere as a whole."""

    def __init__(self, views: Mapping[str, View]) -> None:
        """Bring tensors into their canonical order, without copying them.

        Args:
            views: The tensors by name, in any order.

        Raises:
            WeightsError: They have no place in a weight file.
        """
        self.layout = make_layout({n: (v.dtype, v.shape) for n, v in views.items()})
        self._views = views

    @property
    def files(self) -> set[Path]:
        """The files that tensors lie in."""
        return {view.file.path for view in self._views.values() if view.file}

    def without(self, names: Container[str]) -> "ViewedWeights":
        """Return the same tensors but for some."""
        kept = {n: view for n, view in self._views.items() if n not in names}
        return ViewedWeights(kept)

    def _read(self, tensor: Tensor, start: int, stop: int) -> NDArray[np.uint8]:
        return self._views[tensor.name].raw[start:stop]

    def bits(self, tensor: Tensor, start: int, stop: int) -> NDArray[Any]:
        """Return elements of a tensor, in C order, as unsigned integers."""
        found = super().bits(tensor, start, stop)
        if file := self._views[tensor.name].file:  # of what was returned before
            file.saw(found.nbytes)
        return found

    def chunks(self) -> Iterator[memoryview]:
        """Yield the file's bytes in order, in pieces of bounded size."""
        yield memoryview(self.layout.header)
        for name in self.layout.by_name:
            view = self._views[name]
            for start in range(0, view.raw.size, CHUNK_BYTES):
                piece = view.raw[start : start + CHUNK_BYTES]
                yield piece.data
                if view.file:
                    view.file.saw(piece.size)
