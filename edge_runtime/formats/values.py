# SPDX-License-Identifier: Apache-2.0
"""New values as steps on a line, and whole bytes: both directions side by side.

What the steps are is in :mod:`edge_runtime.formats.value_line`. FORMAT.md is the
normative description.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import numpy as np

from edge_runtime.formats.frames import SectionReader, quick_size
from edge_runtime.formats.numbers import (
    BitReader,
    BitWriter,
    NumberReader,
    encode_numbers,
    finenesses,
)
from edge_runtime.formats.sections import BITS, PLANES, REST, SYMBOLS
from edge_runtime.formats.spool import Spool
from edge_runtime.formats.tensor_index import WINDOW
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


class Moved(Protocol):
    """The elements of one tensor that travel; they need not be in memory."""

    @property
    def dtype(self) -> str:
        """The safetensors type code."""

    def __len__(self) -> int:
        """Return how many there are."""

    def pieces(self) -> Iterator[tuple[Bits, Bits]]:
        """Yield what they were and what they become, a bounded number at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorValues:
    """The elements of one tensor that travel, in memory.

    Attributes:
        dtype: The safetensors type code.
        base: What they were, as unsigned integers.
        target: What they become.
    """

    dtype: str
    base: Bits
    target: Bits

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.base)

    def pieces(self) -> Iterator[tuple[Bits, Bits]]:
        """Yield all of them."""
        yield self.base, self.target


def encode_values(group: Sequence[Moved]) -> tuple[Form, dict[int, Spool]]:
    """Encode the values of one group in the form that makes them smallest.

    Args:
        group: The tensors of one item size, in file order; at least one element.

    Returns:
        The form, and the group's sections, one part a tensor where tensors differ.
    """
    step = sum(map(len, group)) // _SAMPLE + 1
    sample, ones = list[TensorValues](), 0
    for one in group:
        seen = 0
        for base, target in one.pieces():
            ones |= int(np.bitwise_or.reduce(target))
            old, new = (bits[-seen % step :: step].copy() for bits in (base, target))
            sample.append(TensorValues(one.dtype, old, new))
            seen += len(base)
    form = _choose(ones, _Batch(sample))
    return form, _encode(group, form)


def _choose(ones: int, sample: "_Batch") -> Form:
    """Search for the smallest form, on a sample; other bits than ``ones`` are zero."""

    def size(form: Form) -> int:
        writer = _Writer(item_size, form)
        writer.write(sample)
        return sum(quick_size(s.read(0, s.size)) for s in writer.finish().values())

    item_size = sample.base.itemsize
    bits = 8 * item_size
    zeros = (ones & -ones).bit_length() - 1 if ones else bits
    plain = Form(zeros // 8 * 8, item_size - zeros // 8, 1, 0)
    mantissas = [MANTISSA_BITS[g] for g in sample.types if g in MANTISSA_BITS]
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


def _units(sample: "_Batch", mantissas: Sequence[int]) -> list[int]:
    """Return the units worth trying: 1, and those around the largest exponents."""
    if not mantissas:
        return [1]
    exponents = np.sort(
        np.concatenate(
            [
                (sample.target[at] << 1 >> 1 + MANTISSA_BITS[dtype]).astype(np.int64)
                for dtype, at in sample.types.items()
                if dtype in MANTISSA_BITS
            ]
        )
    )
    # But a few outliers, and what is not finite, may be far above the unit.
    high = int(exponents[len(exponents) * 999 // 1000])
    largest = (1 << (8 * sample.base.itemsize - 1 - max(mantissas))) - 1
    return sorted({1, *range(max(1, high - 16), min(high + 2, largest) + 1)})


class _Batch:
    """Elements of several tensors, in file order: so many cost hardly more than one.

    Attributes:
        base: What they were.
        target: What they become.
        types: Which of them are of each type.
    """

    def __init__(self, parts: Sequence[TensorValues]) -> None:
        self.base = np.concatenate([part.base for part in parts])
        self.target = np.concatenate([part.target for part in parts])
        kinds = list(dict.fromkeys(part.dtype for part in parts))
        self.types: dict[str, Any] = {kinds[0]: slice(None)}
        if len(kinds) > 1:
            number = np.repeat(
                [kinds.index(part.dtype) for part in parts], [len(p) for p in parts]
            )
            self.types = {k: np.flatnonzero(number == n) for n, k in enumerate(kinds)}


def _batches(group: Sequence[Moved]) -> Iterator[_Batch]:
    waiting, held = list[TensorValues](), 0
    for one in group:
        for base, target in one.pieces():
            waiting.append(TensorValues(one.dtype, base, target))
            held += len(base)
            if held >= WINDOW:
                yield _Batch(waiting)
                waiting, held = [], 0
    if held:
        yield _Batch(waiting)


def _encode(group: Sequence[Moved], form: Form) -> dict[int, Spool]:
    """Encode a group in a given form, as :class:`ValueReader` reads it."""
    writer: _Writer | None = None
    for batch in _batches(group):
        writer = writer or _Writer(batch.base.itemsize, form)
        writer.write(batch)
    sections = writer.finish() if writer else {}
    stops = list(accumulate(map(len, group)))  # where each has one byte an element
    for kind, spool in sections.items():
        spool.stops = [spool.size] if kind in (BITS, REST) else stops
    return sections


class _Writer:
    """Writes the sections of a group in a given form."""

    def __init__(self, item_size: int, form: Form) -> None:
        self._item_size, self._form = item_size, form
        self._planes = [Spool() for _ in range(form.planes)]
        self._symbols, *self._streams = (Spool() for _ in range(3))
        self._bits, self._rest = map(BitWriter, self._streams)
        self._lines: dict[str, Line] = {}

    def write(self, batch: _Batch) -> None:
        form = self._form
        for plane, spool in enumerate(self._planes):
            spool.write((batch.target >> (form.drop + 8 * plane)).astype(np.uint8))
        if form.is_plain(self._item_size):
            return
        steps, high, widths = (np.zeros(len(batch.base), np.int64) for _ in range(3))
        for dtype, at in batch.types.items():
            if dtype not in self._lines:
                self._lines[dtype] = Line(dtype, self._item_size, form)
            line, target = self._lines[dtype], batch.target[at]
            numbers = line.numbers(target)
            signed = line.step(numbers.copy(), -line.numbers(batch.base[at]))
            steps[at] = ((signed << 1) ^ (signed >> 31)).view(np.uint32)
            high[at], widths[at] = line.rests(target, numbers)
        self._rest.write(high, widths)
        symbols, widths = encode_numbers(steps, form.fine)
        self._symbols.write(symbols)
        self._bits.write(steps, widths)

    def finish(self) -> dict[int, Spool]:
        """Return what was written, by kind."""
        sections = {PLANES + plane: spool for plane, spool in enumerate(self._planes)}
        if self._form.is_plain(self._item_size):
            return sections
        self._bits.finish()
        self._rest.finish()
        bits, rest = self._streams
        return sections | {SYMBOLS: self._symbols, BITS: bits, REST: rest}
