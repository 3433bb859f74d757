# SPDX-License-Identifier: Apache-2.0
"""The line on which values are steps from the base, and how a group is written.

Training moves the small and the large weights of a tensor about equally far, so a new
value costs least as a step in *linear* space. But ``base + (new - base)`` is not
always ``new``. Therefore elements are mapped to integers, and back, without loss: to a
:class:`Line` on which floats up to a chosen magnitude are evenly spaced. What travels
is the difference of two such integers, and the few bits that tell apart the floats that
fall on one of them. FORMAT.md is the normative description.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import PatchFormatError
from edge_runtime.formats.numbers import MAX_FINE, BitReader, Integers
from edge_runtime.formats.sections import PLANES, SYMBOLS

Bits = NDArray[Any]  # elements as unsigned integers
Steps = NDArray[np.int32]

MAX_LINE_WIDTH = 32
MANTISSA_BITS = {
    "F64": 52,
    "F32": 23,
    "F16": 10,
    "BF16": 7,
    "F8_E5M2": 2,
    "F8_E4M3": 3,
}
_NO_LENGTH = 1022  # what _lengths gives more than a length
_LENGTHS = _NO_LENGTH + MAX_LINE_WIDTH + 1


@dataclass(frozen=True, slots=True)
class Form:
    """How the values of one group are written.

    Attributes:
        drop: Low bits that are zero in every new value; they do not travel.
        planes: Whole bytes above them that travel as they are. Where they reach the
            top of the element, nothing else travels.
        unit: Exponent (biased, as stored) up to which floats are evenly spaced on the
            line; 1 puts neighbouring floats on neighbouring integers. At least 1.
        fine: Bits of a large step that its symbol holds.
    """

    drop: int
    planes: int
    unit: int
    fine: int

    @property
    def shift(self) -> int:
        """Bits below those that are on the line."""
        return self.drop + 8 * self.planes

    def is_plain(self, item_size: int) -> bool:
        """Tell whether values are written as whole bytes (planes) and nothing else."""
        return self.shift == 8 * item_size

    def kinds(self, item_size: int) -> list[int]:
        """Return the sections of a group that hold one byte an element."""
        symbols = [] if self.is_plain(item_size) else [SYMBOLS]
        return [*symbols, *range(PLANES, PLANES + self.planes)]

    def check(self, dtype: str, item_size: int) -> None:
        """Insist that a group of this type may be written in this form.

        Raises:
            PatchFormatError: The form does not fit the type.
        """
        width, mantissa = 8 * item_size - self.shift, MANTISSA_BITS.get(dtype)
        if self.is_plain(item_size):
            fits = self.unit == 1 and not self.fine
        else:
            fits = 0 < width <= MAX_LINE_WIDTH and self.fine <= MAX_FINE
            if mantissa is not None:
                exponents = 1 << (8 * item_size - 1 - mantissa)
                fits &= self.shift <= mantissa and 1 <= self.unit < exponents
        if not fits:
            raise PatchFormatError(f"the patch writes {dtype} values as {self}")


class Line:
    """Maps elements of one type to integers and back, without loss.

    Attributes:
        width: Bits of an element that are on the line; integers are of that width too.
    """

    def __init__(self, dtype: str, item_size: int, form: Form) -> None:
        """Lay out the line.

        Args:
            dtype: The safetensors type code.
            item_size: Its bytes.
            form: How the group is written.

        Raises:
            PatchFormatError: The form does not fit the type.
        """
        form.check(dtype, item_size)
        mantissa = MANTISSA_BITS.get(dtype)
        self.width = 8 * item_size - form.shift
        self._shift, self._is_float = form.shift, mantissa is not None
        self._sign = 1 << (self.width - 1)
        self._spare = MAX_LINE_WIDTH - self.width
        if mantissa is not None:
            self._mantissa = mantissa - form.shift
            self._tables(self._mantissa, form.unit)

    def _tables(self, mantissa: int, unit: int) -> None:
        # By the exponent field of a float: what to take away and how far to shift.
        exponent = np.maximum(np.arange(1 << (self.width - 1 - mantissa)), 1)
        low = np.minimum(exponent, unit)
        self._far = np.minimum(unit - low, 31).astype(np.uint32)
        self._off = ((low - 1) << mantissa).astype(np.uint32)
        # By the length of an integer, as _lengths gives it: how many bits tell its
        # floats apart, and what makes it a float again.
        length = np.arange(_LENGTHS) - _NO_LENGTH
        self._rest = np.minimum(np.maximum(mantissa + 1 - length, 0), unit - 1)
        self._on = ((unit - 1 - self._rest) << mantissa).astype(np.uint32)
        zeros = ((max(unit - mantissa, 1) << mantissa) - 1).bit_length()
        self._rest[0], self._on[0] = min(unit - 1, zeros), 0

    def numbers(self, elements: Bits) -> Steps:
        """Return the integers that elements fall on, from -2**(width - 1) up."""
        number = (elements >> self._shift).astype(np.uint32)
        signed = self._extended(number.view(np.int32))
        if not self._is_float:
            return signed
        negative = signed >> (MAX_LINE_WIDTH - 1)
        number &= self._sign - 1
        exponent = (number >> self._mantissa).astype(np.intp)
        number -= self._off.take(exponent)
        number >>= self._far.take(exponent)
        negative ^= number.view(np.int32)
        return negative

    def rests(self, elements: Bits, numbers: Steps) -> tuple[Integers, Integers]:
        """Return the bits of elements that their integers leave out, and how many."""
        high: Integers = (elements >> self._shift).astype(np.int64)
        if not self._is_float:
            return high, np.zeros_like(high)
        return high, self._rest.take(_lengths(numbers ^ (numbers >> 31)))

    def elements(self, numbers: Steps, rest: BitReader) -> NDArray[np.uint32]:
        """Return the elements, shifted down, that :meth:`numbers` maps to ``numbers``.

        Raises:
            PatchFormatError: ``rest`` ends early.
        """
        if not self._is_float:
            return numbers.view(np.uint32) & np.uint32(2 * self._sign - 1)
        negative = numbers >> (MAX_LINE_WIDTH - 1)
        magnitude = (numbers ^ negative).view(np.uint32)
        length = _lengths(magnitude)
        widths = self._rest.take(length)
        magnitude <<= widths.astype(np.uint32)
        magnitude |= rest.take(widths)
        magnitude += self._on.take(length)
        magnitude &= self._sign - 1
        magnitude |= negative.view(np.uint32) & self._sign
        return magnitude

    def step(self, numbers: Steps, steps: Steps) -> Steps:
        """Add steps to integers, modulo 2**width, in place."""
        numbers += steps
        return self._extended(numbers)

    def _extended(self, numbers: Steps) -> Steps:
        """Return the lowest ``width`` bits of integers with their sign."""
        if self._spare:
            numbers = numbers << self._spare
            numbers >>= self._spare
        return numbers


def _lengths(numbers: NDArray[Any]) -> Integers:
    """Return the bit lengths of numbers up to 2**32, plus 1022; of zero, zero.

    As exact doubles: what they have in their exponent field.
    """
    return numbers.astype(np.float64).view(np.int64) >> 52
