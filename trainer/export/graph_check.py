# SPDX-License-Identifier: Apache-2.0
"""Prove that a finished graph runs from the weight file and gives torch's outputs."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_runtime.errors import ExportError
from edge_runtime.formats.contract import parse_contract
from edge_runtime.formats.layout import Layout
from edge_runtime.formats.model_folder import (
    CONTRACT_NAME,
    GOLDEN_NAME,
    GRAPH_NAME,
    WEIGHTS_NAME,
)
from edge_runtime.formats.weights import Weights, write_weights
from edge_runtime.update.golden import read_golden
from trainer.export.tensors import TYPES, deployed_tensors, layout_of, weights_of

GOLDEN_ROWS = 8  # golden inputs that every round is tried with
OUTPUT_TOLERANCE = 1e-4  # of max|y|; the same weights differ by up to 1e-6


def check_graph(
    graph: bytes, model: nn.Module, example: Tensor | tuple[Tensor, ...]
) -> None:
    """Prove that a graph runs from the model's weight file and gives its outputs.

    Args:
        graph: The bytes of ``graph.onnx``.
        model: On the CPU and in eval mode.
        example: As for :func:`export_graph`.

    Raises:
        ExportError: A deployed tensor is not an initializer of the graph, ONNX
            Runtime refuses the graph, or its outputs differ from torch's.
    """
    _check_initializers(graph, deployed_tensors(model), layout_of(model))
    inputs = as_tuple(example, "the example")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, GRAPH_NAME)
        path.write_bytes(graph)
        write_weights(weights_of(model), Path(folder, WEIGHTS_NAME))
        # Not the number of rows that was traced: no batch size may be baked in.
        for count in (1, 3):
            batch = tuple(rows_of(x, count) for x in inputs)
            with torch.no_grad():
                expected = as_tuple(model(*batch), "what forward returns")
            _compare(_run(path, batch), expected)


def check_deployed(
    model: nn.Module, weights: Weights, folder: Path, rows: int = GOLDEN_ROWS
) -> None:
    """Prove that the device's graph with new weights answers as the model does.

    What a model keeps outside of its state dict and changes in training (a buffer that
    is not persistent, a plain attribute) was frozen into the graph when it was
    exported; the weight file cannot bring it up to date.

    Args:
        model: The network; left in the mode in which it was.
        weights: Its deployed tensors.
        folder: The run's ``model`` folder: graph, contract, golden inputs.
        rows: How many of the golden inputs are tried.

    Raises:
        ExportError: The outputs differ by more than the contract allows, or ONNX
            Runtime refuses the graph.
        OSError: A file cannot be read.
    """
    contract = parse_contract((folder / CONTRACT_NAME).read_bytes())
    golden = read_golden((folder / GOLDEN_NAME).read_bytes()).by_name(contract)
    feed = contract.prepare(
        {
            spec.name: golden[spec.name][: rows if spec.has_batch else None]
            for spec in contract.inputs
        }
    )
    batch = tuple(torch.tensor(array) for array in feed.values())
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, GRAPH_NAME)
        path.write_bytes((folder / GRAPH_NAME).read_bytes())
        write_weights(weights, Path(scratch, WEIGHTS_NAME))
        found = _run(path, batch)
    expected = as_tuple(_answer(model, batch), "what forward returns")
    names = [spec.name for spec in contract.outputs]
    if len(names) != len(expected):
        names = [str(index) for index in range(len(expected))]
    for name, value, wanted in zip(names, found, expected, strict=True):
        if name in contract.random_outputs:
            continue
        error = _difference(value, wanted)
        if error > contract.output_tolerance:
            raise ExportError(
                f"output {name!r} of the device's graph with these weights differs "
                f"from the model's by {error:.2g} of its largest value, allowed are "
                f"{contract.output_tolerance:g}; nothing was written. The model keeps "
                "something outside of its state dict that training changes: make it a "
                "parameter or a persistent buffer, and start a new run"
            )


@torch.no_grad()
def _answer(model: nn.Module, batch: tuple[Tensor, ...]) -> Any:
    """Return what the model answers in eval mode; every module keeps its mode."""
    modes = {module: module.training for module in model.modules()}
    first = next(iter(model.parameters()), None)
    device = torch.device("cpu") if first is None else first.device
    model.eval()
    try:
        answer = model(*(x.to(device) for x in batch))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return [x.cpu() for x in as_tuple(answer, "what forward returns")]


def as_tuple(value: Any, what: str) -> tuple[Tensor, ...]:
    """Return one tensor, or several, as a tuple."""
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    if not values or not all(isinstance(item, Tensor) for item in values):
        raise ExportError(
            f"{what} must be a tensor or a tuple of tensors, found "
            f"{type(value).__name__}; put a module around the network that takes and "
            "returns those"
        )
    return values


def rows_of(x: Tensor, count: int) -> Tensor:
    """Return ``count`` rows of a batch, repeating them where it is shorter."""
    return x[torch.arange(count) % len(x)]


def _check_initializers(
    graph: bytes, tensors: Mapping[str, Tensor], layout: Layout
) -> None:
    import onnx

    proto = onnx.load_model_from_string(graph).graph
    found = {init.name: init for init in proto.initializer}
    outside = {value.name for value in [*proto.input, *proto.output]}
    for name, tensor in tensors.items():
        if name in outside:
            raise ExportError(
                f"tensor {name!r} has the name of a graph input or output; rename it"
            )
        if name not in found:
            raise ExportError(
                f"tensor {name!r} is not in the graph: forward does not read it in "
                f"eval mode; remove it from the model, or let forward use it"
            )
        place, init = layout.by_name[name], found[name]
        there = {entry.key: entry.value for entry in init.external_data}
        actual = (init.data_type, list(init.dims), there)
        expected = (
            onnx.TensorProto.DataType.Value(TYPES[tensor.dtype][1]),
            list(place.shape),
            {
                "location": WEIGHTS_NAME,
                "offset": str(place.start),
                "length": str(place.stop - place.start),
            },
        )
        if actual != expected:
            raise ExportError(
                f"tensor {name!r} is {actual} in the graph, expected {expected}; the "
                f"graph is another model's: export this one"
            )


def _run(path: Path, batch: Sequence[Tensor]) -> list[NDArray[Any]]:
    """Return ONNX Runtime's outputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    try:
        session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        names = [value.name for value in session.get_inputs()]
        arrays = (x.numpy() for x in batch)
        return list(session.run(None, dict(zip(names, arrays, strict=True))))
    except Exception as err:
        # ONNX Runtime's exceptions have no common base of their own.
        raise ExportError(f"ONNX Runtime refuses the exported graph: {err}") from err


def _compare(found: Sequence[NDArray[Any]], expected: Sequence[Tensor]) -> None:
    for index, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        if _difference(value, wanted) > OUTPUT_TOLERANCE:
            raise ExportError(
                f"output {index} of the exported graph, shape {list(value.shape)}, "
                f"differs from torch's, shape {list(wanted.shape)}, by more than "
                f"{OUTPUT_TOLERANCE} of its largest value; forward does something that "
                f"the graph does not keep (random numbers, state between calls)"
            )


def _difference(value: NDArray[Any], wanted: Tensor) -> float:
    """Return the largest difference, as a share of the largest wanted value."""
    y = wanted.double().numpy()
    if value.shape != y.shape or (np.isfinite(value) != np.isfinite(y)).any():
        return math.inf
    whole = np.isfinite(y)
    if not np.array_equal(value[~whole], y[~whole], equal_nan=True):
        return math.inf
    error = np.abs(value[whole] - y[whole]).max(initial=0.0)
    return float(error / np.abs(y[whole]).max(initial=0.0)) if error else 0.0
