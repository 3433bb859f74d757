# SPDX-License-Identifier: Apache-2.0
"""What int8 on the device brings: bytes, time of a call, and what answers lose.

``python -m tools.bench.int8`` trains networks for a moment on made-up classes (a
pattern each, under noise), quantises each, and measures both forms in turn in one
process: weight files, the CPU time of a call of one sample on one thread, how far
outputs differ, and how many answers are the same. With ``--check`` it holds the bars
that :data:`CASES` states; accuracy on real data is the trainer's to show.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import torch
from torch import nn

from edge_runtime.commandline import CONTEXT, Command, emit, json_option, say
from edge_runtime.formats.contract import COARSE_TOLERANCE
from edge_runtime.formats.model_folder import GRAPH_NAME, WEIGHTS_NAME
from edge_runtime.formats.weights import Weights, pack_weights, write_weights
from edge_runtime.inference.bench import MIN_CALLS
from edge_runtime.inference.session import Backend, RunOptions, make_session
from edge_runtime.update.golden import relative_difference
from tools.ending import end
from trainer.data.vision import torchvision
from trainer.export.graph import export_graph
from trainer.export.int8_graph import quantised_graph
from trainer.export.tensors import weights_of
from trainer.networks.models import MODELS

SIZE = 0.26  # of float32's file; BatchNorm's four values a channel stay float32
TIME = 0.7  # of float32's call
ATTEMPTS = 3  # other processes on the machine can only make a figure worse
SAMPLES = 32  # to calibrate with, and others to compare answers on
CLASSES, BATCH = 10, 8


@dataclass(frozen=True, slots=True)
class Case:
    """A network, and what is held of it; None is measured only.

    Attributes:
        name: For tables.
        model: One of ours, or of torchvision's.
        shape: Of one input.
        options: Of the model.
        steps: Of training.
        size: The most bytes, as a share of float32's.
        time: The longest call, as a share of float32's.
        differs: The largest difference of outputs, as a share of the largest.
    """

    name: str
    model: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 8
    size: float | None = SIZE
    time: float | None = TIME
    differs: float | None = 3 * COARSE_TOLERANCE

    def build(self) -> nn.Module:
        """Return the network, trained for a moment."""
        torch.manual_seed(0)
        torch.set_num_threads(1)
        if self.model in MODELS:
            network = MODELS[self.model](self.shape, CLASSES, **self.options)
        else:
            network = torchvision.models.get_model(self.model, num_classes=CLASSES)
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = None  # all batches count alike
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        for step in range(self.steps):
            x, labels = map(torch.from_numpy, self.samples(BATCH, 100 + step))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(x), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return network.eval()

    def samples(self, count: int, seed: int) -> tuple[Any, Any]:
        """Return inputs and labels."""
        pattern = np.random.default_rng(0).standard_normal((CLASSES, *self.shape))
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, CLASSES, count)
        x = pattern[labels] + 2 * rng.standard_normal((count, *self.shape))
        return x.astype(np.float32), labels


CASES = (
    Case("mlp 784-512-512-10", "mlp", (1, 28, 28)),
    Case("vgg, 1/4 wide, 16x16", "vgg", (3, 16, 16), {"width": 32}),
    Case("vgg, 32x32", "vgg", (3, 32, 32), steps=3),
    Case("resnet20, 32x32", "resnet20", (3, 32, 32), size=None),
    Case(
        "mobilenet_v2, 224x224",
        "mobilenet_v2",
        (3, 224, 224),
        steps=2,
        size=None,
        differs=None,
    ),
    Case("small_cnn, 8x8", "small_cnn", (1, 8, 8), size=None, time=None),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One case: bytes and seconds in float32 and in int8, and how outputs differ.

    Attributes:
        case: Its name.
        weights: Bytes of the weight files.
        graphs: Bytes of the graphs.
        seconds: CPU time of a call, the median.
        difference: Largest one of outputs, as a share of the largest output.
        same: Share of samples for which the largest output is the same one.
    """

    case: str
    weights: tuple[int, int]
    graphs: tuple[int, int]
    seconds: tuple[float, float]
    difference: float
    same: float

    @property
    def size_ratio(self) -> float:
        """int8 beside float32."""
        return self.weights[1] / self.weights[0]

    @property
    def time_ratio(self) -> float:
        """int8 beside float32."""
        return self.seconds[1] / self.seconds[0]

    def problems(self, case: Case) -> Iterator[str]:
        """Yield what is not as promised."""
        if case.size and self.size_ratio > case.size:
            yield f"{case.name}: {self.size_ratio:.4f} of the bytes, over {case.size}"
        if case.time and self.time_ratio > case.time:
            yield f"{case.name}: {self.time_ratio:.2f} of the time, over {case.time}"
        if case.differs and not self.difference <= case.differs:
            yield f"{case.name}: outputs differ by {self.difference:.3f}"


