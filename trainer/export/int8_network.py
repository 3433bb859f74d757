# SPDX-License-Identifier: Apache-2.0
"""Finds the layers and activations of a float32 graph that can run in int8.

Layers are what ONNX Runtime has kernels in integers for. 8 bits get the inputs of all
layers, what convolutions make, and backward from there what an operator that works on
8 bits too takes.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.export.int8_ranges import Activation

Floats = NDArray[np.float32]

# What only moves values moves them in 8 bits; the output has the range of the input.
MOVES = {
    *("Flatten", "Identity", "Pad", "Reshape", "Slice", "Squeeze", "Transpose"),
    "Unsqueeze",
}
_SAME_RANGE = {*MOVES, "MaxPool"}
# Computed in 8 bits by ONNX Runtime where inputs and outputs have 8 bits.
_ALSO = {"Add", "AveragePool", "Concat", "GlobalAveragePool", "ReduceMean"}


class GraphIndex:
    """Producer and consumers of every tensor in an ONNX graph."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.makers: dict[str, Any] = {}
        self.takers: defaultdict[str, list[Any]] = defaultdict(list)
        self.constants = {i.name: i for i in graph.initializer}
        for node in graph.node:
            self.makers |= dict.fromkeys(node.output, node)
            if node.op_type == "Constant":
                self.constants |= dict.fromkeys(node.output, node)
            for name in set(node.input):
                self.takers[name].append(node)
        self.outputs = {value.name for value in graph.output}

    def number(self, name: str) -> float | None:
        """Return a constant of one number, as the bounds of Clip are."""
        from onnx import numpy_helper

        found = self.constants.get(name)
        if found is None or getattr(found, "external_data", None):
            return None
        if hasattr(found, "op_type"):
            if found.attribute[0].name != "value":
                return None
            found = found.attribute[0].t
        return float(numpy_helper.to_array(found).reshape(-1)[0])

    def only_taker(self, name: str) -> Any:
        """Return the node that alone takes a tensor, or None."""
        takers = self.takers[name]
        alone = len(takers) == 1 and name not in self.outputs
        return takers[0] if alone else None

    def through_bounds(self, name: str) -> tuple[str, float, float]:
        """Follow a tensor through Relu and Clip; return where it leads, and bounds."""
        low, high = -np.inf, np.inf
        while (node := self.only_taker(name)) is not None:
            if node.op_type == "Relu":
                low = max(low, 0.0)
            elif node.op_type == "Clip" and node.input[0] == name:
                given = [*map(self.number, node.input[1:]), None, None]
                low = low if given[0] is None else max(low, given[0])
                high = high if given[1] is None else min(high, given[1])
            else:
                break
            name = node.output[0]
        return name, low, high


@dataclass(frozen=True, eq=False)
class Layer:
    """A node with int8 weights.

    Attributes:
        node: Conv, Gemm or MatMul.
        weight: The deployed tensor.
        axis: Of the outputs, as the node takes the weight.
        norm: The BatchNormalization behind it that goes into its scales.
    """

    node: Any
    weight: str
    axis: int
    norm: Any = None

    @property
    def output(self) -> str:
        """What the layer makes, BatchNorm included."""
        return str((self.norm or self.node).output[0])


def attributes(node: Any) -> dict[str, Any]:
    """Return a node's attributes by name."""
    from onnx import helper

    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def find_layers(net: GraphIndex, scales: Mapping[str, Floats]) -> list[Layer]:
    """Return the layers that ONNX Runtime has kernels in integers for."""
    found = []
    for node in net.graph.node:
        layer = _as_layer(net, node, scales)
        if layer is None or layer.node.input[0] in net.constants:
            continue
        found.append(layer)
    return found


def _as_layer(net: GraphIndex, node: Any, scales: Mapping[str, Floats]) -> Layer | None:
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return None
    weight, options = node.input[1], attributes(node)
    bias = node.input[2] if len(node.input) > 2 else ""
    if bias and not _is_vector(net, bias):
        return None
    if node.op_type == "MatMul":
        turned = net.makers.get(weight)
        if turned is None or turned.op_type != "Transpose":
            return None
        two = list(attributes(turned).get("perm", (1, 0))) == [1, 0]
        name = turned.input[0]
        return Layer(node, name, 1) if two and name in scales else None
    if weight not in scales:
        return None
    if node.op_type == "Gemm":
        plain = options.get("alpha", 1.0) == options.get("beta", 1.0) == 1.0
        if not plain or options.get("transA", 0) or not options.get("transB", 0):
            return None
    after = net.only_taker(node.output[0])
    if after is not None and after.op_type == "BatchNormalization":
        used = [name for name in after.output if name]
        if len(used) == 1 and all(n in net.constants for n in after.input[1:]):
            return Layer(node, weight, 0, after)
    return Layer(node, weight, 0)


def _is_vector(net: GraphIndex, name: str) -> bool:
    found = net.constants.get(name)
    return found is not None and len(getattr(found, "dims", ())) == 1


def find_activations(net: GraphIndex, layers: list[Layer]) -> dict[str, Activation]:
    """Return the tensors that get 8 bits, and whose range each of them has."""
    bounds: dict[str, tuple[float, float]] = {}
    for node in net.graph.node:  # the chain's first tensor comes first
        for name in node.output:
            end, low, high = net.through_bounds(name)
            bounds.setdefault(end, (low, high))
    waiting = [layer.node.input[0] for layer in layers]
    waiting += [
        net.through_bounds(layer.output)[0]
        for layer in layers
        if layer.node.op_type == "Conv"
    ]
    found: dict[str, Activation] = {}
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        root = name
        while (maker := net.makers.get(root)) and keeps_range(maker):
            root = maker.input[0]
        found[name] = Activation(root, *bounds.get(root, (-np.inf, np.inf)))
        waiting += _also(net, name)
    return found


def keeps_range(node: Any) -> bool:
    """Whether a node's output has the range of its first input."""
    padded = node.op_type == "Pad" and any(node.input[2:])  # by a value of its own
    return node.op_type in _SAME_RANGE and not padded


def _also(net: GraphIndex, name: str) -> list[str]:
    """Return what should have 8 bits because a tensor has."""
    maker = net.makers.get(name)
    if maker is not None and keeps_range(maker):
        return [maker.input[0]]
    while maker is not None and maker.op_type in ("Relu", "Clip"):
        inside = maker.input[0]
        maker = net.makers.get(inside) if net.only_taker(inside) else None
    if maker is None or maker.op_type not in _ALSO:
        return []
    data = maker.input[:1] if maker.op_type == "ReduceMean" else maker.input
    return [] if any(n in net.constants for n in data) else [*data]
