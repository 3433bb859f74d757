# SPDX-License-Identifier: Apache-2.0
"""What the proofs of a fleet come to, as data and as one table."""

from collections.abc import Mapping
from typing import Any

from packager.check_proof import Verdict
from packager.check_proofs import Tally
from packager.read_proof import Question
from packager.report.document import Document, Section, Table
from packager.report.words import counted, spaced

TOLD = 10  # files of each fault that people are told of; --json has more


def tally_record(
    tally: Tally, question: Question, silent: Mapping[str, str]
) -> dict[str, Any]:
    """Return what was found as data.

    Args:
        tally: What was found.
        question: What was asked, and of whom.
        silent: Names and key ids of the known devices without a proof.
    """
    return {
        "proofs": tally.proofs,
        "devices": len(tally.signers) if question.signers else None,
        "holds": [
            {"name": name, "fingerprint": held, "proofs": counts.total()}
            | {verdict: counts[verdict] for verdict in Verdict}
            for (name, held), counts in _grouped(tally)
        ],
        "faults": {
            kind: {
                "proofs": named.count,
                "files": [{"path": p, "reason": r} for p, r in named.files],
            }
            for kind, named in _faults(tally)
        },
        "silent": [{"name": name, "key_id": key} for name, key in silent.items()],
    }


def tally_document(
    tally: Tally, question: Question, silent: Mapping[str, str]
) -> Document:
    """Return what was found, for people; arguments as of :func:`tally_record`."""
    bad = sum(named.count for named in tally.faults.values())
    verdict = f"{counted(tally.proofs, 'proof')}: "
    verdict += f"{spaced(bad)} not as expected" if bad else "all as expected"
    facts = [("devices", f"{spaced(len(tally.signers))} of known keys")]
    if not question.signers:
        facts = [("devices", "signatures not checked: give --key DEVICE.pub.pem")]
    sections = []
    if tally.holds:
        rows = [
            [name, held[:12], spaced(counts.total())]
            + [spaced(counts[verdict]) for verdict in Verdict]
            for (name, held), counts in _grouped(tally)
        ]
        columns = ["holds", "<weights", "proofs", *Verdict]
        sections.append(Section("What is on the disks", "", Table(columns, rows)))
    for kind, named in _faults(tally):
        sections.append(_files(kind, named.count, named.files))
    if silent:
        sections.append(_files("no proof", len(silent), list(silent.items())))
    return Document(verdict, facts=facts, sections=sections)


def _files(kind: str, count: int, files: list[tuple[str, str]]) -> Section:
    rows = [[path, reason] for path, reason in files[:TOLD]]
    if count > len(rows):
        rows.append(["...", f"{spaced(count - len(rows))} more"])
    title = f"{kind[0].upper()}{kind[1:]}: {spaced(count)}"
    return Section(title, "", Table(["file", "<what"], rows))


def _grouped(tally: Tally) -> list[tuple[tuple[str, str], Any]]:
    """Return the weights that are held, those of most devices first."""
    return sorted(tally.holds.items(), key=lambda item: (-item[1].total(), item[0]))


def _faults(tally: Tally) -> list[tuple[str, Any]]:
    return sorted(tally.faults.items(), key=lambda item: -item[1].count)
