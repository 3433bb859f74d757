# SPDX-License-Identifier: Apache-2.0
"""What prediction costs: this runtime beside ONNX Runtime alone, and NumPy beside both.

``python -m tools.bench.infer`` exports every built-in network, measures each in a
process of its own (without torch), and with ``--check`` holds three promises: a call
costs at most 20 microseconds more than ONNX Runtime's own ``run``; at most 2 % more on
networks of 5 ms or longer; and NumPy gives the same outputs within the contract's
tolerance.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from edge_runtime.commandline import CONTEXT, Command, emit, json_option, say
from edge_runtime.formats.contract import Contract, InputSpec
from edge_runtime.formats.model_folder import GRAPH_NAME, WEIGHTS_NAME
from edge_runtime.inference.bench import bench
from edge_runtime.inference.predictor import Predictor
from edge_runtime.inference.session import Backend, RunOptions
from edge_runtime.update.golden import relative_difference
from tools.ending import end

OVERHEAD_S = 20e-6  # a call, on networks shorter than ...
LONG_S = 5e-3
RATIO = 1.02  # ... and on all others
TOLERANCE = 1e-4
ATTEMPTS = 3  # other processes on the machine can only make a figure worse


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured: a network, samples a call, and whether inputs are images."""

    model: str
    shape: tuple[int, ...]
    batch: int = 1
    images: bool = False

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.model}, {self.batch} {'image' if self.images else 'sample'}(s)"

    def contract(self) -> Contract:
        """Values as they are, or 8-bit images that are scaled and normalised."""
        spec = InputSpec("input", "float32", (None, *self.shape))
        if self.images:
            mean, std = (0.5,) * self.shape[0], (0.25,) * self.shape[0]
            spec = replace(spec, scale=1 / 255, mean=mean, std=std)
        return Contract((spec,))

    def inputs(self) -> Any:
        """Raw values of one call."""
        rng = np.random.default_rng(0)
        shape = (self.batch, *self.shape)
        if self.images:
            return rng.integers(0, 256, shape, dtype=np.uint8)
        return rng.standard_normal(shape, dtype=np.float32)


CASES = (
    Case("mlp", (1, 28, 28)),
    Case("small_cnn", (1, 8, 8)),
    Case("small_cnn", (1, 8, 8), images=True),
    Case("resnet56", (3, 32, 32)),
    Case("vgg", (3, 32, 32)),
    Case("vgg", (3, 32, 32), images=True),
    Case("vgg", (3, 32, 32), batch=4),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One case: ours and raw from :func:`bench`, NumPy's, and how far they differ."""

    case: str
    onnxruntime: dict[str, Any]
    numpy: dict[str, Any]
    difference: float

    def problems(self) -> Iterator[str]:
        """Yield what is not as promised."""
        raw = self.onnxruntime["raw"]
        if raw["latency_s"]["p50"] >= LONG_S:
            if raw["ratio"] > RATIO:
                yield f"{self.case}: {raw['ratio']:.3f}x, allowed is {RATIO}x"
        elif raw["overhead_s"] > OVERHEAD_S:
            yield f"{self.case}: {raw['overhead_s'] * 1e6:.1f} us more, allowed are 20"
        if not self.difference <= TOLERANCE:
            yield f"{self.case}: NumPy's outputs differ by {self.difference:.1e}"


def measure(folder: Path, case: Case, seconds: float) -> Row:
    """Measure one case, in this process."""
    contract, inputs = case.contract(), case.inputs()
    ours = RunOptions(backend=Backend.ONNXRUNTIME)
    numpy = RunOptions(backend=Backend.NUMPY)
    return Row(
        case.name,
        bench(folder, contract, inputs, ours, seconds=seconds),
        bench(folder, contract, inputs, numpy, seconds=seconds),
        relative_difference(
            Predictor(folder, contract, numpy).predict(inputs),
            Predictor(folder, contract, ours).predict(inputs),
        ),
    )


def write_slot(folder: Path, case: Case) -> None:
    """Export a built-in network with random weights."""
    import torch

    from edge_runtime.formats.weights import write_weights
    from trainer.export.graph import export_graph
    from trainer.export.tensors import weights_of
    from trainer.networks.models import MODELS

    torch.manual_seed(0)
    network = MODELS[case.model](case.shape, 10)
    folder.mkdir()
    graph = export_graph(network, torch.zeros(1, *case.shape))
    (folder / GRAPH_NAME).write_bytes(graph)
    write_weights(weights_of(network), folder / WEIGHTS_NAME)


@click.command(cls=Command, context_settings=CONTEXT)
@click.option("--seconds", default=3.0, show_default=True, help="For each figure.")
@click.option("--check", is_flag=True, help="End with 1 if a promise is broken.")
@click.option("--child", nargs=2, hidden=True, help="Measure one case here.")
@json_option
def main(
    seconds: float, *, check: bool, child: tuple[str, str] | None, as_json: bool
) -> None:
    """Measure every built-in network with both backends."""
    if child:
        row = measure(Path(child[0]), CASES[int(child[1])], seconds)
        print(json.dumps(asdict(row)))
        return
    with tempfile.TemporaryDirectory() as root:
        rows = [
            _row(Path(root), number, seconds, ATTEMPTS if check else 1)
            for number in range(len(CASES))
        ]
    problems = [problem for row in rows for problem in row.problems()]
    record = {"rows": [asdict(row) for row in rows], "problems": problems}
    emit(record, as_json=as_json, text="\n".join(table(rows)))
    end(problems, check=check)


def _row(root: Path, number: int, seconds: float, attempts: int) -> Row:
    case = CASES[number]
    folder = root / case.model
    if not folder.exists():
        say(f"exporting {case.model}")
        write_slot(folder, case)
    command = [sys.executable, "-m", "tools.bench.infer", "--child", str(folder)]
    command += [str(number), "--seconds", str(seconds)]
    for _ in range(attempts):
        say(f"measuring {case.name}")
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        row = Row(**json.loads(done.stdout))
        if not list(row.problems()):
            break
    return row


def table(rows: list[Row]) -> Iterator[str]:
    """Yield the rows as lines of Markdown."""
    yield (
        "| network, call | load s | p50 ms | p90 | p99 | samples/s | peak MB "
        "| ONNX Runtime alone, p50 ms | ours beside it | NumPy p50 ms | NumPy load s "
        "| outputs differ |"
    )
    yield "|" + "---|" * 12
    for row in rows:
        ours, numpy = row.onnxruntime, row.numpy
        times = [f"{1e3 * seconds:.3f}" for seconds in ours["latency_s"].values()]
        raw = ours["raw"]
        yield (
            f"| {row.case} | {ours['load_s']:.3f} | {' | '.join(times)} "
            f"| {ours['samples_per_s']:.0f} | {ours['memory_bytes'] / 1e6:.0f} "
            f"| {1e3 * raw['latency_s']['p50']:.3f} "
            f"| {1e6 * raw['overhead_s']:+.1f} us, {raw['ratio']:.3f}x "
            f"| {1e3 * numpy['latency_s']['p50']:.3f} | {numpy['load_s']:.3f} "
            f"| {row.difference:.0e} |"
        )


if __name__ == "__main__":
    main()
