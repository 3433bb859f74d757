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
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from edge_runtime.errors import MALFORMED, BundleError, PatchError, TrustError
from edge_runtime.formats import signing
from edge_runtime.formats.model_folder import (
    CONTRACT_NAME,
    GOLDEN_NAME,
    GRAPH_NAME,
    INIT_NAME,
    INIT_TENSORS_NAME,
    RUN_NAME,
)

SCHEMA = 1
RUN_SCHEMA = 2  # with run.json: a runtime that cannot read it must say so
MANIFEST_NAME = "bundle.json"
SIGNATURES_NAME = "bundle.sig"
KEYS_FOLDER = "keys/"
PATCH_NAME = "patch.dpu"
REQUIRED = (GRAPH_NAME, INIT_NAME, CONTRACT_NAME, GOLDEN_NAME, PATCH_NAME)
OPTIONAL = (INIT_TENSORS_NAME, RUN_NAME)
MAX_MANIFEST_BYTES = 1 << 20
MAX_KEY_BYTES = 4096
MAX_MEMBER_BYTES = 2 << 30  # of any other
Source = str | PathLike[str] | bytes


@dataclass(frozen=True, slots=True)
class Bundle:
    """The content of an installation bundle.

    Attributes:
        model: Identity of the network, hex.
        target: Fingerprint of the weights that it installs, hex.
        patch: The bytes of the patch that leads to them from the init weights.
        files: The other members that a device keeps, by name.
    """

    model: str
    target: str
    patch: bytes
    files: dict[str, bytes]


def read_bundle(source: Source, trust: signing.Trust | None = None) -> Bundle:
    """Read a bundle and check every member against the manifest.

    Args:
        source: A path, or the bytes of the file.
        trust: Whose signatures it needs; by default nobody's.

    Raises:
        OSError: The file cannot be read.
        BundleError: Not a bundle, damaged or incomplete.
        TrustError: The trusted keys did not sign it.
    """
    with _opened(source) as archive:
        signed = _member(archive, MANIFEST_NAME, MAX_MANIFEST_BYTES)
        block = b""
        if SIGNATURES_NAME in archive.namelist():
            block = _member(archive, SIGNATURES_NAME, signing.MAX_BLOCK_BYTES)
        signatures = signing.decode_signatures(block)
        (trust or signing.Trust()).check(signing.BUNDLE_CONTEXT, signed, signatures)
        manifest = json.loads(signed)
        if manifest["schema"] not in (SCHEMA, RUN_SCHEMA):
            raise BundleError(
                f"bundle of schema {manifest['schema']}, this runtime knows up to "
                f"{RUN_SCHEMA}; install a newer dpu-edge"
            )
        digests = manifest["files"]
        missing = [name for name in REQUIRED if name not in digests]
        if missing:
            raise BundleError(f"the bundle lacks {', '.join(missing)}; make it anew")
        names = [name for name in (*REQUIRED, *OPTIONAL) if name in digests]
        files = {name: _member(archive, name, digest=digests[name]) for name in names}
        patch = files.pop(PATCH_NAME)
        return Bundle(str(manifest["model"]), str(manifest["target"]), patch, files)


def carried_trust(source: Source, threshold: int = 1) -> signing.Trust:
    """Return the trust in the keys that a bundle itself carries.

    Nothing proves these keys: whoever made the bundle chose them. It is a leap of
    faith, for a first installation over a channel that is trusted for other reasons.

    Args:
        source: A path, or the bytes of the file.
        threshold: How many of the keys must sign from then on.

    Raises:
        OSError: The file cannot be read.
        BundleError: Not a bundle, or damaged.
        KeyFileError: A key in it is none.
        TrustError: It carries fewer keys than that.
    """
    with _opened(source) as archive:
        manifest = json.loads(_member(archive, MANIFEST_NAME, MAX_MANIFEST_BYTES))
        pems = {
            name: _member(archive, name, MAX_KEY_BYTES, digest)
            for name, digest in sorted(manifest["files"].items())
            if name.startswith(KEYS_FOLDER)
        }
    if not pems:
        raise TrustError(
            "the bundle carries no keys; give the key with --trust KEY.pem"
        )
    return signing.trust_keys(pems, threshold)


@contextmanager
def _opened(source: Source) -> Iterator[zipfile.ZipFile]:
    file = io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb")
    try:
        with file, zipfile.ZipFile(file) as archive:
            yield archive
    except PatchError as err:
        raise BundleError(f"the bundle's {SIGNATURES_NAME}: {err}") from err
    # RuntimeError: an encrypted member, or one of an unknown kind.
    except (zipfile.BadZipFile, EOFError, RuntimeError, *MALFORMED) as err:
        raise BundleError(
            f"not an installation bundle, or damaged ({err}); fetch it again"
        ) from err


def _member(
    archive: zipfile.ZipFile,
    name: str,
    limit: int = MAX_MEMBER_BYTES,
    digest: str | None = None,
) -> bytes:
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
        raise BundleError(
            f"the bundle's {name} is compressed or larger than {limit} bytes; make it "
            "with dpu-pack --bundle"
        )
    data = archive.read(info)
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise BundleError(f"the bundle's {name} is damaged; fetch it again")
    return data
