# SPDX-License-Identifier: Apache-2.0
"""Result files of the reproduction; the table and plot that are drawn from them."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from edge_runtime.errors import ConfigError
from edge_runtime.files import Files
from edge_runtime.formats.json_file import read_record
from packager.report.frontier import Measured, frontier_points
from packager.report.records import FrontierPoint

SCHEMA = 1
METHODS = ("fu", "dpu", "gcpu", "rpu", "pruning")
BASELINES = ("last_layer", "dense_only", "lora")  # of few bytes, after a full round
# Trained only where asked for: what becomes of a re-initialised model that validates
# worse (in the paper's code it carries the chain on; here, it may do so unseen), and
# what else is better than the paper at the same bytes.
VARIANTS = (
    *("dpu_paper_chain", "dpu_shadow", "dpu_beyond"),
    *("dpu_lean", "dpu_lean_k005", "dpu_lean_k010", "dpu_lean_int8"),
    "dpu_lean_taught",
    *("subspace", "subspace_4k", "subspace_taught_4k"),
    *BASELINES,
    # Fair references: full updating distilled from itself, more samples by moving them,
    # and a pruning that does not cut layers off.
    *("fu_taught", "fu_shift", "dpu_lean_shift", "pruning_gradual"),
)
EIGHT_BITS = "fu_8bit"  # full updating, rounded
# Mean accuracy difference to full updating over all rounds, points.
PAPER = {
    "mnist_mlp": {"dpu": -0.17, "gcpu": -0.72, "rpu": -4.04, "pruning": -1.45},
    "cifar10_vgg": {"dpu": 0.33, "gcpu": -1.51, "rpu": -11.35, "pruning": -4.35},
    "cifar100_resnet56": {"dpu": -0.42, "gcpu": -3.87, "rpu": -7.78, "pruning": -2.35},
}
# Protocols of our own for a CPU: which column they stand for, and what they are. The
# paper's figures are of the larger network and protocol, and not to be compared.
SMALLER = {
    "cifar10_vgg_small": (
        "cifar10_vgg",
        "VGG of a quarter of the width, CIFAR-10 at 16x16, 12 epochs a phase",
    ),
    "cifar10_resnet_small": (
        "cifar100_resnet56",
        "ResNet20, CIFAR-10 at 16x16, 12 epochs a phase",
    ),
}
COLOURS = dict(
    zip(
        (*METHODS, *VARIANTS, EIGHT_BITS),
        (
            "#555",
            "#06c",
            "#0a7",
            "#d60",
            "#a3a",
            "#6bf",
            "#036",
            "#c03",
            "#280",
            "#7b3",
            "#5cb",
            "#c80",
            "#83c",
            "#740",
            "#e6a",
            "#f0a",
            "#099",
            "#f50",
            "#5b5",
            *("#222", "#88a", "#a06", "#b84"),
            "#999",
        ),
        strict=True,
    )
)
WIDTH, HEIGHT, MARGIN = 640, 320, 48  # pixels


def read_result(path: Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        ConfigError: It is damaged.
        OSError: It cannot be read.
    """
    result = read_record(path, "record_bytes", str(path), ConfigError)
    result.record("seeds").integer("run")
    for row in result.records("rounds"):
        for name in ("val_tried", "test_tried", "bytes"):
            row.number(name)
    return dict(result.values)


def write_result(
    path: Path, about: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]
) -> None:
    """Replace a result file; a round is a line: longer runs are short diffs."""
    head = json.dumps({"schema": SCHEMA, **about}, indent=1)
    lines = ",\n".join("  " + json.dumps(row) for row in rounds)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f'{head[:-2]},\n "rounds": [\n{lines}\n ]\n}}\n'
    Files().replace(path, text.encode(), durable=False)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One method and seed against full updating of the same seed.

    Attributes:
        method: Name of its recipe.
        seed: Of both runs.
        rounds: Rounds that both have; the means are over these.
        raw: Mean difference of the test accuracy of what each round tried, points.
        monotone: The same after the official post-processing: a round that validates
            worse than the one before it shows that one's accuracies.
        last: Test accuracy of the last of these rounds, per cent, monotone.
        mean_bytes: Of the patches of these rounds; 0 where a round kept its base or is
            not meant to be packed.
    """

    method: str
    seed: int
    rounds: int
    raw: float
    monotone: float
    last: float
    mean_bytes: float


def read_results(folder: Path) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Read all results of a network: rows by name of the recipe and seed."""
    found = {}
    for path in sorted(folder.glob("*_seed*.json")):
        result, recipe = read_result(path), path.stem.rpartition("_seed")[0]
        found[recipe, result["seeds"]["run"]] = result["rounds"]
    return found


