# SPDX-License-Identifier: Apache-2.0
"""Writes the zip file of a bundle.

:mod:`edge_runtime.formats.bundle` says what is in it.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

from edge_runtime.formats.bundle import MANIFEST_NAME, RUN_SCHEMA, SCHEMA
from edge_runtime.formats.model_folder import RUN_NAME


def encode_bundle(manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> bytes:
    """Encode a bundle; the same content gives the same bytes.

    Args:
        manifest: ``run``, ``round``, ``model`` and ``target``.
        files: The members, without ``bundle.json``.

    Returns:
        The bytes of the zip file.
    """
    files = dict(sorted(files.items()))
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    schema = RUN_SCHEMA if RUN_NAME in files else SCHEMA
    record = {"schema": schema, **manifest, "files": digests}
    text = json.dumps(record, indent=1)
    return encode_members({MANIFEST_NAME: text.encode()} | files)


def encode_members(members: Mapping[str, bytes]) -> bytes:
    """Encode a zip file with members in this order; they alone decide its bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            # A fixed date and mode, so that the bytes depend on the content alone.
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, data)
    return out.getvalue()
