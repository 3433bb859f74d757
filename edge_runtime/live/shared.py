# SPDX-License-Identifier: Apache-2.0
"""What proofs, reports and the network side share; it needs no NumPy."""

import json
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

MACHINE_ID = Path("/etc/machine-id")


def device_id() -> str:
    """Return what this machine is called where nobody gave it a name."""
    with suppress(OSError, ValueError):
        found = MACHINE_ID.read_text("ascii").strip()
        # Empty, or "uninitialized", on every board of an image: one place for all.
        if re.fullmatch("[0-9a-f]{32}", found):
            return found
    return socket.gethostname()


def canonical(record: Mapping[str, Any]) -> bytes:
    """Encode a record in the one form that is signed."""
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()


def public_key(key: "Ed25519PrivateKey") -> str:
    """Return the public half of a key: 32 raw bytes, in hex."""
    return key.public_key().public_bytes_raw().hex()
