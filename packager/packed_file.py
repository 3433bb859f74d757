# SPDX-License-Identifier: Apache-2.0
"""What a finished patch or bundle says of itself: for whom, and signed by whom."""

import io
from dataclasses import dataclass
from errno import EINVAL
from pathlib import Path
from typing import BinaryIO

from edge_runtime.errors import ConfigError, DpuError, TrustError
from edge_runtime.formats.bundle import (
    MANIFEST_NAME,
    PATCH_NAME,
    SIGNATURES_NAME,
    open_archive,
    read_member,
)
from edge_runtime.formats.header import MAGIC, PatchHeader, parse_header, read_header
from edge_runtime.formats.kinds import Kind, kind_of
from edge_runtime.formats.signing import (
    Signature,
    decode_signatures,
    read_signatures,
)

PATCH, BUNDLE = "patch", "bundle"
_KINDS = {PATCH: (Kind.PATCH,), BUNDLE: (Kind.BUNDLE, Kind.ZIP)}


@dataclass(frozen=True, slots=True)
class Facts:
    """What a file says of itself; nothing but its checksums was proved.

    Attributes:
        kind: ``patch`` or ``bundle``.
        header: Of the patch, or of the patch in the bundle.
        signatures: Those that it has, of anybody.
        signed: The bytes that signatures are made over. They cover everything else,
            so that two files with the same ones differ in their signatures alone.
    """

    kind: str
    header: PatchHeader
    signatures: tuple[Signature, ...]
    signed: bytes

    @property
    def signers(self) -> tuple[str, ...]:
        """Ids of the keys under whose names there are signatures."""
        return tuple(signature.key_id for signature in self.signatures)


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
    return Facts(PATCH, header, read_signatures(file)[1], raw)


def _bundle_facts(source: Path | bytes) -> Facts:
    with open_archive(source) as archive:
        manifest = read_member(archive, MANIFEST_NAME, "manifest_bytes")
        block = b""
        if SIGNATURES_NAME in archive.namelist():
            block = read_member(archive, SIGNATURES_NAME, "signature_bytes")
        with archive.open(PATCH_NAME) as member:
            header = _patch_facts(member).header  # type: ignore[arg-type]
    return Facts(BUNDLE, header, decode_signatures(block), manifest)


def keep_signed(data: bytes, path: Path, *, force: bool = False) -> tuple[bytes, str]:
    """Guard what a new file is about to replace.

    Args:
        data: The new file.
        path: Where it goes.
        force: Replace it, whatever it is.

    Returns:
        What is to be written: the new file, with the signatures that others gave the
        same bytes; nothing where the file that is there has them all. And the ids of
        the signers that are kept, in words.

    Raises:
        ConfigError: What is there is of another kind.
        TrustError: Signatures would be lost.
        OSError: The file that is there cannot be read.
    """
    new = read_facts(data)
    if force or not path.is_file() or not path.stat().st_size:
        return data, ""
    try:
        old = read_facts(path)
    except DpuError:
        old = None
    found = kind_of(path)
    if old.kind != new.kind if old else found not in _KINDS[new.kind]:
        what = found.short if found else f"no {new.kind}"
        raise ConfigError(
            f"{path} is {what}, and would be replaced by a {new.kind}; give another "
            "name with -o, or --force"
        )
    others = old and [s for s in old.signatures if s.key_id not in new.signers]
    if not old or not others:
        return data, ""
    names = ", ".join(signature.key_id for signature in others)
    if new.signed != old.signed:
        raise TrustError(
            f"{path} is signed by {names}, and would be replaced by another "
            f"{new.kind} that is not; sign this one too (--sign), write it elsewhere "
            "(-o), or give the signatures up with --force"
        )
    if not new.signatures:
        return b"", names
    from packager.signing import add_signatures  # cryptography only where it is needed

    return add_signatures(data, others), names
