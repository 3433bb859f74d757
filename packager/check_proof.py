# SPDX-License-Identifier: Apache-2.0
"""Judge a device's proof: does it hold, and run, exactly the server's weights?

A proof is untrusted input. Nothing but numbers and hex digits of it is ever printed.
"""

import hashlib
import re
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from edge_runtime.errors import ProofError, RoundError, RoundNotFoundError, TrustError
from edge_runtime.formats.json_file import parse_values
from edge_runtime.formats.model_folder import GRAPH_NAME
from edge_runtime.formats.signing import Signature, Trust, key_id
from edge_runtime.formats.weights import Weights
from edge_runtime.limits import limits
from edge_runtime.live.proof import CONTEXT, SCHEMA
from edge_runtime.live.shared import canonical
from edge_runtime.text import listed
from edge_runtime.times import FORM, seconds_of
from packager.rounds.folder import read_model_file, read_round
from packager.rounds.names import full_name, list_runs
from packager.rounds.record import read_record

_HEX = re.compile(r"[0-9a-f]{64}|")
_KEY_ID, _SIGNATURE = re.compile(r"[0-9a-f]{16}"), re.compile(r"[0-9a-f]{128}")
_TOLD_KEYS = 8  # of the known ones, in a message


class Verdict(StrEnum):
    """What a proof comes to, for all of it or for one process."""

    EQUAL = "equal"
    DIFFERENT = "different"
    UNCLEAR = "unclear"  # nothing differs, but not everything could be seen


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """What a device should hold.

    Attributes:
        name: ``RUN/round_05``, or the weight file.
        weights: The weights.
        graph: SHA-256 of the graph; empty where it is not known.
    """

    name: str
    weights: Weights
    graph: str = ""


@dataclass(frozen=True, slots=True)
class Rounds:
    """The round folders of all runs; of equal ones the first.

    Attributes:
        by_release: By model and fingerprint. Two runs may hold equal weights, of which
            a device holds one: for the other's graph.
        by_weights: By fingerprint alone, to name what is held.
    """

    by_release: Mapping[tuple[str, str], Path]
    by_weights: Mapping[str, Path]


@dataclass(slots=True)
class Part:
    """What was found about the disk, or about one process.

    Attributes:
        name: ``disk``, ``process 4711``.
        verdict: Whether it is as expected.
        reason: Why not.
        fingerprint: Of what it holds; empty where that is not known.
        tensors: The tensors that differ; ``header`` is the file's table of them.
    """

    name: str
    verdict: Verdict
    reason: str = ""
    fingerprint: str = ""
    tensors: list[str] = field(default_factory=list)


# Reading ------------------------------------------------------------------------------


def read_proof(data: bytes) -> dict[str, Any]:
    """Parse a proof; its fields have the types that they should have afterwards.

    Raises:
        ProofError: Malformed, or not in canonical form.
    """
    try:
        if problem := limits().problem("proof_bytes", len(data), "it"):
            raise ValueError(problem)
        proof = parse_values(data.decode("ascii"))
        # One form only: no second key of a name, nothing that is read in two ways.
        if canonical(proof) != data.removesuffix(b"\n"):
            raise ValueError("not in canonical form")
        if proof["schema"] != SCHEMA:
            raise ValueError(f"schema {proof['schema']}, known is {SCHEMA}")
        _check(proof, nonce=str, round=int, live=list, untold=list)
        _check({"model": ""} | proof, model=_HEX, fingerprint=_HEX)
        datetime.strptime(proof["time"], FORM)
        _check_parts(proof)
        if "signature" in proof:
            _check(proof["signature"], key_id=_KEY_ID, value=_SIGNATURE)
    except (ValueError, LookupError, TypeError, RecursionError) as err:
        raise ProofError(
            f"not a proof as 'dpu-edge proof' writes it: {str(err)[:200]!r}; ask "
            "for it again, and carry it unchanged"
        ) from err
    return dict(proof)


def _check_parts(proof: Mapping[str, Any]) -> None:
    if (disk := proof["disk"]) is not None:
        _check(disk, fingerprint=_HEX, graph=_HEX, bytes=int)
        if "tensors" in disk:
            _check(disk, header=_HEX, tensors=dict)
    for entry in proof["live"]:
        _check(entry, pid=int, status=str, file_now=_HEX)
        if entry["status"] == "loaded":
            _check(entry, fingerprint=_HEX, graph=_HEX)
            datetime.strptime(entry["loaded"], FORM)
    for pid in proof["untold"]:
        _check({"pid": pid}, pid=int)


def _check(record: Mapping[str, Any], **fields: Any) -> None:
    for name, kind in fields.items():
        value = record[name]
        good = (
            type(value) is kind
            if isinstance(kind, type)
            else isinstance(value, str) and kind.fullmatch(value)
        )
        if not good:
            raise ValueError(f"{name}: {value!r}")


