# SPDX-License-Identifier: Apache-2.0
"""``dpu-patch check-proof``: is a device's proof about the server's weights?"""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_runtime.commandline import OK, FileOf, emit, json_option
from edge_runtime.errors import KeyFileError, ProofError
from edge_runtime.files import read_bounded
from edge_runtime.formats.kinds import Kind
from edge_runtime.text import printable
from packager.cli.files import read_any
from packager.cli.options import MODEL, PUBLIC_KEY, runs_option
from packager.report.words import duration

if TYPE_CHECKING:
    from packager.check_proof import Expected, Part

DIFFERENT = 5  # as for any verification that failed


@click.command("check-proof")
@click.argument("path", metavar="PROOF", type=FileOf(Kind.PROOF))
@click.option("--nonce", required=True, help="What the device was asked with.")
@click.option("--round", "round_", metavar="ROUND", help="Where it should be.")
@click.option(
    "--weights",
    type=MODEL,
    metavar="FILE",
    help="What it should hold: a weight file, an ONNX file or a checkpoint.",
)
@runs_option
@click.option(
    "--key",
    "keys",
    metavar="DEVICE.pub.pem",
    multiple=True,
    type=PUBLIC_KEY,
    help="Insist that this device, or another one given, signed it (repeatable).",
)
@click.option(
    "--max-age",
    metavar="SECONDS",
    type=click.FloatRange(0),
    help="Refuse an older proof, by the device's own clock.",
)
@json_option
def check_proof(  # noqa: PLR0913 - one for each option
    path: Path,
    *,
    nonce: str,
    round_: str | None,
    weights: Path | None,
    runs: Path,
    keys: tuple[Path, ...],
    max_age: float | None,
    as_json: bool,
) -> int:
    """Check that a device holds, and runs, the server's weights.

    By default those of the round that it says it is at. Exit code 0: equal, on the disk
    and in every live predictor. 5: something differs, or not all could be seen; the
    output names it. 8: another nonce, another device, or altered.
    """
    from edge_runtime.errors import TrustError
    from edge_runtime.formats.signing import load_public
    from packager import check_proof as proofs

    if round_ and weights:
        raise click.UsageError("give --round or --weights, not both")
    proof = proofs.read_proof(read_bounded(path, "proof_bytes", str(path), ProofError))
    public = {
        load_public(read_bounded(key, "key_bytes", str(key), KeyFileError), str(key)): (
            str(key)
        )
        for key in keys
    }
    signer, name = proofs.check_origin(proof, nonce, public)
    age = proofs.age_s(proof)
    if max_age is not None and abs(age) > max_age:
        raise TrustError(f"the proof is {age:.0f} s old, expected at most {max_age:g}")
    rounds = proofs.known_rounds(runs)
    if weights:
        expected = _expected_file(weights)
    else:
        from packager.rounds.folder import find_round

        folder = find_round(round_, runs) if round_ else None
        expected = proofs.expected_round(folder or proofs.claimed_round(proof, rounds))
    parts = proofs.judge(proof, expected, rounds)
    verdict = proofs.overall(parts)
    record = {
        "path": str(path),
        "verdict": verdict,
        "expected": {
            "name": expected.name,
            "fingerprint": expected.weights.fingerprint,
            "graph": expected.graph or None,
        },
        "parts": [asdict(part) for part in parts],
        "key_id": signer or None,
        "age_s": age,
        "release_counter": proof.get("release_counter"),
    }
    origin = f"signed by {name} ({signer})" if signer else "signature not checked"
    ahead = "old" if age >= 0 else "ahead"
    lines = [
        f"{verdict.upper()}  {printable(expected.name)}  "
        f"{expected.weights.fingerprint}",
        *(f"  {part.name:<14} {_words(part)}" for part in parts),
        f"  {'proof':<14} {origin}, {duration(abs(age))} {ahead} by the device's clock",
    ]
    if not expected.graph:
        lines.append(f"  {'graph':<14} not compared: {expected.name} has none")
    emit(record, as_json=as_json, text="\n".join(lines))
    return OK if verdict is proofs.Verdict.EQUAL else DIFFERENT


def _words(part: "Part") -> str:
    words = [str(part.verdict)] + ([printable(part.reason)] if part.reason else [])
    text = ": ".join(words)
    if part.tensors:
        text += f"\n{'':<17}differs in {', '.join(map(printable, part.tensors))}"
    return text


def _expected_file(path: Path) -> "Expected":
    import hashlib

    from packager.check_proof import Expected

    model = read_any(path)
    graph = hashlib.sha256(model.graph).hexdigest() if model.graph else ""
    return Expected(str(path), model.weights, graph)
