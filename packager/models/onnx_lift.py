# SPDX-License-Identifier: Apache-2.0
"""Weights, wherever an exporter has put them, become initializers of the graph.

Some write them as nodes that give a constant; some have them in the bodies of ``If``,
``Loop`` and ``Scan``, or in functions. A weight file knows one list of names, so all of
them move to the top, where bodies see them too.
"""

import math
from collections import Counter
from collections.abc import Collection, Container, Iterator

import numpy as np
import onnx
import onnx.inliner
from onnx import TensorProto, numpy_helper

# Inputs that decide a shape or a length and may be of a type that weights have: ONNX's
# shape inference reads them, and takes only values that lie inside the graph.
SHAPING: dict[str, set[int]] = {
    **{name: {1, 2, 3} for name in ("Resize", "Upsample")},
    **{name: {0} for name in ("HannWindow", "HammingWindow", "BlackmanWindow")},
    "Range": {0, 1, 2},
    "Slice": {1, 2, 3, 4},
    "OneHot": {1},
    "Pad": {1, 3},
    "DFT": {1},
    "STFT": {1, 3},
    "MelWeightMatrix": {0, 1},
    "SplitToSequence": {1},
    "CenterCropPad": {1},
}


def lift(model: onnx.ModelProto, kinds: Collection[int]) -> onnx.ModelProto:
    """Make every weight an initializer of the graph itself.

    Args:
        model: Changed in place.
        kinds: ONNX's numbers of the types that weights have.

    Returns:
        The model, or what it became: weights in functions are one for each call.
    """
    if any(_weight_in(n, kinds) for f in model.functions for n in f.node):
        model = onnx.inliner.inline_local_functions(model)
    graph = model.graph
    _lift_constants(graph, graph, set(), kinds)
    taken = Counter(_names(graph))
    for body in _bodies(graph):
        stays = shaping(body) | {value.name for value in body.input}
        inside = onnx.GraphProto()
        _lift_constants(body, inside, stays, kinds)
        for index, tensor in reversed(list(enumerate(body.initializer))):
            if tensor.data_type in kinds and tensor.name not in stays:
                inside.initializer.add().CopyFrom(tensor)
                del body.initializer[index]
        for tensor in inside.initializer:
            graph.initializer.add().CopyFrom(tensor)
            graph.initializer[-1].name = _moved(body, tensor.name, taken)
    return model


def shaping(graph: onnx.GraphProto) -> set[str]:
    """Return the names of values that a node of a graph takes as a shape or length."""
    return {
        name
        for node in graph.node
        for index, name in enumerate(node.input)
        if index in SHAPING.get(node.op_type, ())
    }


def _bodies(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs inside of a graph's nodes, outer ones first."""
    for node in graph.node:
        for attribute in node.attribute:
            inside = [attribute.g] if attribute.HasField("g") else []
            for body in (*inside, *attribute.graphs):
                yield body
                yield from _bodies(body)


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    """Yield the name of each value that a graph or one of its bodies defines."""
    for part in (graph, *_bodies(graph)):
        for value in (*part.input, *part.initializer):
            yield value.name
        for node in part.node:
            yield from node.output


def _lift_constants(
    graph: onnx.GraphProto,
    target: onnx.GraphProto,
    stays: Container[str],
    kinds: Collection[int],
) -> None:
    """Turn nodes that are nothing but a weight into initializers of another graph.

    Single numbers are left alone: they are part of a formula more often than learned.
    """
    spent = []
    for index, node in enumerate(graph.node):
        tensor = _weight_in(node, kinds)
        if tensor is not None and node.output[0] not in stays:
            target.initializer.add().CopyFrom(tensor)
            target.initializer[-1].name = node.output[0]
            spent.append(index)
    for index in reversed(spent):
        del graph.node[index]


def _weight_in(node: onnx.NodeProto, kinds: Collection[int]) -> TensorProto | None:
    """Return the weight that a node is, if it is one."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    if not node.output:
        return None  # the checker says what is wrong with it
    for attribute in node.attribute:
        tensor: TensorProto = attribute.t
        if attribute.name == "value_floats":
            tensor = numpy_helper.from_array(np.array(attribute.floats, np.float32))
        if tensor.data_type in kinds and math.prod(tensor.dims) > 1:
            return tensor
    return None


def _moved(body: onnx.GraphProto, name: str, taken: Counter[str]) -> str:
    """Give what left a body a name that nothing else has; return it."""
    ends = [value.name for value in body.output]
    if taken[name] == 1 and name not in ends:
        return name
    number = next(n for n in range(1, 1 << 31) if not taken[f"{name}.{n}"])
    new = f"{name}.{number}"
    taken[new] += 1
    for part in (body, *_bodies(body)):
        for node in part.node:
            for index, old in enumerate(node.input):
                if old == name:
                    node.input[index] = new
    if name in ends:  # a body gives back only what it has made itself
        body.node.append(onnx.helper.make_node("Identity", [new], [name]))
    return new
