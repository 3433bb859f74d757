# SPDX-License-Identifier: Apache-2.0
"""What was packed: as data for ``--json``, and as text from it.

Sizes are in bytes, digests in hexadecimal.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from edge_runtime.formats.model_folder import Outcome, round_name
from edge_runtime.text import printable
from packager.build import PackedPatch
from packager.models.read import Model
from packager.report.records import FilesRecord, PackRecord
from packager.report.words import percent, spaced
from packager.rounds.folder import RoundFolder


class Made(NamedTuple):
    """A finished file that is still to be written.

    Attributes:
        path: Where to.
        data: Its bytes; empty where there is nothing to send.
        record: The result as data.
        text: The same for people.
        write: Writes data to the path, and tells whether it did.
    """

    path: Path
    data: bytes
    record: PackRecord | FilesRecord
    text: str
    write: Callable[[bytes, Path], bool]


def pack_record(
    round_: RoundFolder,
    packed: PackedPatch | None,
    path: Path,
    size: int,
    signed_by: Sequence[str] = (),
) -> PackRecord:
    """Describe the result of packing one round.

    Args:
        round_: The round.
        packed: Its patch; None where there was nothing to send.
        path: The file that was or would be written.
        size: Bytes of that file.
        signed_by: Ids of the keys that signed it.
    """
    stated = round_.record
    record: PackRecord = {
        "run": stated.run,
        "round": stated.round,
        "counter": packed.header.counter if packed else stated.counter,
        "round_counter": stated.counter,
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
    numbers = {number for term in packed.terms for number in term.scales}
    moved = [t for number, t in enumerate(tensors) if number in numbers]
    return record | {
        "parent": packed.header.parent,
        "parent_name": packed.parent_name,
        "bytes": size,
        "patch_bytes": len(packed.data),
        "signed_by": list(signed_by),
        "full_bytes": packed.header.file_size,
        "weights": sum(t.size for t in selectable),
        "weights_changed": sum(packed.counts[t.name] for t in selectable),
        "tensors_changed": sum(packed.counts[t.name] > 0 for t in selectable),
        "weights_moved": sum(t.size for t in moved),
        "coefficients": sum(len(term.coefficients) for term in packed.terms),
        "every_weight": bool(round_.terms) and not packed.terms,
        "dense": sum(t.size for t in dense),
        "dense_changed": sum(packed.counts[t.name] for t in dense),
    }


def pack_text(record: PackRecord) -> str:
    """Put a record of :func:`pack_record` into words."""
    name = round_name(record["round"])
    if record["path"] is None:
        kept = record["outcome"] == Outcome.KEPT_BASE
        why = "kept its base" if kept else "is what the parent already is,"
        return (
            f"{name}  {why} {record['target'][:12]}: nothing to send, nothing written"
        )
    changed, weights = record["weights_changed"], record["weights"]
    travelling = changed + record["dense_changed"] + record["weights_moved"]
    lines = [
        f"{name}  parent {record['parent_name']} {record['parent'][:12]}  →  "
        f"{record['target'][:12]}",
        _changed_line(record, changed, weights, "weights"),
        *_moved_lines(record),
        f"  dense    {spaced(record['dense_changed']):>11} values "
        "(biases, normalisation)",
        _patch_line(record, travelling),
        f"  checked  applied to {record['parent_name']}, result identical",
    ]
    if record["every_weight"]:
        lines.append(
            "  hint     all weights travel, as no chain of up to 64 rounds in "
            "subspaces leads from there to here, and sums are not taken back; --from "
            "init, or an earlier round, may have one"
        )
    if record["signed_by"]:
        lines.append(f"  signed   by {', '.join(record['signed_by'])}")
    if record["bytes"] != record["patch_bytes"]:
        lines.append(
            f"  bundle   {spaced(record['bytes']):>11} bytes   with graph, init "
            "recipe, contract and golden inputs"
        )
    if record["counter"] != record["round_counter"]:
        lines.append(
            f"  release  counter {record['counter']} instead of the round's "
            f"{record['round_counter']}: every later release needs a higher one"
        )
    return "\n".join(lines)


def _moved_lines(record: PackRecord) -> list[str]:
    if not record["weights_moved"]:
        return []
    count = spaced(record["coefficients"])
    return [
        f"  moved    {spaced(record['weights_moved']):>11} weights in a subspace, by "
        f"{count} coefficients"
    ]


def _changed_line(
    record: PackRecord | FilesRecord, changed: int, of: int, what: str
) -> str:
    tensors = record["tensors_changed"]
    return (
        f"  changed  {spaced(changed):>11} of {spaced(of)} {what} "
        f"({percent(changed, of)}) in {tensors} tensor{'s' * (tensors != 1)}"
    )


def _patch_line(record: PackRecord | FilesRecord, values: int) -> str:
    size = record["patch_bytes"]
    share = percent(size, record["full_bytes"])
    return (
        f"  patch    {spaced(size):>11} bytes   {share} of the weights (lower is "
        f"better)   {_each(size, values)}"
    )


def _each(size: int, values: int) -> str:
    if 4 * size < values:
        return f"{8 * size / values:.2g} bits/value"
    return f"{size / max(values, 1):.1f} bytes/value"


def files_record(
    models: tuple[Model, Model],
    packed: PackedPatch | None,
    path: Path,
    size: int,
    signed_by: Sequence[str] = (),
) -> FilesRecord:
    """Describe the result of packing two files, or a bundle of one.

    Args:
        models: What devices hold and what they shall hold; the same for a bundle.
        packed: The patch; None where there was nothing to send.
        path: The file that was or would be written.
        size: Bytes of that file.
        signed_by: Ids of the keys that signed it.
    """
    base, target = models
    record: FilesRecord = {
        "base": str(base.path),
        "target_path": str(target.path),
        "model": base.model,
        "run_id": base.run.id if base.run else None,
        "graph": bool(base.graph),
        "canonical": target.canonical,
        "parent": base.weights.fingerprint,
        "target": target.weights.fingerprint,
        "path": str(path) if packed else None,
        "signed_by": list(signed_by),
    }
    if not packed:
        return record
    tensors = target.weights.layout.tensors
    return record | {
        "counter": packed.header.counter,
        "bytes": size,
        "patch_bytes": len(packed.data),
        "full_bytes": packed.header.file_size,
        "values": sum(tensor.size for tensor in tensors),
        "changed": sum(packed.counts.values()),
        "tensors_changed": sum(count > 0 for count in packed.counts.values()),
    }


def files_text(record: FilesRecord) -> str:
    """Put a record of :func:`files_record` into words."""
    paths = record["target_path"], record["base"]
    name, base = (printable(Path(path).name) for path in paths)
    if record["path"] is None:
        return f"{name}  holds the weights of {base}: nothing to send, nothing written"
    if record["parent"] == record["target"]:
        lines = [f"{name}  {record['target'][:12]}", *_bundle_lines(record)]
    else:
        lines = [
            f"{name}  from {base} {record['parent'][:12]}  →  {record['target'][:12]}",
            *_change_lines(record, base),
        ]
    if record["signed_by"]:
        lines.append(f"  signed   by {', '.join(record['signed_by'])}")
    counter = record["counter"]
    lines.append(
        f"  release  counter {counter}: the next release needs --counter {counter + 1} "
        "or more"
    )
    kind = "is" if record["canonical"] else "holds the tensors of"
    lines.append(f"  device   weight file {record['target']}; it {kind} {name}")
    if not record["graph"]:
        lines.append(
            "  graph    not known: dpu-edge takes this patch only if it was made with "
            "--graph; 'dpu-patch apply' takes it"
        )
    return "\n".join(lines)


def _change_lines(record: FilesRecord, base: str) -> list[str]:
    changed, values = record["changed"], record["values"]
    lines = [
        _changed_line(record, changed, values, "values"),
        _patch_line(record, changed),
        f"  checked  applied to {base}, result identical",
    ]
    if changed > values // 2:
        lines.append(
            "  hint     most values changed: was the whole network trained, or did the "
            "exporter fold BatchNorm into other weights? Then little can be saved"
        )
    return lines


def _bundle_lines(record: FilesRecord) -> list[str]:
    made_up = record["golden"] == "made up"
    return [
        f"  bundle   {spaced(record['bytes']):>11} bytes   with graph, weights, "
        "contract and golden inputs",
        "  golden   "
        + (
            "made-up inputs: they tell a broken runtime, not a bad model (--golden)"
            if made_up
            else "inputs as given"
        ),
    ]
