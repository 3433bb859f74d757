# SPDX-License-Identifier: Apache-2.0
"""Signing keys, and what they sign: patches and bundles.

Devices verify with :mod:`edge_runtime.formats.signing`; private keys never come near
them. Ed25519 is deterministic and signatures are kept in the order of their key ids, so
the same file and keys always give the same bytes, whoever signs first.

    >>> from edge_runtime.formats.signing import trust_keys
    >>> key = generate_key()
    >>> trust = trust_keys({"fleet.pub.pem": encode_public(key)})
    >>> signatures = add_signature((), PATCH_CONTEXT, b"some header", key)
    >>> trust.check(PATCH_CONTEXT, b"some header", signatures) == trust.ids
    True
"""

import hashlib
import io
import os
import re
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from enum import StrEnum
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from edge_runtime.errors import KeyFileError, PatchFormatError
from edge_runtime.formats.bundle import (
    KEYS_FOLDER,
    MANIFEST_NAME,
    SIGNATURES_NAME,
    open_archive,
    read_bundle,
    read_member,
)
from edge_runtime.formats.frames import STORED
from edge_runtime.formats.header import (
    DATED,
    encode_header,
    parse_header,
    read_header,
)
from edge_runtime.formats.patch import open_patch
from edge_runtime.formats.sections import SIGNED_AT, encode_varint
from edge_runtime.formats.signing import (
    BUNDLE_CONTEXT,
    MAX_BLOCK_BYTES,
    PATCH_CONTEXT,
    Signature,
    decode_signatures,
    encode_signatures,
    framed,
    key_id,
    read_signatures,
)
from edge_runtime.live.proof import encode_public, public_key
from packager.zip_file import encode_members


def sign(
    data: bytes, keys: Iterable[Ed25519PrivateKey], seconds: int | None = None
) -> bytes:
    """Sign a patch or a bundle with some keys.

    Args:
        data: The bytes of the file.
        keys: The signers'.
        seconds: When it is signed, since 1970, for a patch that is to say so.

    Raises:
        PatchError: Neither of them, damaged, or without room for another signature.
        BundleError: A damaged or incomplete bundle.
    """
    if seconds is not None and not is_bundle(data):
        data = date_patch(data, seconds)
    for key in keys:
        data = (sign_bundle if is_bundle(data) else sign_patch)(data, key)
    return data


def is_bundle(data: bytes) -> bool:
    """Whether this is the beginning of a bundle, which is a zip file."""
    return data.startswith(b"PK")


def sign_patch(data: bytes, key: Ed25519PrivateKey) -> bytes:
    """Sign a patch, beside the signatures that it has.

    Header and body stay as they are; a second signature of one key changes nothing.

    Args:
        data: The bytes of the patch file.
        key: The signer's.

    Returns:
        The bytes of the signed patch file.

    Raises:
        PatchError: It is not a whole patch, or has no room for another signature.
    """
    file = io.BytesIO(data)
    header = read_header(file)
    _, size, digest = parse_header(header)
    _, signatures = read_signatures(file)
    body = file.read()
    if (len(body), hashlib.sha256(body).digest()) != (size, digest):
        raise PatchFormatError("the patch is damaged and was not signed; make it anew")
    block = encode_signatures(add_signature(signatures, PATCH_CONTEXT, header, key))
    if len(block) > MAX_BLOCK_BYTES:
        raise PatchFormatError(
            f"the patch has {len(signatures)} signatures and no room for another"
        )
    return header + len(block).to_bytes(2, "little") + block + body


def date_patch(data: bytes, seconds: int) -> bytes:
    """Say in a patch when it is signed; what it changes stays byte for byte.

    Devices with a key list judge by it whether the list was still good then. Runtimes
    that do not know it refuse the patch.

    Args:
        data: The bytes of the patch file, unsigned.
        seconds: Since 1970, UTC.

    Returns:
        The bytes of the patch file, unsigned.

    Raises:
        PatchError: It is not a whole patch, or it is signed, so that it may not change.
    """
    with open_patch(data) as patch:
        header, sections = patch.header, patch.sections
        if patch.signatures:
            raise PatchFormatError(
                "the patch is signed: to date it would break the signatures; pack its "
                "round again and sign that with --dated"
            )
    parts = {s.kind: (s.encoding, data[s.offset :][: s.packed_size]) for s in sections}
    parts[SIGNED_AT] = STORED, encode_varint(seconds)
    table, body = bytearray([len(parts)]), b""
    for kind, (encoding, part) in sorted(parts.items()):
        table += bytes([kind, encoding]) + encode_varint(len(part))
        body += part
    body = bytes(table) + body
    dated = replace(header, critical=header.critical | DATED)
    result = encode_header(dated, body) + b"\0\0" + body
    open_patch(result).close()
    return result


