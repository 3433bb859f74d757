# SPDX-License-Identifier: Apache-2.0
"""Positions as numbers: which elements travel, both directions side by side.

Every decoder reads in bounded pieces, so that the memory needed to apply a patch does
not depend on its size. FORMAT.md is the normative description.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from itertools import accumulate, chain, groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import PatchFormatError
from edge_runtime.formats.frames import LEVEL, Parts, SectionReader
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
from edge_runtime.formats.tensor_index import (
    WINDOW,
    Found,
    Positions,
    TensorIndex,
    grid_of,
    is_bitmap,
    mask_of,
    pack_mask,
    size_of,
)

UNARY_GAPS = 8  # a fineness of 8 and more: gaps in unary, beside 0 and more low bits
_DOUBT = 2560  # tenths of a bit that an estimate of a size may be wrong by
_SAMPLE = 1 << 20  # numbers that a fineness is chosen on
_LONG_RUN = 1 << 13  # positions

Change = tuple[int, Tensor, int]  # group of values, tensor, how many elements travel

# Encoding ----------------------------------------------------------------------------


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
    index = [TensorIndex(shape, found) for shape, found in tensors]
    sample, largest = _survey(index)
    candidates = finenesses(largest)
    if not candidates:
        raise PatchFormatError(
            f"two changes are {largest} elements apart, which is too far for a "
            "patch; split the tensor"
        )
    fine = min(candidates, key=lambda one: size_of([sample], one))
    width = unary_width(sample)
    bits = len(sample) * (width + 1) + int((sample >> width).sum())
    is_close = 10 * bits <= 11 * size_of([sample], fine) + _DOUBT
    sections, even = _write(index, fine, width if is_close else None)
    # Of two that are close, those tell that are packed to the last byte.
    if is_close and len(encode_body(even, level, pool)) < len(
        encode_body(sections, level, pool)
    ):
        return UNARY_GAPS + width, even
    return fine, sections


def _survey(index: Sequence[TensorIndex]) -> tuple[Integers, int]:
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
    index: Sequence[TensorIndex], fine: int, width: int | None
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
            columns.write(pack_mask(one.used))
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


def _contents(index: Sequence[TensorIndex]) -> Iterator[tuple[bytes, Integers]]:
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
            tensors, lambda one: is_bitmap(one[1].size, one[2])
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
        if is_bitmap(size, count):
            return self._bitmap(size, count, first)
        if 2 * count > size:
            return self._others(size, size - count, first)
        if not self._all_columns and (grid := grid_of(tensor.axes, count)):
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
            (found,) = (~mask_of(stop - start, stays[:inside] - start)).nonzero()
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
