# SPDX-License-Identifier: Apache-2.0
"""Judge a device's proof: does it hold, and run, exactly the server's weights?

:mod:`packager.read_proof` reads it, strictly, and says whose it is.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from edge_runtime.errors import RoundError, RoundNotFoundError
from edge_runtime.formats.model_folder import GRAPH_NAME
from edge_runtime.formats.weights import Weights
from packager.rounds.folder import read_model_file, read_round
from packager.rounds.names import full_name, list_runs
from packager.rounds.record import read_record


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
        proof: From :func:`packager.read_proof.read_proof`.
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
