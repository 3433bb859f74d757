# SPDX-License-Identifier: Apache-2.0
"""The paper's table, row by row: train its recipes and hold them against its numbers.

    python -m tools.paper.reproduce run --work ~/repro --data ~/data  # hours
    python -m tools.paper.reproduce eight-bits --work ~/repro  # no training
    python -m tools.paper.reproduce report  # table and plot
    python -m tools.paper.reproduce replay --method dpu_lean --data ~/data  # a device

A recipe stands for each method in ``tools/recipes/NETWORK/``. The methods are trained
in turns, round by round, so that whatever is finished can be compared. The round
folders below ``--work`` are the state: the same command goes on after any stop. What
each round came to is kept in ``tools/results/reproduction/NETWORK/METHOD_seedN.json``,
which later runs extend, and its patch in a folder of the same name: from those,
training goes on where ``--work`` is empty, and ``replay`` gives them to a device.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.commandline import CONTEXT, Command, Group, emit, json_option, say
from edge_runtime.errors import ConfigError
from edge_runtime.formats.model_folder import list_rounds, round_name
from tools.paper.reproduction import (
    EIGHT_BITS,
    METHODS,
    PAPER,
    SMALLER,
    VARIANTS,
    compare,
    frontier,
    plot,
    read_result,
    read_results,
    table,
    write_result,
)

if TYPE_CHECKING:
    from trainer.folder.record import RoundRecord

HERE = Path(__file__).parents[1]
RECIPES = HERE / "recipes"
RESULTS = HERE / "results" / "reproduction"
NETWORKS = tuple(PAPER) + tuple(SMALLER)
# Points between PyTorch and ONNX Runtime: a sample or two whose best scores are equal.
APART = 0.05

_network_option = click.option(
    "--network",
    type=click.Choice(NETWORKS),
    default=NETWORKS[0],
    show_default=True,
    help="Column of the paper's table.",
)
_results_option = click.option(
    "--results",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    help="Where the result files are.  [default: tools/results/reproduction]",
)


@click.group(cls=Group, context_settings=CONTEXT)
def main() -> None:
    """Reproduce the table of the Deep Partial Updating paper."""


@main.command(cls=Command)
@_network_option
@_results_option
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder of the runs; outside of the repository.",
)
@click.option("--data", help="Where the data set lies or is downloaded to.")
@click.option("--rounds", default=24, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=1, show_default=True, help="Of split, init and order.")
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=click.Choice(METHODS + VARIANTS),
    default=METHODS,
    help="One row; may be repeated.  [default: the paper's five]",
)
@click.option(
    "--minutes",
    type=click.FloatRange(0),
    help="Stop after a round that ends later.",
)
@click.option(
    "--set", "changes", multiple=True, metavar="KEY=VALUE", help="As dpu-train's."
)
def run(  # noqa: PLR0913 - one argument for each option
    network: str,
    results: Path,
    work: Path,
    data: str | None,
    rounds: int,
    seed: int,
    methods: Sequence[str],
    minutes: float | None,
    changes: Sequence[str],
) -> None:
    """Train the rounds that are not there yet; stop and start it as you like."""
    end = time.monotonic() + 60 * (math.inf if minutes is None else minutes)
    for _ in train_rows(
        network,
        methods,
        seed=seed,
        rounds=rounds,
        folders=(results, work),
        changes=[*([f"data.root={json.dumps(data)}"] if data else []), *changes],
    ):
        if time.monotonic() > end:
            say(f"{minutes} minutes are over; the same command goes on")
            return


def train_rows(
    network: str,
    methods: Sequence[str],
    *,
    seed: int,
    rounds: int,
    folders: tuple[Path, Path],
    changes: Sequence[str] = (),
) -> Iterator[tuple[str, int]]:
    """Train the rounds of some methods in turns; stop asking, and go on later.

    Args:
        network: Column of the paper's table.
        methods: Names of its recipes.
        seed: Of split, init and order.
        rounds: How many.
        folders: Of the results, and of the runs.
        changes: Keys of the recipes that are set otherwise, ``train.compile=true``.

    Yields:
        Method and round, once its results are written.
    """
    from packager.size import patch_size
    from tools.paper.checkpoints import has_checkpoints, keep, restore
    from trainer.config import load_config
    from trainer.data.sources import load_source
    from trainer.rounds.schedule import run_rounds

    results, runs = folders[0] / network, folders[1] / network
    source = None  # is the same for all methods
    for number in range(rounds):
        for method in methods:
            name = f"{method}_seed{seed}"
            recipe = RECIPES / network / f"{method}.toml"
            now = [*changes, f"run.seed={seed}", f"run.rounds={number + 1}"]
            config = load_config(recipe, now, name=name)
            source = source or load_source(config.data)
            kept, run_dir = results / name, runs / name
            if kept.exists() and not list_rounds(run_dir):
                restored = restore(kept, config, runs, source)
                say(f"{name:<14} goes on from the patches of {len(restored)} rounds")
            records = run_rounds(config, runs, source=source, pack=patch_size)
            for row in _extend(results / f"{name}.json", records, runs):
                say(
                    f"{name:<14} {round_name(row['round'])} {row['outcome']:<9} "
                    f"val {row['val']:6.2f} test {row['test']:6.2f} "
                    f"{row['changed']:>7} changed {row['bytes']:>8} bytes"
                )
            if has_checkpoints(method):
                keep(kept, run_dir, records)
            yield method, number


def _extend(
    path: Path, records: "Sequence[RoundRecord]", runs: Path
) -> list[dict[str, Any]]:
    """Add to a result file the rounds that it lacks, and return their rows."""
    from trainer.rounds.schedule import FREE_KEYS

    known = read_result(path)["rounds"] if path.exists() else []
    added = [_row(record, runs) for record in records[len(known) :]]
    if added:
        record = records[-1]
        recipe = {
            section: {k: v for k, v in table.items() if (section, k) not in FREE_KEYS}
            for section, table in record.config.items()
        }
        about = {"method": record.method, "seeds": record.seeds, "recipe": recipe}
        about["versions"] = record.versions
        write_result(path, about, [*known, *added])
    return added


def _row(record: "RoundRecord", runs: Path) -> dict[str, Any]:
    """Return what one round came to, accuracies in per cent."""
    from packager import pack_round, read_round

    packed = None
    if record.packable:
        packed = pack_round(read_round(runs / record.run / round_name(record.round)))
    metrics = record.metrics
    return {
        "round": record.round,
        "outcome": str(record.outcome),
        "tried_reinit": record.tried_reinit,
        "val_tried": round(100 * metrics["val_best"], 4),
        "test_tried": round(100 * metrics["test_best"], 4),
        "val": round(100 * metrics["val_accuracy"], 4),
        "test": round(100 * metrics["test_accuracy"], 4),
        "changed": metrics["changed"],
        "bytes": len(packed.data) if packed else 0,
        "target": record.target,
    }


@main.command("eight-bits", cls=Command)
@_network_option
@_results_option
@click.option(
    "--work",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder of the runs.",
)
@click.option("--data", help="Where the data set lies or is downloaded to.")
@click.option("--seed", default=1, show_default=True)
def round_full_updating(
    network: str, results: Path, work: Path, data: str | None, seed: int
) -> None:
    """Round what full updating gave to 8 bits a weight: a row, without training."""
    from tools.paper.eight_bits import eight_bit_rows
    from trainer.config import load_config
    from trainer.data.sources import load_source
    from trainer.folder.record import read_round_record

    run_dir = work / network / f"fu_seed{seed}"
    records = [read_round_record(folder) for folder in list_rounds(run_dir)]
    if not records:
        raise ConfigError(f"{run_dir} holds no rounds; run `reproduce run` first")
    overrides = [f"data.root={json.dumps(data)}"] if data else []
    overrides += [f"run.seed={seed}", f"run.rounds={len(records)}"]
    config = load_config(RECIPES / network / "fu.toml", overrides, name="fu")
    source = load_source(config.data)
    rows = []
    for row in eight_bit_rows(config, run_dir, records, source):
        rows.append(row)
        name = round_name(row["round"])
        say(f"{name} test {row['test']:6.2f} {row['bytes']:>8} bytes")
    about = {"method": EIGHT_BITS, "seeds": records[-1].seeds}
    about["versions"] = records[-1].versions
    write_result(results / network / f"{EIGHT_BITS}_seed{seed}.json", about, rows)


@main.command("replay", cls=Command)
@_network_option
@_results_option
@click.option("--data", help="Where the data set lies or is downloaded to.")
@click.option("--seed", default=1, show_default=True)
@click.option("--method", type=click.Choice(METHODS[1:] + VARIANTS), default="dpu_lean")
@json_option
def replay_run(
    network: str,
    results: Path,
    data: str | None,
    seed: int,
    method: str,
    as_json: bool,
) -> None:
    """Give the patches of a run to a device, and measure it beside the trainer.

    Exits with 1 where the device's weights or its accuracy are not the trainer's.
    """
    from tools.paper.replay import replay
    from trainer.config import load_config
    from trainer.data.sources import load_source

    name = f"{method}_seed{seed}"
    known = read_result(results / network / f"{name}.json")["rounds"]
    overrides = [f"data.root={json.dumps(data)}"] if data else []
    overrides += [f"run.seed={seed}", f"run.rounds={len(known)}"]
    config = load_config(RECIPES / network / f"{method}.toml", overrides, name=name)
    rows, source = [], load_source(config.data)
    with TemporaryDirectory() as work:
        for row in replay(results / network / name, config, source, Path(work)):
            rows.append(row)
            say(
                f"{name:<14} {round_name(row.round)} {row.size:>8} bytes  "
                f"{'equal' if row.equal else 'DIFFERS'}  test {row.test:6.2f} "
                f"device {row.device:6.2f}"
            )
    apart = max(abs(row.test - row.device) for row in rows)
    equal = all(row.equal for row in rows)
    sent = [row.size for row in rows if row.size]
    emit(
        {"name": name, "rounds": [asdict(row) for row in rows]},
        as_json=as_json,
        text=f"{name}: {len(sent)} patches, {sum(sent):,} bytes, weights "
        f"{'equal' if equal else 'DIFFER'}, accuracies within {apart:.3f} points",
    )
    if not equal or apart > APART:
        raise click.exceptions.Exit(1)


@main.command(cls=Command)
@_network_option
@_results_option
@click.option(
    "--rounds",
    type=click.IntRange(1),
    help="By bytes: over so many first rounds, of the runs that have them all.  "
    "[default: all rounds that a run has]",
)
@json_option
def report(network: str, results: Path, rounds: int | None, as_json: bool) -> None:
    """Print the tables, and write the plots beside the results."""
    from packager.report.document import Table, pipes
    from packager.report.frontier import frontier_chart, frontier_rows
    from packager.report.html import to_svg

    folder = results / network
    found = read_results(folder)
    if not found:
        raise ConfigError(f"{folder} holds no results; run `reproduce run` first")
    comparisons, points = compare(found), frontier(found, rounds)
    (folder / "accuracy.svg").write_text(plot(found))
    if any(point["bytes"] for point in points):
        title = "Accuracy by bytes of a round, beside full updating"
        title += f", rounds 0 to {rounds - 1}" if rounds else ""
        chart = frontier_chart(title, points, unit="points")
        (folder / "frontier.svg").write_text(to_svg(chart))
    columns = ["method", "seeds", "points", "bytes behind the first", "first", "all"]
    lines = [*table(network, comparisons), ""]
    lines += pipes(Table(columns, list(frontier_rows(points))))
    emit(
        {
            "network": network,
            "comparisons": [asdict(row) for row in comparisons],
            "frontier": points,
        },
        as_json=as_json,
        text="\n".join(lines),
    )


if __name__ == "__main__":
    main()
