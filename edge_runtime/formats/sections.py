# SPDX-License-Identifier: Apache-2.0
"""The body of a patch: a table of sections, and the sections, each one stream of bytes.

What a section looks like is in :mod:`edge_runtime.formats.frames`. FORMAT.md is the
normative description.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from functools import partial
from itertools import chain
from typing import BinaryIO

from edge_runtime.errors import PatchFormatError
from edge_runtime.formats.frames import (
    STORED,
    ZSTD,
    Parts,
    Section,
    SectionReader,
    as_spool,
    frame_size,
    pack_section,
)
from edge_runtime.formats.header import read_exactly
from edge_runtime.times import MAX_SECONDS

MAX_SECTIONS = 64
MAX_COUNTED_BYTES = 1 << 20  # a section whose size follows from nothing else

COUNTS, FORMS, INDEX, INDEX_BITS, COLUMNS, OUTPUTS, UNARY = range(0x01, 0x08)
SIGNED_AT, SUBSPACES = 0x08, 0x09
VALUES, DENSE = 0x40, 0x10  # the first group, and a bit of its kind
# Within a group of values, beside its kind.
SYMBOLS, BITS, REST, PLANES = 0, 1, 2, 8


def group_kind(item_size: int, dense: bool) -> int:
    """Return the kind of the first section of a group of values.

    Args:
        item_size: 1, 2, 4 or 8 bytes.
        dense: Whether more than half of each tensor travels.
    """
    return VALUES + ((item_size.bit_length() - 1) << 5) + dense * DENSE


KINDS = {*range(COUNTS, SUBSPACES + 1)} | {
    group_kind(size, dense) + kind
    for size in (1, 2, 4, 8)
    for dense in (False, True)
    for kind in (SYMBOLS, BITS, REST, *range(PLANES, PLANES + size))
}

# Their zeros take time to read, which compressed would cost no bytes.
STORED_KINDS = {UNARY}


# Unsigned integers of variable length ------------------------------------------------


def encode_varint(value: int) -> bytes:
    """Encode a non-negative integer as LEB128."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def decode_varint(source: Iterator[int]) -> int:
    """Decode one LEB128 integer below 2**63, in its shortest form.

    Args:
        source: The bytes; those behind the integer are left.

    Raises:
        PatchFormatError: Too long, not shortest, or cut off.
    """
    value = 0
    for shift, byte in zip(range(0, 63, 7), source, strict=False):
        value |= (byte & 127) << shift
        if byte < 128:
            if byte == 0 and shift:
                break
            return value
    raise PatchFormatError("a number in the patch is malformed or cut off")


# The body: table and sections --------------------------------------------------------


def pack_kind(
    kind: int, parts: Parts, level: int, pool: Executor | None = None
) -> tuple[int, bytes]:
    """Choose the smallest encoding that a section of some kind may have."""
    raw = as_spool(parts)
    if kind in STORED_KINDS:
        return STORED, b"".join(raw.pieces())
    if level not in raw.packed:
        raw.packed[level] = pack_section(raw, level, pool)
    return raw.packed[level]


def encode_body(
    sections: Mapping[int, Parts], level: int, pool: Executor | None = None
) -> bytes:
    """Encode the body of a patch.

    Args:
        sections: By kind, their content in parts; empty ones are left out.
        level: zstd level, 1 to 22.
        pool: Threads to compress in.
    """
    table, body = bytearray(), []
    raws = {kind: as_spool(parts) for kind, parts in sorted(sections.items())}
    used = {kind: raw for kind, raw in raws.items() if raw.size}
    table.append(len(used))
    for kind, raw in used.items():
        encoding, packed = pack_kind(kind, raw, level, pool)
        table += bytes([kind, encoding]) + encode_varint(len(packed))
        body.append(packed)
    return b"".join([table, *body])


