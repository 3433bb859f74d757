# SPDX-License-Identifier: Apache-2.0
"""The header of a patch: fixed size, little-endian, nothing decompressed to read it."""

import hashlib
import struct
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from edge_runtime.errors import (
    PatchFormatError,
    PatchIntegrityError,
    PatchVersionError,
)

MAGIC = b"\x89DPU\r\n\x1a\n"
VERSION = 1
# Release counters. No device misses a million releases, so a counter that is further
# ahead is a slip of the hand; and no release could follow the highest number of all.
MAX_JUMP = 1 << 20
RESERVED_COUNTER = (1 << 64) - 1
# Bits of critical features: what a reader has to know of a body.
DATED = 0x1  # it says when the patch was signed
SUBSPACE = 0x2  # it moves whole tensors by subspaces
KNOWN_CRITICAL = DATED | SUBSPACE  # what this runtime understands
# magic, version, header size, critical, optional, round, counter, model, parent,
# target, weight file size, body size, SHA-256 of the body; then a CRC-32 of it all.
_HEADER = struct.Struct("<8sHHHHIQ32s32s32sQQ32s")
HEADER_BYTES = _HEADER.size + 4
MAX_HEADER_BYTES = 4096


@dataclass(frozen=True, slots=True)
class PatchHeader:
    """What a patch is for.

    Attributes:
        model: Identity of the network (:mod:`edge_runtime.formats.identity`), hex.
        parent: Fingerprint of the weights that the patch leads from, hex.
        target: Fingerprint of the weights that it leads to, hex.
        round: The round that made the target.
        counter: Release counter of the target; a device never goes below its floor.
        file_size: Bytes of the weight file, before and after.
        critical: Feature bits that a reader must understand.
        optional: Feature bits that a reader may ignore.
        signed_at: When it was signed, in seconds since 1970, as its body says; None
            where it does not say.
    """

    model: str
    parent: str
    target: str
    round: int
    counter: int
    file_size: int
    critical: int = 0
    optional: int = 0
    signed_at: int | None = None


def read_exactly(file: BinaryIO, count: int) -> bytes:
    """Read ``count`` bytes.

    Raises:
        PatchFormatError: The file ends before.
    """
    data = file.read(count)
    while len(data) < count and (more := file.read(count - len(data))):
        data += more  # of a pipe
    if len(data) < count:
        raise PatchFormatError("the patch is truncated; fetch it again")
    return data


def read_header(file: BinaryIO) -> bytes:
    """Read the header from the start of a patch, exactly as it stands there.

    Raises:
        PatchFormatError: Not a patch, or truncated.
        PatchVersionError: Made for a newer runtime.
    """
    start = file.read(len(MAGIC))
    if start != MAGIC:
        raise PatchFormatError(
            f"not a patch: it {f'begins with {start!r}' if start else 'is empty'}, "
            f"expected {MAGIC!r}; give a .dpu file, or fetch it again, whole and as "
            "binary data"
        )
    start += read_exactly(file, 4)
    version, size = struct.unpack_from("<HH", start, len(MAGIC))
    if version != VERSION:
        what = "which was never settled; pack its round again"
        if version > VERSION:
            what = f"this runtime reads up to {VERSION}; install a newer dpu-edge"
        raise PatchVersionError(
            f"the patch is of format version {version}, {what}",
            found=version,
            supported=VERSION,
        )
    if not HEADER_BYTES <= size <= MAX_HEADER_BYTES:
        raise PatchFormatError(f"the patch states a header of {size} bytes")
    return start + read_exactly(file, size - len(start))


def parse_header(data: bytes) -> tuple[PatchHeader, int, bytes]:
    """Check and parse the bytes of a header.

    Returns:
        The header, the size of the body in bytes, and the body's SHA-256.

    Raises:
        PatchVersionError: It needs features of a newer runtime.
        PatchIntegrityError: The checksum does not match.
    """
    stated = int.from_bytes(data[-4:], "little")
    actual = zlib.crc32(data[:-4])
    if stated != actual:
        raise PatchIntegrityError(
            "the patch is damaged: its header does not match its checksum; fetch it "
            "again",
            expected=f"{stated:08x}",
            actual=f"{actual:08x}",
        )
    fields = _HEADER.unpack_from(data)
    critical, optional, round_, counter, *digests, file_size = fields[3:11]
    if critical & ~KNOWN_CRITICAL:
        raise PatchVersionError(
            f"the patch needs features {critical & ~KNOWN_CRITICAL:#x} that this "
            "runtime does not have; install a newer dpu-edge",
            found=critical,
            supported=KNOWN_CRITICAL,
        )
    model, parent, target = (digest.hex() for digest in digests)
    header = PatchHeader(
        model, parent, target, round_, counter, file_size, critical, optional
    )
    return header, *fields[11:]


def encode_header(header: PatchHeader, body: bytes) -> bytes:
    """Encode the header of a patch with this body."""
    data = _HEADER.pack(
        MAGIC,
        VERSION,
        HEADER_BYTES,
        header.critical,
        header.optional,
        header.round,
        header.counter,
        bytes.fromhex(header.model),
        bytes.fromhex(header.parent),
        bytes.fromhex(header.target),
        header.file_size,
        len(body),
        hashlib.sha256(body).digest(),
    )
    return data + zlib.crc32(data).to_bytes(4, "little")