def on_grid(weights: Weights) -> tuple[dict[str, Any], Weights, Weights]:
    """Return scales with twofold headroom, and weights as int8 and as float32."""
    scales, whole, wide = {}, dict(weights), dict(weights)
    for name, array in weights.items():
        if array.ndim > 1:
            reach = 2 * np.abs(array).reshape(len(array), -1).max(axis=1)
            scales[name] = (reach / 127).astype(np.float32)
            rows = scales[name].reshape(-1, *[1] * (array.ndim - 1))
            whole[name] = np.rint(array / rows).astype(np.int8)
            wide[name] = whole[name] * rows
    return scales, pack_weights(whole), pack_weights(wide)


def measure(case: Case, seconds: float, folder: Path) -> Row:
    """Make both forms of a network in a folder, and measure them."""
    network = case.build()
    plain = export_graph(network, torch.from_numpy(case.samples(2, 0)[0]))
    scales, whole, wide = on_grid(weights_of(network))
    inputs = {"input": case.samples(SAMPLES, 1)[0]}
    graph = quantised_graph(
        onnx.load_model_from_string(plain), wide, scales, inputs
    ).SerializeToString()
    sessions = []
    forms = {"float32": (plain, weights_of(network)), "int8": (graph, whole)}
    for name, (data, weights) in forms.items():
        (folder / name).mkdir()
        (folder / name / GRAPH_NAME).write_bytes(data)
        write_weights(weights, folder / name / WEIGHTS_NAME)
        options = RunOptions(threads=1)
        sessions.append(make_session(folder / name, Backend.ONNXRUNTIME, options))
    one = {"input": case.samples(1, 2)[0]}
    times = _cpu_seconds(
        (lambda: sessions[0].run(None, one), lambda: sessions[1].run(None, one)),
        seconds,
    )
    asked = {"input": case.samples(SAMPLES, 3)[0]}
    wanted, found = (session.run(None, asked)[0] for session in sessions)
    return Row(
        case.name,
        (len(weights_of(network).data), len(whole.data)),
        (len(plain), len(graph)),
        times,
        relative_difference(found, wanted),
        float((found.argmax(axis=1) == wanted.argmax(axis=1)).mean()),
    )


def _cpu_seconds(
    calls: tuple[Callable[[], Any], Callable[[], Any]], seconds: float
) -> tuple[float, float]:
    """Return the median CPU time of each, called in turn: others' work counts less."""
    times: tuple[list[float], list[float]] = ([], [])
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times[0]) < MIN_CALLS:
        for call, found in zip(calls, times, strict=True):
            start = time.process_time()
            call()
            found.append(time.process_time() - start)
    first, second = map(float, map(np.median, times))
    return first, second


@click.command(cls=Command, context_settings=CONTEXT)
@click.option("--seconds", default=3.0, show_default=True, help="For each network.")
@click.option("--check", is_flag=True, help="End with 1 if a bar is not reached.")
@json_option
def main(seconds: float, *, check: bool, as_json: bool) -> None:
    """Measure networks in int8 beside float32."""
    rows, problems = [], []
    for case in CASES:
        for _ in range(ATTEMPTS if check else 1):
            say(f"measuring {case.name}")
            with tempfile.TemporaryDirectory() as folder:
                row = measure(case, seconds, Path(folder))
            found = list(row.problems(case))
            if not found:
                break
        rows.append(row)
        problems += found
    record = {"rows": [asdict(row) for row in rows], "problems": problems}
    emit(record, as_json=as_json, text="\n".join(table(rows)))
    end(problems, check=check)


def table(rows: list[Row]) -> Iterator[str]:
    """Yield the rows as lines of Markdown."""
    yield (
        "| network | weights, float32 kB | int8 | of it | graph kB, float32 | int8 "
        "| a call, float32 ms | int8 | of it | outputs differ | same answer |"
    )
    yield "|" + "---|" * 11
    for row in rows:
        kb = [f"{n / 1000:.1f}" for n in (*row.weights, *row.graphs)]
        ms = [f"{1e3 * s:.3f}" for s in row.seconds]
        yield (
            f"| {row.case} | {kb[0]} | {kb[1]} | {row.size_ratio:.4f} "
            f"| {kb[2]} | {kb[3]} | {ms[0]} | {ms[1]} | {row.time_ratio:.2f} "
            f"| {row.difference:.1%} | {row.same:.0%} |"
        )


if __name__ == "__main__":
    main()
