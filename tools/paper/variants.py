# SPDX-License-Identifier: Apache-2.0
"""What the paper's method leaves on the table: its knobs, one at a time, beside it.

    python -m tools.paper.variants --recipe digits --seeds 10 --work ~/variants

Every variant changes one line or two of a recipe of ``dpu-train``; the baseline is the
paper's DPU. Each is trained with the same seeds, and compared with full updating of the
same seed, as the paper does: mean difference of the test accuracy over all rounds.
The run folders below ``--work`` are the state: the same command goes on after any stop.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev

import click

from edge_runtime.commandline import CONTEXT, Command, emit, json_option, say
from edge_runtime.formats.model_folder import round_name
from tools.bench.contest_report import replace_section
from tools.bench.patch import machine

HERE = Path(__file__).parents[1]
RECIPES = HERE.parent / "trainer" / "recipes"
BASELINE = "dpu, as in the paper"
REFERENCE = "full updating"
# What is changed of the recipe, as `dpu-train run RECIPE ...` takes it.
VARIANTS: dict[str, tuple[str, ...]] = {
    REFERENCE: ('update.method="fu"',),
    BASELINE: (),
    "gcpu (lambda = 1)": ('update.method="gcpu"',),
    "lcpu (lambda = 0)": ('update.method="lcpu"',),
    "rpu": ('update.method="rpu"',),
    "fisher": ('update.method="fisher"',),
    "magnitude": ('update.method="magnitude"',),
    "never re-initialised": ('update.reinit="never"',),
    "re-initialised unseen": ('update.chain="shadow"',),
    "full first round": ('update.first="full"',),
    "cosine schedule": ('train.schedule="cosine"',),
    "twice the epochs": ("train.epochs=60",),
    "dense part frozen": ('update.dense="freeze"',),
    "dense part selected": ('update.dense="budget"',),
    "10 mantissa bits": ("update.mantissa_bits=10",),
    "7 mantissa bits": ("update.mantissa_bits=7",),
    "7 mantissa bits, twice the ratio": (
        "update.mantissa_bits=7",
        "update.ratio=0.02",
    ),
    "7 mantissa bits, dense part selected, twice the ratio": (
        "update.mantissa_bits=7",
        'update.dense="budget"',
        "update.ratio=0.02",
    ),
    "full first round, 7 mantissa bits, dense part selected": (
        'update.first="full"',
        "update.mantissa_bits=7",
        'update.dense="budget"',
    ),
}


@dataclass(frozen=True, slots=True)
class VariantResult:
    """One run of one variant.

    Attributes:
        accuracy: Test accuracy of what is deployed after each round, per cent.
        patch_bytes: Of each round's patch; 0 where nothing was deployed.
    """

    accuracy: tuple[float, ...]
    patch_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One variant over all seeds.

    Attributes:
        variant: Its name.
        difference: Mean over rounds and seeds to full updating of the same seed,
            percentage points.
        error: The difference's standard error over the seeds.
        gain: The same to the baseline of the same seed.
        gain_error: Its standard error.
        last: Mean test accuracy after the last round, per cent.
        patch_bytes: Mean size of a patch behind the first round.
    """

    variant: str
    difference: float
    error: float
    gain: float
    gain_error: float
    last: float
    patch_bytes: float


def train(
    recipe: str, overrides: Sequence[str], seed: int, work: Path
) -> VariantResult:
    """Train one run, or go on with it, and pack its rounds."""
    from packager import pack_round, read_round
    from trainer.config import load_config
    from trainer.rounds.schedule import run_rounds

    name = "-".join(["seed", str(seed), *overrides]).replace('"', "").replace(".", "-")
    config = load_config(
        RECIPES / f"{recipe}.toml", [*overrides, f"run.seed={seed}"], name=name
    )
    records = run_rounds(config, work / recipe)
    sizes = []
    for record in records:
        folder = work / recipe / name / round_name(record.round)
        packed = pack_round(read_round(folder))
        sizes.append(len(packed.data) if packed else 0)
    return VariantResult(
        tuple(100 * record.metrics["test_accuracy"] for record in records),
        tuple(sizes),
    )


