# SPDX-License-Identifier: Apache-2.0
"""An ONNX file -> a graph without weights, and a weight file that it reads.

What is a weight? Every initializer of a number type that networks learn in or are
quantised to. 64-bit integers and booleans are not: they are shapes, axes and index
tables, which ONNX Runtime must see while it loads a graph; they stay inside, and so do
the few floats that say how large something is (``Resize``). A difference in those is a
difference of the networks.
"""

import math
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import (  # type: ignore[import-untyped]
    DecodeError,
    Message,
)
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.external_data_helper import load_external_data_for_model

from edge_runtime.errors import WeightsError
from edge_runtime.formats.layout import DTYPES, Layout
from edge_runtime.formats.model_folder import WEIGHTS_NAME
from edge_runtime.formats.weights import Weights, pack_weights
from edge_runtime.streams import utf8_path
from packager.models.onnx_check import ONNX_TYPES, check_valid

# Weights by their looks, which so far stay inside too.
INSIDE = {"C64", "F4", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"}
# ONNX type number -> type code of the weight file.
CODES = {
    onnx.TensorProto.DataType.Value(name): code
    for code, name in ONNX_TYPES.items()
    if code not in {"I64", "U64", "BOOL"} and code not in INSIDE
}
# Operators whose inputs from this one on decide a shape: ONNX Runtime refuses to load
# a graph in which they lie in another file.
SHAPING = {"Resize": 1, "Upsample": 1, "Range": 0}
# What exporters write for people and their own bookkeeping, some of it with paths and
# dates: it must not make two exports of one network differ.
REMARKS = {"doc_string", "metadata_props", "producer_name", "producer_version"}


def split_onnx(path: str | PathLike[str]) -> tuple[bytes, Weights]:
    """Split an ONNX file; the same network always gives the same graph.

    Args:
        path: The file; its weights may be inside it or in files beside it.

    Returns:
        The bytes of the graph without weights, and the weights.

    Raises:
        OSError: A file cannot be read.
        WeightsError: Not an ONNX file, or one without weights that a patch could
            change.
        RoundError: The ONNX checker calls the model invalid.
    """
    model = _load(path)
    _lift_constants(model.graph)
    found = list(_weights(model.graph))
    if not found:
        raise WeightsError(
            f"{path} holds no weights: no initializer of a type that a weight file has"
        )
    check_valid(model, path)
    arrays = {tensor.name: _bits(tensor) for tensor in found}
    types = {tensor.name: CODES[tensor.data_type] for tensor in found}
    weights = pack_weights(arrays, types)
    for tensor in found:
        _point_into(tensor, weights.layout)
    _tidy(model)
    model.graph.name = "graph"
    return model.SerializeToString(deterministic=True), weights


def _load(path: str | PathLike[str]) -> onnx.ModelProto:
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
        load_external_data_for_model(model, utf8_path(Path(path).parent))
    except (DecodeError, ValueError, onnx.checker.ValidationError) as err:
        raise WeightsError(
            f"{path} is neither an ONNX nor a safetensors file, or its weights are "
            f"missing ({err})"
        ) from err
    if not model.graph.node:
        raise WeightsError(f"{path} is no ONNX file with a network in it")
    return model


def _tidy(message: Message) -> None:
    """Write in one way what ONNX lets exporters write in several."""
    for field, value in message.ListFields():
        if field.name in REMARKS:
            message.ClearField(field.name)
        elif field.message_type is not None:
            for entry in [value] if isinstance(value, Message) else value:
                if isinstance(entry, onnx.TensorProto):
                    _rewrite(entry)
                else:
                    _tidy(entry)


def _rewrite(tensor: onnx.TensorProto) -> None:
    """Keep a constant's values as raw bytes, not as a list of numbers."""
    if tensor.data_type == onnx.TensorProto.STRING:
        tensor.ClearField("doc_string")
    elif tensor.data_location != onnx.TensorProto.EXTERNAL:
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _lift_constants(graph: onnx.GraphProto) -> None:
    """Turn nodes that are nothing but a weight into initializers.

    Some exporters write every weight like that. Single numbers are left alone: they
    are part of a formula more often than learned.
    """
    for node in list(graph.node):
        tensors = [a.t for a in node.attribute if a.name == "value"]
        if node.op_type != "Constant" or not tensors:
            continue
        (tensor,) = tensors
        if tensor.data_type in CODES and math.prod(tensor.dims) > 1:
            graph.node.remove(node)
            graph.initializer.add().CopyFrom(tensor)
            graph.initializer[-1].name = node.output[0]


def _weights(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    shaping = {
        name
        for node in graph.node
        for name in node.input[SHAPING.get(node.op_type, len(node.input)) :]
    }
    for tensor in graph.initializer:
        # ONNX Runtime takes no empty tensor from a file either.
        if (
            tensor.data_type in CODES
            and tensor.name not in shaping
            and all(tensor.dims)
        ):
            yield tensor


def _bits(tensor: onnx.TensorProto) -> NDArray[Any]:
    """Return a tensor in the NumPy type that the weight file has for it."""
    array = numpy_helper.to_array(tensor)
    return array.view(DTYPES[CODES[tensor.data_type]])


def _point_into(tensor: onnx.TensorProto, layout: Layout) -> None:
    """Replace a tensor's values by where the weight file has them."""
    place = layout.by_name[tensor.name]
    bare = onnx.TensorProto(
        name=tensor.name,
        data_type=tensor.data_type,
        dims=list(tensor.dims),
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, value in {
        "location": WEIGHTS_NAME,
        "offset": place.start,
        "length": place.stop - place.start,
    }.items():
        bare.external_data.add(key=key, value=str(value))
    tensor.CopyFrom(bare)


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
        ("function", a.functions, b.functions),
    ]
    for what, ours, theirs in parts:
        if words := _differ(what, ours, theirs):
            return words
    return "their graphs are written differently"


def _differ(what: str, ours: Iterable[Any], theirs: Iterable[Any]) -> str:
    left, right = list(ours), list(theirs)
    for number, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            names = " and ".join(dict.fromkeys(map(_name, (a, b))))
            kind = f"; {_type(a)} stay in the graph" if what == "constant" else ""
            return f"{what} {number} differs ({names}{kind})"
    if len(left) != len(right):
        return f"one has {len(left)} {what}s, the other {len(right)}"
    return ""


def _type(tensor: onnx.TensorProto) -> str:
    name = onnx.TensorProto.DataType.Name(tensor.data_type)
    return f"numbers of type {name}" if math.prod(tensor.dims) > 1 else "single numbers"


def _name(part: Any) -> str:
    kind = getattr(part, "op_type", "")
    return f"{kind} {part.name or (part.output[0] if kind else '')!r}".strip()
