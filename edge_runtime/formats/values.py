# SPDX-License-Identifier: Apache-2.0
"""New values as steps on a line, and whole bytes: both directions side by side.

What the steps are is in :mod:`edge_runtime.formats.value_line`. FORMAT.md is the
normative description.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edge_runtime.formats.frames import SectionReader, quick_size
from edge_runtime.formats.numbers import (
    BitReader,
    Integers,
    NumberReader,
    encode_bits,
    encode_numbers,
    finenesses,
)
from edge_runtime.formats.sections import BITS, PLANES, REST, SYMBOLS
from edge_runtime.formats.value_line import (
    MANTISSA_BITS,
    MAX_LINE_WIDTH,
    Bits,
    Form,
    Line,
)

_SAMPLE = 1 << 16  # elements that a form is chosen on


class ValueReader:
    """Decodes the values of one group, in bounded pieces."""

    def __init__(
        self, item_size: int, form: Form, section: Callable[[int], SectionReader]
    ) -> None:
        """Prepare to read.

        Args:
            item_size: Bytes of an element, the same in the whole group.
            form: How the group is written.
            section: Opens one section of the group.

        Raises:
            PatchFormatError: The form is not possible.
        """
        self._item_size, self._form = item_size, form
        self._planes = [section(PLANES + plane) for plane in range(form.planes)]
        self._lines: dict[str, Line] = {}
        width = 8 * item_size - form.shift
        self._steps = NumberReader(section(SYMBOLS), section(BITS), form.fine, width)
        self._rest = BitReader(section(REST))

    def take(self, dtype: str, base: Bits) -> Bits:
        """Return the next values.

        Args:
            dtype: Their safetensors type code.
            base: The base's elements at the same positions, as unsigned integers.

        Raises:
            PatchFormatError: A section ends early, or the form does not fit the type.
        """
        form = self._form
        if form.is_plain(self._item_size):
            out = np.zeros_like(base)
        else:
            line = self._lines.get(dtype) or Line(dtype, self._item_size, form)
            self._lines[dtype] = line
            steps = self._steps.take(len(base))
            odd = steps & 1
            steps >>= 1
            steps ^= np.negative(odd, out=odd)
            numbers = line.step(line.numbers(base), steps.view(np.int32))
            out = line.elements(numbers, self._rest).astype(base.dtype, copy=False)
            out <<= form.shift
        for plane, section in enumerate(self._planes):
            raw = np.frombuffer(section.take(len(base)), np.uint8)
            out |= raw.astype(base.dtype) << (form.drop + 8 * plane)
        return out

    def finish(self) -> None:
        """Insist that all values are used up.

        Raises:
            PatchFormatError: Values are left over.
        """
        self._steps.finish()
        self._rest.finish()
        for plane in self._planes:
            plane.finish()


# Encoding ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class TensorValues:
    """The elements of one tensor that travel.

    Attributes:
        dtype: The safetensors type code.
        base: What they were, as unsigned integers.
        target: What they become.
    """

    dtype: str
    base: Bits
    target: Bits


def encode_values(group: Sequence[TensorValues]) -> tuple[Form, dict[int, list[bytes]]]:
    """Encode the values of one group in the form that makes them smallest.

    Args:
        group: The tensors of one item size, in file order; at least one element.

    Returns:
        The form, and the group's sections, one part a tensor where tensors differ.
    """
    step = sum(len(one.base) for one in group) // _SAMPLE + 1
    sample = [TensorValues(c.dtype, c.base[::step], c.target[::step]) for c in group]
    form = _choose(group[0].base.itemsize, group, sample)
    return form, _encode(group, form)


def _choose(
    item_size: int, group: Sequence[TensorValues], sample: Sequence[TensorValues]
) -> Form:
    """Search for the smallest form, on a sample."""

    def size(form: Form) -> int:
        return sum(quick_size(b"".join(p)) for p in _encode(sample, form).values())

    bits, zeros = 8 * item_size, _zero_bits(group)
    plain = Form(zeros // 8 * 8, item_size - zeros // 8, 1, 0)
    mantissas = [MANTISSA_BITS[g.dtype] for g in group if g.dtype in MANTISSA_BITS]
    drop = min([zeros, bits - 1, *mantissas])
    planes = (max(0, bits - drop - MAX_LINE_WIDTH) + 7) // 8
    width = bits - drop - 8 * planes
    if bits - width > min([bits - 1, *mantissas]):
        return plain
    fines = finenesses((1 << width) - 1)
    forms = [
        Form(drop, planes, unit, fines[len(fines) // 2])
        for unit in _units(sample, mantissas)
    ]
    unit = min(forms, key=size).unit
    forms = [Form(drop, planes, unit, fine) for fine in fines]
    return min([plain, *forms], key=size)


def _zero_bits(group: Sequence[TensorValues]) -> int:
    """Count the low bits that are zero in every new value."""
    ones = 0
    for one in group:
        ones |= int(np.bitwise_or.reduce(one.target))
    return (ones & -ones).bit_length() - 1 if ones else 8 * group[0].base.itemsize


def _units(sample: Sequence[TensorValues], mantissas: Sequence[int]) -> list[int]:
    """Return the units worth trying: 1, and those around the largest exponents."""
    if not mantissas:
        return [1]
    exponents = np.sort(
        np.concatenate(
            [
                (one.target << 1 >> 1 + MANTISSA_BITS[one.dtype]).astype(np.int64)
                for one in sample
                if one.dtype in MANTISSA_BITS
            ]
        )
    )
    # But a few outliers, and what is not finite, may be far above the unit.
    high = int(exponents[len(exponents) * 999 // 1000])
    largest = (1 << (8 * sample[0].base.itemsize - 1 - max(mantissas))) - 1
    return sorted({1, *range(max(1, high - 16), min(high + 2, largest) + 1)})


def _encode(group: Sequence[TensorValues], form: Form) -> dict[int, list[bytes]]:
    """Encode a group in a given form, as :class:`ValueReader` reads it."""
    item_size = group[0].base.itemsize
    sections = {
        PLANES + plane: [
            (one.target >> (form.drop + 8 * plane)).astype(np.uint8).tobytes()
            for one in group
        ]
        for plane in range(form.planes)
    }
    if form.is_plain(item_size):
        return sections
    symbols: list[bytes] = []
    low: list[tuple[Integers, Integers]] = []
    rests: list[tuple[Integers, Integers]] = []
    for one in group:
        line = Line(one.dtype, item_size, form)
        numbers = line.numbers(one.target)
        signed = line.step(numbers.copy(), -line.numbers(one.base))
        steps = ((signed << 1) ^ (signed >> 31)).view(np.uint32).astype(np.int64)
        symbol, widths = encode_numbers(steps, form.fine)
        symbols.append(symbol)
        low.append((steps, widths))
        rests.append(line.rests(one.target, numbers))
    return sections | {
        SYMBOLS: symbols,
        BITS: [encode_bits(*map(np.concatenate, zip(*low, strict=True)))],
        REST: [encode_bits(*map(np.concatenate, zip(*rests, strict=True)))],
    }
