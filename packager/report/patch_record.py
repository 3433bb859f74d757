# SPDX-License-Identifier: Apache-2.0
"""What a patch holds and how far it is from the floor; where two weight files differ.

Plain data for ``--json``; :mod:`packager.report.patch_document` puts it into words and
pictures. Sizes are in bytes, digests in hexadecimal, times in seconds.

The floor is what the content costs without any knowledge of it: for the index the
logarithm of the number of ways to choose m of n elements, tensor by tensor; for each
value the bits of its type. It is a measure, not a limit. Selections come in clusters
and the exponents of floats are no noise, so a good patch is smaller than its floor.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import WeightsError
from edge_runtime.formats.frames import STORED, ZSTD, Section
from edge_runtime.formats.layout import DTYPES, Layout, Tensor
from edge_runtime.formats.patch import Patch
from edge_runtime.formats.sections import (
    BITS,
    COLUMNS,
    COUNTS,
    DENSE,
    FORMS,
    INDEX,
    INDEX_BITS,
    OUTPUTS,
    PLANES,
    REST,
    SIGNED_AT,
    SUBSPACES,
    SYMBOLS,
    UNARY,
    VALUES,
)
from edge_runtime.formats.signing import encode_signatures
from edge_runtime.formats.weights import Weights
from edge_runtime.limits import limits
from packager.diff import TensorChange
from packager.moved import patched_weights
from packager.report.links import link_records
from packager.report.records import (
    DiffRecord,
    FloorRecord,
    PatchRecord,
    SectionRecord,
    TensorRecord,
)

NAMES = {
    COUNTS: "counts",
    FORMS: "forms",
    INDEX: "index",
    INDEX_BITS: "index bits",
    COLUMNS: "columns",
    UNARY: "index in unary",
    OUTPUTS: "expected outputs",
    SIGNED_AT: "time of signing",
    SUBSPACES: "subspaces",
}
VALUE_NAMES = {SYMBOLS: "steps", BITS: "bits", REST: "rest"}
ENCODINGS = {STORED: "stored", ZSTD: "zstd"}
BINS = 48  # of a tensor's flat positions, to see where in it something changes
FLOATS = {"F64", "F32", "F16"}
PIECE = 1 << 18  # elements that are compared as numbers at a time


def log2_choose(n: int, m: int) -> float:
    """Return log2 of the number of ways to choose m of n."""
    if not 0 < m < n:
        return 0.0
    nats = math.lgamma(n + 1) - math.lgamma(m + 1) - math.lgamma(n - m + 1)
    return nats / math.log(2)


def patch_record(
    path: Path, patch: Patch, layout: Layout | None = None, base: Weights | None = None
) -> PatchRecord:
    """Describe an open patch.

    Args:
        path: Its file.
        patch: The patch.
        layout: Of a weight file of its network; gives the tensors their names, and the
            floor.
        base: The weights that it leads from; tells how much the values change.
    """
    header = patch.header
    record: PatchRecord = {
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
        "signature_bytes": len(encode_signatures(patch.signatures)),
        "signed_by": [signature.key_id for signature in patch.signatures],
        "changed": sum(patch.counts),
        "tensors_changed": sum(count > 0 for count in patch.counts),
        "subspaces": [
            {
                "coefficients": len(term.coefficients),
                "bits": term.bits,
                "taps": term.taps,
                "tensors": len(term.scales),
            }
            for term in patch.terms
        ],
        "sections": [_section_record(section) for section in patch.sections],
        "parts": patch_parts(patch),
        "links": link_records(patch.size, header.file_size),
    }
    if layout is not None:
        bins = _bins(patch, layout)
        tensors = tensor_records(layout, patch.counts, bins)
        if base is not None:
            _add_changes(tensors, base, patch)
        record["tensors"] = tensors
        record["floor"] = floor_record(tensors, record["parts"])
    return record


def section_name(kind: int) -> str:
    """Return the kind of a section in words."""
    if kind < VALUES:
        return NAMES[kind]
    bits = 8 << ((kind - VALUES) >> 5)
    within = kind % DENSE
    what = VALUE_NAMES.get(within, f"byte {within - PLANES}")
    return f"{'dense' if kind & DENSE else 'sparse'} {bits}-bit values, {what}"


def section_part(kind: int) -> str:
    """Say what a section is for: ``header``, ``index``, ``values`` or ``dense``."""
    if kind == SUBSPACES:
        return "values"
    if kind < VALUES:
        return "header" if kind in (FORMS, OUTPUTS, SIGNED_AT) else "index"
    return "dense" if kind & DENSE else "values"


def _section_record(section: Section) -> SectionRecord:
    return {
        "name": section_name(section.kind),
        "kind": section.kind,
        "encoding": ENCODINGS[section.encoding],
        "packed_bytes": section.packed_size,
        "raw_bytes": section.raw_size,
    }


def patch_parts(patch: Patch) -> dict[str, int]:
    """Say where the bytes of a patch go.

    Returns:
        Bytes of ``header`` (with the section table), ``signatures``, ``index``,
        ``values`` and ``dense`` (tensors of which more than half travels). They add up
        to the file.
    """
    parts = {"header": 0, "signatures": 0, "index": 0, "values": 0, "dense": 0}
    for section in patch.sections:
        parts[section_part(section.kind)] += section.packed_size
    parts["signatures"] = len(encode_signatures(patch.signatures))
    parts["header"] += patch.size - sum(parts.values())
    return parts


def is_dense(changed: int, size: int) -> bool:
    """Say whether a tensor counts as dense part: more than half of it travels."""
    return 2 * changed > size


def tensor_records(
    layout: Layout, counts: Sequence[int], bins: Sequence[NDArray[np.float64]] = ()
) -> list[TensorRecord]:
    """Describe each tensor of a weight file and what changes in it.

    Args:
        layout: Of the weight file.
        counts: How many elements of each tensor change, in file order.
        bins: Shares of changed elements along each tensor, where they are known.
    """
    check_shown(layout)
    records = []
    known: dict[float, float] = {}  # most are of few values: each is kept once
    for number, (tensor, count) in enumerate(zip(layout.tensors, counts, strict=True)):
        record: TensorRecord = {
            "name": tensor.name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "size": tensor.size,
            "changed": count,
            "index_floor_bytes": log2_choose(tensor.size, count) / 8,
            "value_floor_bytes": count * tensor.item_size,
        }
        if bins:
            shares = [round(share, 6) for share in bins[number].tolist()]
            record["shares"] = [known.setdefault(share, share) for share in shares]
        records.append(record)
    return records


def check_shown(layout: Layout) -> None:
    """Insist that tensors are few enough to be described one by one.

    Raises:
        WeightsError: They are not.
    """
    count = len(layout.tensors)
    if problem := limits().problem("shown_tensors", count, "the weight file"):
        raise WeightsError(problem)


def floor_record(
    tensors: Sequence[TensorRecord], parts: dict[str, int]
) -> dict[str, FloorRecord]:
    """Hold a patch against its floor, part by part.

    Returns:
        For ``index``, ``values``, ``dense`` and ``total``: ``bytes`` of the patch,
        ``floor_bytes``, and their ``ratio`` (lower is better; None without a floor).
        The total leaves header and signatures out.
    """
    floors = {"index": 0.0, "values": 0.0, "dense": 0.0}
    for tensor in tensors:
        part = "dense" if is_dense(tensor["changed"], tensor["size"]) else "values"
        floors["index"] += tensor["index_floor_bytes"]
        floors[part] += tensor["value_floor_bytes"]
    sizes = {name: parts[name] for name in floors}
    sizes["total"], floors["total"] = sum(sizes.values()), sum(floors.values())
    return {
        name: {
            "bytes": sizes[name],
            "floor_bytes": floors[name],
            "ratio": sizes[name] / floors[name] if floors[name] else None,
        }
        for name in floors
    }


def diff_record(
    base: Weights, target: Weights, changes: Sequence[TensorChange]
) -> DiffRecord:
    """Describe where two weight files differ."""
    layout = base.layout
    counts = [len(change) for change in changes]
    bins = []
    for tensor, change in zip(layout.tensors, changes, strict=True):
        bins.append(_nowhere(tensor))
        for positions in change.pieces():
            bins[-1] += _histogram(tensor, positions)
    tensors = tensor_records(layout, counts, bins)
    for record, tensor in zip(tensors, layout.tensors, strict=True):
        _add_change(record, tensor, base, target)
    return {
        "base": base.fingerprint,
        "target": target.fingerprint,
        "full_bytes": layout.file_size,
        "size": sum(tensor.size for tensor in layout.tensors),
        "changed": sum(counts),
        "tensors_changed": sum(count > 0 for count in counts),
        "floor_bytes": sum(
            t["index_floor_bytes"] + t["value_floor_bytes"] for t in tensors
        ),
        "other_network": None,
        "tensors": tensors,
    }


def _bins(patch: Patch, layout: Layout) -> list[NDArray[np.float64]]:
    """Return the share of changed elements along each tensor."""
    tensors = layout.tensors
    found = [_nowhere(tensor) for tensor in tensors]
    for run in patch.runs(layout):
        low, high = (int(at) * run.item_size for at in run.positions[[0, -1]])
        number = bisect_right(tensors, low, key=attrgetter("stop"))
        while number < len(tensors) and tensors[number].start <= high:
            tensor = tensors[number]
            first = tensor.start // tensor.item_size
            if tensor.dtype == run.dtype:
                found[number] += _histogram(tensor, run.positions, first)
            number += 1
    return found


def _nowhere(tensor: Tensor) -> NDArray[np.float64]:
    """Return the shares of a tensor that stays as it is."""
    return np.zeros(max(1, min(BINS, tensor.size)))


def _histogram(
    tensor: Tensor, positions: NDArray[np.int64], first: int = 0
) -> NDArray[np.float64]:
    """Return the share of each bin of a tensor whose elements count from ``first``."""
    bins = len(_nowhere(tensor))
    edges = np.arange(bins + 1) * tensor.size // bins  # of flat positions, C order
    counts = np.diff(np.searchsorted(positions, first + edges))
    shares: NDArray[np.float64] = counts / np.maximum(np.diff(edges), 1)
    return shares


def _add_changes(tensors: list[TensorRecord], base: Weights, patch: Patch) -> None:
    target = patched_weights(base, patch)
    for record, tensor in zip(tensors, base.layout.tensors, strict=True):
        _add_change(record, tensor, base, target)


def _add_change(
    record: TensorRecord, tensor: Tensor, base: Weights, target: Weights
) -> None:
    """Add how far a tensor of floats moved, relative to its own length."""
    if tensor.dtype not in FLOATS:
        return
    length = moved = 0.0
    with np.errstate(all="ignore"):  # weights may hold infinities and NaN
        for start in range(0, tensor.size, PIECE):
            stop = min(start + PIECE, tensor.size)
            before, after = (
                weights.bits(tensor, start, stop)
                .view(DTYPES[tensor.dtype])
                .astype(np.float64)
                for weights in (base, target)
            )
            length += float(before @ before)
            moved += float((after - before) @ (after - before))
    is_known = bool(np.isfinite(length + moved) and length)
    record["relative_change"] = math.sqrt(moved / length) if is_known else None
