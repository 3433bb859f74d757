# SPDX-License-Identifier: Apache-2.0
"""Patches and weight files as documents: records in, words and pictures out."""

from collections.abc import Sequence
from pathlib import Path

from edge_runtime.times import duration
from packager.report.document import Document, Section, Table
from packager.report.records import (
    DiffRecord,
    FloorRecord,
    LinkRecord,
    PatchRecord,
    TensorRecord,
)
from packager.report.svg import dumbbells, heat_map, stacked_bars
from packager.report.words import natural, percent, short_bytes, spaced, times

# Parts of a patch with their colours, in the order of the file.
PARTS = {"header": 5, "signatures": 4, "index": 1, "values": 2, "dense": 3}
STRIPS = 40  # tensors whose changes are drawn
TIMES = (
    (1e-3, "1 ms"),
    (1e-2, "10 ms"),
    (1e-1, "0.1 s"),
    (1, "1 s"),
    (10, "10 s"),
    (60, "1 min"),
    (600, "10 min"),
    (3600, "1 h"),
    (43_200, "12 h"),
    (86_400 * 7, "1 week"),
    (86_400 * 91, "3 months"),
    (86_400 * 365 * 4, "4 years"),
)


def patch_document(record: PatchRecord) -> Document:
    """Return the report of a patch, from :func:`patch_record`."""
    size, full = record["bytes"], record["full_bytes"]
    figures = [
        (short_bytes(size), "patch"),
        (times(full / size, 1), "smaller than the weights"),
        (spaced(record["changed"]), "values change"),
    ]
    if subspaces := record["subspaces"]:
        count = sum(one["coefficients"] for one in subspaces)
        figures.append((spaced(count), "coefficients move whole tensors"))
    elif "floor" in record and record["floor"]["total"]["ratio"]:
        ratio = record["floor"]["total"]["ratio"]
        figures.append((times(ratio, 2), "of the floor (lower is better)"))
    signed = bool(record["signed_by"])
    facts = [
        ("model", record["model"]),
        ("parent", record["parent"]),
        ("target", record["target"]),
        ("round", f"{record['round']}, release counter {record['counter']}"),
        ("signed", f"by {', '.join(record['signed_by'])}" if signed else "no"),
        (
            "changed",
            f"{spaced(record['changed'])} values in {record['tensors_changed']} "
            "tensors",
        ),
        *[
            (
                "moved",
                f"{one['tensors']} tensors by {spaced(one['coefficients'])} "
                f"coefficients of {one['bits']} bit{'s' * (one['bits'] > 1)}, "
                f"{one['taps']} for each weight",
            )
            for one in subspaces
        ],
        (
            "size",
            f"{spaced(size)} bytes, {percent(size, full)} of the weight file's "
            f"{spaced(full)} (lower is better)",
        ),
    ]
    sections = [
        _parts(record),
        _sections(record),
        link_section(record["links"], "this patch"),
    ]
    if "tensors" in record and (record["changed"] or not subspaces):
        sections.insert(1, tensor_section(record["tensors"], record["changed"]))
    title = f"Patch {Path(record['path']).name}"
    return Document(title, figures, facts, sections)


def _parts(record: PatchRecord) -> Section:
    parts, floor = record["parts"], record.get("floor", {})
    rows = []
    for name in [*PARTS, "total"]:
        size = record["bytes"] if name == "total" else parts[name]
        row = [name, spaced(size), percent(size, record["bytes"], 1)]
        if floor:
            row += _against_floor(floor.get(name))
        if size:
            rows.append(row)
    columns = ["part", "bytes", "share"]
    bars: list[tuple[str, list[tuple[str, int, float]]]]
    bars = [("patch", [(name, PARTS[name], parts[name]) for name in PARTS])]
    text = "Lower is better."
    if floor:
        columns += ["floor", "times the floor"]
        kinds = ("index", "values", "dense")
        bars.append(("floor", [(n, PARTS[n], floor[n]["floor_bytes"]) for n in kinds]))
        text = (
            "Lower is better. The floor is what the changes would take if nothing "
            "about them could be foreseen: for each tensor the bits that tell which of "
            "its elements change, and every changed value in full. A good patch is "
            "smaller, because changes lie close together and values resemble each "
            "other. Index: which elements change. Dense: tensors of which more than "
            "half changes. The total is compared without the header."
        )
    legend = [(PARTS[name], name) for name in PARTS if parts[name]]
    picture = stacked_bars("Where the bytes of the patch go", bars, short_bytes)
    table = Table(columns, rows)
    return Section("Where the bytes go", text, table, picture, legend=legend)


