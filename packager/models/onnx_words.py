# SPDX-License-Identifier: Apache-2.0
"""What to say of ONNX files that no patch leads from one to the other, and why."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import onnx

from edge_runtime.formats.layout import Layout
from edge_runtime.text import listed

FLOATING = {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16}
# Types of weights that so far do not travel.
STAYING = {
    *("INT2", "UINT2", "INT4", "UINT4", "FLOAT4E2M1", "COMPLEX64", "COMPLEX128"),
    *("FLOAT8E8M0", "FLOAT8E5M2FNUZ", "FLOAT8E4M3FNUZ"),
}
LINEAR = {"LinearClassifier", "LinearRegressor"}  # which skl2onnx can write otherwise


def type_name(number: int) -> str:
    """Return what ONNX calls a type, of which a file may have any number."""
    known = onnx.TensorProto.DataType
    return known.Name(number) if number in known.values() else f"unknown ({number})"


def without_weights(model: onnx.ModelProto) -> str:
    """Say why a model has no weights that a patch could change."""
    if words := _learned(model.graph):
        operators = {node.op_type for node in model.graph.node}
        way = (
            "; skl2onnx writes linear models with weights, as MatMul and Add: "
            "to_onnx(..., black_op={'LinearClassifier', 'LinearRegressor'})"
            if operators & LINEAR
            else "; only a whole new file updates such a model: copy that to the device"
        )
        return f"{words}{way}"
    staying = _staying(model.graph)
    return staying or "no initializer of a type that travels in a patch"


def what_stays(graph: bytes) -> list[str]:
    """Say which learned numbers stay in a graph, so that no patch changes them.

    Attributes, as trees, support vectors and linear models of classical machine
    learning have them; and initializers of a type that does not travel.
    """
    found = onnx.load_model_from_string(graph).graph
    return [words for words in (_learned(found), _staying(found)) if words]


def _staying(graph: onnx.GraphProto) -> str:
    kinds = Counter(type_name(tensor.data_type) for tensor in graph.initializer)
    found = [f"{n} of type {kind}" for kind, n in kinds.items() if kind in STAYING]
    sparse = [s.values.data_type for s in graph.sparse_initializer]
    kinds = Counter(type_name(kind) for kind in sparse if kind in FLOATING)
    found += [f"{n} sparse of type {kind}" for kind, n in kinds.items()]
    words = f"tensors stay in the graph ({', '.join(found)}), and no patch changes one"
    return words if found else ""


def _learned(graph: onnx.GraphProto) -> str:
    found = [
        f"{node.op_type} ({', '.join(_numbers(node))})"
        for node in graph.node
        if _numbers(node)
    ]
    if not found:
        return ""
    return (
        f"what was learned is in attributes of {listed(found, 3)}, which are "
        "part of the graph, and no patch changes a graph"
    )


def _numbers(node: onnx.NodeProto) -> list[str]:
    """Return which attributes of an operator hold floating numbers, and how many."""
    counts = {}
    for attribute in node.attribute if node.domain == "ai.onnx.ml" else ():
        counts[attribute.name] = len(attribute.floats)
        if attribute.t.data_type in FLOATING:
            counts[attribute.name] = math.prod(attribute.t.dims)
    return [f"{name}: {count:,} numbers" for name, count in counts.items() if count]


def merged(base: Layout, target: Layout, graphs: tuple[bytes, bytes]) -> str:
    """Say that an exporter has made one tensor of several equal ones, if it has.

    Some do that, and then weights that were equal at first and differ after training
    make another network of the file.
    """
    for less, more, graph in (
        (base, target, graphs[0]),
        (target, base, graphs[1]),
    ):
        missing = {
            (tensor.dtype, tensor.shape)
            for name, tensor in more.by_name.items()
            if name not in less.by_name
        }
        readers = [
            name
            for node in onnx.load_model_from_string(graph).graph.node
            for name in set(node.input)
        ]
        for name, tensor in less.by_name.items():
            kind = tensor.dtype, tensor.shape
            if kind in missing and readers.count(name) > 1:
                which = "base" if less is base else "target"
                return (
                    f"; in the {which}, {readers.count(name)} operators read {name!r}: "
                    "some exporters and optimizers make one tensor of several that are "
                    "equal (biases of zeros, say); switch that off, or begin with "
                    "weights that all differ"
                )
    return ""


def first_difference(base: bytes, target: bytes) -> str:
    """Put into words where two graphs of :func:`split_onnx` begin to differ."""
    if not base or not target:
        return "one of them has no graph"
    a, b = onnx.load_from_string(base), onnx.load_from_string(target)
    if a.opset_import != b.opset_import or a.ir_version != b.ir_version:
        return "they are of different ONNX versions"
    parts = [
        ("input", a.graph.input, b.graph.input),
        ("output", a.graph.output, b.graph.output),
        ("operator", a.graph.node, b.graph.node),
        ("constant", a.graph.initializer, b.graph.initializer),
        ("sparse constant", a.graph.sparse_initializer, b.graph.sparse_initializer),
        ("function", a.functions, b.functions),
    ]
    for what, ours, theirs in parts:
        if words := _differ(what, ours, theirs):
            return words
    for place, mine, other in (("model.graph", a.graph, b.graph), ("model", a, b)):
        for field in mine.DESCRIPTOR.fields:
            if getattr(mine, field.name) != getattr(other, field.name):
                return f"they differ in {place}.{field.name}"
    return "their graphs are written differently"


def _differ(what: str, ours: Iterable[Any], theirs: Iterable[Any]) -> str:
    left, right = list(ours), list(theirs)
    both = [
        sorted(p.SerializeToString(deterministic=True) for p in s)
        for s in (left, right)
    ]
    if left != right and both[0] == both[1]:
        return f"the {what}s are the same ones in another order"
    for number, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            names = " and ".join(dict.fromkeys(map(_name, (a, b))))
            kind = f"; {_type(a)} stay in the graph" if what == "constant" else ""
            return f"{what} {number} differs ({names}{kind}){_in_attributes(a, b)}"
    if len(left) != len(right):
        return f"one has {len(left)} {what}s, the other {len(right)}"
    return ""


def _in_attributes(a: Any, b: Any) -> str:
    """Say that what differs are learned numbers, if they are."""
    if not isinstance(a, onnx.NodeProto) or a.op_type != b.op_type:
        return ""
    graph = onnx.GraphProto(node=[b])
    words = _learned(graph)
    return f": {words}" if words else ""


def _type(tensor: onnx.TensorProto) -> str:
    name = type_name(tensor.data_type)
    return f"numbers of type {name}" if math.prod(tensor.dims) > 1 else "single numbers"


def _name(part: Any) -> str:
    kind = getattr(part, "op_type", "")
    named = part.values if isinstance(part, onnx.SparseTensorProto) else part
    name = named.name or next(iter(part.output if kind else ()), "")
    return f"{kind} {name!r}".strip()
