# SPDX-License-Identifier: Apache-2.0
"""The ranges of activations, measured by running the float32 graph on real samples."""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ExportError
from edge_runtime.formats.model_folder import GRAPH_NAME, WEIGHTS_NAME
from edge_runtime.formats.weights import Weights, write_weights

Array = NDArray[Any]
ROWS = 16  # samples a run: what is between layers is in memory only for a moment
# Later rounds' activations may grow by so much before they are cut.
HEADROOM = 0.1


@dataclass(frozen=True, slots=True)
class Activation:
    """A tensor between two layers.

    Attributes:
        root: The tensor whose range it has.
        low: Nothing is below it.
        high: Nothing is above it.
    """

    root: str
    low: float
    high: float


def measure(
    graph: Any,
    weights: Weights,
    activations: Mapping[str, Activation],
    inputs: Mapping[str, Array],
) -> dict[str, tuple[np.float32, np.integer[Any]]]:
    """Return the step and the zero point of each activation.

    Args:
        graph: The float32 graph, an ``onnx.ModelProto``.
        weights: Of it.
        activations: What to measure, by name.
        inputs: Samples by input name.

    Raises:
        ExportError: ONNX Runtime cannot run the graph on these inputs, or an activation
            is not finite.
    """
    roots = sorted({activation.root for activation in activations.values()})
    extremes = dict(zip(roots, _extremes(graph, weights, roots, inputs), strict=True))
    found = {}
    for name, activation in activations.items():
        low, high = extremes[activation.root]
        if not np.isfinite([low, high]).all():
            raise ExportError(
                f"activation {activation.root!r} is from {low} to {high} on the "
                "calibration inputs; expected finite numbers: train the network first"
            )
        is_input = any(value.name == activation.root for value in graph.graph.input)
        growth = 1 if is_input else 1 + HEADROOM
        low, high = low * growth, high * growth
        # A bound that is reached stays one exactly: no Clip is needed then.
        exact = is_input or low <= activation.low < 0 or high >= activation.high
        found[name] = _steps(
            max(low, activation.low), min(high, activation.high), exact=exact
        )
    return found


def _steps(
    low: float, high: float, *, exact: bool
) -> tuple[np.float32, np.integer[Any]]:
    """Return step and zero point of 256 values; 0 is always one of them, exactly.

    Unless it has to be exact, the step is rounded up to three significant bits: other
    weights whose activations go about as far have the same, and a patch is smaller.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    step = np.float32((high - low) / 255) or np.float32(1 / 255)
    if not exact:
        mantissa, exponent = np.frexp(step)
        step = np.ldexp(np.ceil(mantissa * np.float32(8)), exponent - 3)
    while exact and step * np.float32(255) > np.float32(high - low) > 0:
        step = np.nextafter(step, np.float32(0))  # so that a Clip is not needed more
    return step, np.uint8(round(-low / float(step)))


def _extremes(
    graph: Any, weights: Weights, names: list[str], inputs: Mapping[str, Array]
) -> Iterator[tuple[float, float]]:
    import onnx
    from onnx import TensorProto, helper

    model = onnx.ModelProto()
    model.CopyFrom(graph)
    asked = []
    for number, name in enumerate(names):
        for operator in ("ReduceMin", "ReduceMax"):
            asked.append(f"{operator}/{number}")
            model.graph.node.append(
                helper.make_node(operator, [name], asked[-1:], keepdims=0)
            )
            model.graph.output.append(
                helper.make_tensor_value_info(asked[-1], TensorProto.FLOAT, [])
            )
    batches = [np.array(run) for run in _runs(model, weights, asked, inputs)]
    lows, highs = np.min(batches, axis=0)[::2], np.max(batches, axis=0)[1::2]
    return zip(lows.tolist(), highs.tolist(), strict=True)


def _runs(
    model: Any, weights: Weights, asked: list[str], inputs: Mapping[str, Array]
) -> Iterator[list[Array]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = 1  # the order of sums, and with it the graph
    rows = min(len(array) for array in inputs.values())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, GRAPH_NAME)
        path.write_bytes(model.SerializeToString())
        write_weights(weights, Path(folder, WEIGHTS_NAME))
        try:
            session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
            for start in range(0, rows, ROWS):
                part = {n: a[start : start + ROWS] for n, a in inputs.items()}
                yield session.run(asked, part)
        except Exception as err:
            # ONNX Runtime's exceptions have no common base of their own.
            raise ExportError(
                f"ONNX Runtime cannot run the graph on the calibration inputs: {err}"
            ) from err
