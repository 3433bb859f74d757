"""What a new device is installed from: one uncompressed zip file.

::

    bundle.json     schema, run, round, model, target, SHA-256 of every other member
    graph.onnx      the network without weights
    init.json       what regenerates the init weights (init.safetensors where needed)
    contract.json   what goes in and comes out
    golden.npz      inputs, labels, and the outputs that the round's weights give
    patch.dpu       from the init weights to the round

Any zip tool opens it. The runtime reads only members that it knows, and only as many
bytes as it expects.
"""

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from edge_runtime.errors import BundleError

SCHEMA = 1
MANIFEST_NAME = "bundle.json"
PATCH_NAME = "patch.dpu"
REQUIRED = ("graph.onnx", "init.json", "contract.json", "golden.npz", PATCH_NAME)
OPTIONAL = ("init.safetensors",)
MAX_MEMBER_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Bundle:
    """The content of an installation bundle.

    Attributes:
        run: Name of the run.
        round: The round that it installs.
        target: Fingerprint of that round's weights, hex.
        model: Identity of the network, hex.
        files: The members by name, without ``bundle.json``.
    """

    run: str
    round: int
    target: str
    model: str
    files: dict[str, bytes]


def read_bundle(source: str | PathLike[str] | bytes) -> Bundle:
    """Read a bundle and check every member against the manifest.

    Args:
        source: A path, or the bytes of the file.

    Raises:
        OSError: The file cannot be read.
        BundleError: Not a bundle, damaged or incomplete.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb")
    try:
        with file, zipfile.ZipFile(file) as archive:
            manifest = json.loads(_member(archive, MANIFEST_NAME))
            if manifest["schema"] != SCHEMA:
                raise BundleError(
                    f"bundle of schema {manifest['schema']}, this runtime knows "
                    f"{SCHEMA}; install a newer dpu-edge"
                )
            files = _members(archive, manifest["files"])
            return Bundle(
                str(manifest["run"]),
                int(manifest["round"]),
                str(manifest["target"]),
                str(manifest["model"]),
                files,
            )
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, EOFError) as err:
        raise BundleError(
            f"not an installation bundle, or damaged ({err}); fetch it again"
        ) from err


def write_bundle(manifest: dict[str, Any], files: dict[str, bytes]) -> bytes:
    """Write a bundle; the same content gives the same bytes.

    Args:
        manifest: ``run``, ``round``, ``model`` and ``target``.
        files: The members, without ``bundle.json``.

    Returns:
        The bytes of the zip file.
    """
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    text = json.dumps({"schema": SCHEMA} | manifest | {"files": digests}, indent=1)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, data in [(MANIFEST_NAME, text.encode()), *sorted(files.items())]:
            # A fixed date and mode, so that the bytes depend on the content alone.
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, data)
    return out.getvalue()


def _members(archive: zipfile.ZipFile, digests: dict[str, str]) -> dict[str, bytes]:
    missing = [name for name in REQUIRED if name not in digests]
    if missing:
        raise BundleError(f"the bundle lacks {', '.join(missing)}; make it anew")
    files = {}
    for name in (*REQUIRED, *OPTIONAL):
        if name in digests:
            files[name] = _member(archive, name)
            if hashlib.sha256(files[name]).hexdigest() != digests[name]:
                raise BundleError(f"the bundle's {name} is damaged; fetch it again")
    return files


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > MAX_MEMBER_BYTES:
        raise BundleError(
            f"the bundle's {name} is compressed or larger than {MAX_MEMBER_BYTES} "
            "bytes; make it with dpu-pack --bundle"
        )
    return archive.read(info)
