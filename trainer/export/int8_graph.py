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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ExportError
from edge_runtime.formats.layout import Layout, make_layout
from edge_runtime.formats.model_folder import WEIGHTS_NAME
from edge_runtime.formats.weights import Weights
from trainer.export.int8_network import (
    Floats,
    Network,
    find_activations,
    find_layers,
)
from trainer.export.int8_nodes import Writer
from trainer.export.int8_ranges import measure

Array = NDArray[Any]


def int8_layout(layout: Layout, scales: Mapping[str, Floats]) -> Layout:
    """Return the layout of the weight file with the scaled tensors in int8."""
    return make_layout(
        {
            t.name: ("I8" if t.name in scales else t.dtype, t.shape)
            for t in layout.tensors
        }
    )


def quantised_graph(
    graph: Any,
    weights: Weights,
    scales: Mapping[str, Floats],
    inputs: Mapping[str, Array],
) -> Any:
    """Return the same network as a QDQ graph with int8 weights.

    Args:
        graph: The exported float32 graph, an ``onnx.ModelProto``; left as it is.
        weights: Float32 weights to calibrate with, on the int8 grid.
        scales: The steps of each tensor that becomes int8, one for each row of its
            first axis. Symmetric: the weight is the scale times -127 to 127.
        inputs: Some hundred training samples, by input name, as the graph takes them;
            the ranges of activations are measured on them.

    Returns:
        An ``onnx.ModelProto`` whose deployed tensors lie as :func:`int8_layout` says.

    Raises:
        ExportError: Scales do not fit the weights, or ONNX Runtime refuses the graph.
    """
    import onnx

    _check_scales(weights.layout, scales)
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    net = Network(model.graph)
    layers = find_layers(net, scales)
    activations = find_activations(net, layers)
    ranges = measure(graph, weights, activations, inputs)
    Writer(net, layers, scales, ranges).rewrite()
    _place(model.graph, int8_layout(weights.layout, scales))
    return model


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
        if place is None or not tensor.external_data:
            continue
        if place.dtype == "I8":
            tensor.data_type = onnx.TensorProto.INT8
        where = {
            "location": WEIGHTS_NAME,
            "offset": str(place.start),
            "length": str(place.stop - place.start),
        }
        del tensor.external_data[:]
        for key, value in where.items():
            tensor.external_data.add(key=key, value=value)
