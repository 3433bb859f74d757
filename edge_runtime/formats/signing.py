# SPDX-License-Identifier: Apache-2.0
"""Ed25519 signatures over the exact bytes of a patch header or a bundle manifest.

What is signed is never the bare message: a context and the message go in together, each
behind its length, so that a signature made for one purpose is worth nothing for
another, and no context can be taken for the beginning of a message.

A public key is written as its 32 raw bytes in hex, and called by its *id*: the first 8
bytes of their SHA-256, in hex. ``cryptography`` is imported when a key is first used.

Here is only what verifies: a release is signed in ``packager.signing``, and a device
signs nothing but its proofs (:mod:`edge_runtime.live.proof`).
"""

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from edge_runtime.errors import (
    KeyFileError,
    PatchFormatError,
    PatchIntegrityError,
    TrustError,
)
from edge_runtime.formats.header import read_exactly
from edge_runtime.reading import read_key_file

PATCH_CONTEXT = b"dpu patch header"
BUNDLE_CONTEXT = b"dpu bundle manifest"
MAX_BLOCK_BYTES = 4096
_ID_BYTES, _VALUE_BYTES, _CHECK_BYTES = 8, 64, 4
_ENTRY_BYTES = _ID_BYTES + _VALUE_BYTES


@dataclass(frozen=True, slots=True, order=True)
class Signature:
    """One signature.

    Attributes:
        key_id: Of the key that made it, hex.
        value: Its 64 bytes.
    """

    key_id: str
    value: bytes


@dataclass(frozen=True, slots=True)
class Trust:
    """Whose signatures count, and how many of them are needed.

    Attributes:
        keys: The trusted public keys, 32 raw bytes in hex; none: nothing is checked.
        threshold: How many of them must have signed.
    """

    keys: tuple[str, ...] = ()
    threshold: int = 1

    def __post_init__(self) -> None:
        """Insist that the threshold can be met.

        Raises:
            KeyFileError: It cannot.
        """
        if not 1 <= self.threshold <= max(1, len(set(self.keys))):
            raise KeyFileError(
                f"{self.threshold} signatures cannot be asked of {len(set(self.keys))} "
                "trusted keys; trust more keys or lower the threshold"
            )

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of the trusted keys."""
        return tuple(key_id(key) for key in self.keys)

    def check(
        self, context: bytes, message: bytes, signatures: Iterable[Signature]
    ) -> tuple[str, ...]:
        """Insist that enough trusted keys signed a message.

        Signatures of other keys are ignored; a wrong one of a trusted key never is.

        Args:
            context: What the message is, ``PATCH_CONTEXT`` or ``BUNDLE_CONTEXT``.
            message: The exact bytes that were signed.
            signatures: What came with them.

        Returns:
            The ids of the trusted keys that signed.

        Raises:
            TrustError: Too few signatures of trusted keys, or a wrong one.
        """
        if not self.keys:
            return ()
        keys, given = dict(zip(self.ids, self.keys, strict=True)), list(signatures)
        ours = [signature for signature in given if signature.key_id in keys]
        found = tuple(dict.fromkeys(signature.key_id for signature in ours))
        if len(found) < self.threshold:
            signers = ", ".join(signature.key_id for signature in given) or "nobody"
            raise TrustError(
                f"not trusted: signed by {signers}, expected {self.threshold} of the "
                f"keys {', '.join(keys)}; have it signed with 'dpu-patch sign'"
            )
        for signature in ours:
            _verify(keys[signature.key_id], signature, framed(context, message))
        return found


@dataclass(frozen=True, slots=True)
class FirstUse:
    """Trust in the keys that a bundle itself carries, whoever made it.

    Attributes:
        threshold: How many of them must sign.
    """

    threshold: int = 1


def _verify(public: str, signature: Signature, message: bytes) -> None:
    if not is_signed(public, signature.value, message):
        raise TrustError(
            f"the signature of key {signature.key_id} is wrong: the file was altered, "
            "or the signature was made for another one; do not use it"
        )


def is_signed(public: str, value: bytes, message: bytes) -> bool:
    """Whether a signature is this key's, over exactly these bytes.

    Args:
        public: The key, 32 raw bytes in hex.
        value: The signature.
        message: What was signed.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
    try:
        key.verify(value, message)
    except InvalidSignature:
        return False
    return True


