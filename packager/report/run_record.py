# SPDX-License-Identifier: Apache-2.0
"""What a run's rounds came to: accuracy, bytes, and where the changes were.

Plain data for ``--json``; :mod:`packager.report.run_document` puts it into words and
pictures.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import DpuError, RoundError
from edge_runtime.formats import json_file
from edge_runtime.formats.layout import Layout
from edge_runtime.formats.model_folder import (
    RECORD_NAME,
    WEIGHTS_NAME,
    Outcome,
    list_rounds,
)
from edge_runtime.formats.patch import open_patch
from edge_runtime.formats.subspace import Term
from packager.build import pack_round
from packager.report.frontier import FULL, Measured, frontier_points
from packager.report.links import link_records
from packager.report.records import (
    FrontierPoint,
    OtherRound,
    OtherRun,
    OverlapRecord,
    RoundEntry,
    RoundTensor,
    RunRecord,
    SentRecord,
)
from packager.rounds.folder import RoundFolder, read_round
from packager.rounds.record import RoundRecord, read_record

T = TypeVar("T")
BEYOND = 1e100  # differences and squares of what is smaller are finite
Masks = Mapping[str, NDArray[np.uint8]]


def run_record(run: Path, beside: Sequence[Path] = ()) -> RunRecord:
    """Describe a run.

    Args:
        run: The run's folder.
        beside: Other runs to hold it against, such as one of full updating; one that
            is given twice counts once.

    Raises:
        RoundError: There is no round in one of them, one is damaged, or two of full
            updating have one seed.
    """
    given = {path.resolve(): path for path in reversed([run, *beside])}
    beside = [path for path in reversed(given.values()) if path is not run]
    folders = _folders(run)
    rounds = [_round_record(folder) for folder in folders]
    cumulate(rounds)
    sent = [entry["bytes"] for entry in rounds if entry["bytes"]]
    full = rounds[0]["full_bytes"]
    others = [_other_record(other) for other in beside]
    return {
        "run": run.resolve().name,
        "path": str(run),
        "model": rounds[0]["model"],
        "full_bytes": full,
        "bytes": sum(sent),
        "patches": len(sent),
        "rounds": rounds,
        "overlap": overlap_record([f for f in folders if _is_update(f)]),
        "links": link_records(int(np.median(sent)) if sent else 0, full),
        "beside": others,
        "frontier": _frontier([_as_other(run, rounds), *others]),
    }


def _folders(run: Path) -> list[Path]:
    folders = list_rounds(run)
    if not folders:
        raise RoundError(
            f"{run} is no run with rounds in it: there is no round_00 below"
        )
    return folders


def _other_record(run: Path) -> OtherRun:
    rounds = [_round_record(folder) for folder in _folders(run)]
    cumulate(rounds)
    return _as_other(run, rounds)


def _as_other(run: Path, rounds: Sequence[RoundEntry]) -> OtherRun:
    return {
        "run": run.resolve().name,
        "path": str(run),
        "method": rounds[-1]["method"],
        "seed": rounds[-1]["seed"],
        "rounds": [_other_round(entry) for entry in rounds],
    }


def _frontier(runs: Sequence[OtherRun]) -> list[FrontierPoint]:
    """Hold those that are measured as the first one is against full updating."""
    metric = runs[0]["rounds"][-1]["metric"]
    return frontier_points(
        [
            Measured(
                run["run"],
                run["method"],
                run["seed"],
                {
                    e["round"]: e["test_metric"]
                    for e in run["rounds"]
                    if e["test_metric"] is not None
                },
                [e["bytes"] for e in run["rounds"] if e["bytes"]],
                run["rounds"][-1]["better"] == "lower",
                _recipe(Path(run["path"])),
                run["path"],
            )
            for run in runs
            if run["rounds"][-1]["metric"] == metric
        ]
    )


def _recipe(run: Path) -> str:
    """Return what tells a run's recipe from others, but for its name and seed."""
    record = _raw(_folders(run)[-1])
    config = record.get("config")
    if not (isinstance(config, dict) and config):
        return repr(record.get("ratio"))
    kept, data = {**config, "run": None}, config.get("data")
    if isinstance(data, dict):  # where it lies is a matter of the machine
        kept["data"] = {key: value for key, value in data.items() if key != "root"}
    return json.dumps(kept, sort_keys=True)


def _raw(folder: Path) -> Mapping[str, Any]:
    """Return all that a trainer states about a round, which nobody has checked."""
    path = folder / RECORD_NAME
    return json_file.read_record(
        path, "record_bytes", str(path), RoundError, finite=False
    ).values


def _other_round(entry: RoundEntry) -> OtherRound:
    values: Mapping[str, Any] = entry
    return cast(OtherRound, {name: values[name] for name in OtherRound.__annotations__})


def cumulate(rounds: Sequence[RoundEntry]) -> None:
    """Add to each round the bytes of all rounds up to it; None once one is unknown."""
    total: int | None = 0
    for entry in rounds:
        size = entry["bytes"]
        total = None if total is None or size is None else total + size
        entry["cumulative_bytes"] = total


