# SPDX-License-Identifier: Apache-2.0
"""``dpu-patch releases``: what a run gave to devices, and who signed it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.commandline import emit, json_option, say
from edge_runtime.text import printable
from packager.cli.options import runs_option

if TYPE_CHECKING:
    from packager.release import Release

CHANNEL_FOLDERS = "patches", "bundles"  # where dpu-fleet publish puts them
HEADS = ("counter", "round", "from", "file", "signed by", "state", "recorded", "to")


@click.command()
@click.argument("name", metavar="RUN")
@runs_option
@json_option
def releases(name: str, *, runs: Path, as_json: bool) -> None:
    """List a run's releases: counter, file, who signed it, where it went.

    RUN is a folder, or a name below --runs. What the ledger lacks is told by the files
    beside the rounds.
    """
    from packager.ledger import read_ledger
    from packager.rounds.names import named_run

    run = named_run(name, runs)
    ledger = read_ledger(run)
    for note in ledger.notes:
        say(note)
    names = _round_names(run)
    records = [_record(run, release, names) for release in ledger.releases]
    counters = [release.counter for release in ledger.releases]
    record = {
        "run": str(run),
        "newest": max(counters, default=None),
        "releases": records,
    }
    emit(record, as_json=as_json, text=_text(records) or f"{name}: nothing released")


def _record(run: Path, release: "Release", names: dict[str, str]) -> dict[str, Any]:
    from dataclasses import asdict

    parent = names.get(release.parent, release.parent[:12])
    return asdict(release) | {"parent_name": parent, "state": _state(run, release)}


def _state(run: Path, release: "Release") -> str:
    """Say what became of a release's file, where it can be looked at."""
    from edge_runtime.formats.weights import fingerprint_file

    if "://" in release.to:
        return "remote"
    folders = (run / release.to / below for below in ("", *CHANNEL_FOLDERS))
    found = (f / release.file for f in folders if (f / release.file).is_file())
    if (path := next(found, None)) is None:
        return "gone"
    # Another size is another file; only equal ones are worth reading.
    same = path.stat().st_size == release.bytes
    return "there" if same and fingerprint_file(path) == release.sha256 else "replaced"


def _round_names(run: Path) -> dict[str, str]:
    from edge_runtime.errors import RoundError
    from edge_runtime.formats.model_folder import list_rounds
    from packager.rounds.record import read_record

    names: dict[str, str] = {}
    for folder in list_rounds(run):
        try:
            record = read_record(folder)
        except RoundError:
            continue  # releases are told beside a damaged round
        names.setdefault(record.target, folder.name)
        if not record.round:
            names.setdefault(record.parent, "init")
    return names


def _text(records: list[dict[str, Any]]) -> str:
    from edge_runtime.formats.model_folder import round_name

    if not records:
        return ""
    rows = [HEADS] + [
        (
            str(record["counter"]),
            round_name(record["round"]),
            record["parent_name"],
            printable(record["file"]),
            ", ".join(record["signers"]) or "nobody",
            record["state"],
            printable(record["at"]),
            printable(record["to"]),
        )
        for record in records
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