def compare(outcomes: Mapping[str, Mapping[int, VariantResult]]) -> list[Row]:
    """Hold every variant against full updating and the baseline, seed by seed."""
    return [_row(name, seeds, outcomes) for name, seeds in outcomes.items()]


def _row(
    name: str,
    seeds: Mapping[int, VariantResult],
    outcomes: Mapping[str, Mapping[int, VariantResult]],
) -> Row:
    mean = {seed: fmean(outcome.accuracy) for seed, outcome in seeds.items()}
    to_full, to_base = (
        [mean[seed] - fmean(outcomes[other][seed].accuracy) for seed in seeds]
        for other in (REFERENCE, BASELINE)
    )
    return Row(
        name,
        fmean(to_full),
        _error(to_full),
        fmean(to_base),
        _error(to_base),
        fmean(outcome.accuracy[-1] for outcome in seeds.values()),
        fmean(size for outcome in seeds.values() for size in outcome.patch_bytes[1:]),
    )


def _error(values: Sequence[float]) -> float:
    """Return the standard error of the mean; infinite for a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def table(
    recipe: str, seeds: int, rows: Sequence[Row], told: Mapping[str, object]
) -> str:
    """Return the section of the results for one recipe."""
    lines = [
        f"## Beyond the paper: {recipe}",
        "",
        f"    python -m tools.paper.variants --recipe {recipe} --seeds {seeds}",
        "",
        "Mean test accuracy over all rounds beside full updating, and beside the",
        "paper's DPU, of the same seed, percentage points with the standard error over",
        f"{seeds} seeds; bytes of a patch behind the first round, 0 where nothing was",
        "deployed.",
        "",
        "Machine: " + ", ".join(f"{k} {v}" for k, v in told.items()) + ".",
        "",
        "| variant | to full updating | to DPU | last round % | patch bytes |",
        "|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row.variant} | {row.difference:+.2f} ± {row.error:.2f} "
        f"| {row.gain:+.2f} ± {row.gain_error:.2f} "
        f"| {row.last:.2f} | {row.patch_bytes:,.0f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


@click.command(cls=Command, context_settings=CONTEXT)
@click.option(
    "--recipe",
    type=click.Choice(["digits", "digits_cnn"]),
    default="digits",
    show_default=True,
    help="Of dpu-train.",
)
@click.option("--seeds", type=click.IntRange(2), default=10, show_default=True)
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder of the runs; outside of the repository.",
)
@click.option("--save", is_flag=True, help="Write result file and tools/RESULTS.md.")
@json_option
def main(recipe: str, seeds: int, work: Path, *, save: bool, as_json: bool) -> None:
    """Train every variant with every seed; stop and start it as you like."""
    outcomes: dict[str, dict[int, VariantResult]] = {name: {} for name in VARIANTS}
    for seed in range(1, seeds + 1):
        for name, overrides in VARIANTS.items():
            outcome = outcomes[name][seed] = train(recipe, overrides, seed, work)
            say(
                f"seed {seed:2} {name:<40} {fmean(outcome.accuracy):6.2f} % "
                f"{fmean(outcome.patch_bytes[1:]):8,.0f} bytes"
            )
    rows, told = compare(outcomes), machine()
    text = table(recipe, seeds, rows, told)
    record = {
        "schema": 1,
        "recipe": recipe,
        "seeds": seeds,
        "machine": told,
        "variants": [
            asdict(row) | {"overrides": VARIANTS[row.variant]} for row in rows
        ],
    }
    emit(record, as_json=as_json, text=text)
    if save:
        results = HERE / "RESULTS.md"
        results.write_text(replace_section(results.read_text(), text))
        file = HERE / "results" / f"variants_{recipe}.json"
        file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
