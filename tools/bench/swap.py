# SPDX-License-Identifier: Apache-2.0
"""What a swap costs: callers in several threads while the weights change under them.

``python -m tools.bench.swap`` makes three versions of a network and lets callers ask
without a pause while a :class:`Predictor` swaps between them 100 times. Every answer
must be, bit for bit, that of one of the versions. Each policy runs in a process of its
own, without torch, so that the memory figures are a device's.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from edge_runtime.commandline import CONTEXT, Command, emit, json_option, say
from edge_runtime.errors import DpuError
from edge_runtime.formats.contract import Contract, InputSpec
from edge_runtime.formats.model_folder import GRAPH_NAME, WEIGHTS_NAME
from edge_runtime.inference.bench import peak_memory
from edge_runtime.inference.predictor import Predictor
from edge_runtime.inference.session import RunOptions, SwapPolicy
from tools.ending import end

VERSIONS = 3
SHAPE = (1, 3, 32, 32)
CONTRACT = Contract((InputSpec("input", "float32", (None, *SHAPE[1:])),))
POLICIES = (SwapPolicy.AVAILABILITY, SwapPolicy.FRUGAL)


@dataclass
class Caller:
    """Asks without a pause and remembers what came back."""

    predictor: Predictor
    inputs: np.ndarray
    expected: list[bytes]
    stop: threading.Event
    times: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    mixed: int = 0

    def run(self) -> None:
        """Call until told to stop."""
        while not self.stop.is_set():
            start = time.perf_counter()
            try:
                answer = self.predictor.predict(self.inputs)
            except DpuError as err:
                self.failed.append(str(err))
            else:
                self.mixed += answer.tobytes() not in self.expected
            self.times.append(time.perf_counter() - start)


@dataclass(frozen=True, slots=True)
class Row:
    """One policy.

    Attributes:
        policy: Which.
        swaps: How often the weights changed.
        calls: Answered while they did.
        failed: Calls that raised.
        mixed: Answers of no single version.
        call_ms: Median time of a call with no swap going on.
        longest_ms: The longest call while swapping.
        swap_ms: Median time of a swap.
        memory_mb: Resident after the first two swaps, at the end, and at the highest.
    """

    policy: str
    swaps: int
    calls: int
    failed: int
    mixed: int
    call_ms: float
    longest_ms: float
    swap_ms: float
    memory_mb: tuple[float, float, float]

    def problems(self) -> list[str]:
        """Return what is not as promised."""
        first, last, _ = self.memory_mb
        found = {
            f"{self.failed} calls failed": self.failed > 0,
            f"{self.mixed} answers were of no single version": self.mixed > 0,
            f"memory went from {first:.0f} to {last:.0f} MB": last > 1.1 * first + 8,
        }
        return [f"{self.policy}: {what}" for what, wrong in found.items() if wrong]


def measure(folder: Path, policy: str, swaps: int, callers: int) -> Row:
    """Swap under load, in this process."""
    slots = [folder / str(number) for number in range(VERSIONS)]
    inputs = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)
    options = RunOptions(policy=SwapPolicy(policy))
    predictor = Predictor(slots[0], CONTRACT, options)
    expected = []
    for slot in (*slots[1:], slots[0]):
        predictor.swap(slot)
        expected.append(predictor.predict(inputs).tobytes())
    if len(set(expected)) != VERSIONS:
        raise SystemExit("the versions do not differ in their answers")
    before = resident()
    quiet = _load(predictor, inputs, expected, callers, lambda: time.sleep(2))
    took: list[float] = []

    def swap() -> None:
        for number in range(swaps):
            start = time.perf_counter()
            predictor.swap(slots[(number + 1) % VERSIONS])
            took.append(time.perf_counter() - start)

    busy = _load(predictor, inputs, expected, callers, swap)
    predictor.swap(slots[0])
    times = [t for caller in busy for t in caller.times]
    return Row(
        policy=policy,
        swaps=swaps,
        calls=len(times),
        failed=sum(len(caller.failed) for caller in busy),
        mixed=sum(caller.mixed for caller in busy),
        call_ms=1e3 * float(np.median([t for c in quiet for t in c.times])),
        longest_ms=1e3 * max(times),
        swap_ms=1e3 * float(np.median(took)),
        memory_mb=(before / 1e6, resident() / 1e6, peak_memory() / 1e6),
    )


def _load(
    predictor: Predictor, inputs: Any, expected: list[bytes], count: int, meanwhile: Any
) -> list[Caller]:
    stop = threading.Event()
    callers = [Caller(predictor, inputs, expected, stop) for _ in range(count)]
    threads = [threading.Thread(target=caller.run) for caller in callers]
    for thread in threads:
        thread.start()
    try:
        meanwhile()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    return callers


def resident() -> int:
    """Return the memory that this process holds now, in bytes (``VmRSS``)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def make_versions(folder: Path, model: str) -> int:
    """Write the slots of a network that differ in every weight; return their size."""
    import torch

    from edge_runtime.formats.weights import write_weights
    from trainer.export.graph import export_graph
    from trainer.export.tensors import weights_of
    from trainer.networks.models import build_model
    from trainer.recipe.schema import ModelConfig

    config = ModelConfig(name=model)
    graph = export_graph(build_model(config, SHAPE[1:], 10), torch.zeros(SHAPE))
    for number in range(VERSIONS):
        torch.manual_seed(number)
        network = build_model(config, SHAPE[1:], 10)
        slot = folder / str(number)
        slot.mkdir()
        (slot / GRAPH_NAME).write_bytes(graph)
        write_weights(weights_of(network), slot / WEIGHTS_NAME)
    return (slot / WEIGHTS_NAME).stat().st_size


