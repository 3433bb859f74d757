# SPDX-License-Identifier: Apache-2.0
"""Numbers as symbols and bits: both directions side by side.

Every decoder reads from :class:`SectionReader` objects in bounded pieces, so that the
memory needed to apply a patch does not depend on its size. FORMAT.md is the normative
description.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import PatchFormatError
from edge_runtime.formats.frames import SectionReader
from edge_runtime.formats.spool import Spool

# Elements decoded at a time: a multiple of 8, and so few that NumPy's temporaries stay
# in the processor's cache and below the size at which malloc goes to the kernel.
PIECE = 1 << 14
MAX_FINE = 7
MAX_WIDTH = 32  # of a number's low bits
MAX_BITS = 40  # of a number in unary: sums of a piece of them fit into 64
_MASKS = ((1 << np.arange(MAX_WIDTH + 1)) - 1).astype(np.uint32)

Integers = NDArray[np.int64]


def _warm_allocator() -> None:
    """Let this process keep freed blocks of up to 2 MiB, as long as it runs.

    glibc hands freed memory back to the kernel, and page faults to get it again cost
    more than decoding, until a block larger than what pieces need has come and gone.
    """
    np.empty(1 << 21, np.uint8)


_warm_allocator()


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
        # A symbol tells how many bits its number has; larger symbols have more.
        widest = min(length - 1 - fine, MAX_WIDTH)
        past = (widest + 2) << fine if widest >= 0 else 1 << length
        symbol = np.arange(min(past, 256))
        self._widths = np.maximum((symbol >> fine) - 1, 0)
        tops = symbol - (self._widths << fine) << self._widths
        self._tops = tops.astype(np.uint32) if length <= 32 else tops
        self._literals = min(2 << fine, len(symbol))
        self._symbols, self._bits = symbols, BitReader(bits)

    def take(self, count: int) -> NDArray[Any]:
        """Return the next ``count`` numbers.

        Raises:
            PatchFormatError: A section ends early, or a number is out of range.
        """
        symbols = np.frombuffer(self._symbols.take(count), np.uint8)
        large = symbols >= self._literals
        if 2 * np.count_nonzero(large) > count:
            return self._decoded(symbols)
        numbers: NDArray[Any] = symbols.astype(self._tops.dtype)
        numbers[large] = self._decoded(symbols[large])
        return numbers

    def _decoded(self, symbols: NDArray[np.uint8]) -> NDArray[Any]:
        at = symbols.astype(np.intp)  # once, for both tables
        try:
            numbers: NDArray[Any] = self._tops.take(at)
        except IndexError as err:
            raise PatchFormatError("a number in the patch is out of range") from err
        numbers |= self._bits.take(self._widths.take(at))
        return numbers

    def finish(self) -> None:
        """Insist that both sections are used up.

        Raises:
            PatchFormatError: Something is left over.
        """
        self._symbols.finish()
        self._bits.finish()


def unary_bits(numbers: Integers, width: int) -> tuple[Integers, Integers]:
    """Return what :func:`encode_bits` has to write for numbers in unary.

    Of each, less ``width`` low bits, as many zeros, then a one. With the low bits this
    is the code of Golomb and Rice, which is within a percent of the entropy of gaps
    between positions that are all equally likely.
    """
    words, zeros = np.divmod(numbers >> width, MAX_WIDTH)
    last = np.cumsum(words + 1) - 1
    bits = np.zeros(int(last[-1]) + 1 if last.size else 0, np.int64)
    widths = np.full_like(bits, MAX_WIDTH)
    bits[last], widths[last] = 1 << zeros, zeros + 1
    return bits, widths


def unary_width(numbers: Integers) -> int:
    """Return the ``width`` with which unary and low bits are shortest together."""
    return min(
        range(MAX_WIDTH + 1),
        key=lambda width: len(numbers) * width + int((numbers >> width).sum()),
    )


class UnaryReader:
    """Decodes numbers of :func:`unary_bits` and :func:`encode_bits`."""

    def __init__(self, unary: SectionReader, bits: SectionReader, width: int) -> None:
        """Prepare to read.

        Args:
            unary: The numbers without their low bits.
            bits: The low bits.
            width: As for :func:`unary_bits`.

        Raises:
            PatchFormatError: ``width`` is out of range.
        """
        if width > MAX_WIDTH:
            raise PatchFormatError(
                f"{width} low bits in the patch, at most {MAX_WIDTH}"
            )
        self._unary, self._bits, self._width = unary, BitReader(bits), width
        # Bits of which the ones are known, those ones, and the last one that was used.
        self._seen, self._ones, self._last = 0, np.empty(0, np.int64), -1

    def take(self, count: int) -> Integers:
        """Return the next ``count`` numbers.

        Raises:
            PatchFormatError: A section ends early, or a number is out of range.
        """
        while len(self._ones) < count:
            raw = np.frombuffer(self._unary.take_most(PIECE // 8), np.uint8)
            (found,) = np.unpackbits(raw, bitorder="little").nonzero()
            self._ones = np.concatenate([self._ones, found + self._seen])
            self._seen += 8 * len(raw)
        ones, self._ones = self._ones[:count], self._ones[count:]
        numbers = np.diff(ones, prepend=self._last)
        numbers -= 1
        if int(numbers.max(initial=0)) >> (MAX_BITS - self._width):
            raise PatchFormatError("a number in the patch is out of range")
        self._last = int(ones[-1]) if count else self._last
        numbers <<= self._width
        numbers |= self._bits.take(np.full(count, self._width))
        return numbers

    def finish(self) -> None:
        """Insist that both sections are used up and the last bits are zero.

        Raises:
            PatchFormatError: Something is left over.
        """
        self._unary.finish()
        self._bits.finish()
        if self._ones.size or self._seen - self._last > 8:
            raise PatchFormatError("the patch has bits left over")


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


class BitWriter:
    """Writes bits one after the other, in pieces of any length."""

    def __init__(self, spool: Spool) -> None:
        """Prepare to write at the end of ``spool``."""
        self._spool = spool
        self._byte, self._bit = np.zeros(1, np.int64), np.zeros(1, np.int64)

    def write(self, numbers: Integers, widths: Integers) -> None:
        """Write the low bits of numbers, as :func:`encode_bits` does."""
        # What is left over of the byte before comes first.
        widths = np.concatenate([self._bit, widths])
        data = encode_bits(np.concatenate([self._byte, numbers]), widths)
        whole, left = divmod(int(widths.sum()), 8)
        self._spool.write(data[:whole])
        self._bit[0], self._byte[0] = left, data[whole] if left else 0

    def finish(self) -> None:
        """Write the last bits."""
        if self._bit[0]:
            self._spool.write(bytes([int(self._byte[0])]))


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
        starts = widths.cumsum()
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
