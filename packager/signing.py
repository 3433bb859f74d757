# SPDX-License-Identifier: Apache-2.0
"""Signatures of patches and bundles, made with the keys of :mod:`packager.keys`.

Devices verify with :mod:`edge_runtime.formats.signing`; private keys never come near
them. Ed25519 is deterministic and signatures are kept in the order of their key ids, so
the same file and keys always give the same bytes, whoever signs first.

    >>> from edge_runtime.formats.signing import trust_keys
    >>> from edge_runtime.live.proof import encode_public
    >>> from packager.keys import generate_key
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
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

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
from edge_runtime.formats.header import DATED, encode_header, parse_header, read_header
from edge_runtime.formats.patch import Patch, open_patch
from edge_runtime.formats.sections import SIGNED_AT, encode_varint
from edge_runtime.formats.signing import (
    BUNDLE_CONTEXT,
    MAX_BLOCK_BYTES,
    PATCH_CONTEXT,
    Signature,
    Trust,
    decode_signatures,
    encode_signatures,
    framed,
    key_id,
    read_signatures,
)
from edge_runtime.live.proof import encode_public
from edge_runtime.live.shared import public_key
from packager.zip_file import encode_members

# Signatures that a file has, and what they are made over -> those that it shall have.
_Change = Callable[[tuple[Signature, ...], bytes], tuple[Signature, ...]]


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


def add_signatures(data: bytes, signatures: Iterable[Signature]) -> bytes:
    """Give a patch or a bundle the signatures that another copy of it has.

    Args:
        data: The bytes of the file.
        signatures: Of keys that did not sign it.

    Raises:
        DpuError: As :func:`sign`.
    """
    rewrite = _bundle_with if is_bundle(data) else _patch_with
    return rewrite(data, lambda own, _message: tuple(sorted([*own, *signatures])))


def is_bundle(data: bytes) -> bool:
    """Whether this is the beginning of a bundle, which is a zip file."""
    return data.startswith(b"PK")


def open_release(path: Path, trust: Trust | None = None) -> Patch:
    """Open a patch, or the patch in a bundle.

    Args:
        path: The file.
        trust: Whose signatures it needs, by default nobody's. Of a bundle it is what is
            signed: the patch in it needs no signature.

    Raises:
        OSError: It cannot be read.
        BundleError: The bundle is damaged.
        PatchError: The patch is damaged.
        TrustError: The trusted keys did not sign it.
    """
    with path.open("rb") as file:
        bundle = is_bundle(file.read(4))
    if bundle:
        return open_patch(read_bundle(path, trust).patch)
    return open_patch(path, trust=trust)


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
    return _patch_with(
        data, lambda own, header: add_signature(own, PATCH_CONTEXT, header, key)
    )


def _patch_with(data: bytes, change: _Change) -> bytes:
    file = io.BytesIO(data)
    header = read_header(file)
    _, size, digest = parse_header(header)
    _, signatures = read_signatures(file)
    body = file.read()
    if (len(body), hashlib.sha256(body).digest()) != (size, digest):
        raise PatchFormatError("the patch is damaged and was not signed; make it anew")
    block = encode_signatures(change(signatures, header))
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
    return _bundle_with(
        data, lambda own, manifest: add_signature(own, BUNDLE_CONTEXT, manifest, key)
    )


def _bundle_with(data: bytes, change: _Change) -> bytes:
    read_bundle(data)  # nobody's name goes on what no device would take
    with open_archive(data) as archive:
        members = {name: read_member(archive, name) for name in archive.namelist()}
    manifest = members.pop(MANIFEST_NAME)
    signatures = decode_signatures(members.pop(SIGNATURES_NAME, b""))
    signatures = change(signatures, manifest)
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
