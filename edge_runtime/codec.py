"""Numbers as symbols and bits, and positions as numbers: both directions side by side.

Every decoder reads from :class:`SectionReader` objects in bounded pieces, so that the
memory needed to apply a patch does not depend on its size. FORMAT.md is the normative
description.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import PatchFormatError
from edge_runtime.sections import (
    COLUMNS,
    INDEX,
    INDEX_BITS,
    SectionReader,
    quick_size,
)

# Elements decoded at a time: a multiple of 8, and so few that NumPy's temporaries stay
# in the processor's cache and below the size at which malloc goes to the kernel.
PIECE = 1 << 14
MAX_FINE = 7
MAX_WIDTH = 32  # of a number's low bits
MAX_ROW = 1 << 16  # elements of a row whose columns may be left out
_MASKS = ((1 << np.arange(MAX_WIDTH + 1)) - 1).astype(np.uint32)
_SAMPLE = 1 << 20  # numbers that a fineness is chosen on

Integers = NDArray[np.int64]
Positions = Integers
Mask = NDArray[np.bool_]


# Numbers: a symbol each, and the low bits of large ones ------------------------------


def encode_numbers(numbers: Integers, fine: int) -> tuple[bytes, Integers]:
    """Split non-negative numbers into symbols and the widths of their low bits.

    A number below ``2 << fine`` is its own symbol. Of a larger one the symbol names
    the length and the ``fine`` bits below the leading one; the lower bits are noise and
    go into a bit stream as they are. One byte a number lets zstd see how they are
    distributed, and how masks cluster.

    Args:
        numbers: What to encode.
        fine: Bits of a large number that the symbol holds, of :func:`finenesses`.

    Returns:
        The symbols, and for each number how many low bits it has.
    """
    widths = bit_lengths(numbers) - 1 - fine
    np.maximum(widths, 0, out=widths)
    return ((widths << fine) + (numbers >> widths)).astype(np.uint8).tobytes(), widths


def bit_lengths(numbers: NDArray[Any]) -> Integers:
    """Return the bit lengths of numbers from 0 to 2**53."""
    # As exact doubles: what they have in their exponent field. Faster than frexp.
    lengths: Integers = numbers.astype(np.float64).view(np.int64) >> 52
    lengths -= 1022
    np.maximum(lengths, 0, out=lengths)
    return lengths


def finenesses(largest: int) -> list[int]:
    """Return the values of ``fine`` with which numbers up to ``largest`` fit."""
    found = []
    for fine in range(MAX_FINE + 1):
        width = min((255 >> fine) - 1, MAX_WIDTH)
        top = min(255 - (width << fine), (2 << fine) - 1)
        if largest >> width <= top:
            found.append(fine)
    return found


class NumberReader:
    """Decodes what :func:`encode_numbers` and :func:`encode_bits` wrote."""

    def __init__(
        self, symbols: SectionReader, bits: SectionReader, fine: int, length: int = 64
    ) -> None:
        """Prepare to read.

        Args:
            symbols: One byte a number.
            bits: The low bits.
            fine: As for :func:`encode_numbers`.
            length: Bits that a number may have. Up to 32, numbers are uint32.

        Raises:
            PatchFormatError: ``fine`` is out of range.
        """
        if fine > MAX_FINE:
            raise PatchFormatError(f"{fine} fine bits in the patch, at most {MAX_FINE}")
        symbol = np.arange(256)
        self._widths = np.maximum((symbol >> fine) - 1, 0)
        tops = symbol - (self._widths << fine)
        # A symbol tells how many bits its number has; larger symbols have more.
        fits = bit_lengths(tops) + self._widths <= length
        self._largest = np.flatnonzero(fits & (self._widths <= MAX_WIDTH))[-1]
        tops <<= np.minimum(self._widths, MAX_WIDTH)
        self._tops = tops.astype(np.uint32) if length <= 32 else tops
        self._literals = min(2 << fine, 255)
        self._symbols, self._bits = symbols, BitReader(bits)
        self._ready: NDArray[Any] = self._tops[:0]

    def take(self, count: int, ahead: int = 0) -> NDArray[Any]:
        """Return the next ``count`` numbers.

        Args:
            count: How many.
            ahead: How many are certain to follow, these included: small calls are cheap
                where it is many.

        Raises:
            PatchFormatError: A section ends early, or a number is out of range.
        """
        if count > len(self._ready):
            more = max(count, min(ahead, PIECE)) - len(self._ready)
            self._ready = np.concatenate([self._ready, self._decode(more)])
        numbers, self._ready = self._ready[:count], self._ready[count:]
        return numbers

    def _decode(self, count: int) -> NDArray[Any]:
        symbols = np.frombuffer(self._symbols.take(count), np.uint8)
        if symbols.max(initial=0) > self._largest:
            raise PatchFormatError("a number in the patch is out of range")
        numbers: NDArray[Any] = self._tops.take(symbols)
        large = np.flatnonzero(symbols >= self._literals)
        if 2 * large.size < count:
            numbers[large] |= self._bits.take(self._widths.take(symbols[large]))
        else:
            numbers |= self._bits.take(self._widths.take(symbols))
        return numbers

    def finish(self) -> None:
        """Insist that both sections are used up.

        Raises:
            PatchFormatError: Something is left over.
        """
        self._symbols.finish()
        self._bits.finish()


def encode_bits(numbers: Integers, widths: Integers) -> bytes:
    """Write the low bits of numbers one after the other, least significant first."""
    # Each number touches the 64-bit words at and behind its first bit.
    stops = np.cumsum(widths)
    starts = stops - widths
    low = (numbers & ((1 << widths) - 1)).astype(np.uint64)
    shifts = (starts & 63).astype(np.uint64)
    words = np.zeros((int(stops[-1]) >> 6) + 2 if stops.size else 0, np.uint64)
    np.bitwise_or.at(words, starts >> 6, low << shifts)
    # Two shifts, as one by 64 is undefined.
    np.bitwise_or.at(words, (starts >> 6) + 1, low >> np.uint64(1) >> (63 - shifts))
    return words.astype("<u8").tobytes()[
        : (int(stops[-1]) + 7) // 8 if stops.size else 0
    ]


class BitReader:
    """Decodes what :func:`encode_bits` wrote, in bounded pieces."""

    def __init__(self, section: SectionReader) -> None:
        self._section = section
        self._byte, self._bit = b"", 0  # the byte that is only partly used

    def take(self, widths: Integers) -> NDArray[np.uint32]:
        """Return the next numbers of these widths, each at most ``MAX_WIDTH``.

        Raises:
            PatchFormatError: The section ends early.
        """
        starts = np.cumsum(widths)
        starts += self._bit
        stop = int(starts[-1]) if starts.size else self._bit
        starts -= widths
        need = (stop + 7) // 8
        data = self._byte + self._section.take(need - len(self._byte))
        self._bit = stop & 7
        self._byte = data[-1:] if self._bit else b""
        # A 64-bit word at every fourth byte: one gather instead of a loop over bits.
        padded = np.frombuffer(data + bytes(8 + -need % 4), "<u4").astype(np.uint64)
        words = padded[1:] << np.uint64(32)
        words |= padded[:-1]
        low = words.take(starts >> 5)
        starts &= 31
        low >>= starts.view(np.uint64)
        numbers = low.astype(np.uint32)
        numbers &= _MASKS.take(widths)
        return numbers

    def finish(self) -> None:
        """Insist that the section is used up and the last bits are zero.

        Raises:
            PatchFormatError: Something is left over.
        """
        self._section.finish()
        if self._byte and self._byte[0] >> self._bit:
            raise PatchFormatError("the patch has bits left over")


# Positions: gaps between the listed ones, or a bitmap --------------------------------


def _is_bitmap(size: int, count: int) -> bool:
    """Tell whether a tensor has a bitmap; otherwise its positions are listed."""
    return size < 4 * count < 3 * size


def gaps_ahead(tensors: Sequence[tuple[int, int]]) -> list[int]:
    """Return how many gaps follow one another from each tensor on.

    Args:
        tensors: Element count of each, and how many of them travel.
    """
    ahead, found = 0, []
    for size, count in reversed(tensors):
        listed = min(count, size - count)
        ahead = 0 if _is_bitmap(size, count) else ahead + listed
        found.append(ahead)
    return found[::-1]


def _grid(shape: tuple[int, ...], count: int) -> tuple[int, int] | None:
    """Return number and depth of a tensor's columns, where unused ones are left out.

    A column is a slice along the second axis: an input of a layer. Its depth is the
    number of its elements in a row.
    """
    if len(shape) < 2 or not 0 < 4 * count <= math.prod(shape):
        return None
    columns, depth = shape[1], math.prod(shape[2:])
    return (columns, depth) if columns * depth <= MAX_ROW else None


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

    def pieces(
        self, shape: tuple[int, ...], count: int, ahead: int = 0
    ) -> Iterator[Positions]:
        """Yield the positions that travel of the next tensor, in ascending pieces.

        Args:
            shape: The tensor's.
            count: How many of its elements travel.
            ahead: What :func:`gaps_ahead` says of it.

        Yields:
            One to ``PIECE`` positions.

        Raises:
            PatchFormatError: A section ends early or contradicts the tensor.
        """
        size, grid = math.prod(shape), _grid(shape, count)
        if count == size:
            return (
                np.arange(start, min(start + PIECE, size))
                for start in range(0, size, PIECE)
            )
        if _is_bitmap(size, count):
            found = self._bitmap(size, count)
        elif 2 * count > size:
            found = self._others(size, size - count, ahead)
        elif grid is None or self._all_columns:
            found = self._listed(size, count, ahead)
        else:
            found = self._in_columns(shape[0], grid, count, ahead)
        return filter(len, found)

    def _in_columns(
        self, rows: int, grid: tuple[int, int], count: int, ahead: int
    ) -> Iterator[Positions]:
        columns, depth = grid
        used = self._bits(self._columns, columns)
        offsets = np.flatnonzero(np.repeat(used, depth))
        for positions in self._listed(rows * len(offsets), count, ahead):
            row = positions // len(offsets)  # faster than divmod, by far
            positions -= row * len(offsets)
            row *= columns * depth
            row += offsets.take(positions)
            yield row

    def _listed(self, size: int, count: int, ahead: int) -> Iterator[Positions]:
        previous = -1
        for start in range(0, count, PIECE):
            gaps = self._gaps.take(min(PIECE, count - start), ahead - start)
            gaps += 1
            positions: Positions = gaps.cumsum()
            positions += previous
            previous = int(positions[-1])
            # What still has to come needs room behind this piece.
            if previous >= size - (count - start - len(gaps)):
                raise PatchFormatError(
                    f"a position in the patch is out of bounds: {previous} of {size} "
                    "elements"
                )
            yield positions

    def _others(self, size: int, count: int, ahead: int) -> Iterator[Positions]:
        stays, listed = np.empty(0, np.int64), self._listed(size, count, ahead)
        left = count
        for start in range(0, size, PIECE):
            stop = min(start + PIECE, size)
            while left and (not stays.size or stays[-1] < stop):
                found = next(listed)
                left -= len(found)
                stays = np.concatenate([stays, found])
            inside = int(np.searchsorted(stays, stop))
            yield np.flatnonzero(~_mask(stop - start, stays[:inside] - start)) + start
            stays = stays[inside:]

    def _bitmap(self, size: int, count: int) -> Iterator[Positions]:
        left = count
        for start in range(0, size, PIECE):
            piece = min(PIECE, size - start)
            found = np.flatnonzero(self._bits(self._index, piece)) + start
            left -= len(found)
            yield found
        if left:
            raise PatchFormatError(
                f"a bitmap in the patch has {count - left} bits, expected {count}"
            )

    def _bits(self, section: SectionReader, count: int) -> NDArray[np.uint8]:
        raw = np.frombuffer(section.take((count + 7) // 8), np.uint8)
        bits = np.unpackbits(raw, bitorder="little")
        if bits[count:].any():
            raise PatchFormatError("a bitmap in the patch has bits behind its end")
        return bits[:count]

    def finish(self) -> None:
        """Insist that everything is used up.

        Raises:
            PatchFormatError: Something is left over.
        """
        self._gaps.finish()
        self._columns.finish()
