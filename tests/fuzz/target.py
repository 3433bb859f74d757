# SPDX-License-Identifier: Apache-2.0
"""What is fuzzed: any bytes, as a patch for a small weight file.

The first byte chooses: the rest as a whole file, or as a body that gets a valid header,
with some features, so that the fuzzer reaches what lies behind the checksums. Every
refusal must be one of our errors; a patch that is accepted must lead to what its header
promises.
"""

import hashlib
import struct
import zlib

import numpy as np

from edge_runtime.errors import DpuError
from edge_runtime.formats.apply import apply_patch
from edge_runtime.formats.header import (
    HEADER_BYTES,
    KNOWN_CRITICAL,
    PatchHeader,
    encode_header,
)
from edge_runtime.formats.patch import open_patch
from edge_runtime.formats.weights import pack_weights

_RNG = np.random.default_rng(0)
BASE = pack_weights(
    {
        "conv.weight": _RNG.normal(size=(6, 3, 3, 3)).astype("<f4"),
        "conv.bias": _RNG.normal(size=6).astype("<f4"),
        "head.weight": _RNG.normal(size=(9, 70)).astype("<f2"),
        "scale": np.array(0.5, "<f8"),
        "steps": np.arange(4, dtype="<i8"),
        "quantised": _RNG.integers(-128, 128, 40, dtype="i1"),
        "empty": np.zeros((0, 3), "<f4"),
    }
)
WHOLE_FILE, BODY = 0, 1


def seal(body: bytes, critical: int = 0) -> bytes:
    """Return a patch file with a valid header around a body."""
    header = PatchHeader(
        "00" * 32, BASE.fingerprint, "11" * 32, 1, 1, BASE.layout.file_size, critical
    )
    return encode_header(header, body) + b"\0\0" + body


def reseal(data: bytes) -> bytes:
    """Mend the checksums of a damaged patch file."""
    if len(data) < HEADER_BYTES + 2:
        return data
    out = bytearray(data)
    body = data[HEADER_BYTES + 2 :]
    struct.pack_into("<Q32s", out, 132, len(body), hashlib.sha256(body).digest())
    struct.pack_into("<I", out, HEADER_BYTES - 4, zlib.crc32(out[: HEADER_BYTES - 4]))
    return bytes(out)


def attempt(data: bytes) -> None:
    """Read and apply ``data``; raise only if the runtime does what it must not."""
    if not data:
        return
    kind, rest = data[0] % 3, data[1:]
    critical = data[0] // 3 % (KNOWN_CRITICAL + 1)
    file = (rest, seal(rest, critical), reseal(rest))[kind]
    try:
        with open_patch(file) as patch:
            result = apply_patch(BASE, patch)
            promised = patch.header.target
    except DpuError:
        return
    if hashlib.sha256(result.data).hexdigest() != promised:
        raise AssertionError("an accepted patch does not lead to its target")
