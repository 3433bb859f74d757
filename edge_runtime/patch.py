"""The patch file: header, signature block, section table, sections.

Reading is in steps, cheapest refusal first, and needs no more memory for a large patch
than for a small one: :func:`open_patch` proves size, magic, version, checksum and the
SHA-256 of everything behind the header before a single byte is decompressed.
:meth:`Patch.elements` then decodes against a weight file's layout. FORMAT.md is the
normative description; :mod:`edge_runtime.apply` holds the rules of acceptance.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from edge_runtime import codec, signing
from edge_runtime.codec import SectionReader
from edge_runtime.errors import PatchFormatError, PatchIntegrityError
from edge_runtime.header import (
    PatchHeader,
    encode_header,
    exactly,
    parse_header,
    read_header,
)
from edge_runtime.weights import CHUNK_BYTES, Layout, Tensor, Weights

MAX_SECTIONS = 64
PIECE = 1 << 16  # elements decoded at a time

COUNTS, GAPS, GAP_BITS, PLANES = 0x01, 0x02, 0x03, 0x40


def _plane_kinds(item_size: int) -> range:
    """Section kinds of the byte planes of elements of 1, 2, 4 or 8 bytes."""
    first = PLANES | (item_size.bit_length() - 1) << 3
    return range(first, first + item_size)


SECTION_NAMES = {COUNTS: "counts", GAPS: "gaps", GAP_BITS: "gap bits"} | {
    kind: f"{8 * size}-bit values, byte {plane}"
    for size in (1, 2, 4, 8)
    for plane, kind in enumerate(_plane_kinds(size))
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a reader accepts.

    Attributes:
        patch_bytes: Largest patch file.
        signature_bytes: Largest signature block.
    """

    patch_bytes: int = 1 << 30
    signature_bytes: int = signing.MAX_BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class Section:
    """One entry of the section table.

    Attributes:
        kind: What it holds, a key of ``SECTION_NAMES``.
        encoding: ``codec.STORED``, ``codec.ZSTD`` or ``codec.CONSTANT``.
        packed_size: Bytes in the file.
        raw_size: Bytes once unpacked.
        offset: Where the packed bytes begin, from the start of the file.
    """

    kind: int
    encoding: int
    packed_size: int
    raw_size: int
    offset: int

    @property
    def name(self) -> str:
        """The kind in words."""
        return SECTION_NAMES[self.kind]


