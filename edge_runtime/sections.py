"""The body of a patch: a table of sections, and the sections, each one stream of bytes.

A section is stored as it is, or it is one zstd frame. Readers hand out its bytes in
pieces, so that the memory needed to apply a patch does not depend on its size.
FORMAT.md is the normative description.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import BinaryIO, cast

import zstandard

from edge_runtime.errors import PatchFormatError
from edge_runtime.header import exactly

STORED, ZSTD = 0, 1
MAX_SECTIONS = 64
MAX_COUNTED_BYTES = 1 << 20  # a section whose size follows from nothing else
MAX_WINDOW_LOG = 18  # zstd window of 256 KiB: bounds what a device must hold a section
_BLOCK_BYTES = 1 << 17  # of zstd; longer runs are split by it anyway
_SEARCH_BYTES = 1 << 20  # sections up to this size are compressed in several ways
READ_BYTES = 1 << 16

COUNTS, FORMS, INDEX, INDEX_BITS, COLUMNS, OUTPUTS = range(0x01, 0x07)
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


KINDS = {COUNTS, FORMS, INDEX, INDEX_BITS, COLUMNS, OUTPUTS} | {
    group_kind(size, dense) + kind
    for size in (1, 2, 4, 8)
    for dense in (False, True)
    for kind in (SYMBOLS, BITS, REST, *range(PLANES, PLANES + size))
}


@dataclass(frozen=True, slots=True)
class Section:
    """One entry of the section table.

    Attributes:
        kind: What it holds, one of ``KINDS``.
        encoding: ``STORED`` or ``ZSTD``.
        packed_size: Bytes in the file.
        raw_size: Bytes once unpacked.
        offset: Where the packed bytes begin, from the start of the file.
    """

    kind: int
    encoding: int
    packed_size: int
    raw_size: int
    offset: int


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


def encode_body(sections: Mapping[int, Sequence[bytes]], level: int) -> bytes:
    """Encode the body of a patch.

    Args:
        sections: By kind, their content in parts; empty ones are left out.
        level: zstd level, 1 to 22.
    """
    table, body = bytearray(), bytearray()
    used = {kind: parts for kind, parts in sorted(sections.items()) if any(parts)}
    table.append(len(used))
    for kind, parts in used.items():
        encoding, packed = pack_section(parts, level)
        table += bytes([kind, encoding]) + encode_varint(len(packed))
        body += packed
    return bytes(table + body)


class Body:
    """The sections of an open patch.

    Attributes:
        sections: The section table.
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
        self._file = file
        entries = [_read_entry(file) for _ in range(exactly(file, 1)[0])]
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
            raw = packed if encoding == STORED else _frame_size(file, offset, packed)
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
        source = iter(self._whole(kind))
        return tuple(
            byte if byte < 128 else decode_varint(chain([byte], source))
            for byte in source
        )

    def outputs(self) -> bytes:
        """Read the expected outputs: float32 values, none where none are there.

        Raises:
            PatchFormatError: They are too many, or the last one is cut off.
        """
        data = self._whole(OUTPUTS)
        if len(data) % 4:
            raise PatchFormatError(
                f"the expected outputs of the patch have {len(data)} bytes, which is "
                "not a whole number of float32 values"
            )
        return data

    def _whole(self, kind: int) -> bytes:
        # Nothing else bounds its size, so that is done here, before it is unpacked.
        size = self._by_kind[kind].raw_size if kind in self._by_kind else 0
        if size > MAX_COUNTED_BYTES:
            raise PatchFormatError(f"section {kind:#x} is too large: {size} bytes")
        return self.reader(kind).take(size)

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
    kind, encoding = exactly(file, 2)
    packed = decode_varint(chain.from_iterable(iter(partial(file.read, 1), b"")))
    if kind not in KINDS or encoding > ZSTD:
        raise PatchFormatError(
            f"the patch has a section of kind {kind:#x} and encoding {encoding} that "
            "this runtime does not know"
        )
    if not packed:
        raise PatchFormatError(f"section {kind:#x} of the patch is empty")
    return kind, encoding, packed


def _frame_size(file: BinaryIO, start: int, packed: int) -> int:
    """Walk the blocks of a frame: one frame, its size stated, nothing behind.

    python-zstandard ignores ``max_output_size`` when a frame states its size, and
    accepts trailing bytes; so neither is left to it.
    """
    stop = start + packed
    file.seek(start)
    head = file.read(min(18, packed))  # the longest frame header
    try:
        frame = zstandard.get_frame_parameters(head)
        offset = start + zstandard.frame_header_size(head)
    except zstandard.ZstdError as err:
        raise PatchFormatError(f"a section is not a zstd frame: {err}") from err
    # A frame that states no size states 2**64 - 1 here.
    if not 0 < frame.content_size < 1 << 63 or frame.window_size > 1 << MAX_WINDOW_LOG:
        raise PatchFormatError(
            f"a zstd section states {frame.content_size} bytes and a window of "
            f"{frame.window_size}; at most {1 << MAX_WINDOW_LOG} is allowed"
        )
    last = False
    while not last and offset + 3 <= stop:
        file.seek(offset)
        block = int.from_bytes(file.read(3), "little")
        last, kind, size = bool(block & 1), block >> 1 & 3, block >> 3
        offset += 3 + (1 if kind == 1 else size)  # kind 1: one byte, repeated
    offset += 4 if frame.has_checksum else 0
    if not last or offset != stop or head[4] & 3:  # which flags a dictionary id
        raise PatchFormatError("a zstd frame does not fill its section exactly")
    return frame.content_size