@click.command(cls=Command, context_settings=CONTEXT)
@click.option("--model", default="vgg", show_default=True, help="A built-in network.")
@click.option("--swaps", type=click.IntRange(1), default=100, show_default=True)
@click.option(
    "--callers",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Threads that call.",
)
@click.option("--check", is_flag=True, help="End with 1 if a promise is broken.")
@click.option("--child", nargs=2, hidden=True, help="Measure one policy here.")
@json_option
def main(
    model: str,
    swaps: int,
    callers: int,
    *,
    check: bool,
    child: tuple[str, str] | None,
    as_json: bool,
) -> None:
    """Swap weights under load and see what callers notice."""
    if child:
        print(json.dumps(asdict(measure(Path(child[0]), child[1], swaps, callers))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        say(f"exporting {model}")
        size = make_versions(Path(folder), model)
        for policy in POLICIES:
            say(f"{swaps} swaps, {policy}")
            command = [sys.executable, "-m", "tools.bench.swap", "--child", folder]
            command += [policy, "--swaps", str(swaps), "--callers", str(callers)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            rows.append(Row(**json.loads(done.stdout)))
    problems = [problem for row in rows for problem in row.problems()]
    emit(
        {"model": model, "weights_bytes": size, "callers": callers}
        | {"policies": [asdict(row) for row in rows], "problems": problems},
        as_json=as_json,
        text="\n".join(table(rows, model, size, callers)),
    )
    end(problems, check=check)


def table(rows: list[Row], model: str, size: int, callers: int) -> list[str]:
    """Return the rows as Markdown."""
    return [
        f"{model}, {size / 1e6:.1f} MB of weights, {callers} calling threads",
        "",
        "| policy | swaps | calls | failed | mixed | call ms | longest ms | swap ms "
        "| memory MB: start, end, highest |",
        "|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {r.policy} | {r.swaps} | {r.calls} | {r.failed} | {r.mixed} "
            f"| {r.call_ms:.1f} | {r.longest_ms:.0f} | {r.swap_ms:.0f} | "
            + ", ".join(f"{mb:.0f}" for mb in r.memory_mb)
            + " |"
            for r in rows
        ),
    ]


if __name__ == "__main__":
    main()
