# SPDX-License-Identifier: Apache-2.0
"""Writes the zip file of a bundle.

:mod:`edge_runtime.formats.bundle` says what is in it.
"""

import json
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

from edge_runtime.files import naming
from edge_runtime.formats.bundle import MANIFEST_NAME, RUN_SCHEMA, SCHEMA
from edge_runtime.formats.model_folder import RUN_NAME
from edge_runtime.formats.weights import Weights, fingerprint_chunks

Content = bytes | Weights  # weights come in pieces: they need not be in memory


def encode_bundle(manifest: Mapping[str, Any], files: Mapping[str, Content]) -> bytes:
    """Encode a bundle; the same content gives the same bytes.

    Args:
        manifest: ``run``, ``round``, ``model`` and ``target``.
        files: The members, without ``bundle.json``; a weight file may be weights.

    Returns:
        The bytes of the zip file.
    """
    files = dict(sorted(files.items()))
    digests = {n: fingerprint_chunks(_pieces(data)) for n, data in files.items()}
    schema = RUN_SCHEMA if RUN_NAME in files else SCHEMA
    record = {"schema": schema, **manifest, "files": digests}
    text = json.dumps(record, indent=1)
    return encode_members({MANIFEST_NAME: text.encode()} | files)


def encode_members(members: Mapping[str, Content]) -> bytes:
    """Encode a zip file with members in this order; they alone decide its bytes."""
    with naming(tempfile.gettempdir()), tempfile.TemporaryFile() as out:
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
            for name, data in members.items():
                # A fixed date and mode, so that the bytes depend on the content alone.
                info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
                info.create_system, info.external_attr = 3, 0o644 << 16
                info.file_size = (
                    data.layout.file_size if isinstance(data, Weights) else len(data)
                )
                with archive.open(info, "w") as member:
                    for piece in _pieces(data):
                        member.write(piece)
        out.seek(0)
        # A buffered read of everything would hold it twice for a moment.
        with open(out.fileno(), "rb", buffering=0, closefd=False) as whole:
            return whole.read()


def _pieces(data: Content) -> Iterable[bytes | memoryview]:
    return data.chunks() if isinstance(data, Weights) else [data]