def _round_record(folder: Path) -> RoundEntry:
    stated = read_record(folder)
    extra = _raw(folder)
    metrics = extra.get("metrics")
    metrics = metrics if isinstance(metrics, dict) else {}
    # No ratio alone says nothing: a subspace, which moves all weights, has none either.
    sent = _sent(folder, stated, full=extra.get("method") == FULL)
    metric = _stated(extra.get("metric"), str) or "accuracy"
    return {
        "round": stated.round,
        "outcome": stated.outcome,
        "model": stated.model,
        "counter": stated.counter,
        "full_bytes": (folder / WEIGHTS_NAME).stat().st_size,
        # What a trainer may state beside what packing needs: without it no curves.
        "method": _stated(extra.get("method"), str),
        "ratio": _number(extra.get("ratio")),
        "seed": _seed(extra.get("seeds")),
        "samples": _stated(extra.get("samples"), int),
        "reinitialised": _stated(extra.get("reinitialised"), bool),
        "metric": metric,
        "better": _stated(extra.get("better"), str) or "higher",
        "val_metric": _number(metrics.get(f"val_{metric}")),
        "test_metric": _number(metrics.get(f"test_{metric}")),
        "val_accuracy": _number(metrics.get("val_accuracy")),
        "test_accuracy": _number(metrics.get("test_accuracy")),
        "bytes": sent["bytes"],
        "bytes_from": sent["bytes_from"],
        "tensors": sent["tensors"],
        "cumulative_bytes": None,  # until those before it are known
    }


def _seed(stated: object) -> int | None:
    return _stated(stated.get("run"), int) if isinstance(stated, dict) else None


def _stated(value: object, kind: type[T]) -> T | None:
    """Return what a trainer states if it is of its type, which nobody has checked."""
    return value if type(value) is kind else None


def _number(value: object) -> float | None:
    """Return a number that can be drawn: no NaN, nothing beyond all measure."""
    if type(value) not in (int, float) or not abs(value) < BEYOND:  # type: ignore[arg-type]
        return None
    return float(value) if abs(value) > 1 / BEYOND else 0.0  # type: ignore[arg-type]


def _sent(folder: Path, stated: RoundRecord, *, full: bool) -> SentRecord:
    """Say how many bytes a round costs, and what changes in which tensor.

    Counted is the patch beside the round folder, else one that is packed now. Without
    one a round of full updating counts as its weight file, which would be sent.
    """
    nothing: SentRecord = {"bytes": 0, "bytes_from": "nothing", "tensors": []}
    if stated.outcome is Outcome.KEPT_BASE:
        return nothing
    if not stated.packable:
        return {"bytes": None, "bytes_from": "not packable", "tensors": []}
    round_ = read_round(folder)
    layout = round_.weights.layout
    size, counts = _existing(folder, stated, layout)
    if counts:
        tensors = _changes(round_, counts)
        return {"bytes": size, "bytes_from": "patch file", "tensors": tensors}
    if full:
        size = layout.file_size
        return {"bytes": size, "bytes_from": "weight file", "tensors": []}
    packed = pack_round(round_)
    if packed is None:
        return nothing
    counts = _with_moved([*packed.counts.values()], packed.terms, layout)
    tensors, size = _changes(round_, counts), len(packed.data)
    return {"bytes": size, "bytes_from": "packed now", "tensors": tensors}


def _with_moved(
    counts: Sequence[int], terms: Sequence[Term], layout: Layout
) -> list[int]:
    """Return how many elements of each tensor change, where subspaces move some."""
    moved = {number for term in terms for number in term.scales}
    return [
        tensor.size if number in moved else count
        for number, (tensor, count) in enumerate(
            zip(layout.tensors, counts, strict=True)
        )
    ]


def _existing(
    folder: Path, stated: RoundRecord, layout: Layout
) -> tuple[int, list[int]]:
    path = folder.with_name(folder.name + ".dpu")
    if not path.is_file():
        return 0, []
    try:
        with open_patch(path) as patch:
            header = patch.header
            if (header.parent, header.target) == (stated.parent, stated.target):
                return patch.size, _with_moved(patch.counts, patch.terms, layout)
    except DpuError:
        return 0, []  # of another format version, or damaged: pack it again
    return 0, []


def _changes(round_: RoundFolder, counts: Sequence[int]) -> list[RoundTensor]:
    tensors = round_.weights.layout.tensors
    return [
        {
            "name": tensor.name,
            "size": tensor.size,
            "changed": count,
            "dense": tensor.name not in round_.selection,
        }
        for tensor, count in zip(tensors, counts, strict=True)
    ]


def _is_update(folder: Path) -> bool:
    stated = read_record(folder)
    return stated.packable and stated.outcome is Outcome.UPDATED


def overlap_record(folders: Sequence[Path]) -> OverlapRecord:
    """Say how far the selections of rounds coincide.

    Returns:
        ``rounds``; ``shares``: a square of the selected weights that two rounds have in
        common, as a share of the smaller selection; ``by_chance``: the same for random
        selections of these sizes. Rounds that select nothing or everything are left
        out: they overlap with anything or nothing.
    """
    found: dict[int, tuple[Masks, int]] = {}
    weights = 0
    for folder in folders:
        round_ = read_round(folder)
        masks, tensors = round_.selection, round_.weights.layout.by_name
        weights = max(weights, sum(tensors[name].size for name in masks))
        count = sum(map(_ones, masks.values()))
        if 0 < count < sum(tensors[name].size for name in masks):
            found[round_.record.round] = masks, count
    pairs = [[(a, b) for b in found.values()] for a in found.values()]
    return {
        "rounds": list(found),
        "shares": [[_common(a, b) for a, b in row] for row in pairs],
        "by_chance": [[max(a[1], b[1]) / weights for a, b in row] for row in pairs],
    }


def _common(a: tuple[Masks, int], b: tuple[Masks, int]) -> float:
    # A round that trains the dense part freely does not select from it; another may.
    names = a[0].keys() & b[0].keys()
    return sum(_ones(a[0][name] & b[0][name]) for name in names) / min(a[1], b[1])


_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1)


def _ones(masks: NDArray[np.uint8]) -> int:
    return int(_ONES[masks].sum())
