# SPDX-License-Identifier: Apache-2.0
"""Rewrites the nodes of a float32 graph as those of an int8 graph.

What depends on weights alone is computed once, while a runtime loads the graph.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from trainer.export.int8_network import (
    MOVES,
    Floats,
    GraphIndex,
    Layer,
    attributes,
    keeps_range,
)
from trainer.export.int8_ranges import Array

# Biases are integers of 32 bits in steps of activation times weight. Where a channel's
# weights are so small that its bias does not fit, its steps become larger.
_MOST = 2.0**30
_TINY = 1e-30  # and a channel without weights and bias needs any step


def grid_names(root: str) -> tuple[str, str]:
    """Return the names of an activation's step and zero point in the graph."""
    return f"{root}/step", f"{root}/zero"


class Writer:
    """Rewrites a float32 graph's nodes as those of a QDQ int8 graph."""

    def __init__(
        self,
        net: GraphIndex,
        layers: list[Layer],
        scales: Mapping[str, Floats],
        ranges: Mapping[str, tuple[np.float32, np.integer[Any]]],
        roots: Mapping[str, str],
    ) -> None:
        self._net, self._scales, self._ranges = net, scales, ranges
        self._roots = roots
        self._layers = {id(layer.node): layer for layer in layers}
        self._norms = {id(layer.norm) for layer in layers if layer.norm is not None}
        self._nodes: list[Any] = []
        self._constants: dict[str, Array] = {}
        self._numbers = itertools.count()

    def rewrite(self) -> None:
        """Replace the graph's nodes, and add the constants that they need."""
        from onnx import numpy_helper

        graph = self._net.graph
        for value in [*graph.input, *graph.initializer]:
            self._narrow(value.name)
        for node in [*graph.node]:
            if id(node) in self._norms:
                continue
            layer = self._layers.get(id(node))
            if layer is not None:
                output = layer.output  # before the node gets another one
                self._layer(layer)
                self._narrow(output)
            elif self._moves(node):
                self._move(node)
            else:
                self._keep(node)
        read = {name for node in self._nodes for name in node.input} | self._net.outputs
        del graph.node[:]
        graph.node.extend(n for n in self._nodes if not read.isdisjoint(n.output))
        graph.initializer.extend(
            numpy_helper.from_array(a, name) for name, a in self._constants.items()
        )

    def _add(self, operator: str, output: str, *inputs: str, **attributes: Any) -> str:
        from onnx import helper

        self._nodes.append(
            helper.make_node(operator, [*inputs], [output], **attributes)
        )
        return output

    def _constant(self, name: str, value: Any) -> str:
        self._constants[name] = np.asarray(value)
        return name

    def _number(self, value: float) -> str:
        return self._constant(f"number/{value:g}", np.float32(value))

    def _narrow(self, name: str) -> None:
        """Bring a tensor to 8 bits and back, where it is one of those."""
        if name in self._ranges:
            grid = self._grid(name)
            self._add("QuantizeLinear", f"{name}/8bit", self._made(name), *grid)
            self._add("DequantizeLinear", self._read(name), f"{name}/8bit", *grid)

    def _grid(self, name: str) -> tuple[str, str]:
        grid = grid_names(self._roots[name])
        for constant, value in zip(grid, self._ranges[name], strict=True):
            self._constant(constant, value)
        return grid

    def _read(self, name: str) -> str:
        """Return what takes a tensor's place as an input."""
        ends = name in self._net.outputs
        return f"{name}/read" if name in self._ranges and not ends else name

    def _made(self, name: str) -> str:
        """Return what takes a tensor's place as an output."""
        ends = name in self._net.outputs
        return f"{name}/made" if name in self._ranges and ends else name

    def _moves(self, node: Any) -> bool:
        moves = node.op_type in MOVES and keeps_range(node)
        return moves and node.output[0] in self._ranges

    def _move(self, node: Any) -> None:
        """Let a node move 8-bit values."""
        source, output = node.input[0], node.output[0]
        grid = self._grid(output)
        node.input[0], node.output[0] = f"{source}/8bit", f"{output}/8bit"
        if node.op_type == "Pad":
            rest = [*node.input[3:]]
            del node.input[2:]
            node.input.extend([grid[1], *rest])
        self._nodes.append(node)
        self._add("DequantizeLinear", self._read(output), node.output[0], *grid)

    def _keep(self, node: Any) -> None:
        """Keep a node; int8 weights that it takes are float32 again."""
        turned = node.op_type == "Transpose" and node.input[0] in self._scales
        if turned and all(id(n) in self._layers for n in self._takers(node)):
            return  # each of these layers turns the int8 weight
        sizes = node.op_type in ("Shape", "Size")  # of an input, before 8 bits
        for place, name in enumerate(node.input):
            if name in self._scales:
                node.input[place] = self._wide(name)
            elif not (sizes and name not in self._net.makers):
                node.input[place] = self._read(name)
        names = [*node.output]
        node.output[:] = [self._made(name) for name in names]
        self._nodes.append(node)
        for name in names:
            self._narrow(name)

    def _takers(self, node: Any) -> list[Any]:
        return self._net.takers[node.output[0]]

    def _wide(self, name: str) -> str:
        wide = f"{name}/float"
        if f"{name}/rows" not in self._constants:
            axes = (-1, *[1] * (len(self._net.constants[name].dims) - 1))
            rows = self._constant(f"{name}/rows", self._scales[name].reshape(axes))
            whole = self._add("Cast", f"{name}/whole", name, to=1)
            self._add("Mul", wide, whole, rows)
        return wide

    def _layer(self, layer: Layer) -> None:
        node, weight = layer.node, layer.weight
        key = f"layer/{next(self._numbers)}"
        steps = self._constant(f"{weight}/steps", self._scales[weight])
        bias = node.input[2] if len(node.input) > 2 else ""
        if layer.norm is not None:
            steps, bias = self._normed(layer, key, steps, bias)
        if bias:
            steps, bias = self._whole_bias(layer, key, steps, bias)
        taken = weight
        if node.op_type == "MatMul":
            taken = self._add("Transpose", f"{key}/turned", weight, perm=[1, 0])
        # ONNX Runtime fuses nothing where zero points are left out. Each weight has
        # its own, or it could not be made unsigned where that has to be.
        count = len(self._scales[weight])
        zeros = self._constant(f"{key}/zeros", np.zeros(count, np.int8))
        read = self._add(
            "DequantizeLinear", f"{key}/read", taken, steps, zeros, axis=layer.axis
        )
        inputs = [self._read(node.input[0]), read, *([bias] if bias else [])]
        del node.input[:]
        node.input.extend(inputs)
        node.output[0] = self._made(layer.output)
        self._nodes.append(node)

    def _normed(self, layer: Layer, key: str, steps: str, bias: str) -> tuple[str, str]:
        """Return steps and bias of a layer with the BatchNorm behind it."""
        _, gamma, beta, mean, var = layer.norm.input
        eps = attributes(layer.norm).get("epsilon", 1e-5)
        safe = self._add("Add", f"{key}/safe", var, self._number(eps))
        deviation = self._add("Sqrt", f"{key}/deviation", safe)
        slope = self._add("Div", f"{key}/slope", gamma, deviation)
        if bias:
            centred = self._add("Sub", f"{key}/centred", bias, mean)
        else:
            centred = self._add("Neg", f"{key}/centred", mean)
        moved = self._add("Mul", f"{key}/moved", centred, slope)
        return (
            self._add("Mul", f"{key}/sloped", steps, slope),
            self._add("Add", f"{key}/bias", moved, beta),
        )

    def _whole_bias(
        self, layer: Layer, key: str, steps: str, bias: str
    ) -> tuple[str, str]:
        """Return the steps of a layer, and its bias as a whole number of them."""
        taken, _ = self._grid(layer.node.input[0])
        size = self._add("Abs", f"{key}/size", bias)
        part = self._add("Div", f"{key}/part", size, taken)
        share = self._add("Mul", f"{key}/share", part, self._number(1 / _MOST))
        least = self._add("Add", f"{key}/least", share, self._number(_TINY))
        width = self._add("Abs", f"{key}/width", steps)
        fits = self._add("Greater", f"{key}/fits", width, least)
        steps = self._add("Where", f"{key}/steps", fits, steps, least)
        unit = self._add("Mul", f"{key}/unit", steps, taken)
        count = self._add("Div", f"{key}/count", bias, unit)
        near = self._add("Round", f"{key}/near", count)
        whole = self._add("Cast", f"{key}/integers", near, to=6)
        rows = len(self._scales[layer.weight])
        zeros = self._constant(f"zeros/{rows}", np.zeros(rows, np.int32))
        read = self._add(
            "DequantizeLinear", f"{key}/biased", whole, unit, zeros, axis=0
        )
        return steps, read
