# SPDX-License-Identifier: Apache-2.0
"""Prove that a device will answer as the trained model does, before anything is sent.

What a model keeps outside of its state dict and changes in training was frozen into the
graph when that was exported; a weight file cannot bring it up to date.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edge_runtime.errors import ExportError
from edge_runtime.formats.contract_file import parse_contract
from edge_runtime.formats.model_folder import (
    CONTRACT_NAME,
    GOLDEN_NAME,
    GRAPH_NAME,
)
from edge_runtime.formats.weights import Weights
from edge_runtime.update.golden import read_golden
from trainer.export.graph_check import (
    OUTPUT_TOLERANCE,
    GraphSession,
    as_tuple,
    difference,
)
from trainer.export.network import network_weights
from trainer.export.tensors import changed_elements

GOLDEN_ROWS = 8  # golden inputs that every round is tried with
ALONE_TOLERANCE = 1e-3  # of max|y|; other kernels for fewer rows stay far below
DEPENDS_ON_OTHERS = (
    "what the network answers to a sample depends on the samples beside it, and "
    "devices ask for one at a time; give samples the first axis in all of the network "
    "(nn.LSTM, nn.MultiheadAttention: batch_first=True), or take the task free: "
    "devices then ask once for each file"
)


def check_deployed(model: nn.Module, weights: Weights, folder: Path) -> None:
    """Prove that a run's graph with new weights answers as the model does.

    Args:
        model: The network; left in the mode in which it was.
        weights: Its deployed tensors.
        folder: The run's ``model`` folder: graph, contract, golden inputs.

    Raises:
        ExportError: As :func:`check_answers`.
        OSError: A file cannot be read.
    """
    contract = parse_contract((folder / CONTRACT_NAME).read_bytes())
    golden = read_golden((folder / GOLDEN_NAME).read_bytes()).by_name(contract)
    for spec in contract.inputs:
        if spec.has_batch:
            golden[spec.name] = golden[spec.name][:GOLDEN_ROWS]
    feed = contract.prepare(golden)
    check_answers(
        model,
        weights,
        (folder / GRAPH_NAME).read_bytes(),
        [torch.tensor(array) for array in feed.values()],
        names=[spec.name for spec in contract.outputs],
        tolerance=contract.output_tolerance,
        random_outputs=contract.random_outputs,
    )


def check_answers(
    model: nn.Module,
    weights: Weights,
    graph: bytes,
    batch: Sequence[Tensor],
    *,
    names: Sequence[str] = (),
    tolerance: float = OUTPUT_TOLERANCE,
    random_outputs: Collection[str] = (),
) -> None:
    """Prove that a graph with new weights answers as the model does.

    Args:
        model: The network; left in the mode in which it was.
        weights: Its deployed tensors.
        graph: The bytes of ``graph.onnx``.
        batch: Its inputs.
        names: Of the outputs; by default their numbers.
        tolerance: By how much they may differ, as a share of the largest value.
        random_outputs: Names of those that are not compared.

    Raises:
        ExportError: The outputs differ by more than that, forward changes the weights,
            or ONNX Runtime refuses the graph; the message gives the cause.
    """
    found = GraphSession(graph, weights).run(batch)
    expected = answer_of(model, batch)
    after = network_weights(model)
    if after.fingerprint != weights.fingerprint:
        written = [n for n in weights if changed_elements(weights, after, n).any()]
        raise ExportError(
            f"forward changes {', '.join(map(repr, written[:3]))} in eval mode; "
            "nothing was written. Inference never changes a device's weights: change "
            "them in training mode only"
        )
    if len(names) != len(expected):
        names = [str(index) for index in range(len(expected))]
    for index, (name, value) in enumerate(zip(names, found, strict=True)):
        if name in random_outputs:
            continue
        error = difference(value, expected[index])
        if error > tolerance:
            again = answer_of(model, batch)[index]
            random = not torch.equal(again, expected[index])
            raise ExportError(
                f"output {name!r} of the device's graph with these weights differs "
                f"from the model's by {error:.2g} of its largest value, allowed are "
                f"{tolerance:g}; nothing was written. "
                + (_random(name) if random else _stale(model))
            )


def _random(name: str) -> str:
    return (
        "The model gives another answer to the same input each time: take the random "
        "numbers (or the state that each call changes) out of eval mode, or declare "
        f"random_outputs=({name!r},) in the contract, and start a new run"
    )


def _stale(model: nn.Module) -> str:
    suspects = list(_outside(model))
    names = f" (it has {', '.join(map(repr, suspects[:5]))})" if suspects else ""
    return (
        f"The model keeps something outside of its state dict{names} that training "
        "changes, or that is another in each build: make it a parameter or a "
        "persistent buffer (register_buffer), and start a new run"
    )


def _outside(model: nn.Module) -> Iterator[str]:
    """Yield names of tensors that modules hold and the state dict does not."""
    known = model.state_dict().keys()
    yield from (name for name, _ in model.named_buffers() if name not in known)
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers") and _has_tensors(value):
                yield f"{path}.{name}".strip(".")


def _has_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    values = value if isinstance(value, list | tuple) else [value]
    return any(
        isinstance(item, Tensor) and not isinstance(item, nn.Parameter)
        for item in values
    )


@torch.no_grad()
def answer_of(model: nn.Module, batch: Sequence[Tensor]) -> list[Tensor]:
    """Return what the model answers in eval mode; every module keeps its mode."""
    modes = {module: module.training for module in model.modules()}
    first = next(iter(model.parameters()), None)
    device = torch.device("cpu") if first is None else first.device
    model.eval()
    try:
        with _exact(device):
            answer = model(*(x.to(device) for x in batch))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return [x.cpu() for x in as_tuple(answer, "what forward returns")]


def depends_on_others(
    model: nn.Module,
    batch: Sequence[Tensor],
    has_rows: Sequence[bool] = (True,),
    tolerance: float = ALONE_TOLERANCE,
) -> bool:
    """Return whether the first answer to a sample changes with the samples beside it.

    Args:
        model: The network; left in the mode in which it was.
        batch: Its inputs, of a few samples.
        has_rows: Of each, whether its first axis has the samples.
        tolerance: By how much it may, as a share of the largest value.
    """
    whole = answer_of(model, batch)[0]
    inputs = [*zip(batch, has_rows, strict=True)]
    if any(whole.shape[:1] != x.shape[:1] for x, rows in inputs if rows):
        return False  # no row for each sample, which is told where that matters
    alone = []
    for n in range(len(whole) if any(has_rows) else 0):
        sample = [x[n : n + 1] if rows else x for x, rows in inputs]
        alone.append(answer_of(model, sample)[0])
    if not alone or any(found.shape != whole[:1].shape for found in alone):
        return False
    error = difference(torch.cat(alone).double().numpy(), whole)
    # What draws random numbers is told by its own name.
    return error > tolerance and torch.equal(answer_of(model, batch)[0], whole)


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Compute in the model's own types, as a device does: no TF32, no autocast."""
    cudnn = torch.backends.cudnn
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.autocast(device.type, enabled=False),
            cudnn.flags(
                enabled=cudnn.enabled,
                benchmark=cudnn.benchmark,
                deterministic=cudnn.deterministic,
                allow_tf32=False,
            ),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
