"""The patch file: header, signature block, and a body of sections.

Reading is in steps, cheapest refusal first, and needs no more memory for a large patch
than for a small one: :func:`open_patch` proves size, magic, version, checksum and the
SHA-256 of everything behind the header before a single byte is decompressed.
:meth:`Patch.elements` then decodes against a weight file's layout. FORMAT.md is the
normative description; :mod:`edge_runtime.apply` holds the rules of acceptance.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, Self

from numpy.typing import NDArray

from edge_runtime import signing
from edge_runtime.codec import PositionReader, Positions, encode_positions
from edge_runtime.errors import PatchFormatError, PatchIntegrityError
from edge_runtime.header import PatchHeader, encode_header, parse_header, read_header
from edge_runtime.sections import (
    COUNTS,
    FORMS,
    Body,
    encode_body,
    encode_varint,
    group_kind,
)
from edge_runtime.values import (
    MANTISSA_BITS,
    Bits,
    Form,
    TensorValues,
    ValueReader,
    encode_values,
)
from edge_runtime.weights import CHUNK_BYTES, Layout, Tensor, Weights


@dataclass(frozen=True, slots=True)
class Limits:
    """What a reader accepts.

    Attributes:
        patch_bytes: Largest patch file.
        signature_bytes: Largest signature block.
    """

    patch_bytes: int = 1 << 30
    signature_bytes: int = signing.MAX_BLOCK_BYTES


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
        body: Body,
        size: int,
    ) -> None:
        self._file, self._body = file, body
        self.header = header
        self.signatures = tuple(signatures)
        self.sections = body.sections
        self.size = size
        self.counts = body.numbers(COUNTS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def elements(
        self, layout: Layout
    ) -> Iterator[tuple[Tensor, Positions, ValueReader]]:
        """Yield what travels, in the order of the weight file and in small pieces.

        Args:
            layout: Of the weight file that the patch is for.

        Yields:
            A tensor, at most ``codec.PIECE`` ascending flat positions in it, and what
            reads as many values, which must be read before the next piece.

        Raises:
            PatchFormatError: The patch contradicts the layout or itself.
        """
        forms = self._forms(layout)
        groups = {tensor.name: group for group, tensor, _ in self._groups(layout)}
        readers: dict[int, ValueReader] = {}
        for tensor, positions in self.positions(layout):
            group = groups[tensor.name]
            if group not in readers:
                readers[group] = ValueReader(
                    tensor.item_size, forms[group], partial(self._body.reader, group)
                )
            yield tensor, positions, readers[group]
        for reader in readers.values():
            reader.finish()

    def positions(self, layout: Layout) -> Iterator[tuple[Tensor, Positions]]:
        """Yield the positions of :meth:`elements` alone.

        Raises:
            PatchFormatError: The patch contradicts the layout or itself.
        """
        self._check_counts(layout)
        fine = next(iter(self._body.numbers(FORMS)), 0)
        index = PositionReader(self._body.reader, fine)
        for _, tensor, count in self._groups(layout):
            for positions in index.pieces(tensor.shape, count):
                yield tensor, positions
        index.finish()

    def check(self, layout: Layout) -> None:
        """Decode every position and look at every size, without any weight.

        Raises:
            PatchFormatError: The patch contradicts the layout or itself.
        """
        for _ in self.positions(layout):
            pass
        forms, expected = self._forms(layout), Counter[int]()
        for group, tensor, count in self._groups(layout):
            for kind in forms[group].kinds(tensor.item_size):
                expected[group + kind] += count
        self._body.check_values(expected)

    def _groups(self, layout: Layout) -> Iterator[tuple[int, Tensor, int]]:
        """Yield every tensor of which something travels: its group, and how much."""
        for tensor, count in zip(layout.tensors, self.counts, strict=True):
            if count:
                yield group_of(tensor, count), tensor, count

    def _forms(self, layout: Layout) -> dict[int, Form]:
        """Read the form of every group and hold it against the types in the group."""
        self._check_counts(layout)
        types = {(group, t.dtype): t for group, t, _ in self._groups(layout)}
        groups = sorted({group for group, _ in types})
        numbers = self._body.numbers(FORMS)
        if len(numbers) != (4 * len(groups) + 1 if groups else 0):
            raise PatchFormatError(
                f"the patch has {len(numbers)} numbers for the forms of {len(groups)} "
                "groups of values"
            )
        fields = iter(numbers[1:])
        forms = {
            group: Form(*four)
            for group, four in zip(groups, zip(*[fields] * 4, strict=True), strict=True)
        }
        for (group, dtype), tensor in types.items():
            forms[group].check(dtype, tensor.item_size)
        floats = {group for group, dtype in types if dtype in MANTISSA_BITS}
        if any(forms[group].unit != 1 for group in groups if group not in floats):
            raise PatchFormatError("the patch has a unit for a group without floats")
        return forms

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


def group_of(tensor: Tensor, count: int) -> int:
    """Return the group of values (its first kind) that a tensor belongs to.

    Args:
        tensor: The tensor.
        count: How many of its elements travel.
    """
    return group_kind(tensor.item_size, 2 * count > tensor.size)


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
    return Patch(file, header, signatures, Body(file, size), size)


def encode_patch(
    header: PatchHeader,
    changes: Sequence[Positions],
    base: Weights,
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
        base: The weights that the patch leads from.
        target: The weights that it leads to, of the same layout.
        level: zstd level, 1 to 22.

    Returns:
        The bytes of the patch file.

    Raises:
        PatchFormatError: Two changes are too far apart for the format.
    """
    tensors = target.layout.tensors
    fine, sections = encode_positions(
        [(t.shape, found) for t, found in zip(tensors, changes, strict=True)]
    )
    sections[COUNTS] = [encode_varint(len(found)) for found in changes]
    groups: dict[int, list[TensorValues]] = {}
    for tensor, found in zip(tensors, changes, strict=True):
        if len(found):
            old, new = (_bits(w[tensor.name])[found] for w in (base, target))
            group = groups.setdefault(group_of(tensor, len(found)), [])
            group.append(TensorValues(tensor.dtype, old, new))
    forms = [fine] if groups else []
    for kind, group in sorted(groups.items()):
        form, parts = encode_values(group)
        forms += astuple(form)
        sections |= {kind + offset: part for offset, part in parts.items()}
    sections[FORMS] = [encode_varint(number) for number in forms]
    body = encode_body(sections, level)
    return encode_header(header, body) + b"\0\0" + body


def _bits(array: NDArray[Any]) -> Bits:
    return array.reshape(-1).view(f"<u{array.dtype.itemsize}")
