# SPDX-License-Identifier: Apache-2.0
"""Weights that subspaces or a patch have changed, without a second copy in memory."""

from collections.abc import Iterable, Iterator, Sequence

from edge_runtime.formats.apply import apply_weights, windows
from edge_runtime.formats.layout import Layout, Tensor
from edge_runtime.formats.patch import Patch
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
    return _Spooled(base.layout, _moves(base, terms)) if terms else base


def patched_weights(base: Weights, patch: Patch) -> Weights:
    """Return what a patch makes of weights.

    Raises:
        DpuError: As :func:`edge_runtime.formats.apply.apply_weights`.
        OSError: There is no room for temporary files.
    """
    return _Spooled(base.layout, apply_weights(base, patch))


def _moves(base: Weights, terms: Sequence[Term]) -> Iterator[memoryview]:
    mover, at = Mover(terms, base.layout), 0
    for window in windows(map(bytes, base.chunks()), base.layout.file_size):
        mover.move(window, at)
        yield window
        at += len(window)


class _Spooled(Weights):
    """Small ones lie in memory, large ones in a temporary file."""

    def __init__(self, layout: Layout, pieces: Iterable[memoryview]) -> None:
        self.layout, self._spool = layout, Spool()
        for piece in pieces:
            self._spool.write(bytes(piece))

    def _read(self, tensor: Tensor, start: int, stop: int) -> bytes:
        return self._spool.read(tensor.start + start, tensor.start + stop)

    def chunks(self) -> Iterator[memoryview]:
        """Yield the file's bytes in order, in pieces of bounded size."""
        return map(memoryview, self._spool.pieces())