class Body:
    """The sections of an open patch.

    Attributes:
        sections: The section table.
        size: Bytes of the whole patch.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        """Read the table, and look at every zstd frame without unpacking it.

        Args:
            file: The patch, at the start of its body; several readers share it.
            size: Bytes of the whole patch.

        Raises:
            PatchFormatError: The table or a frame is malformed, or sections and file do
                not end together.
        """
        self._file, self.size = file, size
        entries = [_read_entry(file) for _ in range(read_exactly(file, 1)[0])]
        kinds = [kind for kind, _, _ in entries]
        if kinds != sorted(set(kinds)) or len(kinds) > MAX_SECTIONS:
            raise PatchFormatError(
                f"the {len(kinds)} sections of the patch are not in order, or more "
                f"than {MAX_SECTIONS}"
            )
        offset = file.tell()
        end = offset + sum(packed for _, _, packed in entries)
        if end != size:
            raise PatchFormatError(
                f"the sections of the patch end at byte {end}, the file at {size}"
            )
        sections = []
        for kind, encoding, packed in entries:
            raw = packed if encoding == STORED else frame_size(file, offset, packed)
            sections.append(Section(kind, encoding, packed, raw, offset))
            offset += packed
        self.sections = tuple(sections)
        self._by_kind = dict(zip(kinds, sections, strict=True))

    def reader(self, group: int, kind: int = 0) -> "SectionReader":
        """Open a section, of a group if one is given; a missing one is empty."""
        kind += group
        empty = Section(kind, STORED, 0, 0, 0)
        return SectionReader(self._file, self._by_kind.get(kind, empty))

    def numbers(self, kind: int) -> tuple[int, ...]:
        """Read a section that holds varints and nothing else.

        Raises:
            PatchFormatError: It is malformed or too large.
        """
        # A number is at least one byte: the raw size bounds how many there are.
        source = iter(self.whole(kind))
        return tuple(
            byte if byte < 128 else decode_varint(chain([byte], source))
            for byte in source
        )

    def outputs(self) -> bytes:
        """Read the expected outputs: float32 values, none where none are there.

        Raises:
            PatchFormatError: They are too many, or the last one is cut off; nothing
                was unpacked.
        """
        if (size := self._raw_size(OUTPUTS)) % 4:
            raise PatchFormatError(
                f"the expected outputs of the patch have {size} bytes, which is not a "
                "whole number of float32 values"
            )
        return self.whole(OUTPUTS)

    def signed_at(self) -> int | None:
        """Read when the patch was signed, in seconds since 1970; None where not said.

        Raises:
            PatchFormatError: It is malformed, or beyond the year 9999.
        """
        numbers = self.numbers(SIGNED_AT)
        if len(numbers) > 1 or any(number > MAX_SECONDS for number in numbers):
            raise PatchFormatError(
                f"the patch says {numbers[:2]} for when it was signed, expected one "
                f"number of seconds up to {MAX_SECONDS}"
            )
        return numbers[0] if numbers else None

    def whole(self, kind: int) -> bytes:
        """Read a section whose size follows from nothing else, up to 1 MiB.

        Raises:
            PatchFormatError: It is larger; nothing was unpacked.
        """
        if (size := self._raw_size(kind)) > MAX_COUNTED_BYTES:
            raise PatchFormatError(f"section {kind:#x} is too large: {size} bytes")
        return self.reader(kind).take(size)

    def _raw_size(self, kind: int) -> int:
        return self._by_kind[kind].raw_size if kind in self._by_kind else 0

    def check_values(self, expected: Mapping[int, int]) -> None:
        """Insist on the raw sizes of the sections of values.

        Args:
            expected: By kind. How many bits there are beside symbols only the base
                tells: reading them shows it.

        Raises:
            PatchFormatError: A section is missing, too many, or of another size.
        """
        found = {
            s.kind: s.raw_size
            for s in self.sections
            if s.kind >= VALUES
            and not (s.kind & 15 in (BITS, REST) and s.kind & ~15 in expected)
        }
        if found != expected:
            raise PatchFormatError(
                f"the patch holds values {found} (by section and number), its counts "
                f"ask for {dict(expected)}"
            )


def _read_entry(file: BinaryIO) -> tuple[int, int, int]:
    kind, encoding = read_exactly(file, 2)
    packed = decode_varint(chain.from_iterable(iter(partial(file.read, 1), b"")))
    if kind not in KINDS or encoding > (STORED if kind in STORED_KINDS else ZSTD):
        raise PatchFormatError(
            f"the patch has a section of kind {kind:#x} and encoding {encoding} that "
            "this runtime does not know"
        )
    if not packed:
        raise PatchFormatError(f"section {kind:#x} of the patch is empty")
    return kind, encoding, packed
