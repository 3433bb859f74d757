# SPDX-License-Identifier: Apache-2.0
"""What a new device is installed from: one uncompressed zip file.

::

    bundle.json     schema, run, round, model, target, SHA-256 of the members below
    bundle.sig      signatures of bundle.json, where somebody signed it
    graph.onnx      the network without weights
    init.json       what regenerates the init weights (init.safetensors where needed)
    contract.json   what goes in and comes out
    run.json        which run it is, see identity.py (only where the run has an id)
    golden.npz      inputs, labels, and the outputs that the round's weights give
    patch.dpu       from the init weights to the round
    keys/*.pem      public keys that a device may come to trust (optional)

Any zip tool opens it. The runtime reads only members that it knows, and only as many
bytes as it expects; ``packager.zip_file`` writes it.

Signatures are made over the exact bytes of ``bundle.json``. As that holds the SHA-256
of every member, they cover graph, init recipe, contract, golden inputs and patch alike.
So the patch in a bundle needs no signature of its own, and one signer after another can
sign without undoing what the former did.
"""

import hashlib
import io
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EINVAL, EOVERFLOW
from typing import BinaryIO, cast

from edge_runtime.errors import MALFORMED, BundleError, PatchError, TrustError
from edge_runtime.formats import signing
from edge_runtime.formats.header import PatchHeader
from edge_runtime.formats.json_file import parse_record
from edge_runtime.formats.json_record import Record
from edge_runtime.formats.model_folder import (
    CONTRACT_NAME,
    GOLDEN_NAME,
    GRAPH_NAME,
    INIT_NAME,
    INIT_TENSORS_NAME,
    RUN_NAME,
)
from edge_runtime.limits import limits
from edge_runtime.reading import Source, open_source

SCHEMA = 1
RUN_SCHEMA = 2  # with run.json: a runtime that cannot read it must say so
MANIFEST_NAME = "bundle.json"
SIGNATURES_NAME = "bundle.sig"
KEYS_FOLDER = "keys/"
PATCH_NAME = "patch.dpu"
REQUIRED = (GRAPH_NAME, INIT_NAME, CONTRACT_NAME, GOLDEN_NAME, PATCH_NAME)
OPTIONAL = (INIT_TENSORS_NAME, RUN_NAME)
_INDEX = "bundle_index_bytes"
_NO_PLACE = (EINVAL, EOVERFLOW)


@dataclass(frozen=True, slots=True)
class Bundle:
    """The content of an installation bundle.

    Attributes:
        model: Identity of the network, hex.
        target: Fingerprint of the weights that it installs, hex.
        patch: The bytes of the patch that leads to them from the init weights.
        files: The other members that a device keeps, by name.
        trust: Whose signatures it has.
    """

    model: str
    target: str
    patch: bytes
    files: dict[str, bytes]
    trust: signing.Trust

    def check(self, header: PatchHeader) -> None:
        """Insist that this is the header of the patch that it says it holds.

        Raises:
            BundleError: The patch is for another model, or leads to other weights.
        """
        if (header.model, header.target) != (self.model, self.target):
            raise BundleError("the bundle's patch is not for the bundle's weights")


def read_bundle(
    source: Source, trust: signing.Trust | signing.FirstUse | None = None
) -> Bundle:
    """Read a bundle and check every member against the manifest.

    Args:
        source: A path, the bytes of the file, or the open file, which is closed then.
        trust: Whose signatures it needs, or how many of the keys that it carries; by
            default nobody's.

    Raises:
        OSError: The file cannot be read.
        BundleError: Not a bundle, damaged or incomplete.
        TrustError: The trusted keys did not sign it.
    """
    with open_archive(source) as archive:
        signed = read_member(archive, MANIFEST_NAME, "manifest_bytes")
        manifest = _parse(signed)
        if isinstance(trust, signing.FirstUse):
            trust = _carried(archive, manifest, trust.threshold)
        trust = trust or signing.Trust()
        block = b""
        if SIGNATURES_NAME in archive.namelist():
            block = read_member(archive, SIGNATURES_NAME, "signature_bytes")
        signatures = signing.decode_signatures(block)
        trust.check(signing.BUNDLE_CONTEXT, signed, signatures)
        manifest.schema(SCHEMA, RUN_SCHEMA)
        digests = manifest.record("files")
        missing = [name for name in REQUIRED if name not in digests]
        if missing:
            raise BundleError(f"the bundle lacks {', '.join(missing)}; make it anew")
        names = [name for name in (*REQUIRED, *OPTIONAL) if name in digests]
        _check_room(archive, names)
        files = {
            name: read_member(archive, name, digest=digests.digest(name))
            for name in names
        }
        patch = files.pop(PATCH_NAME)
        model, target = manifest.digest("model"), manifest.digest("target")
        return Bundle(model, target, patch, files, trust)


