# SPDX-License-Identifier: Apache-2.0
"""Write the provenance of a release: three files, bound to the same SHA-256."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_runtime.errors import RoundError
from edge_runtime.formats.signing import key_id
from edge_runtime.live.shared import public_key
from packager.build import write_file
from packager.provenance.bom import encode_bom
from packager.provenance.facts import Facts
from packager.provenance.model_signature import sign_model
from packager.provenance.statement import encode_statement, sign_statement


@dataclass(frozen=True, slots=True)
class Paths:
    """The files of one release's provenance.

    Attributes:
        bom: CycloneDX bill of materials.
        statement: in-toto statement in its envelope.
        signature: Of the OpenSSF Model Signing tool.
    """

    bom: Path
    statement: Path
    signature: Path

    @classmethod
    def of(cls, facts: Facts, folder: Path | None = None) -> "Paths":
        """Return where the files of a release lie: by default beside it.

        Raises:
            RoundError: In the round folder itself, which they speak of.
        """
        folder = (folder or facts.path.parent).resolve()
        if folder.is_relative_to(facts.path):
            raise RoundError(
                f"{folder} is what is signed, so nothing can be written there; give "
                "another folder with -o"
            )
        names = (f"{facts.name}{end}" for end in (".cdx.json", ".intoto.json", ".sig"))
        return cls(*(folder / name for name in names))


def write_provenance(
    facts: Facts,
    paths: Paths,
    signers: Sequence[Ed25519PrivateKey],
    model_key: tuple[Path, str | None] | None = None,
    time: str = "",
) -> list[Path]:
    """Write what the keys allow; each file complete or absent.

    Args:
        facts: What is known of the release.
        paths: Where to.
        signers: Keys that sign the statement; none: no statement.
        model_key: File of the key on a NIST curve, and its passphrase; None: no
            signature of the Model Signing tool.
        time: When, in ISO 8601; empty to leave it out.

    Returns:
        The files, in the order in which they were written.

    Raises:
        DpuError: As :func:`sign_model`.
        OSError: Something cannot be read or written.
    """
    bom = encode_bom(facts, time)
    files = {paths.bom: bom}
    if signers:
        names = [key_id(public_key(key)) for key in signers]
        byproducts = {paths.bom.name: hashlib.sha256(bom).hexdigest()}
        payload = encode_statement(facts, byproducts, names, time)
        files[paths.statement] = sign_statement(payload, signers)
    if model_key is not None:
        files[paths.signature] = sign_model(facts.path, *model_key)
    for path, data in files.items():
        write_file(data, path)
    return list(files)
