# SPDX-License-Identifier: Apache-2.0
"""Heads of channels, signed: the writing side of :mod:`edge_runtime.sync.head_file`."""

from collections.abc import Iterable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_runtime.errors import RoundError
from edge_runtime.formats.signing import Signature
from edge_runtime.sync.head import (
    HEAD_CONTEXT,
    PAUSE_CONTEXT,
    Head,
    Pause,
    pause_message,
)
from edge_runtime.sync.head_file import encode_head, head_message, read_head
from edge_runtime.sync.paths import bundle_path, patch_path
from packager.signing import add_signature

MOST = (1 << 63) - 1  # the largest number that a fleet's database can hold
AHEAD_S = 3600  # the clocks of two publishers are closer together than this


def insist_countable(what: str, *numbers: int) -> None:
    """Insist on numbers that whoever watches a fleet can keep.

    Raises:
        RoundError: One is larger.
    """
    if (largest := max(numbers)) > MOST:
        raise RoundError(
            f"{what} has the number {largest}, expected at most {MOST}: no fleet can "
            "be watched beyond that; publish under a smaller release counter"
        )


def is_fresh(left: float, lifetime_s: int) -> bool:
    """Tell whether something signed holds for long enough yet, and not for too long.

    What holds for longer than its lifetime was signed under a clock that was ahead, or
    was to hold for longer than it is now.
    """
    return lifetime_s // 2 < left <= lifetime_s + AHEAD_S


def named_files(head: Head) -> dict[str, int]:
    """Return the files that a head names, with their sizes."""
    found = {patch_path(way.sha256): way.size for way in head.ways}
    if head.bundle:
        size, sha256 = head.bundle
        found[bundle_path(sha256)] = size
    return found


def sign_head(head: Head, keys: Iterable[Ed25519PrivateKey]) -> bytes:
    """Return the file of a head with the signatures of some keys.

    Raises:
        HeadError: No device could read it.
        RoundError: Nobody could watch it.
    """
    message, signatures = head_message(head), tuple[Signature, ...]()
    for key in keys:
        signatures = add_signature(signatures, HEAD_CONTEXT, message, key)
    data = encode_head(head, signatures)
    read_head(data)  # nobody's name goes on what no device would take
    insist_countable("the new head", head.counter, head.version, head.round)
    return data


def pause_head(data: bytes, key: Ed25519PrivateKey, *, at: int) -> bytes:
    """Return the file of a head with a pause; what the head says stays as it is.

    Args:
        data: The file of the head.
        key: Of a pauser that the head names; devices ignore any other's.
        at: When, in seconds since 1970.

    Raises:
        HeadError: It is no head.
    """
    signed = read_head(data)
    message = pause_message(signed.sha256, at)
    (signature,) = add_signature((), PAUSE_CONTEXT, message, key)
    return encode_head(signed.head, signed.signatures, Pause(at, signature))