def _parse(manifest: bytes) -> Record:
    what = f"the bundle's {MANIFEST_NAME}"
    return parse_record(manifest, "manifest_bytes", what, BundleError)


def _carried(
    archive: zipfile.ZipFile, manifest: Record, threshold: int
) -> signing.Trust:
    digests = manifest.record("files")
    names = sorted(name for name in digests.values if name.startswith(KEYS_FOLDER))
    if problem := limits().problem("list_keys", len(names), "the bundle"):
        raise BundleError(problem)
    _check_room(archive, names)
    pems = {
        name: read_member(archive, name, "key_bytes", digests.digest(name))
        for name in names
    }
    if not pems:
        raise TrustError(
            "the bundle carries no keys; give the key with --trust KEY.pub.pem"
        )
    return signing.trust_keys(pems, threshold)


class _Index:
    """A file that gives a zip reader no more bytes than an index may have.

    The reader believes the file's end about how long its index is, and makes an object
    of each entry before anybody can ask how many there are.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable
        self.left = limits().bundle_index_bytes

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self.left + 1 if size < 0 else min(size, self.left + 1))
        self.left -= len(data)
        if self.left < 0:
            most = limits().bundle_index_bytes
            raise BundleError(limits().problem(_INDEX, most + 1, "the bundle's index"))
        return data


@contextmanager
def open_archive(source: Source) -> Iterator[zipfile.ZipFile]:
    """Open a bundle's zip file, if its index is within the limits.

    Raises:
        OSError: The file cannot be read.
        BundleError: Not a bundle, or damaged: also while it is used.
    """
    file = open_source(source)
    try:
        with file, zipfile.ZipFile(index := cast(BinaryIO, _Index(file))) as archive:
            members = len(archive.infolist())
            if problem := limits().problem("bundle_members", members, "the bundle"):
                raise BundleError(problem)
            cast(_Index, index).left = sys.maxsize
            yield archive
    except PatchError as err:
        raise BundleError(f"the bundle's {SIGNATURES_NAME}: {err}") from err
    # RuntimeError: an encrypted member, or one of an unknown kind.
    except (zipfile.BadZipFile, EOFError, RuntimeError, OSError, *MALFORMED) as err:
        # A member is said to begin where no file has a place: no fault of the disk.
        if isinstance(err, OSError) and err.errno not in _NO_PLACE:
            raise
        raise BundleError(
            f"not an installation bundle, or damaged ({err}); fetch it again"
        ) from err


def list_members(source: Source) -> dict[str, int]:
    """Return the bytes of each member of a bundle, in the order of its index.

    Raises:
        OSError: The file cannot be read.
        BundleError: Not a bundle, or damaged.
    """
    with open_archive(source) as archive:
        return {info.filename: info.file_size for info in archive.infolist()}


def _check_room(archive: zipfile.ZipFile, names: Sequence[str]) -> None:
    """Insist that members do not overlap: else a small file unpacks to a large one."""
    file = archive.fp
    size = file.seek(0, io.SEEK_END) if file else 0
    if sum(archive.getinfo(name).file_size for name in names) > size:
        raise BundleError(
            f"the bundle's members have more bytes than the {size} of its file; make "
            "it anew"
        )


def read_member(
    archive: zipfile.ZipFile,
    name: str,
    limit: str = "member_bytes",
    digest: str | None = None,
) -> bytes:
    """Return a member of a bundle.

    Args:
        archive: From :func:`open_archive`.
        name: Of the member.
        limit: Which limit bounds it.
        digest: Its SHA-256, where that is known.

    Raises:
        KeyError: There is none; :func:`open_archive` makes a ``BundleError`` of it.
        BundleError: Compressed, too large or damaged.
    """
    info = archive.getinfo(name)
    # Else as many bytes are read as it has in the file, and cut off afterwards.
    is_plain = info.compress_size == info.file_size
    if info.compress_type != zipfile.ZIP_STORED or not is_plain:
        raise BundleError(
            f"the bundle's {name} is compressed; make it with dpu-pack --bundle"
        )
    if problem := limits().problem(limit, info.file_size, f"the bundle's {name}"):
        raise BundleError(problem)
    # Read once: what is hashed here is what is used.
    data = archive.read(info)
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise BundleError(f"the bundle's {name} is damaged; fetch it again")
    return data
