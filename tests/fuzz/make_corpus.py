# SPDX-License-Identifier: Apache-2.0
"""Make the seeds of the corpus: good patches for the fuzzed weight file, in all forms.

python -m tests.fuzz.make_corpus
"""

import hashlib
from pathlib import Path

import numpy as np

from edge_runtime.formats.header import HEADER_BYTES, SUBSPACE, PatchHeader
from edge_runtime.formats.subspace import Term
from edge_runtime.formats.subspace_moves import move_weights
from edge_runtime.formats.weights import Weights
from packager.build import build_patch, pack_changes
from packager.diff import diff
from tests.fuzz.target import BASE

CORPUS = Path(__file__).parent / "corpus"


def main():
    """Write one whole file, one body and one resealable file for each density."""
    CORPUS.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.1, 0.3, 0.5, 0.8, 1.0):
        data = bytearray(BASE.data)
        first = len(BASE.layout.header)
        where = first + np.flatnonzero(rng.random(len(data) - first) < share)
        for position in where:
            data[position] ^= int(rng.integers(1, 256))
        target = Weights(BASE.layout, data)
        header = PatchHeader(
            "00" * 32, BASE.fingerprint, target.fingerprint, 1, 1, len(data)
        )
        patch = build_patch(BASE, target, header, level=3)
        write(patch)
    coefficients = 2 * rng.integers(0, 4, 128).astype(np.int16) - 3
    terms = [
        Term(1, 2, 2, {2: 2.0**-7, 3: 0.5, 4: 1.0, 5: 2.0**-9}, coefficients),
        Term(2**40, 1, 1, {3: 2.0**-100}, np.sign(coefficients)),
    ]
    target = move_weights(BASE, terms)
    header = PatchHeader(
        "00" * 32, BASE.fingerprint, target.fingerprint, 1, 1, len(BASE.data)
    )
    none = diff(BASE, BASE)
    packed = pack_changes(BASE, target, header, none, level=3, terms=terms)
    write(packed.data, SUBSPACE)


def write(patch, critical=0):
    """Write a patch as it is, its body, and the patch to be sealed again."""
    for kind, rest in enumerate((patch, patch[HEADER_BYTES + 2 :], patch)):
        seed = bytes([kind + 3 * critical]) + rest
        (CORPUS / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)


if __name__ == "__main__":
    main()
