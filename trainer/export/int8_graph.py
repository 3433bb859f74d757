# SPDX-License-Identifier: Apache-2.0
"""A float32 graph with int8 weights and 8-bit activations, for ONNX Runtime's kernels.

Weights keep their names and the state dict's shapes; :func:`quantised_graph` puts the
scales into the graph, as constants, and pairs of QuantizeLinear and DequantizeLinear
around what is to run in integers (QDQ). ONNX Runtime fuses these while it loads:
``Conv`` becomes ``QLinearConv``, ``Gemm`` ``QGemm``.

All else stays a deployed tensor that patches change: biases are brought to integers,
and BatchNorm into the scales of the convolution before it, by nodes that depend on
weights alone, which every runtime computes once, while it loads.

A weight that no such kernel takes (an embedding, an LSTM's, one whose first axis is not
the outputs) is int8 in the file, and float32 again in memory.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from edge_runtime.errors import ExportError
from edge_runtime.formats.layout import NATIVE_CODES, Layout, make_layout
from edge_runtime.formats.model_folder import WEIGHTS_NAME
from edge_runtime.formats.weights import Weights
from trainer.export.int8_network import (
    Floats,
    GraphIndex,
    find_activations,
    find_layers,
)
from trainer.export.int8_nodes import Writer, grid_names
from trainer.export.int8_ranges import Array, measure

_NONE: Mapping[str, Array] = MappingProxyType({})


def int8_layout(
    layout: Layout, scales: Mapping[str, Floats], ranges: Mapping[str, Array] = _NONE
) -> Layout:
    """Return the layout of the weight file with the scaled tensors in int8.

    Args:
        layout: Of the float32 weights.
        scales: Of the tensors that become int8.
        ranges: Of activations, as :func:`activation_ranges` gives them, where they are
            deployed with the weights.

    Raises:
        ExportError: A tensor has the name of one of the ranges.
    """
    if both := sorted(ranges.keys() & layout.by_name.keys()):
        raise ExportError(f"tensor {both[0]!r} has the name of a range; rename it")
    specs = {
        t.name: ("I8" if t.name in scales else t.dtype, t.shape) for t in layout.tensors
    }
    for name, array in ranges.items():
        specs[name] = NATIVE_CODES[array.dtype], array.shape
    return make_layout(specs)


def quantised_graph(
    graph: Any,
    weights: Weights,
    scales: Mapping[str, Floats],
    inputs: Mapping[str, Array],
    *,
    deploy_ranges: bool = False,
) -> Any:
    """Return the same network as a QDQ graph with int8 weights.

    Args:
        graph: The exported float32 graph, an ``onnx.ModelProto``; left as it is.
        weights: Float32 weights to calibrate with, on the int8 grid.
        scales: The steps of each tensor that becomes int8, one for each row of its
            first axis. Symmetric: the weight is the scale times -127 to 127.
        inputs: Some hundred training samples, by input name, as the graph takes them;
            the ranges of activations are measured on them.
        deploy_ranges: Whether the ranges of activations are deployed tensors, which
            patches may change, and not part of the graph; those of inputs stay there.

    Returns:
        An ``onnx.ModelProto`` whose deployed tensors lie as :func:`int8_layout` says.

    Raises:
        ExportError: Scales do not fit the weights, or ONNX Runtime refuses the graph.
    """
    import onnx

    _check_scales(weights.layout, scales)
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    net = GraphIndex(model.graph)
    layers = find_layers(net, scales)
    activations = find_activations(net, layers)
    ranges = measure(graph, weights, activations, inputs)
    roots = {name: activation.root for name, activation in activations.items()}
    Writer(net, layers, scales, ranges, roots).rewrite()
    deployed = _deployed(model.graph, roots, ranges) if deploy_ranges else {}
    _place(model.graph, int8_layout(weights.layout, scales, deployed))
    return model


def activation_ranges(
    graph: Any,
    weights: Weights,
    scales: Mapping[str, Floats],
    inputs: Mapping[str, Array],
) -> dict[str, Array]:
    """Return the steps and zero points that :func:`quantised_graph` deploys, by name.

    Those of other weights fit the same graph.

    Args:
        graph: The float32 graph, an ``onnx.ModelProto``.
        weights: Whose activations are measured, on the int8 grid.
        scales: Of the tensors that are int8.
        inputs: As for :func:`quantised_graph`.

    Raises:
        ExportError: As there.
    """
    net = GraphIndex(graph.graph)
    activations = find_activations(net, find_layers(net, scales))
    roots = {name: activation.root for name, activation in activations.items()}
    ranges = measure(graph, weights, activations, inputs)
    return _deployed(graph.graph, roots, ranges)


def range_names(graph: Any, scales: Mapping[str, Floats]) -> list[str]:
    """Return the names of what :func:`activation_ranges` gives for a graph.

    Args:
        graph: The float32 graph, an ``onnx.ModelProto``.
        scales: Of the tensors that are int8.
    """
    net = GraphIndex(graph.graph)
    roots = {a.root for a in find_activations(net, find_layers(net, scales)).values()}
    outside = {value.name for value in graph.graph.input}
    return [name for root in sorted(roots - outside) for name in grid_names(root)]


def graph_scales(graph: bytes) -> dict[str, Floats]:
    """Return the scales in a graph that :func:`quantised_graph` made; else none."""
    import onnx
    from onnx import numpy_helper

    proto = onnx.load_model_from_string(graph).graph
    constants = {init.name: init for init in proto.initializer}
    found = {}
    for name, init in constants.items():
        if init.data_type == onnx.TensorProto.INT8 and init.external_data:
            steps = constants.get(f"{name}/steps") or constants.get(f"{name}/rows")
            if steps is not None:
                found[name] = numpy_helper.to_array(steps).reshape(-1)
    return found


def _deployed(
    graph: Any,
    roots: Mapping[str, str],
    ranges: Mapping[str, tuple[np.float32, np.integer[Any]]],
) -> dict[str, Array]:
    outside = {value.name for value in graph.input}
    return {
        constant: np.asarray(value)
        for name, grid in ranges.items()
        if roots[name] not in outside
        for constant, value in zip(grid_names(roots[name]), grid, strict=True)
    }


def _check_scales(layout: Layout, scales: Mapping[str, Floats]) -> None:
    for name, steps in scales.items():
        place = layout.by_name.get(name)
        if place is None or place.dtype != "F32" or not place.shape:
            found = f"{place.dtype} {list(place.shape)}" if place else "not there"
            raise ExportError(
                f"tensor {name!r} cannot become int8: it is {found}, expected float32 "
                "with a first axis; give scales for such tensors alone"
            )
        right = steps.shape == place.shape[:1] and steps.dtype == np.float32
        if not right or not (np.isfinite(steps) & (steps > 0)).all():
            raise ExportError(
                f"the scales of tensor {name!r} are {steps.dtype} {list(steps.shape)}, "
                f"expected {place.shape[0]} float32 numbers above 0, one for each row"
            )


def _place(graph: Any, layout: Layout) -> None:
    """Point the deployed tensors into the int8 weight file."""
    import onnx

    for tensor in graph.initializer:
        place = layout.by_name.get(tensor.name)
        if place is None:
            continue
        if place.dtype == "I8":
            tensor.data_type = onnx.TensorProto.INT8
        if not tensor.external_data:
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
        del tensor.external_data[:]
        for key, value in place.external_data(WEIGHTS_NAME).items():
            tensor.external_data.add(key=key, value=value)
