# SPDX-License-Identifier: Apache-2.0
"""What a finished patch or bundle says of itself: for whom, and signed by whom."""

import io
from dataclasses import dataclass
from errno import EINVAL
from pathlib import Path
from typing import BinaryIO

from edge_runtime.errors import DpuError, TrustError
from edge_runtime.formats.bundle import (
    MANIFEST_NAME,
    PATCH_NAME,
    SIGNATURES_NAME,
    open_archive,
    read_member,
)
from edge_runtime.formats.header import MAGIC, PatchHeader, parse_header, read_header
from edge_runtime.formats.signing import decode_signatures, read_signatures

PATCH, BUNDLE = "patch", "bundle"


@dataclass(frozen=True, slots=True)
class Facts:
    """What a file says of itself; nothing but its checksums was proved.

    Attributes:
        kind: ``patch`` or ``bundle``.
        header: Of the patch, or of the patch in the bundle.
        signers: Ids of the keys under whose names there are signatures.
        signed: The bytes that signatures are made over. They cover everything else,
            so that two files with the same ones differ in their signatures alone.
    """

    kind: str
    header: PatchHeader
    signers: tuple[str, ...]
    signed: bytes


def read_facts(source: Path | bytes) -> Facts:
    """Read what a file says of itself, without reading all of it.

    Args:
        source: The file, or its bytes.

    Raises:
        OSError: It cannot be read.
        PatchError: It is neither a patch nor a bundle, or it is damaged.
        BundleError: A damaged bundle.
    """
    if isinstance(source, Path) and source.exists() and not source.is_file():
        raise OSError(EINVAL, "no ordinary file", str(source))  # a pipe never ends
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        start = file.read(len(MAGIC))
        if not start.startswith(b"PK"):
            file.seek(0)
            return _patch_facts(file)
    return _bundle_facts(source)


def _patch_facts(file: BinaryIO) -> Facts:
    raw = read_header(file)
    header, *_ = parse_header(raw)
    ids = tuple(signature.key_id for signature in read_signatures(file)[1])
    return Facts(PATCH, header, ids, raw)


def _bundle_facts(source: Path | bytes) -> Facts:
    with open_archive(source) as archive:
        manifest = read_member(archive, MANIFEST_NAME, "manifest_bytes")
        block = b""
        if SIGNATURES_NAME in archive.namelist():
            block = read_member(archive, SIGNATURES_NAME, "signature_bytes")
        with archive.open(PATCH_NAME) as member:
            header = _patch_facts(member).header  # type: ignore[arg-type]
        ids = tuple(signature.key_id for signature in decode_signatures(block))
    return Facts(BUNDLE, header, ids, manifest)


def keep_signed(data: bytes, path: Path, *, force: bool = False) -> str:
    """Guard a signed file that an unsigned one is about to replace.

    Args:
        data: The new file.
        path: Where it goes.
        force: Give the signatures up.

    Returns:
        Ids of the signers of a file that is the same but for its signatures, so that it
        is to be left alone; empty where the new file is to be written.

    Raises:
        TrustError: The signatures would be lost.
        OSError: The file that is there cannot be read.
    """
    new = read_facts(data)
    if force or new.signers or not path.is_file():
        return ""
    try:
        old = read_facts(path)
    except DpuError:
        return ""  # something else, which is replaced as ever
    names = ", ".join(old.signers)
    if not names or new.signed == old.signed:
        return names
    raise TrustError(
        f"{path} is signed by {names}, and would be replaced by an unsigned "
        f"{new.kind}; sign this one too (--sign), write it elsewhere (-o), or give the "
        "signatures up with --force"
    )
