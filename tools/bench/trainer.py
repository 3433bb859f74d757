# SPDX-License-Identifier: Apache-2.0
"""How fast the trainer is, as ratios within one run; ``--check`` holds them to bars.

    python -m tools.bench.trainer --check

Competitors take turns and are compared by the medians of their CPU time, on one thread:
other work on the machine then changes the figures little, and the ratios less.
"""

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_runtime.commandline import CONTEXT, Command, emit, json_option, say

if TYPE_CHECKING:
    from torch import Tensor, nn

BATCH = {"mlp": 128, "vgg": 16}  # 128 images take the VGG several seconds a step
EPOCH_IMAGES = 12_800  # of MNIST's 60,000: 100 steps
RATIOS = {"mlp": 0.005, "vgg": 0.01}


@dataclass(frozen=True, slots=True)
class Figure:
    """One ratio, and the bar that it has to keep.

    Attributes:
        what: What is compared.
        ours: In ``unit``.
        theirs: Likewise.
        unit: Of both.
        ratio: ``ours / theirs``, or the inverse where a speed-up is asked for.
        bar: The limit of the ratio; None where it is only reported.
        at_most: Whether the bar is a maximum, else a minimum.
    """

    what: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    bar: float | None
    at_most: bool

    @property
    def holds(self) -> bool:
        """Whether the bar is kept."""
        if self.bar is None:
            return True
        return self.ratio <= self.bar if self.at_most else self.ratio >= self.bar


def cost(what: str, ours: float, theirs: float, unit: str, bar: float | None) -> Figure:
    """Compare what should be small: ours as a multiple of theirs."""
    return Figure(what, ours, theirs, unit, ours / theirs, bar, at_most=True)


def gain(what: str, ours: float, theirs: float, unit: str, bar: float | None) -> Figure:
    """Compare what should be large: how many times less we need."""
    return Figure(what, ours, theirs, unit, theirs / ours, bar, at_most=False)


def medians(
    rivals: Mapping[str, Callable[[], object]], turns: int, calls: int = 1
) -> dict[str, float]:
    """Return the median CPU time of one call, in ms, of rivals that take turns."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(turns + 1):
        for name, call in rivals.items():
            start = time.process_time()
            for _ in range(calls):
                call()
            if turn:  # the first one warms up
                times[name].append(1e3 * (time.process_time() - start) / calls)
    return {name: statistics.median(found) for name, found in times.items()}


def compare_steps(name: str, turns: int) -> Iterator[Figure]:
    """Compare training steps with and without the updater, on one network."""
    calls = 5 if name == "mlp" else 1
    rivals = {
        f"{phase}{' fused' if fused else ''}": make_step(name, phase, fused)
        for phase in ("plain", "full", "sparse", "free", "snapped")
        for fused in (False, True)
    }
    found = medians(rivals, turns, calls)
    step = f"{name} step, batch {BATCH[name]}"
    for fused in ("", " fused"):
        adam = f"{fused.strip() or 'default'} Adam"
        for phase, bar in (("full", 1.25), ("sparse", 1.15)):
            yield cost(
                f"{step}: {phase} phase on {adam} / default Adam",
                found[phase + fused],
                found["plain"],
                "ms",
                None if fused else bar,
            )
        for phase in ("free", "snapped"):
            yield cost(
                f"{step}: subspace, {phase} coefficients, on {adam} / the same",
                found[phase + fused],
                found["plain" + fused],
                "ms",
                1.4,
            )
    yield cost(
        f"{step}: fused / default Adam",
        found["plain fused"],
        found["plain"],
        "ms",
        None,
    )


def make_step(name: str, phase: str, fused: bool) -> Callable[[], object]:
    """Return one training step of a network, ready to be timed."""
    import torch
    from torch.nn import functional

    from trainer.method.subspace import SubspaceUpdater
    from trainer.method.updater import PartialUpdater

    model, shape = make_network(name)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3, fused=fused or None)
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(BATCH[name], *shape, generator=random)
    labels = torch.randint(10, (BATCH[name],), generator=random)

    def step() -> None:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    if phase in ("free", "snapped"):
        named = model.named_parameters()
        mover = SubspaceUpdater(named, coefficients=8192).attach(optimizer)
        step()
        if phase == "snapped":
            mover.select()
    elif phase != "plain":
        updater = PartialUpdater(model.named_parameters(), ratio=RATIOS[name])
        updater.attach(optimizer)
        step()
        if phase == "sparse":
            updater.select()
    return step


def make_network(name: str) -> "tuple[nn.Module, tuple[int, ...]]":
    """Return a network of the recipes and the shape of its input."""
    import torch

    from trainer.networks.models import build_model
    from trainer.recipe.schema import ModelConfig

    shape = (1, 28, 28) if name == "mlp" else (3, 32, 32)
    torch.manual_seed(0)
    return build_model(ModelConfig(name=name), shape, 10), shape


def compare_selection(turns: int) -> Iterator[Figure]:
    """Compare selecting 1 % of the VGG's 14 M weights, scoring included."""
    import torch

    from tools.bench.trainer_rivals import select_as_the_official_code
    from trainer.method.scores import DPU, Evidence
    from trainer.method.selection import select_top_k

    weights = {
        name: p.detach() for name, p in make_network("vgg")[0].named_parameters()
    }
    base = {name: weight for name, weight in weights.items() if weight.dim() > 1}
    random = torch.Generator().manual_seed(0)

    def noise() -> dict[str, "Tensor"]:
        return {n: torch.randn(b.shape, generator=random) for n, b in base.items()}

    moved = {name: base[name] + 0.01 * step for name, step in noise().items()}
    seen = Evidence(base, moved, {n: drop.square_() for n, drop in noise().items()})
    total = sum(weight.numel() for weight in base.values())
    k = int(RATIOS["vgg"] * total)
    rivals: dict[str, Callable[[], Mapping[str, Tensor]]] = {
        "ours": lambda: select_top_k(DPU(seen), k),
        "official": lambda: select_as_the_official_code(seen, k),
    }
    masks = {name: call() for name, call in rivals.items()}
    different = sum(int((masks["ours"][n] != masks["official"][n]).sum()) for n in base)
    del masks
    found = medians(rivals, turns)
    memory = {name: peak_memory(call) for name, call in rivals.items()}
    what = f"selection of {k} of {total} weights ({different} selected differently)"
    yield gain(f"{what}: time", found["ours"], found["official"], "ms", 5)
    what = "the same: memory beside its input"
    yield cost(what, memory["ours"], memory["official"], "MB", 0.5)


