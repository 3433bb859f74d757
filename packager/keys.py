# SPDX-License-Identifier: Apache-2.0
"""Private keys: made, written with their public halves, and read from PEM files."""

import hashlib
import os
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from edge_runtime.errors import KeyFileError
from edge_runtime.files import naming
from edge_runtime.formats.signing import key_id
from edge_runtime.live.proof import encode_public
from edge_runtime.live.shared import public_key

MAX_PASSPHRASE = 1023  # bytes that OpenSSL takes
PrivateKey = Ed25519PrivateKey | ec.EllipticCurvePrivateKey
# Those that the OpenSSF Model Signing tool takes.
CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)


class KeyKind(StrEnum):
    """What a key is for: releases that devices check, or public tools."""

    ED25519 = "ed25519"
    P256 = "p256"


def generate_key() -> Ed25519PrivateKey:
    """Generate a private key."""
    return Ed25519PrivateKey.generate()


def encode_private(key: PrivateKey, passphrase: str | None = None) -> bytes:
    """Encode a private key as PEM (PKCS#8), encrypted if there is a passphrase.

    Raises:
        KeyFileError: The passphrase is too long.
    """
    lock: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        secret = passphrase_bytes(passphrase)
        if len(secret) > MAX_PASSPHRASE:
            raise KeyFileError(
                f"the passphrase has {len(secret)} bytes, expected at most "
                f"{MAX_PASSPHRASE}; choose a shorter one"
            )
        lock = serialization.BestAvailableEncryption(secret)
    return key.private_bytes(Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)


def is_encrypted(pem: bytes) -> bool:
    """Whether a private key needs a passphrase."""
    return b"ENCRYPTED" in pem


def passphrase_bytes(passphrase: str) -> bytes:
    """Return the bytes of a passphrase, whatever is in them."""
    # The same bytes in every locale: ASCII alone keeps others as surrogates.
    return passphrase.encode("utf-8", "surrogateescape")


def load_private(
    pem: bytes, passphrase: str | None = None, name: str = "the key"
) -> Ed25519PrivateKey:
    """Read a private key that signs releases from PEM.

    Args:
        pem: The content of the key file.
        passphrase: Used only if the key is encrypted.
        name: What to call it in an error.

    Raises:
        KeyFileError: Not a private Ed25519 key, or the passphrase is wrong or missing.
    """
    key = load_any_private(pem, passphrase, name)
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(
            f"{name}: expected Ed25519, found {key.curve.name}, which signs for public "
            "tools only ('dpu-patch provenance')"
        )
    return key


def load_any_private(
    pem: bytes, passphrase: str | None = None, name: str = "the key"
) -> PrivateKey:
    """Read a private key from PEM: Ed25519, or one for public tools.

    Args:
        pem: The content of the key file.
        passphrase: Used only if the key is encrypted.
        name: What to call it in an error.

    Raises:
        KeyFileError: Neither of them, or the passphrase is wrong or missing.
    """
    if b"PUBLIC KEY" in pem:
        raise KeyFileError(
            f"{name} is a public key: it verifies, only the private key signs"
        )
    if not is_encrypted(pem):
        passphrase = None  # the library would refuse it
    elif not passphrase:
        raise KeyFileError(
            f"{name} is encrypted: give its passphrase, for example in DPU_PASSPHRASE"
        )
    try:
        key = serialization.load_pem_private_key(
            pem, passphrase_bytes(passphrase) if passphrase else None
        )
    except (ValueError, TypeError, UnsupportedAlgorithm) as err:
        if passphrase:
            raise KeyFileError(f"wrong passphrase for {name} ({err})") from err
        raise KeyFileError(
            f"{name} is not a private key in PEM form ({err}); make one with "
            "'dpu-patch keygen'"
        ) from err
    if isinstance(key, Ed25519PrivateKey):
        return key
    if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, CURVES):
        return key
    found = getattr(getattr(key, "curve", None), "name", type(key).__name__)
    raise KeyFileError(f"{name}: expected Ed25519 or P-256, found {found}")


def is_model_key(pem: bytes) -> bool:
    """Whether a public key is one that the OpenSSF Model Signing tool takes."""
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        return False
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, CURVES)


def write_key_pair(
    path: Path, passphrase: str | None = None, kind: KeyKind = KeyKind.ED25519
) -> tuple[Path, str]:
    """Generate a key and write both halves: ``NAME.pem`` and ``NAME.pub.pem``.

    Args:
        path: Where the private key goes, readable for its owner only.
        passphrase: Encrypts it.
        kind: What it is for.

    Returns:
        The path of the public key, and its id.

    Raises:
        KeyFileError: The name is one of a public key, or the passphrase is too long.
        OSError: A file of either name exists, or cannot be written.
    """
    if path.name.endswith(".pub.pem"):  # whose files are given away
        raise KeyFileError(
            f"{path} is the name of a public key; give KEY.pem, and KEY.pub.pem is "
            "written beside it"
        )
    public = path.with_name(path.name.removesuffix(".pem") + ".pub.pem")
    for place in (path, public):
        if place.exists():
            raise FileExistsError(f"{place} exists; a key is never overwritten")
    key: PrivateKey = generate_key()
    if kind is KeyKind.P256:
        key = ec.generate_private_key(ec.SECP256R1())
    private, pem = encode_private(key, passphrase), encode_public(key)
    with ExitStack() as undo:  # both or none: half of a pair would block the next try
        for place, mode, data in (
            (path, 0o600, private),
            (public, 0o644, pem),
        ):
            # Exclusive, and private from its first byte on.
            handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            undo.callback(place.unlink)
            with naming(place), open(handle, "wb") as file:
                file.write(data)
        undo.pop_all()
    if isinstance(key, Ed25519PrivateKey):
        return public, key_id(public_key(key))
    # As the Model Signing tool calls it: the hint in its signatures begins so.
    return public, hashlib.sha256(pem).hexdigest()[:16]
