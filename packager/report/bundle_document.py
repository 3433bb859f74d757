# SPDX-License-Identifier: Apache-2.0
"""An installation bundle as a document: for whom it is, its members, its patch."""

from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from edge_runtime.formats.bundle import list_members, read_bundle
from edge_runtime.formats.identity import parse_run
from edge_runtime.formats.model_folder import RUN_NAME
from packager.packed_file import read_facts
from packager.report.document import Document, Section, Table
from packager.report.patch_document import patch_document
from packager.report.records import PatchRecord
from packager.report.words import percent, spaced


class MemberRecord(TypedDict):
    """A member of a bundle."""

    name: str
    bytes: int


class RunNameRecord(TypedDict):
    """The run that a bundle is of."""

    id: str
    name: str


class BundleRecord(TypedDict):
    """A bundle, and the patch in it."""

    kind: str
    path: str
    bytes: int
    run: RunNameRecord | None
    round: int
    counter: int
    model: str
    target: str
    signed_by: list[str]
    members: list[MemberRecord]
    patch: PatchRecord


def bundle_record(path: Path, patch: PatchRecord) -> BundleRecord:
    """Describe a bundle, of which every member is checked.

    Args:
        path: Its file.
        patch: What is known of the patch in it.

    Raises:
        OSError: It cannot be read.
        BundleError: It is damaged.
    """
    bundle, facts = read_bundle(path), read_facts(path)
    data = bundle.files.get(RUN_NAME)
    run = parse_run(data) if data is not None else None
    return {
        "kind": facts.kind,
        "path": str(path),
        "bytes": path.stat().st_size,
        "run": {"id": run.id, "name": run.name} if run else None,
        "round": facts.header.round,
        "counter": facts.header.counter,
        "model": bundle.model,
        "target": bundle.target,
        "signed_by": list(facts.signers),
        "members": [
            {"name": name, "bytes": size} for name, size in list_members(path).items()
        ],
        "patch": patch,
    }


def bundle_document(record: BundleRecord) -> Document:
    """Return the report of a bundle, from :func:`bundle_record`."""
    run, size = record["run"], record["bytes"]
    name = "without an id"
    if run:
        name = f"{run['name']} ({run['id']})" if run["name"] else run["id"]
    facts = [
        ("model", record["model"]),
        ("run", name),
        ("target", record["target"]),
        ("round", f"{record['round']}, release counter {record['counter']}"),
        (
            "signed",
            f"by {', '.join(record['signed_by'])}" if record["signed_by"] else "no",
        ),
        ("size", f"{spaced(size)} bytes"),
    ]
    rows = [
        [member["name"], spaced(member["bytes"]), percent(member["bytes"], size, 1)]
        for member in record["members"]
    ]
    text = "What a new device is installed from; 'dpu-edge init' takes it."
    members = Section("Members", text, Table(["member", "bytes", "share"], rows))
    inner = patch_document(record["patch"])
    sections = [replace(s, title=f"Patch: {s.title}") for s in inner.sections]
    title = f"Bundle {Path(record['path']).name}"
    return Document(title, inner.figures, facts, [members, *sections])