class Doubt(StrEnum):
    """Reason why a proof is rejected before weights are compared."""

    UNREADABLE = "unreadable"  # no proof, or a file that cannot be read
    OLD_NONCE = "old nonce"  # answers an earlier question
    WRONG_NONCE = "wrong nonce"
    UNSIGNED = "not signed"
    UNKNOWN_KEY = "unknown key"
    ALTERED = "altered"
    TOO_OLD = "too old"
    UNKNOWN_WEIGHTS = "unknown weights"  # says that it is at no round of any run


@dataclass(frozen=True, slots=True)
class Question:
    """What was asked, and of whom.

    Attributes:
        nonce: What the devices were asked with.
        signers: Key id to public key and name of each known device; none: nobody's
            signature is looked at.
        earlier: Nonces of questions before, so that a late answer is told as one.
    """

    nonce: str
    signers: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    earlier: Collection[str] = ()

    @classmethod
    def of(
        cls, nonce: str, keys: Mapping[str, str], earlier: Collection[str] = ()
    ) -> Self:
        """Return the question; keys are public keys in hex, with a name for each."""
        return cls(nonce, {key_id(k): (k, name) for k, name in keys.items()}, earlier)


def check_origin(
    proof: Mapping[str, Any], nonce: str, keys: Mapping[str, str]
) -> tuple[str, str]:
    """Insist on nonce and signer.

    Args:
        proof: From :func:`read_proof`.
        nonce: What the device was asked with.
        keys: Public keys of devices, in hex, with a name for each; none: the signature
            is not looked at.

    Returns:
        The signer's key id and name; empty where nobody's signature was checked.

    Raises:
        TrustError: An answer to another question, altered, or from another device.
    """
    question = Question.of(nonce, keys)
    if found := doubt(proof, question):
        raise TrustError(found[1])
    if not keys:
        return "", ""
    signer: str = proof["signature"]["key_id"]
    return signer, question.signers[signer][1]


def doubt(proof: Mapping[str, Any], question: Question) -> tuple[Doubt, str] | None:
    """Say why a proof is no answer of a known device to this question, if it is none.

    Returns:
        The kind and a sentence; None for an answer. Without signers the signature is
        not looked at.
    """
    nonce = question.nonce
    if proof["nonce"] != nonce:
        kind = Doubt.WRONG_NONCE
        if proof["nonce"] in question.earlier:
            kind = Doubt.OLD_NONCE
        return kind, (
            f"the proof answers the nonce {proof['nonce'][:80]!r}, expected {nonce!r}: "
            "it is an old one, or of another request; ask the device again"
        )
    if not question.signers:
        return None
    if "signature" not in proof:
        return Doubt.UNSIGNED, (
            "the proof is not signed; make a key on the device with 'dpu-edge "
            "device-key' and ask again"
        )
    signature = proof["signature"]
    if signature["key_id"] not in question.signers:
        known = listed(list(question.signers), _TOLD_KEYS)
        return Doubt.UNKNOWN_KEY, (
            f"the proof is signed by key {signature['key_id']}, expected one of "
            f"{known}: it comes from another device"
        )
    public, _ = question.signers[signature["key_id"]]
    message = {key: value for key, value in proof.items() if key != "signature"}
    given = Signature(signature["key_id"], bytes.fromhex(signature["value"]))
    try:
        Trust((public,)).check(CONTEXT, canonical(message), [given])
    except TrustError as err:
        return Doubt.ALTERED, str(err)
    return None


def age_s(proof: Mapping[str, Any]) -> float:
    """Return how old a proof is by the device's clock; negative if that is ahead."""
    return time.time() - seconds_of(proof["time"])


# What should be there -----------------------------------------------------------------


def known_rounds(runs: Path) -> Rounds:
    """Return the round folders of all runs."""
    found: dict[tuple[str, str], Path] = {}
    for folder in list_runs(runs):
        try:
            record = read_record(folder)
        except (RoundError, OSError):
            continue  # a device can be asked about one round beside a damaged other
        found.setdefault((record.model, record.target), folder)
    by_weights = {target: folder for (_, target), folder in reversed(found.items())}
    return Rounds(found, by_weights)


def expected_round(folder: Path) -> Expected:
    """Return what a device that is at a round should hold.

    Raises:
        RoundError: The round folder is incomplete or was changed.
    """
    round_ = read_round(folder)
    graph = hashlib.sha256(read_model_file(round_, GRAPH_NAME)).hexdigest()
    return Expected(full_name(folder), round_.weights, graph)


