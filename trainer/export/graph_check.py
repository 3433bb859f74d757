# SPDX-License-Identifier: Apache-2.0
"""Prove that a finished graph runs from the weight file and gives torch's outputs."""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_runtime.errors import ExportError
from edge_runtime.formats.contract import (
    InputSpec,
    OutputSpec,
    tolerance_between_cpus,
)
from edge_runtime.formats.layout import Layout
from edge_runtime.formats.model_folder import GRAPH_NAME, WEIGHTS_NAME
from edge_runtime.formats.weights import Weights, write_weights
from edge_runtime.inference.session import exact_session
from trainer.export.tensors import TYPES, deployed_tensors, layout_of, weights_of

OUTPUT_TOLERANCE = 1e-4  # of max|y|; the same weights differ by up to 1e-6


def never(_number: int) -> bool:
    """Say of every output that it is not random."""
    return False


def check_graph(
    graph: bytes,
    model: nn.Module,
    batches: Sequence[Sequence[Tensor]],
    is_random: Callable[[int], bool] = never,
    tolerance: float | None = None,
) -> None:
    """Prove that a graph runs from the model's weight file and gives its outputs.

    Args:
        graph: The bytes of ``graph.onnx``.
        model: On the CPU and in eval mode.
        batches: Inputs, not of the sizes that were traced: none may be baked in.
        is_random: Says which outputs, counted from 0, are not compared.
        tolerance: As for :func:`export_graph`.

    Raises:
        ExportError: A deployed tensor is not an initializer of the graph, ONNX
            Runtime refuses the graph, or its outputs differ from torch's.
    """
    layout = layout_of(model)
    _check_initializers(graph, deployed_tensors(model), layout)
    session = GraphSession(graph, weights_of(model))
    for batch in batches:
        with torch.no_grad():
            expected = as_tuple(model(*batch), "what forward returns")
        _compare(session.run(batch), expected, is_random, layout, tolerance)


def graph_outputs(graph: bytes) -> tuple[OutputSpec, ...]:
    """Describe the outputs of ``graph.onnx``."""
    import onnx

    found = []
    for value in onnx.load_model_from_string(graph).graph.output:
        kind = value.type.tensor_type
        dims = [
            d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim
        ]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
        found.append(OutputSpec(value.name, dtype, tuple(dims)))
    return tuple(found)


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


def open_axes(
    inputs: Sequence[Tensor], takes: Sequence[InputSpec] = ()
) -> list[tuple[int, ...]]:
    """Return for each input the axes of any size; without a contract the first one."""
    if not takes:
        return [(0,) for _ in inputs]
    return [
        tuple(axis for axis, size in enumerate(spec.shape) if size is None)
        for spec in takes
    ]


def resized(
    inputs: Sequence[Tensor],
    axes: Sequence[tuple[int, ...]],
    rows: int,
    other: Callable[[int], int] = int,
) -> tuple[Tensor, ...]:
    """Return inputs with so many rows, which repeat where there are fewer.

    Args:
        inputs: All inputs.
        axes: Of each, the axes of any size.
        rows: Size of the first axis where it is one of these.
        other: Gives the size of the other ones from the example's, or from 2 where that
            is 1, which torch takes for a constant.
    """
    found = []
    for x, free in zip(inputs, axes, strict=True):
        for axis in free:
            size = x.shape[axis]
            count = other(max(size, 2)) if axis else rows
            x = x.index_select(axis, torch.arange(count) % size)
        found.append(x)
    return tuple(found)


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
            place.external_data(WEIGHTS_NAME),
        )
        if actual != expected:
            raise ExportError(
                f"tensor {name!r} is {actual} in the graph, expected {expected}; the "
                f"graph is another model's: export this one"
            )


class GraphSession:
    """A graph with weights, in ONNX Runtime."""

    def __init__(self, graph: bytes, weights: Weights) -> None:
        """Load the graph.

        Args:
            graph: The bytes of ``graph.onnx``.
            weights: What its file of weights holds.

        Raises:
            ExportError: ONNX Runtime refuses it.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, GRAPH_NAME)
            path.write_bytes(graph)
            write_weights(weights, Path(folder, WEIGHTS_NAME))
            try:
                self._session = exact_session(onnxruntime, str(path), options)
            except Exception as err:
                # ONNX Runtime's exceptions have no common base of their own.
                raise _refused(err) from err

    def run(self, batch: Sequence[Tensor]) -> list[NDArray[Any]]:
        """Return ONNX Runtime's outputs.

        Raises:
            ExportError: It refuses the inputs.
        """
        names = [value.name for value in self._session.get_inputs()]
        arrays = (x.numpy() for x in batch)
        try:
            return list(self._session.run(None, dict(zip(names, arrays, strict=True))))
        except Exception as err:
            raise _refused(err) from err


def _refused(err: Exception) -> ExportError:
    return ExportError(f"ONNX Runtime refuses the exported graph: {err}")


def _compare(
    found: Sequence[NDArray[Any]],
    expected: Sequence[Tensor],
    is_random: Callable[[int], bool],
    layout: Layout,
    tolerance: float | None,
) -> None:
    usual = tolerance_between_cpus(layout)
    allowed = usual if tolerance is None else tolerance
    for index, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        error = 0.0 if is_random(index) else difference(value, wanted)
        if error > allowed:
            why = (
                "forward does something that the graph does not keep (random numbers, "
                "state between calls): take it out of eval mode; random outputs are "
                "named in the contract"
                if error > usual
                else f"weights of few bits are computed alike to {usual:g}: give the "
                f"contract output_tolerance={usual:g}"
            )
            raise ExportError(
                f"output {index} of the exported graph, shape {list(value.shape)}, "
                f"differs from torch's, shape {list(wanted.shape)}, by {error:.2g} of "
                f"its largest value, allowed are {allowed:g}; {why}"
            )


def difference(value: NDArray[Any], wanted: Tensor) -> float:
    """Return the largest difference, as a share of the largest wanted value."""
    y = wanted.double().numpy()
    if value.shape != y.shape or (np.isfinite(value) != np.isfinite(y)).any():
        return math.inf
    whole = np.isfinite(y)
    if not np.array_equal(value[~whole], y[~whole], equal_nan=True):
        return math.inf
    error = np.abs(value[whole] - y[whole]).max(initial=0.0)
    return float(error / np.abs(y[whole]).max(initial=0.0)) if error else 0.0
