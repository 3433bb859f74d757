# SPDX-License-Identifier: Apache-2.0
"""Judge the proofs of a whole fleet, one file after the other.

What is kept does not grow with the proofs: they are counted, and of each fault the
first ones are named.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_runtime.errors import ProofError, RoundNotFoundError
from edge_runtime.reading import read_bounded
from packager.check_proof import (
    Expected,
    Rounds,
    Verdict,
    claimed_round,
    expected_round,
    judge,
    overall,
)
from packager.read_proof import Doubt, Question, age_s, doubt, read_proof
from packager.rounds.names import full_name

SUFFIX = ".proof"  # of the files that are looked at in a folder
KEPT = 1000  # names of one fault, and weights that proofs are grouped by
OTHERS = "others"


@dataclass(slots=True)
class Named:
    """How many files have one fault.

    Attributes:
        count: All of them.
        files: Path and reason of the first ones.
    """

    count: int = 0
    files: list[tuple[str, str]] = field(default_factory=list)

    def add(self, path: str, reason: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.files) < KEPT:
            self.files.append((path, reason))


@dataclass(slots=True)
class Tally:
    """What the proofs of a fleet come to.

    Attributes:
        proofs: How many files there were.
        holds: Name and fingerprint of the weights on the disks, with how many proofs
            of them are equal to what was expected, different or unclear.
        faults: By what was found (a :class:`~packager.read_proof.Doubt`, or a verdict
            other than equal).
        signers: Key ids whose signatures hold.
    """

    proofs: int = 0
    holds: dict[tuple[str, str], Counter[Verdict]] = field(default_factory=dict)
    faults: dict[str, Named] = field(default_factory=dict)
    signers: set[str] = field(default_factory=set)

    def fault(self, kind: str, path: Path, reason: str) -> None:
        """Count and name a file that is not as it should be."""
        self.faults.setdefault(kind, Named()).add(str(path), reason)

    def judged(self, name: str, fingerprint: str, verdict: Verdict) -> None:
        """Count a proof by what is on the disk."""
        key = name, fingerprint
        if key not in self.holds and len(self.holds) >= KEPT:
            key = OTHERS, ""
        self.holds.setdefault(key, Counter())[verdict] += 1


@dataclass(frozen=True, slots=True)
class Standard:
    """What the devices should hold.

    Attributes:
        rounds: From :func:`~packager.check_proof.known_rounds`.
        expected: The one thing for all; None: the round that each says it is at.
        max_age: The most seconds by the device's clock; None: any.
    """

    rounds: Rounds
    expected: Expected | None = None
    max_age: float | None = None
    _claimed: dict[Path, Expected] = field(default_factory=dict)

    def of(self, proof: Mapping[str, Any]) -> Expected:
        """Return what a device should hold; a round is read once.

        Raises:
            RoundNotFoundError: It says that it is at what no run has.
            RoundError: The round folder is incomplete or was changed.
        """
        if self.expected:
            return self.expected
        folder = claimed_round(proof, self.rounds)
        if folder not in self._claimed:
            self._claimed[folder] = expected_round(folder)
        return self._claimed[folder]


def proof_files(path: Path) -> Iterator[Path]:
    """Yield a file, or the proofs in a folder and those below, in order of names.

    Raises:
        OSError: A folder cannot be listed.
    """
    if not path.is_dir():
        yield path
        return
    entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from proof_files(Path(entry))
        elif entry.name.endswith(SUFFIX):
            yield Path(entry)


def check_proofs(
    paths: Iterable[Path], question: Question, standard: Standard
) -> Tally:
    """Judge any number of proofs.

    Args:
        paths: The files.
        question: What was asked, and of whom.
        standard: What the devices should hold.

    Raises:
        RoundError: A round that a device is at is incomplete or was changed here.
    """
    tally = Tally()
    for path in paths:
        tally.proofs += 1
        try:
            data = read_bounded(
                path, "proof_bytes", str(path), ProofError, regular=True
            )
            proof = read_proof(data)
        except (OSError, ProofError) as err:
            reason = getattr(err, "strerror", None) or str(err)
            tally.fault(Doubt.UNREADABLE, path, reason)
            continue
        _one(tally, path, proof, question, standard)
    return tally


def _one(
    tally: Tally,
    path: Path,
    proof: Mapping[str, Any],
    question: Question,
    standard: Standard,
) -> None:
    if found := doubt(proof, question):
        return tally.fault(found[0], path, found[1])
    if question.signers:
        tally.signers.add(proof["signature"]["key_id"])
    age = age_s(proof)
    if standard.max_age is not None and abs(age) > standard.max_age:
        words = f"{age:.0f} s old, expected at most {standard.max_age:g}"
        return tally.fault(Doubt.TOO_OLD, path, words)
    try:
        expected = standard.of(proof)
    except RoundNotFoundError as err:
        return tally.fault(Doubt.UNKNOWN_WEIGHTS, path, str(err))
    parts = judge(proof, expected, standard.rounds)
    verdict = overall(parts)
    held = parts[0].fingerprint
    name = "nothing that can be read"
    if held == expected.weights.fingerprint:
        name = expected.name
    elif held:
        known = standard.rounds.by_weights.get(held)
        name = full_name(known) if known else "no round here"
    tally.judged(name, held, verdict)
    if verdict is not Verdict.EQUAL:
        wrong = [p for p in parts if p.verdict is not Verdict.EQUAL]
        tally.fault(verdict, path, "; ".join(f"{p.name}: {p.reason}" for p in wrong))
    return None
