# SPDX-License-Identifier: Apache-2.0
"""Every kind of task, from its recipe to a device, and its metric on both sides.

    python -m tools.tasks [--json]

trains the recipes of examples/tasks, packs every round, installs and applies it on a
device's store, and computes the recipe's metric of the test samples there, from what
ONNX Runtime answers. Ends with 1 where a device's is not the server's.
"""

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.commandline import CONTEXT, Command, emit, json_option, say
from edge_runtime.formats.model_folder import round_name
from edge_runtime.update.metrics import Metric
from tools.wheels import CHECKOUT

if TYPE_CHECKING:
    from edge_runtime import Device
    from trainer.data.samples import DataSource
    from trainer.recipe.schema import Config

RECIPES = CHECKOUT / "examples" / "tasks"
CLOSE = 1e-4  # relative; the same weights answer alike up to rounding


@dataclass(frozen=True, slots=True)
class Row:
    """What one recipe came to.

    Attributes:
        recipe: Its name.
        task: As in the contract.
        metric: Its name in the records.
        better: Which values of it are better.
        first: On test samples after round_00, on the server.
        server: After the last round.
        device: The same, from the device's answers.
        bound: What the device's trials ask of golden labels; None for nothing.
        full_bytes: Size of the weight file.
        bundle_bytes: Size of the bundle.
        patch_bytes: Sizes of the patches.
        seconds: For all of it.
    """

    recipe: str
    task: str
    metric: str
    better: str
    first: float
    server: float
    device: float
    bound: float | None
    full_bytes: int
    bundle_bytes: int
    patch_bytes: tuple[int, ...]
    seconds: float

    @property
    def equal(self) -> bool:
        """Whether the device's metric is the server's."""
        return abs(self.device - self.server) <= CLOSE * abs(self.server)


def run_task(recipe: Path, folder: Path, overrides: Sequence[str] = ()) -> Row:
    """Train a recipe, bring it to a device, and measure it there.

    Args:
        recipe: A TOML file; its functions lie beside it.
        folder: Where run and store go.
        overrides: Changes of keys, as ``dpu-train --set`` takes them.
    """
    from edge_runtime import Device
    from packager.build import pack_round
    from packager.bundles.from_round import build_bundle
    from packager.rounds.folder import read_round
    from trainer.config import load_config
    from trainer.data.sources import load_source
    from trainer.rounds.schedule import run_rounds

    start = time.monotonic()
    if str(recipe.parent) not in sys.path:
        sys.path.insert(0, str(recipe.parent))
    config = load_config(recipe, overrides)
    source = load_source(config.data)
    records = run_rounds(config, folder / "runs", source=source)
    run = folder / "runs" / config.run.name
    first, *later = (
        read_round(run / round_name(record.round))
        for record in records
        if record.outcome == "updated"
    )
    bundle = build_bundle(first)
    device, sizes = Device.install(folder / "device", bundle.data), []
    for round_ in later:
        if patch := pack_round(round_):
            device.update(patch.data)
            sizes.append(len(patch.data))
    record = records[-1]
    if device.verify() != record.target:
        raise click.ClickException(f"{recipe.stem}: the device has other weights")
    name, contract = f"test_{record.metric}", device.store.contract
    return Row(
        recipe=recipe.stem,
        task=config.data.task,
        metric=record.metric,
        better=record.better,
        first=records[0].metrics[name],
        server=record.metrics[name],
        device=measure(device, source, config),
        bound=contract.label_bound if contract.asks_for_labels else None,
        full_bytes=(run / first.name / "weights.safetensors").stat().st_size,
        bundle_bytes=len(bundle.data),
        patch_bytes=tuple(sizes),
        seconds=time.monotonic() - start,
    )


def measure(device: "Device", source: "DataSource", config: "Config") -> float:
    """Return the recipe's metric of a device's answers to the test samples."""
    import torch

    from trainer.rounds.objective import judge_of

    outputs = device.predictor().predict_all(source.test.read().numpy())
    metric, labels = judge_of(config).metric, source.test.labels
    if isinstance(metric, Metric):
        return metric.score(outputs[0], labels.numpy())
    answers: Any = tuple(map(torch.from_numpy, outputs))
    return float(metric(answers if len(answers) > 1 else answers[0], labels))


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the rows as lines of a table."""
    yield (
        f"{'recipe':<10} {'task':<15} {'metric':<17} {'round_00':>9} {'server':>9} "
        f"{'device':>9} {'bound':>7} {'full B':>7} {'patch B':>8}  equal"
    )
    for row in rows:
        arrow = "" if row.better == "higher" else " (lower)"
        patch = sum(row.patch_bytes) // max(1, len(row.patch_bytes))
        bound = "-" if row.bound is None else f"{row.bound:.3g}"
        yield (
            f"{row.recipe:<10} {row.task:<15} {row.metric + arrow:<17} "
            f"{row.first:>9.4g} {row.server:>9.4g} {row.device:>9.4g} {bound:>7} "
            f"{row.full_bytes:>7} {patch:>8}  {'yes' if row.equal else 'NO'}"
        )


@click.command(cls=Command, context_settings=CONTEXT)
@json_option
def main(*, as_json: bool) -> None:
    """Train every kind of task, and hold the device's metric against the server's."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="dpu-tasks-") as folder:
        for recipe in sorted(RECIPES.glob("*.toml")):
            say(f"{recipe.stem} ...")
            rows.append(run_task(recipe, Path(folder, recipe.stem)))
    records = [asdict(row) | {"equal": row.equal} for row in rows]
    emit({"tasks": records}, as_json=as_json, text="\n".join(table(rows)))
    if not all(row.equal for row in rows):
        say("error: a device's metric is not the server's")
        sys.exit(1)


if __name__ == "__main__":
    main()