class Patch:
    """An open patch whose integrity is proved; made by :func:`open_patch`.

    Attributes:
        header: What the patch is for.
        signatures: Whose signatures the patch carries; they are proved only if it was
            opened with trusted keys.
        sections: The section table.
        counts: For each tensor of the weight file, in file order, how many of its
            elements travel; the element count of the tensor means all of them.
        size: Bytes of the whole file.
    """

    def __init__(
        self,
        file: BinaryIO,
        header: PatchHeader,
        signatures: Sequence[signing.Signature],
        sections: Sequence[Section],
        size: int,
    ) -> None:
        self._file = file
        self.header = header
        self.signatures = tuple(signatures)
        self.sections = tuple(sections)
        self.size = size
        self.counts = self._read_counts()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def positions(self, layout: Layout) -> Iterator[tuple[Tensor, codec.Positions]]:
        """Yield the positions that travel, tensor by tensor, in ascending pieces.

        Args:
            layout: Of the weight file that the patch is for.

        Yields:
            A tensor and at most ``PIECE`` flat positions in it, int64, increasing.

        Raises:
            PatchFormatError: The patch contradicts the layout or itself.
        """
        self._check_counts(layout)
        gaps = codec.PositionDecoder(self._reader(GAPS), self._reader(GAP_BITS))
        for tensor, count in zip(layout.tensors, self.counts, strict=True):
            previous = -1
            for start in range(0, count, PIECE):
                piece = min(PIECE, count - start)
                if count == tensor.size:
                    yield tensor, np.arange(start, start + piece)
                    continue
                found = gaps.take(piece, previous)
                previous = int(found[-1])
                # What still has to come needs room behind this piece.
                if previous >= tensor.size - (count - start - piece):
                    raise PatchFormatError(
                        f"a position in tensor {tensor.name!r} is out of bounds: "
                        f"{previous} of {tensor.size} elements"
                    )
                yield tensor, found
        gaps.finish()

    def values(self) -> "ValueReader":
        """Return a reader of the values, in the order of :meth:`positions`."""
        return ValueReader(
            {
                size: [self._reader(kind) for kind in _plane_kinds(size)]
                for size in (1, 2, 4, 8)
            }
        )

    def elements(
        self, layout: Layout
    ) -> Iterator[tuple[Tensor, codec.Positions, NDArray[Any]]]:
        """Yield tensor, positions and values (unsigned bits), in ascending pieces.

        Raises:
            PatchFormatError: The patch contradicts the layout or itself.
        """
        values = self.values()
        for tensor, positions in self.positions(layout):
            yield tensor, positions, values.take(tensor.item_size, len(positions))
        values.finish()

    def check(self, layout: Layout) -> None:
        """Decode every position and look at every size, without any weight.

        Raises:
            PatchFormatError: The patch contradicts the layout or itself.
        """
        for _ in self.positions(layout):
            pass
        expected: dict[int, int] = {}
        for tensor, count in zip(layout.tensors, self.counts, strict=True):
            for kind in _plane_kinds(tensor.item_size) if count else ():
                expected[kind] = expected.get(kind, 0) + count
        found = {s.kind: s.raw_size for s in self.sections if s.kind >= PLANES}
        if found != expected:
            raise PatchFormatError(
                f"the patch holds values {found} (by section and number), its counts "
                f"ask for {expected}"
            )
        for kind in expected:
            self._reader(kind)  # walks the frame

    def _reader(self, kind: int) -> SectionReader:
        for section in self.sections:
            if section.kind == kind:
                return SectionReader(
                    self._file,
                    section.offset,
                    section.encoding,
                    section.packed_size,
                    section.raw_size,
                )
        return SectionReader(self._file, 0, codec.STORED, 0, 0)

    def _read_counts(self) -> tuple[int, ...]:
        # A count is at least one byte, and the table gives no number of tensors: the
        # section's raw size bounds it, and that is bounded here, before it is unpacked.
        reader = self._reader(COUNTS)
        raw = next((s.raw_size for s in self.sections if s.kind == COUNTS), 0)
        if raw > CHUNK_BYTES:
            raise PatchFormatError(f"the counts section is too large: {raw} bytes")
        source = io.BytesIO(reader.take(raw))
        counts = []
        while source.tell() < raw:
            counts.append(codec.decode_varint(source))
        return tuple(counts)

    def _check_counts(self, layout: Layout) -> None:
        if self.header.file_size != layout.file_size or len(self.counts) != len(
            layout.tensors
        ):
            raise PatchFormatError(
                f"the patch describes {len(self.counts)} tensors in a file of "
                f"{self.header.file_size} bytes; this weight file has "
                f"{len(layout.tensors)} in {layout.file_size}"
            )
        for tensor, count in zip(layout.tensors, self.counts, strict=True):
            if count > tensor.size:
                raise PatchFormatError(
                    f"the patch changes {count} elements of tensor {tensor.name!r}, "
                    f"which has {tensor.size}"
                )


class ValueReader:
    """Reads values as unsigned bits, one stream for each item size."""

    def __init__(self, planes: dict[int, list[SectionReader]]) -> None:
        self._planes = planes

    def take(self, item_size: int, count: int) -> NDArray[Any]:
        """Return the next ``count`` values of that size.

        Raises:
            PatchFormatError: There are not as many.
        """
        return codec.decode_planes(self._planes[item_size], count)

    def finish(self) -> None:
        """Insist that all values are used up.

        Raises:
            PatchFormatError: Values are left over.
        """
        for planes in self._planes.values():
            for plane in planes:
                plane.finish()


