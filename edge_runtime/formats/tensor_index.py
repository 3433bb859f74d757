# SPDX-License-Identifier: Apache-2.0
"""How the positions of one tensor are written: as gaps, or as a bitmap.

:mod:`edge_runtime.formats.positions` makes sections of them, and reads them again by
the same rules.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.frames import quick_size
from edge_runtime.formats.numbers import Integers, encode_numbers

MAX_ROW = 1 << 16  # elements of a row whose columns may be left out
WINDOW = 1 << 17  # elements that are looked at together while a patch is made
_FINE = 2  # with which gaps are measured

Positions = Integers
Mask = NDArray[np.bool_]


def is_bitmap(size: int, count: int) -> bool:
    """Tell whether a tensor has a bitmap; otherwise its positions are listed."""
    return size < 4 * count < 3 * size


def grid_of(shape: tuple[int, ...], count: int) -> tuple[int, int] | None:
    """Return number and depth of a tensor's columns, where unused ones are left out.

    A column is a slice along the second axis: an input of a layer. Its depth is the
    number of its elements in a row.
    """
    if len(shape) < 2 or not 0 < 4 * count <= math.prod(shape):
        return None
    columns, depth = shape[1], math.prod(shape[2:])
    return (columns, depth) if columns * depth <= MAX_ROW else None


class Found(Protocol):
    """Increasing flat positions, delivered in pieces; an array of them is as good."""

    def __len__(self) -> int:
        """Return how many there are."""

    def pieces(self) -> Iterator[Positions]:
        """Yield them in increasing order, at most ``WINDOW`` at a time."""


def in_pieces(found: Found | Positions) -> Iterator[Positions]:
    """Yield positions in increasing order, at most ``WINDOW`` at a time."""
    if not isinstance(found, np.ndarray):
        yield from found.pieces()
        return
    for start in range(0, len(found), WINDOW):
        yield found[start : start + WINDOW]


class TensorIndex:
    """How the positions of one tensor are written.

    Attributes:
        listed: How many gaps there are.
        bitmap_bytes: Bytes of its bitmap, if it has one.
        used: (columns,) which columns count; none where it has no columns.
    """

    __slots__ = (
        *("_depth", "_fewer", "_found", "_size", "_stays"),
        *("bitmap_bytes", "listed", "used"),
    )

    def __init__(self, shape: tuple[int, ...], found: Found | Positions) -> None:
        self._size, self._found, count = math.prod(shape), found, len(found)
        self._stays = 2 * count > self._size
        self.bitmap_bytes, self.listed = 0, min(count, self._size - count)
        if is_bitmap(self._size, count):
            self.bitmap_bytes, self.listed = (self._size + 7) // 8, 0
        columns, self._depth = grid_of(shape, count) or (0, 0)
        self.used = np.ones(columns, bool)
        self._fewer = False
        if columns:
            self._choose_columns(columns * self._depth)

    def _choose_columns(self, width: int) -> None:
        """Leave columns out of the count in which nothing travels, if that is less."""
        used = np.zeros_like(self.used)
        for positions in in_pieces(self._found):
            used[positions % width // self._depth] = True
        if used.all():
            return
        far, every = size_of(self.gaps(), _FINE), self.used
        self.used, self._fewer = used, True
        if size_of(self.gaps(), _FINE) + len(used) >= far:
            self.used, self._fewer = every, False

    def gaps(self) -> Iterator[Integers]:
        """Yield how many elements are skipped before each that is listed."""
        if not self.listed:
            return
        last, pieces = -1, self._others() if self._stays else in_pieces(self._found)
        for positions in self._among_used(pieces) if self._fewer else pieces:
            gaps = positions - 1  # np.diff costs a small tensor more than all the rest
            gaps[0] -= last
            gaps[1:] -= positions[:-1]
            last = int(positions[-1])
            yield gaps

    def _among_used(self, pieces: Iterable[Positions]) -> Iterator[Positions]:
        """Count positions as if there were no columns but the used ones."""
        offsets = np.flatnonzero(np.repeat(self.used, self._depth))
        for positions in pieces:
            row, at = np.divmod(positions, len(self.used) * self._depth)
            yield row * len(offsets) + np.searchsorted(offsets, at)

    def _others(self) -> Iterator[Positions]:
        """Yield the positions that stay as they are."""
        for start, mask in self._masks():
            (stays,) = np.nonzero(~mask)
            if stays.size:
                yield stays + start

    def bitmap(self) -> Iterator[bytes]:
        """Yield the bitmap, where that is what is written."""
        for _, mask in self._masks():
            yield pack_mask(mask)

    def _masks(self) -> Iterator[tuple[int, Mask]]:
        """Yield which elements travel, ``WINDOW`` at a time, with where that begins."""
        pieces, some = in_pieces(self._found), np.zeros(0, np.int64)
        for start in range(0, self._size, WINDOW):
            stop = min(start + WINDOW, self._size)
            while (
                not (some.size and some[-1] >= stop)
                and (more := next(pieces, None)) is not None
            ):
                some = np.concatenate([some, more])
            inside = int(some.searchsorted(stop))
            yield start, mask_of(stop - start, some[:inside] - start)
            some = some[inside:]


def size_of(pieces: Iterable[Integers], fine: int) -> int:
    """Return about how many bits numbers take."""
    symbols, bits = bytearray(), 0
    for numbers in pieces:
        raw, widths = encode_numbers(numbers, fine)
        symbols += raw
        bits += int(widths.sum())
    return 8 * quick_size(symbols) + bits


def mask_of(size: int, positions: Positions) -> Mask:
    """Return which of so many elements are at some positions."""
    mask = np.zeros(size, bool)
    mask[positions] = True
    return mask


def pack_mask(mask: Mask) -> bytes:
    """Return a mask as a bitmap."""
    return np.packbits(mask, bitorder="little").tobytes()
