# SPDX-License-Identifier: Apache-2.0
"""The paper's table, row by row: train its recipes and hold them against its numbers.

    python -m tools.paper.reproduce run --work ~/repro --data ~/data  # hours
    python -m tools.paper.reproduce report  # table and plot

A recipe stands for each method in ``tools/recipes/NETWORK/``. The methods are trained
in turns, round by round, so that whatever is finished can be compared. The round
folders below ``--work`` are the state: the same command goes on after any stop. What
each round came to is kept in ``tools/results/reproduction/NETWORK/METHOD_seedN.json``,
which later runs extend.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.commandline import CONTEXT, Command, Group, emit, json_option, say
from edge_runtime.errors import ConfigError
from edge_runtime.formats.model_folder import round_name
from tools.paper.reproduction import (
    METHODS,
    PAPER,
    SMALLER,
    VARIANTS,
    compare,
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
def run(
    network: str,
    results: Path,
    work: Path,
    data: str | None,
    rounds: int,
    seed: int,
    methods: Sequence[str],
) -> None:
    """Train the rounds that are not there yet; stop and start it as you like."""
    from trainer.config import load_config
    from trainer.data.sources import load_source
    from trainer.rounds.schedule import run_rounds

    runs = work / network
    overrides = [f"data.root={json.dumps(data)}"] if data else []
    overrides.append(f"run.seed={seed}")
    source = None  # is the same for all methods
    for number in range(rounds):
        for method in methods:
            name = f"{method}_seed{seed}"
            recipe = RECIPES / network / f"{method}.toml"
            now = [*overrides, f"run.rounds={number + 1}"]
            config = load_config(recipe, now, name=name)
            source = source or load_source(config.data)
            records = run_rounds(config, runs, source=source)
            for row in _extend(results / network / f"{name}.json", records, runs):
                say(
                    f"{name:<14} round_{row['round']:02d} {row['outcome']:<9} "
                    f"val {row['val']:6.2f} test {row['test']:6.2f} "
                    f"{row['changed']:>7} changed {row['bytes']:>8} bytes"
                )


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


@main.command(cls=Command)
@_network_option
@_results_option
@json_option
def report(network: str, results: Path, as_json: bool) -> None:
    """Print the table, and write the plot beside the results."""
    folder = results / network
    found = read_results(folder)
    if not found:
        raise ConfigError(f"{folder} holds no results; run `reproduce run` first")
    comparisons = compare(found)
    (folder / "accuracy.svg").write_text(plot(found))
    emit(
        {"network": network, "comparisons": [asdict(row) for row in comparisons]},
        as_json=as_json,
        text="\n".join(table(network, comparisons)),
    )


if __name__ == "__main__":
    main()
