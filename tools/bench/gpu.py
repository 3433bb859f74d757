# SPDX-License-Identifier: Apache-2.0
"""What a GPU gives: masks equal to the CPU's, the cost of the updater, rounds of VGG.

    python -m tools.bench.gpu --results OUT --work WORK --data DATA --minutes 8 --check

One command for a machine that is lent for minutes. First it selects from the same
scores on both, weight for weight; then it times steps with and without the updater;
what time is left trains the paper's VGG row, which goes on from its results next time.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.commandline import CONTEXT, Command, emit, json_option, say
from edge_runtime.formats.model_folder import round_name
from tools.bench.trainer import Figure, cost, line_of, table
from trainer.recipe.schema import TrainConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

# What the paper trains, with its classes and its share of weights.
NETWORKS = {"mlp": (10, 0.005), "vgg": (10, 0.01), "resnet56": (100, 0.01)}
FORMS: Mapping[str, Mapping[str, Any]] = {
    "float32": {},
    "tf32, channels last": {"precision": "tf32", "channels_last": True},
    "bf16, channels last": {"precision": "bf16", "channels_last": True},
    "bf16, channels last, compiled": {
        "precision": "bf16",
        "channels_last": True,
        "compile": True,
    },
}
BATCH, STEPS, TURNS = 128, 20, 5
BARS = {"full": 1.25, "sparse": 1.15}


class Network:
    """A network of the paper on a device, with one batch of noise to train on."""

    def __init__(self, name: str, device: "torch.device", config: TrainConfig) -> None:
        """Build it; the same values for each device and form."""
        import torch

        from trainer.networks.models import build_model
        from trainer.recipe.schema import ModelConfig
        from trainer.rounds.loop import make_optimizer
        from trainer.rounds.speed import arranged, autocast, compiled

        classes, self.ratio = NETWORKS[name]
        shape = (1, 28, 28) if name == "mlp" else (3, 32, 32)
        torch.manual_seed(0)
        model = build_model(ModelConfig(name=name), shape, classes)
        random = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(BATCH, *shape, generator=random).to(device)
        self.labels = torch.randint(classes, (BATCH,), generator=random).to(device)
        self.model: nn.Module = arranged(model.to(device), config)
        self.optimizer = make_optimizer(self.model, config)
        self._forward = compiled(self.model, config)
        self._autocast = autocast(config, device)

    def train(self, steps: int) -> None:
        """Take some steps on the one batch."""
        from trainer.rounds.loop import train_epoch

        batch = (self.inputs, self.labels)
        train_epoch(
            self._forward, self.optimizer, [batch] * steps, autocast=self._autocast
        )


def compare_masks(name: str, device: "torch.device") -> Iterator[Figure]:
    """Select on the device and on the CPU from the scores that training gave there."""
    import torch

    from trainer.method.scores import DPU, Evidence
    from trainer.method.selection import select_top_k
    from trainer.method.updater import PartialUpdater
    from trainer.rounds.speed import computing

    config = TrainConfig(epochs=1)
    with computing(config, device):
        network = Network(name, device, config)
        named = dict(network.model.named_parameters())
        updater = PartialUpdater(named.items(), ratio=network.ratio)
        updater.attach(network.optimizer)
        network.train(STEPS)
    current = {n: named[n].detach() for n in updater.base}
    scores = DPU(Evidence(updater.base, current, updater.loss_drop))
    k = int(network.ratio * sum(score.numel() for score in scores.values()))
    # Rounded, many scores are equal: the rule for ties decides.
    coarse = {n: s.to(torch.bfloat16).float() for n, s in scores.items()}
    for what, given in (("scores", scores), ("scores with many ties", coarse)):
        there = select_top_k(given, k)
        here = select_top_k({n: s.cpu() for n, s in given.items()}, k)
        apart = sum(int((there[n].cpu() != here[n]).sum()) for n in here)
        yield Figure(
            f"{name}: {k} of the best {what}, selected on {device.type} otherwise",
            *(apart, k, "weights", apart / k, 0.0, True),
        )


def compare_steps(name: str, device: "torch.device", form: str) -> Iterator[Figure]:
    """Time steps with and without the updater, in turns."""
    from trainer.method.updater import PartialUpdater
    from trainer.rounds.speed import computing

    config = TrainConfig(epochs=1, **FORMS[form])
    with computing(config, device):
        rivals: dict[str, Callable[[], None]] = {}
        for phase in ("plain", *BARS):
            network = Network(name, device, config)
            if phase != "plain":
                named = network.model.named_parameters()
                updater = PartialUpdater(named, ratio=network.ratio)
                updater.attach(network.optimizer)
            network.train(STEPS)  # compiles, and finds the fastest algorithms
            if phase == "sparse":
                updater.select()
            rivals[phase] = partial(network.train, STEPS)
        times = _medians(rivals, device)
    for phase, bar in BARS.items():
        yield cost(
            f"{name} step of {BATCH}, {form}: {phase} phase / without the updater",
            *(times[phase], times["plain"], "ms"),
            bar if form == "float32" else None,
        )


def _medians(
    rivals: Mapping[str, Callable[[], None]], device: "torch.device"
) -> dict[str, float]:
    """Return the median time of a step in ms; rivals take turns."""
    found: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(TURNS):
        for name, call in rivals.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            found[name].append(1e3 * (time.perf_counter() - start) / STEPS)
    return {name: statistics.median(times) for name, times in found.items()}


def _wait(device: "torch.device") -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def figures(
    names: tuple[str, ...], device: "torch.device", forms: tuple[str, ...]
) -> Iterator[Figure]:
    """Yield what is compared, the proofs first."""
    for name in names:
        yield from compare_masks(name, device)
    for name in names:
        for form in forms:
            yield from compare_steps(name, device, form)


def train_vgg(
    results: Path, work: Path, data: str, end: float, changes: list[str]
) -> int:
    """Train rounds of the VGG row until the time is over, and return how many."""
    from tools.paper.reproduce import train_rows

    changes = [f'data.root="{data}"', *changes]
    rounds, slowest = 0, 0.0
    last = time.monotonic()
    for method, number in train_rows(
        "cifar10_vgg",
        ("fu", "dpu"),
        seed=1,
        rounds=60,
        folders=(results, work),
        changes=changes,
    ):
        now = time.monotonic()
        # The next round has more samples than any before it.
        rounds, slowest, last = rounds + 1, max(slowest, now - last), now
        say(f"{method} {round_name(number)}, {end - now:.0f} s left")
        if now + 1.1 * slowest > end:
            break
    return rounds


@click.command(cls=Command, context_settings=CONTEXT)
@click.option("--results", type=click.Path(path_type=Path), help="Of the VGG row.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder of the runs.")
@click.option("--data", help="Where CIFAR-10 lies; without it no rounds are trained.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE")
@click.option("--minutes", default=8.0, show_default=True, help="For all of it.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda")
@click.option(
    "--network",
    "names",
    type=click.Choice([*NETWORKS]),
    multiple=True,
    default=NETWORKS,
)
@click.option(
    "--form", "forms", type=click.Choice([*FORMS]), multiple=True, default=FORMS
)
@click.option("--check", is_flag=True, help="End with 1 when a bar is missed.")
@json_option
def main(  # noqa: PLR0913 - one argument for each option
    results: Path | None,
    work: Path | None,
    data: str | None,
    changes: tuple[str, ...],
    minutes: float,
    device: str,
    names: tuple[str, ...],
    forms: tuple[str, ...],
    check: bool,
    as_json: bool,
) -> None:
    """Prove, time and train on a GPU, within some minutes."""
    from trainer.rounds.loop import choose_device

    end = time.monotonic() + 60 * minutes
    where, found = choose_device(device), []
    for figure in figures(names, where, forms):
        found.append(figure)
        say(line_of(figure))
    rounds = 0
    if results and work and data:
        rounds = train_vgg(results, work, data, end, list(changes))
    else:
        say("no rounds of the VGG: they need --results, --work and --data")
    missed = [figure.what for figure in found if not figure.holds]
    record = {
        "device": _name(where),
        "figures": [asdict(figure) | {"holds": figure.holds} for figure in found],
        "rounds": rounds,
        "missed": missed,
    }
    emit(record, as_json=as_json, text="\n".join([_name(where), "", *table(found)]))
    if check and missed:
        say("missed: " + "; ".join(missed))
        sys.exit(1)


def _name(device: "torch.device") -> str:
    import torch

    return torch.cuda.get_device_name() if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    main()
