"""What was packed and what a patch holds: as data for ``--json``, and as text from it.

Sizes are in bytes, digests in hexadecimal.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from edge_runtime.patch import Patch
from edge_runtime.sections import STORED, ZSTD
from edge_runtime.weights import Layout, Weights
from packager.build import PackedPatch
from packager.diff import TensorChange
from packager.record import Outcome
from packager.rounds import RoundFolder

ENCODINGS = {STORED: "stored", ZSTD: "zstd"}
Record = dict[str, Any]


def pack_record(
    round_: RoundFolder, packed: PackedPatch | None, path: Path, size: int
) -> Record:
    """Describe the result of packing one round.

    Args:
        round_: The round.
        packed: Its patch; None where there was nothing to send.
        path: The file that was or would be written.
        size: Bytes of that file.
    """
    stated = round_.record
    record: Record = {
        "run": stated.run,
        "round": stated.round,
        "counter": stated.counter,
        "outcome": stated.outcome,
        "model": stated.model,
        "target": stated.target,
        "path": str(path) if packed else None,
    }
    if not packed:
        return record
    tensors = round_.weights.layout.tensors
    selectable = [t for t in tensors if t.name in round_.selection]
    dense = [t for t in tensors if t.name not in round_.selection]
    return record | {
        "parent": packed.header.parent,
        "parent_name": packed.parent_name,
        "bytes": size,
        "patch_bytes": len(packed.data),
        "full_bytes": packed.header.file_size,
        "weights": sum(t.size for t in selectable),
        "weights_changed": sum(packed.counts[t.name] for t in selectable),
        "tensors_changed": sum(packed.counts[t.name] > 0 for t in selectable),
        "dense": sum(t.size for t in dense),
        "dense_changed": sum(packed.counts[t.name] for t in dense),
    }


def pack_text(record: Record) -> str:
    """Put a record of :func:`pack_record` into words."""
    name = f"round_{record['round']:02d}"
    if record["path"] is None:
        kept = record["outcome"] == Outcome.KEPT_BASE
        why = "kept its base" if kept else "is what the parent already is,"
        return (
            f"{name}  {why} {record['target'][:12]}: nothing to send, nothing written"
        )
    changed, weights = record["weights_changed"], record["weights"]
    travelling = changed + record["dense_changed"]
    lines = [
        f"{name}  parent {record['parent_name']} {record['parent'][:12]}  →  "
        f"{record['target'][:12]}",
        f"  changed  {spaced(changed):>11} of {spaced(weights)} weights "
        f"({percent(changed, weights)}) in {record['tensors_changed']} tensors",
        f"  dense    {spaced(record['dense_changed']):>11} values "
        "(biases, normalisation)",
        f"  patch    {spaced(record['patch_bytes']):>11} bytes   "
        f"{percent(record['patch_bytes'], record['full_bytes'])} of the weights (lower "
        f"is better)   {record['patch_bytes'] / max(travelling, 1):.1f} bytes/value",
        f"  checked  applied to {record['parent_name']}, result identical",
    ]
    if record["bytes"] != record["patch_bytes"]:
        lines.append(
            f"  bundle   {spaced(record['bytes']):>11} bytes   with graph, init "
            "recipe, contract and golden inputs"
        )
    return "\n".join(lines)


def patch_record(path: Path, patch: Patch, layout: Layout | None) -> Record:
    """Describe an open patch.

    Args:
        path: Its file.
        patch: The patch.
        layout: Of a weight file of its network; gives the tensors their names.
    """
    header = patch.header
    record: Record = {
        "path": str(path),
        "model": header.model,
        "parent": header.parent,
        "target": header.target,
        "round": header.round,
        "counter": header.counter,
        "critical": header.critical,
        "optional": header.optional,
        "bytes": patch.size,
        "full_bytes": header.file_size,
        "signature_bytes": len(patch.signatures),
        "changed": sum(patch.counts),
        "tensors_changed": sum(count > 0 for count in patch.counts),
        "sections": [
            {
                "name": section.name,
                "kind": section.kind,
                "encoding": ENCODINGS[section.encoding],
                "packed_bytes": section.packed_size,
                "raw_bytes": section.raw_size,
            }
            for section in patch.sections
        ],
    }
    if layout is not None:
        record["tensors"] = _tensors(layout, patch.counts)
    return record


def patch_text(record: Record) -> str:
    """Put a record of :func:`patch_record` into words."""
    packed = sum(section["packed_bytes"] for section in record["sections"])
    rows = [("header and table", record["bytes"] - packed, "", "")]
    rows += [
        (s["name"], s["packed_bytes"], s["raw_bytes"], s["encoding"])
        for s in record["sections"]
    ]
    lines = [
        f"model    {record['model']}",
        f"parent   {record['parent']}",
        f"target   {record['target']}",
        f"round    {record['round']}, release counter {record['counter']}",
        f"changed  {spaced(record['changed'])} values in {record['tensors_changed']} "
        "tensors",
        f"size     {spaced(record['bytes'])} bytes, "
        f"{percent(record['bytes'], record['full_bytes'])} of the weight file's "
        f"{spaced(record['full_bytes'])} (lower is better)",
        "",
        f"{'where the bytes go':<24}{'packed':>12}{'raw':>12}",
        *(
            f"  {name:<22}{spaced(packed):>12}{spaced(raw):>12}  {encoding}".rstrip()
            for name, packed, raw, encoding in rows
        ),
    ]
    if "tensors" in record:
        lines += ["", *tensor_table(record["tensors"])]
    return "\n".join(lines)


def diff_record(
    base: Weights, target: Weights, changes: Sequence[TensorChange]
) -> Record:
    """Describe where two weight files differ."""
    tensors = _tensors(base.layout, [len(change.positions) for change in changes])
    return {
        "base": base.fingerprint,
        "target": target.fingerprint,
        "size": sum(tensor["size"] for tensor in tensors),
        "changed": sum(tensor["changed"] for tensor in tensors),
        "tensors": tensors,
    }


def diff_text(record: Record) -> str:
    """Put the record of ``dpu-patch diff`` into words."""
    changed, size = record["changed"], record["size"]
    total = (
        f"{spaced(changed)} of {spaced(size)} values differ ({percent(changed, size)})"
    )
    return "\n".join([total, *tensor_table(record["tensors"])] if changed else [total])


def _tensors(layout: Layout, counts: Sequence[int]) -> list[Record]:
    return [
        {"name": tensor.name, "size": tensor.size, "changed": count}
        for tensor, count in zip(layout.tensors, counts, strict=True)
    ]


def tensor_table(tensors: Iterable[Record]) -> list[str]:
    """Return one line for each tensor that changed, and their heading."""
    found = [tensor for tensor in tensors if tensor["changed"]]
    width = max([24, *(len(tensor["name"]) + 2 for tensor in found)])
    return [f"{'tensor':<{width}}{'changed':>12}{'of':>12}"] + [
        f"{t['name']:<{width}}{spaced(t['changed']):>12}{spaced(t['size']):>12}  "
        f"{percent(t['changed'], t['size'])}"
        for t in found
    ]


def spaced(number: int | str) -> str:
    """Write a number with a space between thousands."""
    return f"{number:,}".replace(",", " ") if isinstance(number, int) else number


def percent(part: int, whole: int) -> str:
    """Write a share in percent, two digits after the point."""
    return f"{100 * part / whole:.2f} %" if whole else "-"