def open_patch(
    source: str | PathLike[str] | bytes,
    limits: Limits | None = None,
    trust: signing.Trust | None = None,
) -> Patch:
    """Open a patch and prove everything that needs no weights.

    Args:
        source: A path, or the bytes of the file.
        limits: What to accept.
        trust: Whose signatures it needs; by default nobody's.

    Returns:
        The open patch; close it, or use it in a ``with`` statement.

    Raises:
        OSError: The file cannot be read.
        PatchFormatError: Not a patch, truncated, malformed or over a limit.
        PatchVersionError: Made for a newer runtime.
        PatchIntegrityError: A checksum does not match.
        TrustError: The trusted keys did not sign it.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb")
    try:
        return _open(file, limits or Limits(), trust or signing.Trust())
    except BaseException:
        file.close()
        raise


def _open(file: BinaryIO, limits: Limits, trust: signing.Trust) -> Patch:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if size > limits.patch_bytes:
        raise PatchFormatError(
            f"the patch has {size} bytes, this device accepts {limits.patch_bytes}"
        )
    # Read once: what is believed below are the very bytes that were signed.
    signed = read_header(file)
    header, body_size, body_digest = parse_header(signed)
    signatures = signing.read_signatures(file, limits.signature_bytes)
    trust.check(signing.PATCH_CONTEXT, signed, signatures)
    body = file.tell()
    if size != body + body_size:
        raise PatchFormatError(
            f"the patch has {size} bytes, its header describes {body + body_size}: "
            "the download is incomplete or something follows it; fetch it again"
        )
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    if digest.digest() != body_digest:
        raise PatchIntegrityError(
            "the patch is damaged: its content does not match its checksum; fetch it "
            "again",
            expected=body_digest.hex(),
            actual=digest.hexdigest(),
        )
    file.seek(body)
    return Patch(file, header, signatures, _read_table(file, size), size)


def _read_table(file: BinaryIO, size: int) -> list[Section]:
    entries: list[tuple[int, int, int, int]] = []
    for _ in range(exactly(file, 1)[0]):
        kind, encoding = exactly(file, 2)
        packed, raw = codec.decode_varint(file), codec.decode_varint(file)
        if kind not in SECTION_NAMES or encoding > codec.CONSTANT:
            raise PatchFormatError(
                f"the patch has a section of kind {kind:#x} and encoding {encoding} "
                "that this runtime does not know"
            )
        if entries and kind <= entries[-1][0]:
            raise PatchFormatError("the sections of the patch are not in order")
        if not packed or not raw:
            raise PatchFormatError(f"section {kind:#x} of the patch is empty")
        entries.append((kind, encoding, packed, raw))
    if len(entries) > MAX_SECTIONS:
        raise PatchFormatError(f"the patch has {len(entries)} sections")
    offset = file.tell()
    sections = []
    for kind, encoding, packed, raw in entries:
        sections.append(Section(kind, encoding, packed, raw, offset))
        offset += packed
    if offset != size:
        raise PatchFormatError(
            f"the sections of the patch end at byte {offset}, the file at {size}"
        )
    return sections


def encode_patch(
    header: PatchHeader,
    changes: Sequence[codec.Positions],
    target: Weights,
    *,
    level: int = 19,
) -> bytes:
    """Encode a patch, unsigned.

    Args:
        header: What the patch is for.
        changes: For each tensor of the layout, in file order, the increasing flat
            positions that travel; empty where nothing changed. If they are all of the
            tensor's elements, no position is sent.
        target: The weights that the patch leads to.
        level: zstd level, 1 to 22.

    Returns:
        The bytes of the patch file.
    """
    tensors = target.layout.tensors
    counts = b"".join(codec.encode_varint(len(found)) for found in changes)
    sparse = [
        found
        for tensor, found in zip(tensors, changes, strict=True)
        if 0 < len(found) < tensor.size
    ]
    gaps, bits = codec.encode_positions(sparse)
    raw_sections = {COUNTS: counts, GAPS: gaps, GAP_BITS: bits}
    for size in (1, 2, 4, 8):
        values = [
            _bits(target[tensor.name])[found]
            for tensor, found in zip(tensors, changes, strict=True)
            if len(found) and tensor.item_size == size
        ]
        if values:
            planes = codec.encode_planes(np.concatenate(values))
            raw_sections |= dict(zip(_plane_kinds(size), planes, strict=True))
    table, body = bytearray(), bytearray()
    used = {kind: raw for kind, raw in raw_sections.items() if raw}
    table.append(len(used))
    for kind, raw in used.items():
        encoding, packed = codec.pack_section(raw, level)
        table += bytes([kind, encoding])
        table += codec.encode_varint(len(packed)) + codec.encode_varint(len(raw))
        body += packed
    return encode_header(header, bytes(table + body)) + b"\0\0" + bytes(table + body)


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    return array.reshape(-1).view(f"<u{array.dtype.itemsize}")