def framed(context: bytes, message: bytes) -> bytes:
    """Return what is really signed for a message: context and message, with lengths."""
    parts = (context, message)
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


# Signature blocks ---------------------------------------------------------------------


def encode_signatures(signatures: Iterable[Signature]) -> bytes:
    """Encode a signature block, without its length; no signatures give no bytes."""
    entries = b"".join(bytes.fromhex(s.key_id) + s.value for s in sorted(signatures))
    check = zlib.crc32(entries).to_bytes(_CHECK_BYTES, "little")
    return entries + check if entries else b""


def decode_signatures(block: bytes) -> tuple[Signature, ...]:
    """Decode a signature block; there is one form only for the same signatures.

    Raises:
        PatchFormatError: Malformed, or the key ids are not strictly increasing.
        PatchIntegrityError: Its checksum does not match.
    """
    if not block:
        return ()
    if len(block) % _ENTRY_BYTES != _CHECK_BYTES or len(block) < _ENTRY_BYTES:
        raise PatchFormatError(f"a signature block cannot have {len(block)} bytes")
    entries, check = block[:-_CHECK_BYTES], block[-_CHECK_BYTES:]
    actual = zlib.crc32(entries).to_bytes(_CHECK_BYTES, "little")
    if check != actual:
        raise PatchIntegrityError(
            "the signature block is damaged: it does not match its checksum; fetch the "
            "file again",
            expected=check[::-1].hex(),
            actual=actual[::-1].hex(),
        )
    found = tuple(
        Signature(
            entries[at : at + _ID_BYTES].hex(),
            entries[at + _ID_BYTES : at + _ENTRY_BYTES],
        )
        for at in range(0, len(entries), _ENTRY_BYTES)
    )
    ids = [signature.key_id for signature in found]
    if ids != sorted(set(ids)):
        raise PatchFormatError("the key ids of the signature block are not in order")
    return found


def read_signatures(
    file: BinaryIO, limit: int = MAX_BLOCK_BYTES
) -> tuple[int, tuple[Signature, ...]]:
    """Read the length-prefixed signature block behind the header of a patch.

    Returns:
        How many bytes it takes, with its length, and the signatures.

    Raises:
        PatchFormatError: Truncated, malformed or over the limit.
        PatchIntegrityError: Its checksum does not match.
    """
    size = int.from_bytes(read_exactly(file, 2), "little")
    if size > limit:
        raise PatchFormatError(
            f"the signature block has {size} bytes, this device accepts {limit}"
        )
    return 2 + size, decode_signatures(read_exactly(file, size))


# Keys ---------------------------------------------------------------------------------


def key_id(public: str) -> str:
    """Return the short name of a public key: 16 hex digits."""
    return hashlib.sha256(bytes.fromhex(public)).hexdigest()[: 2 * _ID_BYTES]


def load_public(pem: bytes, name: str = "the key") -> str:
    """Read a public key from PEM.

    Args:
        pem: The content of the key file.
        name: What to call it in an error.

    Returns:
        Its 32 raw bytes in hex.

    Raises:
        KeyFileError: Not a public Ed25519 key.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if b"PRIVATE KEY" in pem:
        raise KeyFileError(
            f"{name} is a private key, which stays with its owner; give its public "
            "half (NAME.pub.pem)"
        )
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as err:
        raise KeyFileError(f"{name} is not a public key in PEM form ({err})") from err
    if not isinstance(key, Ed25519PublicKey):
        raise KeyFileError(f"{name}: expected Ed25519, found {type(key).__name__}")
    return key.public_bytes_raw().hex()


def read_public(path: Path) -> str:
    """Read a public key file; return its 32 raw bytes in hex.

    Raises:
        KeyFileError: It is none.
        OSError: It cannot be read.
    """
    return load_public(read_key_file(path), str(path))


def trust_keys(pems: Mapping[str, bytes], threshold: int = 1) -> Trust:
    """Return the trust in some public keys.

    Args:
        pems: The content of each key file, by its name.
        threshold: How many of the keys must sign.

    Raises:
        KeyFileError: One of them is not a public Ed25519 key.
        TrustError: There are fewer keys than the threshold asks for.
    """
    keys = (load_public(pem, name) for name, pem in pems.items())
    return Trust(tuple(dict.fromkeys(keys)), threshold)