def monotone(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return test accuracies as the official code reports them."""
    shown: list[tuple[float, float]] = []
    for row in rows:
        tried = row["val_tried"], row["test_tried"]
        shown.append(shown[-1] if shown and tried[0] < shown[-1][0] else tried)
    return [test for _, test in shown]


def compare(
    results: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]],
) -> list[Comparison]:
    """Hold every run against full updating of its seed, over their common rounds."""
    seeds = {seed: rows for (method, seed), rows in results.items() if method == "fu"}
    found = []
    for method in (*METHODS, *VARIANTS, EIGHT_BITS):
        for seed, full in sorted(seeds.items()):
            rows = results.get((method, seed), ())
            count = min(len(rows), len(full))
            if not count:
                continue
            pairs = list(zip(rows[:count], full[:count], strict=True))
            after = monotone(rows[:count])
            steps = zip(after, monotone(full[:count]), strict=True)
            found.append(
                Comparison(
                    method,
                    seed,
                    count,
                    fmean(row["test_tried"] - fu["test_tried"] for row, fu in pairs),
                    fmean(mine - theirs for mine, theirs in steps),
                    after[-1],
                    fmean(row["bytes"] for row, _ in pairs),
                )
            )
    return found


def frontier(
    results: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]],
    rounds: int | None = None,
) -> list[FrontierPoint]:
    """Hold every method against full updating by accuracy and bytes, over its seeds.

    Accuracies are those of the official post-processing. Runs whose patches are not
    for devices are left out.

    Args:
        results: Rows by name of the recipe and seed.
        rounds: How many of the first rounds count, of runs that have them all, so that
            all points are of the same rounds; default: all that a run has.
    """
    runs = [
        Measured(
            method,
            method,
            seed,
            dict(enumerate(monotone(rows[:rounds]))),
            [row["bytes"] for row in rows[:rounds] if row["bytes"]],
        )
        for (method, seed), rows in results.items()
        if len(rows) >= (rounds or 1)
    ]
    return [point for point in frontier_points(runs) if point["bytes"]]


def table(network: str, comparisons: Sequence[Comparison]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    column, heading = network, "paper"
    if network in SMALLER:
        column, about = SMALLER[network]
        heading = "paper, full size (not comparable)"
        yield f"Smaller than the paper's protocol: {about}."
        yield ""
    yield (
        f"| method | seed | rounds | raw | post-processed | {heading} | last test % "
        "| mean bytes a round, 0 where nothing was sent |"
    )
    yield "|---|--:|--:|--:|--:|--:|--:|--:|"
    for row in comparisons:
        paper = PAPER[column].get(row.method.partition("_")[0])
        sent = f"{row.mean_bytes:,.0f}" if row.mean_bytes else "-"  # cannot be packed
        yield (
            f"| {row.method} | {row.seed} | 0-{row.rounds - 1} | {row.raw:+.2f} "
            f"| {row.monotone:+.2f} | {'-' if paper is None else f'{paper:+.2f}'} "
            f"| {row.last:.2f} | {sent} |"
        )


def plot(results: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]) -> str:
    """Return an SVG: difference to full updating after post-processing, by round.

    A run without full updating of its seed is left out. Where few values are far below
    all others, their curves leave the picture at its lower edge.
    """
    curves = {
        (method, seed): [
            mine - full
            for mine, full in zip(
                monotone(rows), monotone(results["fu", seed]), strict=False
            )
        ]
        for (method, seed), rows in results.items()
        if ("fu", seed) in results
    }
    values = sorted(value for curve in curves.values() for value in curve)
    low = math.floor(values[len(values) // 8]) if values else -1
    high = max(1, math.ceil(values[-1])) if values else 1
    last = max([1, *(len(curve) - 1 for curve in curves.values())])

    def place(number: float, points: float) -> tuple[float, float]:
        x = MARGIN + number / last * (WIDTH - 4 * MARGIN)
        share = (points - low) / (high - low)
        return x, HEIGHT - MARGIN - share * (HEIGHT - 2 * MARGIN)

    (left, bottom), (right, top) = place(0, low), place(last, high)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<clipPath id="inside"><rect x="{left}" y="{top}" width="{right - left}" '
        f'height="{bottom - top}"/></clipPath>',
        f'<text x="8" y="{MARGIN / 2}">points of test accuracy beside full updating'
        "</text>",
    ]
    step = max(1, (high - low) // 6)
    for points in range(-(-low // step) * step, high + 1, step):
        _, y = place(0, points)
        parts.append(f'<path d="M{left:.1f} {y:.1f}H{right:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="20" y="{y + 4:.1f}">{points}</text>')
    for number in range(0, last + 1, max(1, last // 8)):
        x, _ = place(number, low)
        parts.append(f'<text x="{x - 4:.1f}" y="{bottom + 18:.1f}">{number}</text>')
    parts.append(f'<text x="{MARGIN}" y="{HEIGHT - 8}">round</text>')
    for (method, _), curve in curves.items():
        line = " ".join(
            f"{x:.1f},{y:.1f}" for x, y in (place(n, v) for n, v in enumerate(curve))
        )
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{COLOURS[method]}" '
            'stroke-width="2" clip-path="url(#inside)"/>'
        )
    for line_number, method in enumerate(dict.fromkeys(method for method, _ in curves)):
        parts.append(
            f'<text x="{WIDTH - 3 * MARGIN + 12}" y="{MARGIN + 18 * line_number}" '
            f'fill="{COLOURS[method]}">{method}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"