def peak_memory(call: Callable[[], object]) -> float:
    """Return by how many MB a call raises this process' resident memory (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or the call finds memory that is there already
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory_mb("VmRSS")
    call()
    return memory_mb("VmHWM") - before


def memory_mb(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(key))
    return int(line.split()[1]) / 1024


def compare_epoch(turns: int) -> Iterator[Figure]:
    """Compare an epoch of the MLP on MNIST-like images, and its data alone."""
    import torch

    from tools.bench.trainer_rivals import image_loader, plain_epoch, plain_mlp
    from trainer.data.samples import DataSource, Samples, batches
    from trainer.rounds.loop import train_epoch

    random = torch.Generator().manual_seed(0)
    shape = (EPOCH_IMAGES, 1, 28, 28)
    raw = torch.randint(256, shape, dtype=torch.uint8, generator=random)
    samples = Samples(raw, torch.randint(10, shape[:1], generator=random))
    source = DataSource(
        samples, samples, tuple("0123456789"), 1 / 255, (0.1307,), (0.3081,)
    )
    prepared, loader = source.prepared(samples), image_loader(samples, BATCH["mlp"])

    def ours() -> Iterator[tuple["Tensor", "Tensor"]]:
        return batches(prepared, BATCH["mlp"], torch.randperm(EPOCH_IMAGES))

    mine, plain = make_network("mlp")[0], plain_mlp()
    fused = torch.optim.Adam(mine.parameters(), 5e-3, fused=True)
    default = torch.optim.Adam(plain.parameters(), 5e-3)
    found = medians(
        {
            "ours": lambda: train_epoch(mine, fused, ours()),
            "theirs": lambda: plain_epoch(plain, default, loader),
            "our data": lambda: list(ours()),
            "their data": lambda: list(loader),
        },
        turns,
    )
    what = f"mlp epoch of {EPOCH_IMAGES} MNIST-like images"
    yield gain(
        f"{what}: trainer / image loader, torch's layers and default Adam",
        found["ours"],
        found["theirs"],
        "ms",
        3,
    )
    what = "the same: batches alone, no training"
    yield gain(what, found["our data"], found["their data"], "ms", None)


@click.command(cls=Command, context_settings=CONTEXT)
@click.option(
    "--turns",
    type=click.IntRange(1),
    default=9,
    show_default=True,
    help="Timed turns of each.",
)
@click.option("--check", is_flag=True, help="End with 1 when a bar is missed.")
@json_option
def main(turns: int, check: bool, as_json: bool) -> None:
    """Measure the trainer against torch's defaults and the paper's own way."""
    from trainer.rounds.loop import cpu_settings

    figures = []
    with cpu_settings(1):
        for figure in chain(
            compare_steps("mlp", 3 * turns),
            compare_steps("vgg", turns),
            compare_selection(turns),
            compare_epoch(turns),
        ):
            figures.append(figure)
            say(line_of(figure))
    missed = [figure.what for figure in figures if not figure.holds]
    record = {
        "figures": [asdict(figure) | {"holds": figure.holds} for figure in figures],
        "missed": missed,
    }
    emit(record, as_json=as_json, text="\n".join(table(figures)))
    if check and missed:
        say("missed: " + "; ".join(missed))
        sys.exit(1)


def line_of(figure: Figure) -> str:
    bar = "-"
    if figure.bar is not None:
        bar = f"{'at most' if figure.at_most else 'at least'} {figure.bar:g}"
        bar += "" if figure.holds else " (missed)"
    return (
        f"| {figure.what} | {figure.ours:.4g} {figure.unit} | {figure.theirs:.4g} "
        f"{figure.unit} | {figure.ratio:.2f} | {bar} |"
    )


def table(figures: list[Figure]) -> Iterator[str]:
    yield "| what | ours | theirs | ratio | bar |"
    yield "|---|---|---|---|---|"
    yield from map(line_of, figures)


if __name__ == "__main__":
    main()
