"""Positions as numbers: which elements travel, both directions side by side.

What NumPy costs a call is what small tensors cost. So a reader decodes neighbouring
tensors together, as many as fit into a batch of bounded size. FORMAT.md is the
normative description.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress, groupby
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from edge_runtime.codec import (
    PIECE,
    Integers,
    NumberReader,
    encode_bits,
    encode_numbers,
    finenesses,
)
from edge_runtime.errors import PatchFormatError
from edge_runtime.sections import (
    COLUMNS,
    DENSE,
    INDEX,
    INDEX_BITS,
    SectionReader,
    group_kind,
    quick_size,
)
from edge_runtime.weights import Tensor

MAX_ROW = 1 << 16  # elements of a row whose columns may be left out
_SAMPLE = 1 << 20  # numbers that a fineness is chosen on

Positions = Integers
Mask = NDArray[np.bool_]

_SPARSE = {size: group_kind(size, dense=False) for size in (1, 2, 4, 8)}


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


def encode_positions(
    tensors: Sequence[tuple[tuple[int, ...], Positions]],
) -> tuple[int, dict[int, list[bytes]]]:
    """Encode which elements travel, tensor by tensor.

    Of a tensor of which up to a quarter travels the positions are listed, as gaps: the
    number of elements skipped since the one before. Columns in which nothing travels
    (dead inputs, borders of images) may be left out of the count. Where three quarters
    or more travel, the elements that stay are listed; in between it is a bitmap.

    Args:
        tensors: Shape and strictly increasing positions of each tensor.

    Returns:
        The fineness of the gaps, and the sections, in parts.

    Raises:
        PatchFormatError: A gap is too large.
    """
    taken = [_take_apart(shape, positions) for shape, positions in tensors]
    numbers = np.concatenate([np.zeros(0, np.int64), *(gaps for gaps, _, _ in taken)])
    candidates = finenesses(int(numbers.max(initial=0)))
    if not candidates:
        raise PatchFormatError(
            f"two changes are {numbers.max()} elements apart, which is too far for a "
            "patch; split the tensor"
        )
    sample = numbers[:: len(numbers) // _SAMPLE + 1]
    fine = min(candidates, key=lambda one: _size(sample, one))
    symbols, widths = encode_numbers(numbers, fine)
    stops = np.cumsum([len(gaps) for gaps, _, _ in taken])
    used = [columns for _, _, columns in taken if columns is not None]
    return fine, {
        INDEX: [
            bitmap or symbols[stop - len(gaps) : stop]
            for (gaps, bitmap, _), stop in zip(taken, stops, strict=True)
        ],
        INDEX_BITS: [encode_bits(numbers, widths)],
        COLUMNS: [_pack(one) for one in used if not all(map(np.all, used))],
    }


def _take_apart(
    shape: tuple[int, ...], positions: Positions
) -> tuple[Integers, bytes, Mask | None]:
    """Return the gaps or the bitmap of one tensor, and which columns count."""
    size, grid = math.prod(shape), _grid(shape, len(positions))
    if _is_bitmap(size, len(positions)):
        return positions[:0], _pack(_mask(size, positions)), None
    if 2 * len(positions) > size:
        positions = np.flatnonzero(~_mask(size, positions))
    gaps = np.diff(positions, prepend=-1) - 1
    if grid is None:
        return gaps, b"", None
    columns, depth = grid
    row, at = np.divmod(positions, columns * depth)
    used = _mask(columns, at // depth)
    offsets = np.flatnonzero(np.repeat(used, depth))
    fewer = row * len(offsets) + np.searchsorted(offsets, at)
    closer = np.diff(fewer, prepend=-1) - 1
    if _size(closer, 2) + columns < _size(gaps, 2):
        return closer, b"", used
    return gaps, b"", np.ones(columns, bool)


def _size(numbers: Integers, fine: int) -> int:
    """Return about how many bits numbers take."""
    symbols, widths = encode_numbers(numbers, fine)
    return 8 * quick_size(symbols) + int(widths.sum())


def _mask(size: int, positions: Positions) -> Mask:
    mask = np.zeros(size, bool)
    mask[positions] = True
    return mask


def _pack(mask: Mask) -> bytes:
    return np.packbits(mask, bitorder="little").tobytes()


# Decoding ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Changes:
    """How much travels, of each tensor of which something does.

    In arrays: a loop over small tensors costs more than decoding them.

    Attributes:
        tensors: In the order of the file.
        counts: How many of their elements travel.
        sizes: How many elements they have.
        firsts: Where they begin, in elements of their size from the start of the file.
        groups: The groups of values that they belong to.
    """

    tensors: Sequence[Tensor]
    counts: Integers
    sizes: Integers
    firsts: Integers
    groups: Integers

    @classmethod
    def of(cls, tensors: Sequence[Tensor], counts: Sequence[int]) -> Self:
        """Hold counts against the tensors that they are for.

        Raises:
            PatchFormatError: A count is too large.
        """
        for tensor, count in zip(tensors, counts, strict=True):
            if count > tensor.size:
                raise PatchFormatError(
                    f"the patch changes {count} elements of tensor {tensor.name!r}, "
                    f"which has {tensor.size}"
                )
        tensors = list(compress(tensors, counts))
        some = np.array(list(filter(None, counts)), np.int64)
        sizes = np.array([tensor.size for tensor in tensors], np.int64)
        starts = np.array([tensor.start for tensor in tensors], np.int64)
        item_sizes = [tensor.item_size for tensor in tensors]
        groups = np.array([_SPARSE[size] for size in item_sizes], np.int64)
        groups += DENSE * (2 * some > sizes)
        firsts = starts // np.array(item_sizes, np.int64)
        return cls(tensors, some, sizes, firsts, groups)


class Run(NamedTuple):
    """Elements whose values follow one another in the patch.

    Attributes:
        group: The group of values that they belong to.
        tensors: Neighbours of one type, in which they lie.
        positions: Ascending, counted in elements from the start of the *file*.
    """

    group: int
    tensors: Sequence[Tensor]
    positions: Positions

    @property
    def dtype(self) -> str:
        """The type of its elements."""
        return self.tensors[0].dtype

    @property
    def item_size(self) -> int:
        """Bytes of one of its elements."""
        return self.tensors[0].item_size


class PositionReader:
    """Decodes what :func:`encode_positions` wrote, in bounded pieces."""

    def __init__(self, section: Callable[[int], SectionReader], fine: int) -> None:
        """Prepare to read.

        Args:
            section: Opens a section by its kind.
            fine: The fineness of the gaps.

        Raises:
            PatchFormatError: ``fine`` is out of range.
        """
        self._index, self._columns = section(INDEX), section(COLUMNS)
        self._all_columns = self._columns.is_empty
        self._gaps = NumberReader(self._index, section(INDEX_BITS), fine)
        # Of the list that was read last, as it may go on: its last position, and which
        # elements of a row it counts; None stands for all of them.
        self._last = -1
        self._used: Integers | None = None

    def batches(self, changes: Changes) -> Iterator[list[Run]]:
        """Yield what travels, in the order of the file.

        Yields:
            Runs of different groups, of one to ``PIECE`` positions, all of them before
            those of the next batch.

        Raises:
            PatchFormatError: A section ends early or contradicts a tensor.
        """
        # Neighbours of one type are read together, but for those that need a mask.
        masked = (4 * changes.counts > changes.sizes) & (changes.counts < changes.sizes)
        types = (tensor.dtype for tensor in changes.tensors)
        stop = 0
        for (_, mask), alike in groupby(zip(types, masked.tolist(), strict=True)):
            start, stop = stop, stop + len(list(alike))
            if not mask:
                yield from self._together(changes, start, stop)
                continue
            for at in range(start, stop):
                size, count = int(changes.sizes[at]), int(changes.counts[at])
                read = self._bitmap if _is_bitmap(size, count) else self._others
                for positions in filter(len, read(size, count)):
                    positions += changes.firsts[at]
                    tensors = changes.tensors[at : at + 1]
                    yield [Run(int(changes.groups[at]), tensors, positions)]

    def _together(self, changes: Changes, start: int, stop: int) -> Iterator[list[Run]]:
        """Yield what travels of neighbours that are listed or whole."""
        stops = changes.counts[start:stop].cumsum()
        total = int(stops[-1])
        for low in range(0, total, PIECE):
            high = min(low + PIECE, total)
            first, last = stops.searchsorted([low, high - 1], "right").tolist()
            part = slice(start + first, start + last + 1)
            counts = changes.counts[part]
            # Some positions of the first may have come before, of the last come behind.
            done, left = low - stops[first] + counts[0], 0 * counts
            left[-1] = stops[last] - high
            now = counts - left
            now[0] -= done
            whole = counts == changes.sizes[part]
            batch = []
            for kind, read in ((~whole, self._listed), (whole, _whole)):
                (at,) = kind.nonzero()
                if at.size:
                    some = _Part(
                        at + part.start, now[at], left[at], 0 if at[0] else int(done)
                    )
                    group = int(changes.groups[some.at[0]])
                    batch.append(Run(group, changes.tensors[part], read(changes, some)))
            yield batch

    def _listed(self, changes: Changes, part: "_Part") -> Positions:
        """Read positions of tensors that are listed, from the start of the file."""
        sizes, firsts = changes.sizes[part.at], changes.firsts[part.at]
        fewer = []  # tensors of which not all columns count
        for number, at in enumerate([] if self._all_columns else part.at.tolist()):
            if number or not part.done:
                self._used = self._columns_of(changes.tensors[at], changes.counts[at])
            if self._used is not None:
                sizes[number] = changes.tensors[at].shape[0] * len(self._used)
                firsts[number] = 0
                fewer.append((number, changes.tensors[at], self._used))
        positions = self._list(part, sizes, firsts)
        stops = part.now.cumsum()
        for number, tensor, used in fewer:
            among = positions[stops[number] - part.now[number] : stops[number]]
            row = among // len(used)  # faster than divmod, by far
            among -= row * len(used)
            row *= tensor.size // tensor.shape[0]
            row += tensor.start // tensor.item_size
            np.add(row, used.take(among), out=among)
        return positions

    def _columns_of(self, tensor: Tensor, count: int) -> Integers | None:
        """Read which elements of a row count; None stands for all of them."""
        grid = _grid(tensor.shape, count)
        if grid is None:
            return None
        columns, depth = grid
        bitmap = _bitmap(self._columns, columns)
        if int.from_bytes(bitmap, "little").bit_count() == columns:
            return None
        (used,) = _bits(bitmap, columns).repeat(depth).nonzero()
        return used

    def _list(self, part: "_Part", sizes: Integers, firsts: Integers) -> Positions:
        """Read lists of positions, one behind the other.

        Args:
            part: What to read.
            sizes: What every position of each must be below.
            firsts: What is then added to each.
        """
        stops = part.now.cumsum()
        sums = self._gaps.take(int(stops[-1]))
        sums += 1
        sums.cumsum(out=sums)
        # One sum over all lists, but each begins anew, or where its part before ended.
        last = sums[stops - 1]
        shifts = -1 - np.concatenate([[0], last[:-1]])
        if part.done:
            shifts[0] = self._last
        last += shifts
        # What still has to come needs room too.
        (beyond,) = (last >= sizes - part.left).nonzero()
        if beyond.size:
            raise PatchFormatError(
                f"a position in the patch is out of bounds: {last[beyond[0]]} of "
                f"{sizes[beyond[0]]} elements"
            )
        self._last = int(last[-1])
        shifts += firsts
        sums += shifts.repeat(part.now)
        return sums

    def _others(self, size: int, count: int) -> Iterator[Positions]:
        """Yield the positions of a tensor of which those that stay are listed."""
        stays, done, total = np.empty(0, np.int64), 0, size - count
        for start in range(0, size, PIECE):
            stop = min(start + PIECE, size)
            while done < total and (not stays.size or stays[-1] < stop):
                now = min(PIECE, total - done)
                none, left = np.zeros(1, np.int64), total - done - now
                part = _Part(none, none + now, none + left, done)
                stays = np.concatenate([stays, self._list(part, none + size, none)])
                done += now
            inside = int(stays.searchsorted(stop))
            yield np.flatnonzero(~_mask(stop - start, stays[:inside] - start)) + start
            stays = stays[inside:]

    def _bitmap(self, size: int, count: int) -> Iterator[Positions]:
        left = count
        for start in range(0, size, PIECE):
            piece = min(PIECE, size - start)
            (found,) = _bits(_bitmap(self._index, piece), piece).nonzero()
            found += start
            left -= len(found)
            yield found
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
        self._columns.finish()


class _Part(NamedTuple):
    """What is read of some tensors at once.

    Attributes:
        at: Which tensors.
        now: How many positions of each.
        left: How many of each come later; only the last one may have such.
        done: How many of the first have come before.
    """

    at: Integers
    now: Integers
    left: Integers
    done: int


def _whole(changes: Changes, part: _Part) -> Positions:
    """Return positions of tensors that travel whole, from the start of the file."""
    stops = part.now.cumsum()
    shifts = changes.firsts[part.at] - stops
    shifts += part.now
    shifts[0] += part.done
    positions = np.arange(stops[-1])
    positions += shifts.repeat(part.now)
    return positions


def _bitmap(section: SectionReader, count: int) -> bytes:
    """Read a bitmap of so many bits."""
    raw = section.take((count + 7) // 8)
    if raw[-1] >> ((count - 1) % 8 + 1):
        raise PatchFormatError("a bitmap in the patch has bits behind its end")
    return raw


def _bits(bitmap: bytes, count: int) -> NDArray[np.uint8]:
    raw = np.frombuffer(bitmap, np.uint8)
    return np.unpackbits(raw, count=count, bitorder="little")
