"""Numbers as symbols and bits, and positions as numbers: both directions side by side.

Every decoder reads from :class:`SectionReader` objects in bounded pieces, so that the
memory needed to apply a patch does not depend on its size. FORMAT.md is the normative
description.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import PatchFormatError
from edge_runtime.sections import SectionReader, quick_size

# Elements decoded at a time: a multiple of 8, and so few that NumPy's temporaries stay
# in the processor's cache and below the size at which malloc goes to the kernel.
PIECE = 1 << 15
MAX_FINE = 7
MAX_WIDTH = 32  # of a number's low bits
_SAMPLE = 1 << 20  # numbers that a fineness is chosen on

Integers = NDArray[np.int64]
Positions = Integers


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
    # frexp gives the bit length exactly for integers below 2**53.
    widths = np.frexp(numbers.astype(np.float64))[1].astype(np.int64) - 1 - fine
    np.maximum(widths, 0, out=widths)
    return ((widths << fine) + (numbers >> widths)).astype(np.uint8).tobytes(), widths


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

    def __init__(self, symbols: SectionReader, bits: SectionReader, fine: int) -> None:
        """Prepare to read.

        Args:
            symbols: One byte a number.
            bits: The low bits.
            fine: As for :func:`encode_numbers`.

        Raises:
            PatchFormatError: ``fine`` is out of range.
        """
        if fine > MAX_FINE:
            raise PatchFormatError(f"{fine} fine bits in the patch, at most {MAX_FINE}")
        symbol = np.arange(256)
        self._widths = np.maximum((symbol >> fine) - 1, 0)
        # Symbols whose width is too large are refused before they are looked up.
        self._tops = (symbol - (self._widths << fine)) << np.minimum(self._widths, 48)
        self._literals = min(2 << fine, 255)
        self._symbols, self._bits = symbols, BitReader(bits)

    def take(self, count: int) -> Integers:
        """Return the next ``count`` numbers.

        Raises:
            PatchFormatError: A section ends early, or a number is out of range.
        """
        symbols = np.frombuffer(self._symbols.take(count), np.uint8)
        numbers: Integers = self._tops.take(symbols)
        large = np.flatnonzero(symbols >= self._literals)
        if 2 * large.size < count:
            numbers[large] |= self._low_bits(symbols[large])
        else:
            numbers |= self._low_bits(symbols)
        return numbers

    def _low_bits(self, symbols: NDArray[np.uint8]) -> Integers:
        widths = self._widths.take(symbols)
        if widths.max(initial=0) > MAX_WIDTH:
            raise PatchFormatError("a number in the patch is out of range")
        return self._bits.take(widths)

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

    def take(self, widths: Integers) -> Integers:
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
        masks = 1 << widths
        masks -= 1
        masks &= low.view(np.int64)
        return masks

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


def encode_positions(
    tensors: Sequence[tuple[int, Positions]],
) -> tuple[int, list[bytes], bytes]:
    """Encode which elements travel, tensor by tensor.

    Of a tensor of which up to a quarter travels the positions are listed, as gaps: the
    number of elements skipped since the one before. Where three quarters or more
    travel, those that stay are listed instead; in between it is a bitmap.

    Args:
        tensors: Element count and strictly increasing positions of each tensor.

    Returns:
        The fineness of the gaps; for each tensor its symbols or bitmap; and the bits.

    Raises:
        PatchFormatError: A gap is too large.
    """
    gaps, bitmaps = [], []
    for size, positions in tensors:
        gap, bitmap = np.empty(0, np.int64), b""
        if _is_bitmap(size, len(positions)):
            bitmap = np.packbits(_mask(size, positions), bitorder="little").tobytes()
        else:
            if 2 * len(positions) > size:
                positions = np.flatnonzero(~_mask(size, positions))
            gap = np.diff(positions, prepend=-1) - 1
        gaps.append(gap)
        bitmaps.append(bitmap)
    numbers: Integers = np.concatenate([*gaps, []]).astype(np.int64)
    candidates = finenesses(int(numbers.max(initial=0)))
    if not candidates:
        raise PatchFormatError(
            f"two changes are {numbers.max()} elements apart, which is too far for a "
            "patch; split the tensor"
        )
    sample = numbers[:: len(numbers) // _SAMPLE + 1]
    fine = min(candidates, key=lambda one: _size(sample, one))
    symbols, widths = encode_numbers(numbers, fine)
    ends = np.cumsum([len(gap) for gap in gaps])
    parts = [
        bitmap or symbols[end - len(gap) : end]
        for bitmap, gap, end in zip(bitmaps, gaps, ends, strict=True)
    ]
    return fine, parts, encode_bits(numbers, widths)


def _size(numbers: Integers, fine: int) -> int:
    symbols, widths = encode_numbers(numbers, fine)
    return 8 * quick_size(symbols) + int(widths.sum())


def _mask(size: int, positions: Positions) -> NDArray[np.bool_]:
    mask = np.zeros(size, bool)
    mask[positions] = True
    return mask


class PositionReader:
    """Decodes what :func:`encode_positions` wrote, in bounded pieces."""

    def __init__(self, index: SectionReader, bits: SectionReader, fine: int) -> None:
        """Prepare to read; the arguments are as for :class:`NumberReader`."""
        self._index, self._gaps = index, NumberReader(index, bits, fine)

    def pieces(self, size: int, count: int) -> Iterator[Positions]:
        """Yield the positions that travel of the next tensor, in ascending pieces.

        Args:
            size: Its elements.
            count: How many of them travel.

        Yields:
            One to ``PIECE`` positions.

        Raises:
            PatchFormatError: A section ends early or contradicts the tensor.
        """
        if _is_bitmap(size, count):
            found = self._bitmap(size, count)
        elif 2 * count > size:
            found = self._others(size, size - count)
        else:
            found = self._listed(size, count)
        return filter(len, found)

    def _listed(self, size: int, count: int) -> Iterator[Positions]:
        previous = -1
        for start in range(0, count, PIECE):
            gaps = self._gaps.take(min(PIECE, count - start))
            gaps += 1
            positions: Positions = np.cumsum(gaps) + previous
            previous = int(positions[-1])
            # What still has to come needs room behind this piece.
            if previous >= size - (count - start - len(gaps)):
                raise PatchFormatError(
                    f"a position in the patch is out of bounds: {previous} of {size} "
                    "elements"
                )
            yield positions

    def _others(self, size: int, count: int) -> Iterator[Positions]:
        stays, listed = np.empty(0, np.int64), self._listed(size, count)
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
            stop = min(start + PIECE, size)
            raw = np.frombuffer(self._index.take((stop - start + 7) // 8), np.uint8)
            found = np.flatnonzero(np.unpackbits(raw, bitorder="little")) + start
            left -= len(found)
            if found.size and found[-1] >= size:
                raise PatchFormatError("a bitmap in the patch has bits behind its end")
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
