# SPDX-License-Identifier: Apache-2.0
"""The begin of a patch: its header, and who signed it. Needs no NumPy."""

from dataclasses import dataclass
from typing import BinaryIO

from edge_runtime.formats import signing
from edge_runtime.formats.header import PatchHeader, parse_header, read_header
from edge_runtime.limits import Limits


@dataclass(frozen=True, slots=True)
class SignedHeader:
    """What stands before the body of a patch.

    Attributes:
        header: What the patch is for.
        signatures: Proved only as far as trusted keys were asked for.
        start: Bytes before the body.
        body_size: Bytes of the body.
        body_digest: SHA-256 of the body.
    """

    header: PatchHeader
    signatures: tuple[signing.Signature, ...]
    start: int
    body_size: int
    body_digest: bytes


def read_signed_header(
    file: BinaryIO, limits: Limits, trust: signing.Trust
) -> SignedHeader:
    """Read what stands before the body of a patch.

    Raises:
        PatchFormatError: Not a patch, truncated, malformed or over a limit.
        PatchVersionError: Made for a newer runtime.
        PatchIntegrityError: A checksum does not match.
        TrustError: The trusted keys did not sign it.
    """
    # Read once: what is believed below are the very bytes that were signed.
    signed = read_header(file)
    header, body_size, body_digest = parse_header(signed)
    block, signatures = signing.read_signatures(file, limits.signature_bytes)
    trust.check(signing.PATCH_CONTEXT, signed, signatures)
    start = len(signed) + block
    return SignedHeader(header, signatures, start, body_size, body_digest)