# One section -------------------------------------------------------------------------


def pack_section(parts: Sequence[bytes], level: int) -> tuple[int, bytes]:
    """Choose the smallest encoding of a section.

    Args:
        parts: Its content; a new zstd block may begin with a part, so that parts of
            different statistics do not share one Huffman table.
        level: zstd level, 1 to 22.

    Returns:
        The encoding and the packed bytes.
    """
    raw = b"".join(parts)
    if len(raw) <= _SEARCH_BYTES:
        # Matches among symbols are mostly chance: how short a one may be matters.
        split = [
            (how, match) for how in ([raw], _blocks(parts)) for match in (3, 4, 5, 7)
        ]
    else:
        split = [([raw], 3), (_blocks(parts), 7)]
    packed = min((_compress(how, match, level) for how, match in split), key=len)
    return (ZSTD, packed) if len(packed) < len(raw) else (STORED, raw)


def _compress(blocks: Sequence[bytes], min_match: int, level: int) -> bytes:
    size = sum(map(len, blocks))
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level,
        source_size=size,
        window_log=min(MAX_WINDOW_LOG, max(10, (size - 1).bit_length())),
        min_match=min_match,
    )
    out = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size)
    packed = [
        out.compress(block) + out.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        for block in blocks[:-1]
    ]
    return b"".join([*packed, out.compress(blocks[-1]), out.flush()])


def _blocks(parts: Sequence[bytes]) -> list[bytes]:
    """Join neighbouring parts wherever one Huffman table serves both better."""
    blocks: list[bytes] = []
    for part in filter(None, parts):
        if blocks and len(blocks[-1]) < _BLOCK_BYTES:
            joined = blocks[-1] + part
            if quick_size(joined) <= quick_size(blocks[-1]) + quick_size(part):
                blocks[-1] = joined
                continue
        blocks.append(part)
    return blocks


def quick_size(raw: bytes) -> int:
    """Return about how many bytes ``raw`` takes in a frame: the same on any machine.

    Used to choose between encodings, where floating-point estimates could differ from
    one processor to the next and with them the bytes of the patch.
    """
    return len(_QUICK.compress(raw)) - _FRAME_BYTES


_FRAME_BYTES = 6  # that a block in a running frame does not need again
_QUICK = zstandard.ZstdCompressor(
    compression_params=zstandard.ZstdCompressionParameters.from_level(1, min_match=7)
)


class _Slice:
    """A part of an open file, as a source that a zstd reader can read from."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._next, self._stop = file, start, start + size

    def read(self, size: int) -> bytes:
        self._file.seek(self._next)
        data = self._file.read(min(size, self._stop - self._next))
        self._next += len(data)
        return data


class SectionReader:
    """Reads one section of an open patch, in bounded pieces."""

    def __init__(self, file: BinaryIO, section: Section) -> None:
        """Prepare to read.

        Args:
            file: The open patch; several readers share it and seek before each read.
            section: What to read, as :class:`Body` checked it.
        """
        self._left = section.raw_size
        packed = cast(BinaryIO, _Slice(file, section.offset, section.packed_size))
        self._source: BinaryIO | zstandard.ZstdDecompressionReader = packed
        if section.encoding == ZSTD:
            self._source = zstandard.ZstdDecompressor(
                max_window_size=1 << MAX_WINDOW_LOG
            ).stream_reader(packed, read_size=READ_BYTES)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left to read."""
        return not self._left

    def take(self, count: int) -> bytes:
        """Return exactly the next ``count`` bytes.

        Raises:
            PatchFormatError: The section ends before, or does not decompress.
        """
        if count > self._left:
            raise PatchFormatError("a section of the patch ends too early")
        self._left -= count
        try:
            data = self._source.read(count)
        except zstandard.ZstdError as err:
            raise PatchFormatError(f"a section does not decompress: {err}") from err
        if len(data) < count:
            raise PatchFormatError("a section of the patch ends too early")
        return data

    def finish(self) -> None:
        """Insist that nothing is left.

        Raises:
            PatchFormatError: Bytes are left over.
        """
        if self._left:
            raise PatchFormatError(f"a section has {self._left} bytes too many")
