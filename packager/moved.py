# SPDX-License-Identifier: Apache-2.0
"""Weights that subspaces have moved, without a second copy of them in memory."""

from collections.abc import Iterator, Sequence

from edge_runtime.formats.apply import windows
from edge_runtime.formats.layout import Tensor
from edge_runtime.formats.spool import Spool
from edge_runtime.formats.subspace import Term
from edge_runtime.formats.subspace_moves import Mover
from edge_runtime.formats.weights import Weights


def moved_weights(base: Weights, terms: Sequence[Term]) -> Weights:
    """Return weights, moved by terms; the very same ones where there are none.

    Raises:
        PatchFormatError: A weight that would move is no finite number.
        OSError: There is no room for temporary files.
    """
    return _Moved(base, terms) if terms else base


class _Moved(Weights):
    """Small ones lie in memory, large ones in a temporary file."""

    def __init__(self, base: Weights, terms: Sequence[Term]) -> None:
        self.layout, self._spool = base.layout, Spool()
        mover = Mover(terms, base.layout)
        for window in windows(map(bytes, base.chunks()), base.layout.file_size):
            mover.move(window, self._spool.size)
            self._spool.write(bytes(window))

    def _read(self, tensor: Tensor, start: int, stop: int) -> bytes:
        return self._spool.read(tensor.start + start, tensor.start + stop)

    def chunks(self) -> Iterator[memoryview]:
        """Yield the file's bytes in order, in pieces of bounded size."""
        return map(memoryview, self._spool.pieces())
