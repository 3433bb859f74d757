# SPDX-License-Identifier: Apache-2.0
"""Positions as numbers: which elements travel, both directions side by side.

Every decoder reads in bounded pieces, so that the memory needed to apply a patch does
not depend on its size. FORMAT.md is the normative description.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from itertools import accumulate, chain, groupby
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import PatchFormatError
from edge_runtime.formats.frames import LEVEL, Parts, SectionReader, quick_size
from edge_runtime.formats.layout import Tensor
from edge_runtime.formats.numbers import (
    PIECE,
    BitWriter,
    Integers,
    NumberReader,
    UnaryReader,
    encode_numbers,
    finenesses,
    unary_bits,
    unary_width,
)
from edge_runtime.formats.sections import COLUMNS, INDEX, INDEX_BITS, UNARY, encode_body
from edge_runtime.formats.spool import Spool

MAX_ROW = 1 << 16  # elements of a row whose columns may be left out
UNARY_GAPS = 8  # a fineness of 8 and more: gaps in unary, beside 0 and more low bits
_DOUBT = 2560  # tenths of a bit that an estimate of a size may be wrong by
_SAMPLE = 1 << 20  # numbers that a fineness is chosen on
_LONG_RUN = 1 << 13  # positions
WINDOW = 1 << 17  # elements that are looked at together while a patch is made

Positions = Integers
Mask = NDArray[np.bool_]
Change = tuple[int, Tensor, int]  # group of values, tensor, how many elements travel


def _is_bitmap(size: int, count: int) -> bool:
    """Tell whether a tensor has a bitmap; otherwise its positions are listed."""
    return size < 4 * count < 3 * size


def _grid(shape: tuple[int, ...], count: int) -> tuple[int, int] | None:
    """Return number and depth of a tensor's columns, where unused ones are left out.

    A column is a slice along the second axis: an input of a layer. Its depth is the
    number of its elements in a row.
    """
    if len(shape) < 2 or not 0 < 4 * count <= math.prod(shape):
        return None
    columns, depth = shape[1], math.prod(shape[2:])
    return (columns, depth) if columns * depth <= MAX_ROW else None


# Encoding ----------------------------------------------------------------------------


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


def encode_positions(
    tensors: Sequence[tuple[tuple[int, ...], Found | Positions]],
    level: int = LEVEL,
    pool: Executor | None = None,
) -> tuple[int, dict[int, Parts]]:
    """Encode which elements travel, tensor by tensor.

    Of a tensor of which up to a quarter travels the positions are listed, as gaps: the
    number of elements skipped since the one before. Columns in which nothing travels
    (dead inputs, borders of images) may be left out of the count. Where three quarters
    or more travel, the elements that stay are listed; in between it is a bitmap.

    Args:
        tensors: Shape and strictly increasing positions of each tensor.
        level: zstd level that the sections will be packed with, 1 to 22.
        pool: Threads to pack sections in.

    Returns:
        How the gaps are written (a fineness, or ``UNARY_GAPS`` and how many low bits
        they have), and the sections, in parts.

    Raises:
        PatchFormatError: A gap is too large.
    """
    index = [_Index(shape, found) for shape, found in tensors]
    sample, largest = _survey(index)
    candidates = finenesses(largest)
    if not candidates:
        raise PatchFormatError(
            f"two changes are {largest} elements apart, which is too far for a "
            "patch; split the tensor"
        )
    fine = min(candidates, key=lambda one: _size(sample, one))
    width = unary_width(sample)
    bits = len(sample) * (width + 1) + int((sample >> width).sum())
    is_close = 10 * bits <= 11 * _size(sample, fine) + _DOUBT
    sections, even = _write(index, fine, width if is_close else None)
    # Of two that are close, those tell that are packed to the last byte.
    if is_close and len(encode_body(even, level, pool)) < len(
        encode_body(sections, level, pool)
    ):
        return UNARY_GAPS + width, even
    return fine, sections


def _survey(index: Sequence["_Index"]) -> tuple[Integers, int]:
    """Return some of all gaps, evenly spread, and the largest one."""
    step = sum(one.listed for one in index) // _SAMPLE + 1
    seen, largest, sample = 0, 0, [np.zeros(0, np.int64)]
    for one in index:
        for gaps in one.gaps():
            largest = max(largest, int(gaps.max(initial=0)))
            sample.append(gaps[-seen % step :: step].copy())
            seen += len(gaps)
    return np.concatenate(sample), largest


def _write(
    index: Sequence["_Index"], fine: int, width: int | None
) -> tuple[dict[int, Parts], dict[int, Parts]]:
    """Write the sections, and those with gaps in unary if a width is given for them."""
    symbols, bitmaps, columns, *streams = (Spool() for _ in range(6))
    bits, low, unary = map(BitWriter, streams)
    for raw, gaps in _contents(index):
        symbols.write(raw)
        bitmaps.write(raw)
        codes, widths = encode_numbers(gaps, fine)
        symbols.write(codes)
        bits.write(gaps, widths)
        if width is not None:
            low.write(gaps, np.full(len(gaps), width))
            unary.write(*unary_bits(gaps, width))
    if not all(one.used.all() for one in index):
        for one in index:
            columns.write(_pack(one.used))
            columns.stops.append(columns.size)
    for writer, stream in zip((bits, low, unary), streams, strict=True):
        writer.finish()
        stream.stops.append(stream.size)
    symbols.stops += accumulate(one.listed + one.bitmap_bytes for one in index)
    bitmaps.stops += accumulate(one.bitmap_bytes for one in index)
    sections: dict[int, Parts] = {INDEX: symbols, INDEX_BITS: streams[0]}
    sections[COLUMNS] = columns
    even = {INDEX: bitmaps, INDEX_BITS: streams[1], UNARY: streams[2]}
    return sections, sections | even


def _contents(index: Sequence["_Index"]) -> Iterator[tuple[bytes, Integers]]:
    """Yield bitmaps, and gaps of as many tensors together as have none between them."""
    waiting, held, none = list[Integers](), 0, np.zeros(0, np.int64)
    for one in index:
        for gaps in one.gaps():
            waiting.append(gaps)
            held += len(gaps)
            if held >= WINDOW:
                yield b"", np.concatenate(waiting)
                waiting, held = [], 0
        if one.bitmap_bytes:
            yield b"", np.concatenate([none, *waiting])
            waiting, held = [], 0
            for raw in one.bitmap():
                yield raw, none
    yield b"", np.concatenate([none, *waiting])


class _Index:
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
        is_bitmap = _is_bitmap(self._size, count)
        self._stays = 2 * count > self._size
        self.bitmap_bytes = (self._size + 7) // 8 if is_bitmap else 0
        self.listed = 0 if is_bitmap else min(count, self._size - count)
        columns, self._depth = _grid(shape, count) or (0, 0)
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
        far, every = _size_of(self.gaps()), self.used
        self.used, self._fewer = used, True
        if _size_of(self.gaps()) + len(used) >= far:
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
            yield _pack(mask)

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
            yield start, _mask(stop - start, some[:inside] - start)
            some = some[inside:]


def _size(numbers: Integers, fine: int) -> int:
    """Return about how many bits numbers take."""
    symbols, widths = encode_numbers(numbers, fine)
    return 8 * quick_size(symbols) + int(widths.sum())


def _size_of(pieces: Iterable[Integers]) -> int:
    """Return about how many bits the gaps of one tensor take."""
    symbols, bits = bytearray(), 0
    for gaps in pieces:
        raw, widths = encode_numbers(gaps, 2)
        symbols += raw
        bits += int(widths.sum())
    return 8 * quick_size(symbols) + bits


def _mask(size: int, positions: Positions) -> Mask:
    mask = np.zeros(size, bool)
    mask[positions] = True
    return mask


def _pack(mask: Mask) -> bytes:
    return np.packbits(mask, bitorder="little").tobytes()


# Decoding ----------------------------------------------------------------------------


class PositionRun(NamedTuple):
    """Elements of one tensor, or of some, that travel.

    Attributes:
        group: The group of values that they belong to.
        dtype: Their type.
        item_size: Its bytes.
        positions: At least one, ascending, in elements from the start of the *file*.
    """

    group: int
    dtype: str
    item_size: int
    positions: Positions


def pack_run(run: PositionRun) -> tuple[PositionRun, NDArray[Any]]:
    """Return a long run's first position, and the steps to the rest in little memory.

    A short run is returned whole: packing it takes longer than decoding it again.
    """
    if len(run.positions) < _LONG_RUN:
        return run, run.positions[:0]
    steps = np.diff(run.positions)
    first = run._replace(positions=run.positions[:1].copy())
    return first, steps.astype(np.min_scalar_type(steps.max()))


def unpack_run(first: PositionRun, steps: NDArray[Any]) -> PositionRun:
    """Return the run that :func:`pack_run` took apart."""
    if not steps.size:
        return first
    positions = np.concatenate([first.positions, steps], dtype=np.int64)
    return first._replace(positions=positions.cumsum(out=positions))


class PositionReader:
    """Decodes what :func:`encode_positions` wrote, in bounded pieces."""

    def __init__(self, section: Callable[[int], SectionReader], fine: int) -> None:
        """Prepare to read.

        Args:
            section: Opens a section by its kind.
            fine: How the gaps are written.

        Raises:
            PatchFormatError: There is no such way.
        """
        self._index, self._columns = section(INDEX), section(COLUMNS)
        self._all_columns = self._columns.is_empty
        self._unary, bits = section(UNARY), section(INDEX_BITS)
        self._gaps = (
            NumberReader(self._index, bits, fine)
            if fine < UNARY_GAPS
            else UnaryReader(self._unary, bits, fine - UNARY_GAPS)
        )
        # Gaps are summed up ahead of the tensor that is read, as small tensors cost as
        # many calls as large ones: sums not yet used, the one before, gaps that follow.
        self._sums, self._before, self._ahead = np.empty(0, np.int64), 0, 0

    def runs(self, tensors: Iterable[Change]) -> Iterator[PositionRun]:
        """Yield what travels, in the order of the file, at most ``PIECE`` at a time.

        Args:
            tensors: Those of which something travels, in the order of the file.

        Raises:
            PatchFormatError: A section ends early or contradicts a tensor.
        """
        # Gaps follow one another up to the next bitmap.
        for bitmap, alike in groupby(
            tensors, lambda one: _is_bitmap(one[1].size, one[2])
        ):
            some = list(alike)
            if not bitmap:
                self._ahead = sum(min(n, tensor.size - n) for _, tensor, n in some)
            for group, tensor, count in some:
                for positions in filter(len, self._positions(tensor, count)):
                    yield PositionRun(group, tensor.dtype, tensor.item_size, positions)

    def _positions(self, tensor: Tensor, count: int) -> Iterable[Positions]:
        """Return the positions of the next tensor, in pieces."""
        size, first = tensor.size, tensor.start // tensor.item_size
        if count == size:
            starts = range(first, first + size, PIECE)
            return map(np.arange, starts, chain(starts[1:], [first + size]))
        if _is_bitmap(size, count):
            return self._bitmap(size, count, first)
        if 2 * count > size:
            return self._others(size, size - count, first)
        if not self._all_columns and (grid := _grid(tensor.axes, count)):
            columns, depth = grid
            bits = _bits(self._columns, columns)
            if np.count_nonzero(bits) < columns:
                (used,) = bits.repeat(depth).nonzero()
                return self._in_columns(tensor, used, count, first)
        return self._listed(size, count, first)

    def _listed(self, size: int, count: int, first: int) -> Iterator[Positions]:
        last, left = -1, count
        while left:
            if not self._sums.size:
                gaps = self._gaps.take(min(PIECE, self._ahead))
                self._ahead -= len(gaps)
                gaps += 1
                self._sums, self._before = gaps.cumsum(out=gaps), 0
            sums, self._sums = self._sums[:left], self._sums[left:]
            left -= len(sums)
            shift, self._before = last - self._before, int(sums[-1])
            last = self._before + shift
            # What still has to come needs room behind this piece.
            if last >= size - left:
                raise PatchFormatError(
                    f"a position in the patch is out of bounds: {last} of {size} "
                    "elements"
                )
            yield sums + (shift + first)

    def _in_columns(
        self, tensor: Tensor, used: Integers, count: int, first: int
    ) -> Iterator[Positions]:
        rows, width = tensor.axes[0], len(used)
        for positions in self._listed(rows * width, count, 0):
            row = positions // width  # faster than divmod, by far
            positions -= row * width
            row *= tensor.size // rows
            row += first
            row += used.take(positions)
            yield row

    def _others(self, size: int, count: int, first: int) -> Iterator[Positions]:
        stays, listed = np.empty(0, np.int64), self._listed(size, count, 0)
        left = count
        for start in range(0, size, PIECE):
            stop = min(start + PIECE, size)
            while left and (not stays.size or stays[-1] < stop):
                found = next(listed)
                left -= len(found)
                stays = np.concatenate([stays, found])
            inside = int(stays.searchsorted(stop))
            (found,) = (~_mask(stop - start, stays[:inside] - start)).nonzero()
            yield found + (start + first)
            stays = stays[inside:]

    def _bitmap(self, size: int, count: int, first: int) -> Iterator[Positions]:
        left = count
        for start in range(0, size, PIECE):
            (found,) = _bits(self._index, min(PIECE, size - start)).nonzero()
            left -= len(found)
            yield found + (start + first)
        if left:
            raise PatchFormatError(
                f"a bitmap in the patch has {count - left} bits, expected {count}"
            )

    def finish(self) -> None:
        """Insist that everything is used up.

        Raises:
            PatchFormatError: Something is left over.
        """
        self._gaps.finish()
        for section in (self._index, self._unary, self._columns):
            section.finish()


def _bits(section: SectionReader, count: int) -> NDArray[np.uint8]:
    """Read a bitmap of so many bits, at least one."""
    raw = np.frombuffer(section.take((count + 7) // 8), np.uint8)
    if int(raw[-1]) >> ((count - 1) % 8 + 1):
        raise PatchFormatError("a bitmap in the patch has bits behind its end")
    return np.unpackbits(raw, count=count, bitorder="little")