def claimed_round(proof: Mapping[str, Any], rounds: Rounds) -> Path:
    """Return the round that a device says it is at.

    Raises:
        RoundNotFoundError: No run has it.
    """
    claimed, model = proof["fingerprint"], proof.get("model", "")
    found = rounds.by_release.get((model, claimed))
    if found is None:
        other = ""
        if claimed in rounds.by_weights:
            name = full_name(rounds.by_weights[claimed])
            other = f" ({name} has these weights, of another model)"
        raise RoundNotFoundError(
            f"the device says that it is at round {proof['round']} ({claimed[:12]}) of "
            f"model {model[:12]}, which is none of the "
            f"{len(rounds.by_release)} rounds here{other}; give --runs, --round or "
            "--weights"
        )
    return found


# Judging ------------------------------------------------------------------------------


def judge(proof: Mapping[str, Any], expected: Expected, rounds: Rounds) -> list[Part]:
    """Compare a proof with what should be there.

    Args:
        proof: From :func:`read_proof`.
        expected: What should be there.
        rounds: From :func:`known_rounds`, to name what is there instead.

    Returns:
        The disk, then each process.
    """
    parts = [_disk(proof["disk"], expected, rounds)]
    parts += [_process(entry, expected, rounds) for entry in proof["live"]]
    reason = "uses these weights and does not tell which; see 'What a proof shows'"
    parts += [
        Part(f"process {pid}", Verdict.UNCLEAR, reason) for pid in proof["untold"]
    ]
    return parts


def overall(parts: Iterable[Part]) -> Verdict:
    """Return the verdict on all parts: the worst of theirs."""
    found = {part.verdict for part in parts}
    worst = (Verdict.DIFFERENT, Verdict.UNCLEAR)
    return next((verdict for verdict in worst if verdict in found), Verdict.EQUAL)


def _disk(disk: Mapping[str, Any] | None, expected: Expected, rounds: Rounds) -> Part:
    if disk is None:
        return Part("disk", Verdict.DIFFERENT, "its active slot cannot be read")
    found = disk["fingerprint"]
    part = Part("disk", Verdict.EQUAL, fingerprint=found)
    if found != expected.weights.fingerprint:
        part.verdict = Verdict.DIFFERENT
        part.reason = f"holds {_named(found, rounds)}"
        if "tensors" in disk:
            part.tensors = differing(disk, expected.weights)
        elif found not in rounds.by_weights:
            part.reason += "; 'dpu-edge proof --tensors' tells which tensors differ"
    elif expected.graph and disk["graph"] != expected.graph:
        part.verdict = Verdict.DIFFERENT
        part.reason = "equal weights, but another graph beside them"
    return part


def differing(disk: Mapping[str, Any], weights: Weights) -> list[str]:
    """Name the tensors that differ, by the digests of a proof.

    Returns:
        Names in file order; ``header`` before and ``end`` after them stand for the
        file's table of tensors and for another size.
    """
    layout, given = weights.layout, disk["tensors"]
    same_header = disk["header"] == hashlib.sha256(layout.header).hexdigest()
    return [
        *([] if same_header else ["header"]),
        *(
            t.name
            for t in layout.tensors
            if given.get(t.name)
            != hashlib.sha256(weights.bits(t, 0, t.size).data).hexdigest()
        ),
        *([] if disk["bytes"] == layout.file_size else ["end"]),
    ]


def _process(entry: Mapping[str, Any], expected: Expected, rounds: Rounds) -> Part:
    part = Part(f"process {entry['pid']}", Verdict.UNCLEAR)
    if entry["status"] != "loaded":
        part.reason = {
            "loading": "is changing its weights right now; ask again",
            "changed": "loaded files that changed meanwhile; restart it",
            "empty": "has no weights and answers nothing; restart it",
        }.get(
            entry["status"],
            "tells nothing that can be read; ask as its user, or as root",
        )
        return part
    found = part.fingerprint = entry["fingerprint"]
    if found != expected.weights.fingerprint:
        part.verdict = Verdict.DIFFERENT
        since = f"loaded {entry['loaded']} by the device's clock"
        part.reason = f"still runs {_named(found, rounds)}, {since}"
    elif expected.graph and entry["graph"] != expected.graph:
        part.verdict = Verdict.DIFFERENT
        part.reason = "runs equal weights with another graph"
    elif entry["file_now"] not in ("", found):
        part.verdict = Verdict.DIFFERENT
        part.reason = "loaded equal weights, but their file was written to since"
    else:
        part.verdict = Verdict.EQUAL
    return part


def _named(fingerprint: str, rounds: Rounds) -> str:
    if fingerprint in rounds.by_weights:
        return f"{full_name(rounds.by_weights[fingerprint])} ({fingerprint[:12]})"
    return f"{fingerprint[:12]}, which is no round here"