def sign_bundle(data: bytes, key: Ed25519PrivateKey) -> bytes:
    """Sign a bundle, beside the signatures that it has.

    The signature is over ``bundle.json``, which holds the SHA-256 of everything else.

    Args:
        data: The bytes of the bundle.
        key: The signer's.

    Returns:
        The bytes of the signed bundle.

    Raises:
        BundleError: Not a bundle, damaged or incomplete.
    """
    read_bundle(data)  # nobody's name goes on what no device would take
    with open_archive(data) as archive:
        members = {name: read_member(archive, name) for name in archive.namelist()}
    manifest = members.pop(MANIFEST_NAME)
    signatures = decode_signatures(members.pop(SIGNATURES_NAME, b""))
    signatures = add_signature(signatures, BUNDLE_CONTEXT, manifest, key)
    signed = {MANIFEST_NAME: manifest, SIGNATURES_NAME: encode_signatures(signatures)}
    return encode_members(signed | members)


def add_signature(
    signatures: Iterable[Signature],
    context: bytes,
    message: bytes,
    key: Ed25519PrivateKey,
) -> tuple[Signature, ...]:
    """Return the signatures of a message, the one of this key among them.

    Args:
        signatures: Those that it has.
        context: What the message is, ``PATCH_CONTEXT`` or ``BUNDLE_CONTEXT``.
        message: The exact bytes to sign.
        key: The signer's.
    """
    own = key_id(public_key(key))
    others = [signature for signature in signatures if signature.key_id != own]
    value = key.sign(framed(context, message))
    return tuple(sorted([*others, Signature(own, value)]))


def carried_keys(keys: Iterable[Ed25519PrivateKey]) -> dict[str, bytes]:
    """Return the members with which a bundle carries the public halves of keys."""
    return {
        f"{KEYS_FOLDER}{key_id(public_key(key))}.pem": encode_public(key)
        for key in keys
    }


def seconds_now() -> int:
    """Return this moment, or that of SOURCE_DATE_EPOCH, in seconds since 1970.

    Raises:
        KeyFileError: SOURCE_DATE_EPOCH is set and is no number of seconds.
    """
    given = stated_seconds()
    return int(time.time()) if given is None else given


def stated_seconds() -> int | None:
    """Return the moment of SOURCE_DATE_EPOCH, in seconds since 1970; None without it.

    Raises:
        KeyFileError: It is no number of seconds.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    if given and not re.fullmatch(r"[0-9]{1,11}", given):
        raise KeyFileError(
            f"SOURCE_DATE_EPOCH is {given!r}, expected seconds since 1970"
        )
    return int(given) if given else None


# Keys ---------------------------------------------------------------------------------

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
    """Encode a private key as PEM (PKCS#8), encrypted if there is a passphrase."""
    lock: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        lock = serialization.BestAvailableEncryption(_bytes_of(passphrase))
    return key.private_bytes(Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)


def is_encrypted(pem: bytes) -> bool:
    """Whether a private key needs a passphrase."""
    return b"ENCRYPTED" in pem


def _bytes_of(passphrase: str) -> bytes:
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
            pem, _bytes_of(passphrase) if passphrase else None
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
        OSError: A file of either name exists, or cannot be written.
    """
    public = path.with_name(path.name.removesuffix(".pem") + ".pub.pem")
    for place in (path, public):
        if place.exists():
            raise FileExistsError(f"{place} exists; a key is never overwritten")
    key: PrivateKey = generate_key()
    if kind is KeyKind.P256:
        key = ec.generate_private_key(ec.SECP256R1())
    private, pem = encode_private(key, passphrase), _public_pem(key)
    with ExitStack() as undo:  # both or none: half of a pair would block the next try
        for place, mode, data in (
            (path, 0o600, private),
            (public, 0o644, pem),
        ):
            # Exclusive, and private from its first byte on.
            handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            undo.callback(place.unlink)
            with open(handle, "wb") as file:
                file.write(data)
        undo.pop_all()
    if isinstance(key, Ed25519PrivateKey):
        return public, key_id(public_key(key))
    # As the Model Signing tool calls it: the hint in its signatures begins so.
    return public, hashlib.sha256(pem).hexdigest()[:16]


def _public_pem(key: PrivateKey) -> bytes:
    form = PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(Encoding.PEM, form)