def _against_floor(entry: FloorRecord | None) -> list[str]:
    if entry is None:
        return ["", ""]
    ratio = entry["ratio"]
    floor = spaced(round(entry["floor_bytes"]))
    return [floor, f"{ratio:.3f}" if ratio is not None else "-"]


def _sections(record: PatchRecord) -> Section:
    rows = [
        [s["name"], spaced(s["packed_bytes"]), spaced(s["raw_bytes"]), s["encoding"]]
        for s in record["sections"]
    ]
    columns = ["section", "packed", "raw", "<encoding"]
    text = "Bytes of each section, as the patch format names them."
    return Section("Sections of the file", text, Table(columns, rows))


def link_section(links: Sequence[LinkRecord], what: str) -> Section:
    """Say how long something takes on thin links, beside the full weights."""
    rows = [
        [
            link["name"],
            f"{spaced(link['messages'])} {link['unit']}",
            duration(link["seconds"]),
            duration(link["full_seconds"]),
            f"{spaced(round(link['payload_bits_per_s']))} bit/s",
            link["note"],
        ]
        for link in links
    ]
    text = (
        "The best case for one device: nothing is lost, and nobody else sends. Pauses "
        "that a sender has to keep are included."
    )
    columns = ["link", "messages", "time", "full weights", "payload rate", "<assumed"]
    picture = ""
    if all(link["seconds"] for link in links):
        picture = dumbbells(
            f"Time on common links: {what} and the full weights, logarithmic",
            [(link["name"], link["seconds"], link["full_seconds"]) for link in links],
            names=(what, "full weights"),
            ticks=TIMES,
            form=duration,
        )
    legend = [(1, what), (2, "full weights")]
    table = Table(columns, rows)
    return Section("Time on thin links", text, table, picture, legend=legend)


def tensor_section(tensors: Sequence[TensorRecord], total: int) -> Section:
    """Say what changed, tensor by tensor."""
    found = [tensor for tensor in tensors if tensor["changed"]]
    found.sort(key=lambda tensor: natural(tensor["name"]))
    moved = any("relative_change" in tensor for tensor in found)
    rows = []
    for tensor in found:
        row = [
            tensor["name"],
            tensor["dtype"],
            "\u00d7".join(map(str, tensor["shape"])) or "scalar",
            spaced(tensor["changed"]),
            spaced(tensor["size"]),
            percent(tensor["changed"], tensor["size"]),
            percent(tensor["changed"], total),
        ]
        if moved:
            change = tensor.get("relative_change")
            row.append("-" if change is None else percent(change, 1))
        rows.append(row)
    columns = ["tensor", "<type", "<shape", "changed", "of", "share", "of all changes"]
    if moved:
        columns.append("moved by")
    text = f"{len(found)} of {len(tensors)} tensors change."
    if moved:
        text += " Moved by: length of the change as a share of the tensor's own length."
    picture = caption = ""
    drawn = sorted(found, key=lambda tensor: -tensor["changed"])[:STRIPS]
    if drawn:
        picture = heat_map(
            "Where in each tensor elements change, from its first to its last",
            [(t["name"], t["shares"]) for t in found if t in drawn],
            form=lambda share: f"{100 * share:.2g} % changed",
        )
        caption = (
            "Each strip is a tensor, from its first element to its last. The stronger "
            "the colour, the more of the elements there change."
        )
        if len(drawn) < len(found):
            caption += f" Drawn are the {STRIPS} tensors with most changes."
    return Section("What changed", text, Table(columns, rows), picture, caption)


def diff_document(record: DiffRecord, names: tuple[str, str]) -> Document:
    """Return the comparison of two weight files.

    Args:
        record: From :func:`packager.report.patch_record.diff_record`.
        names: Of the files.
    """
    changed, size = record["changed"], record["size"]
    title = (
        f"{spaced(changed)} of {spaced(size)} values differ ({percent(changed, size)})"
    )
    if record["other_network"]:
        title += ", and the networks do"
    if not changed:
        return Document(title)
    figures = [
        (percent(changed, size), "of the values differ"),
        (str(record["tensors_changed"]), f"of {len(record['tensors'])} tensors"),
        (short_bytes(record["floor_bytes"]), "floor of a patch"),
    ]
    facts = [
        (names[0], record["base"]),
        (names[1], record["target"]),
        ("floor", f"{spaced(round(record['floor_bytes']))} bytes for index and values"),
    ]
    return Document(title, figures, facts, [tensor_section(record["tensors"], changed)])
