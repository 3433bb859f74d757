# SPDX-License-Identifier: Apache-2.0
"""``dpu-patch check-proof``: are devices' proofs about the server's weights?"""

from collections.abc import Collection, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_runtime.commandline import emit, json_option
from edge_runtime.errors import KeyFileError, ProofError, TrustError
from edge_runtime.exit_codes import DIFFERENT, OK, exit_code
from edge_runtime.formats.kinds import Kind, refuse_others
from edge_runtime.parameters import FileOf, Seconds
from edge_runtime.reading import read_bounded
from edge_runtime.text import printable
from edge_runtime.times import duration
from packager.cli.files import GRAPH, GRAPH_HELP, read_any
from packager.cli.options import MODEL, runs_option

if TYPE_CHECKING:
    from packager.check_proof import Expected, Part
    from packager.check_proofs import Standard
    from packager.read_proof import Question


@click.command("check-proof")
@click.argument(
    "paths",
    metavar="PROOF...",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, path_type=Path),
)
@click.option("--nonce", required=True, help="What the devices were asked with.")
@click.option(
    "--old-nonce",
    "earlier",
    multiple=True,
    help="One of an earlier question, to tell late answers apart (repeatable).",
)
@click.option("--round", "round_", metavar="ROUND", help="Where they should be.")
@click.option(
    "--weights",
    type=MODEL,
    metavar="FILE",
    help="What they should hold: a weight file, an ONNX file or a checkpoint.",
)
@click.option("--graph", type=GRAPH, metavar="FILE", help=GRAPH_HELP)
@runs_option
@click.option(
    "--key",
    "keys",
    metavar="DEVICE.pub.pem",
    multiple=True,
    type=FileOf(Kind.PUBLIC_KEY, dir_okay=True),
    help="Insist that this device, or another one given, signed it (repeatable; or a "
    "folder of *.pub.pem).",
)
@click.option(
    "--max-age",
    metavar="SECONDS",
    type=Seconds(0, 1e12),
    help="Refuse an older proof, by the device's own clock.",
)
@json_option
def check_proof(  # noqa: PLR0913 - one for each option
    paths: tuple[Path, ...],
    *,
    nonce: str,
    earlier: tuple[str, ...],
    round_: str | None,
    weights: Path | None,
    graph: Path | None,
    runs: Path,
    keys: tuple[Path, ...],
    max_age: float | None,
    as_json: bool,
) -> int:
    """Check that devices hold, and run, the server's weights.

    PROOF is a file, several, or folders of files named *.proof. By default they should
    hold those of the round that each says it is at. Exit code 0: equal, on the disk and
    in every live predictor. 5: something differs, or not all could be seen; the output
    names it. 8: another nonce, another device, or altered. 3: no proof. Of many files
    8 counts before 3, and 3 before 5.
    """
    from packager.check_proof import expected_round, known_rounds
    from packager.check_proofs import Standard
    from packager.read_proof import Question

    if round_ and weights:
        raise click.UsageError("give --round or --weights, not both")
    if graph and not weights:
        raise click.UsageError("--graph is for --weights: give the checkpoint too")
    one = len(paths) == 1 and not paths[0].is_dir()
    for path in paths:
        if one or path.is_dir():  # of many files, one that is none is counted
            refuse_others(path, [Kind.PROOF])
    question = Question.of(nonce, _read_keys(keys), earlier)
    rounds = known_rounds(runs)
    expected = None
    if weights:
        expected = _expected_file(weights, graph)
    elif round_:
        from packager.rounds.names import find_round

        expected = expected_round(find_round(round_, runs))
    standard = Standard(rounds, expected, max_age)
    if one:
        return _one(paths[0], question, standard, as_json=as_json)
    return _many(paths, question, standard, as_json=as_json)


def _read_keys(paths: Iterable[Path]) -> dict[str, str]:
    """Return public keys in hex, with the file of each."""
    from edge_runtime.formats.signing import read_public

    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.pub.pem")) if path.is_dir() else [path]
        if not found:
            raise KeyFileError(
                f"{path} has no *.pub.pem: 'dpu-edge device-key' prints a device's"
            )
        files += found
    return {read_public(key): str(key) for key in files}


def _one(
    path: Path, question: "Question", standard: "Standard", *, as_json: bool
) -> int:
    from packager.check_proof import Verdict, judge, overall
    from packager.read_proof import age_s, doubt, read_proof

    proof = read_proof(read_bounded(path, "proof_bytes", str(path), ProofError))
    if found := doubt(proof, question):
        raise TrustError(found[1])
    signer = proof["signature"]["key_id"] if question.signers else ""
    age, max_age = age_s(proof), standard.max_age
    if max_age is not None and abs(age) > max_age:
        raise TrustError(f"the proof is {age:.0f} s old, expected at most {max_age:g}")
    expected = standard.of(proof)
    parts = judge(proof, expected, standard.rounds)
    verdict = overall(parts)
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
    origin = "signature not checked"
    if signer:
        origin = f"signed by {question.signers[signer][1]} ({signer})"
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
    return OK if verdict is Verdict.EQUAL else DIFFERENT


def _many(
    paths: tuple[Path, ...],
    question: "Question",
    standard: "Standard",
    *,
    as_json: bool,
) -> int:
    from itertools import chain

    from packager.check_proofs import SUFFIX, check_proofs, proof_files
    from packager.cli.proof_table import tally_document, tally_record
    from packager.report.document import to_text

    files = chain.from_iterable(map(proof_files, paths))
    tally = check_proofs(files, question, standard)
    if not tally.proofs:
        raise ProofError(
            f"no *{SUFFIX} in {', '.join(map(str, paths))}; 'dpu-edge proof' on a "
            "device makes one"
        )
    silent = {
        name: key
        for key, (_, name) in question.signers.items()
        if key not in tally.signers
    }
    emit(
        tally_record(tally, question, silent),
        as_json=as_json,
        text=to_text(tally_document(tally, question, silent)),
    )
    return _code(tally.faults)


def _code(faults: Collection[str]) -> int:
    """Return the exit code of many proofs: that of the gravest fault."""
    from packager.check_proof import Verdict
    from packager.read_proof import Doubt

    harmless = {Doubt.UNKNOWN_WEIGHTS, Verdict.DIFFERENT, Verdict.UNCLEAR}
    if not faults:
        return OK
    if set(faults) - harmless - {Doubt.UNREADABLE}:
        return exit_code(TrustError())
    return exit_code(ProofError()) if Doubt.UNREADABLE in faults else DIFFERENT


def _words(part: "Part") -> str:
    words = [str(part.verdict)] + ([printable(part.reason)] if part.reason else [])
    text = ": ".join(words)
    if part.tensors:
        text += f"\n{'':<17}differs in {', '.join(map(printable, part.tensors))}"
    return text


def _expected_file(path: Path, graph: Path | None) -> "Expected":
    import hashlib

    from packager.check_proof import Expected

    model = read_any(path, graph)
    digest = hashlib.sha256(model.graph).hexdigest() if model.graph else ""
    return Expected(str(path), model.weights, digest)
