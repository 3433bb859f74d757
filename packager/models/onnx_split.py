# SPDX-License-Identifier: Apache-2.0
"""An ONNX file -> a graph without weights, and a weight file that it reads.

What is a weight? Every initializer of a number type that networks learn in or are
quantised to. 64-bit integers and booleans are not: they are shapes, axes and index
tables, which ONNX Runtime must see while it loads a graph; they stay inside, and so do
the few other numbers that say how large something is. What else it must see, loading
the graph tells. A difference in those is a difference of the networks.
"""

import tempfile
from collections.abc import Container, Iterable, Mapping
from os import PathLike
from pathlib import Path

import onnx
from google.protobuf.message import Message  # type: ignore[import-untyped]
from onnx import TensorProto, numpy_helper

from edge_runtime.errors import BackendError, BlockedError, StoreError, WeightsError
from edge_runtime.files import naming
from edge_runtime.formats.layout import Layout
from edge_runtime.formats.model_folder import GRAPH_NAME, WEIGHTS_NAME
from edge_runtime.formats.weights import Weights
from edge_runtime.inference.session import Backend, RunOptions, open_session
from packager.models.onnx_check import ONNX_TYPES, check_valid, refused
from packager.models.onnx_file import REMARKS, Values, is_external, read_onnx
from packager.models.onnx_lift import lift, shaping
from packager.models.onnx_words import without_weights
from packager.models.views import View, ViewedWeights

# Weights by their looks, which so far stay inside too.
INSIDE = {"C64", "F4", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"}
# ONNX type number -> type code of the weight file.
CODES = {
    TensorProto.DataType.Value(name): code
    for code, name in ONNX_TYPES.items()
    if code not in {"I64", "U64", "BOOL"} and code not in INSIDE
}
SMALL = 1 << 16  # bytes: what is larger is no shape, and never stays inside
# What registries stamp on a whole file, and what would train it further. (The domain of
# a node or a function is a part of its operator's name, and counts.)
STAMPS = ("model_version", "domain", "training_info")


def split_onnx(path: str | PathLike[str]) -> tuple[bytes, ViewedWeights]:
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
    model, values = read_onnx(path)
    for field in STAMPS:
        model.ClearField(field)
    with refused(path):
        model = lift(model, CODES.keys())
    names = _weights(model.graph)
    if not names:
        raise WeightsError(f"{path} holds no weights: {without_weights(model)}")
    check_valid(model, path)
    views = _taken_out(model.graph, names, values)
    _tidy(model, values)
    model.graph.name = "graph"
    weights = ViewedWeights(views)
    if inside := _needed_inside(model, weights):
        kept = {name: views[name] for name in views.keys() - inside}
        constants = {name: views[name].raw.tobytes() for name in inside}
        return _graph(model, (rest := ViewedWeights(kept)).layout, constants), rest
    return _graph(model, weights.layout, {}), weights


def _weights(graph: onnx.GraphProto) -> set[str]:
    stays = shaping(graph)
    return {
        tensor.name
        for tensor in graph.initializer
        # ONNX Runtime takes no empty tensor from a file either.
        if tensor.data_type in CODES and all(tensor.dims) and tensor.name not in stays
    }


def _taken_out(
    graph: onnx.GraphProto, names: Container[str], values: Values
) -> dict[str, View]:
    """Take weights out of a graph; tensors without values are left of them."""
    views = {}
    for tensor in graph.initializer:
        if tensor.name in names:
            code, shape = CODES[tensor.data_type], tuple(tensor.dims)
            views[tensor.name] = View(code, shape, *values.raw(tensor))
            bare = TensorProto(name=tensor.name, data_type=tensor.data_type)
            bare.dims.extend(shape)
            bare.data_location = TensorProto.EXTERNAL
            tensor.CopyFrom(bare)
    return views


def _tidy(message: Message, values: Values) -> None:
    """Write in one way what ONNX lets exporters write in several."""
    for field, value in message.ListFields():
        if field.name in REMARKS:
            message.ClearField(field.name)
        elif field.message_type is not None:
            for entry in [value] if isinstance(value, Message) else value:
                if isinstance(entry, TensorProto):
                    _rewrite(entry, values)
                else:
                    _tidy(entry, values)


def _rewrite(tensor: TensorProto, values: Values) -> None:
    """Keep a constant's values inside, as raw bytes, not as a list of numbers."""
    if tensor.data_type == TensorProto.STRING:
        _tidy(tensor, values)
    elif not is_external(tensor) or tensor.external_data:
        array = values.array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _graph(
    model: onnx.ModelProto, layout: Layout, inside: Mapping[str, bytes]
) -> bytes:
    """Return a graph that reads its weights from the weight file, some from inside."""
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    for tensor in whole.graph.initializer:
        if tensor.name in inside:
            tensor.ClearField("data_location")
            tensor.raw_data = inside[tensor.name]
        elif is_external(tensor):
            place = layout.by_name[tensor.name].external_data(WEIGHTS_NAME)
            for key, value in place.items():
                tensor.external_data.add(key=key, value=value)
    return bytes(whole.SerializeToString(deterministic=True))


def _write_for_loading(weights: Weights, path: Path) -> None:
    """Write a weight file of which large floating tensors are holes, read as zeros.

    Whether a graph loads does not depend on them, and they may be larger than memory.
    """
    with path.open("wb") as file:
        file.truncate(weights.layout.file_size)
        file.write(weights.layout.header)
        for tensor in weights.layout.tensors:
            large = tensor.stop - tensor.start > SMALL
            if not (large and tensor.dtype.startswith(("F", "BF"))):
                file.seek(tensor.start)
                file.write(weights[tensor.name].tobytes())


def _needed_inside(model: onnx.ModelProto, weights: Weights) -> set[str]:
    """Return the weights without which ONNX Runtime does not load the graph.

    Found by trying, the smallest first: none in nearly every model.
    """
    small = [
        tensor.name
        for tensor in sorted(weights.layout.tensors, key=lambda t: t.stop - t.start)
        if tensor.stop - tensor.start <= SMALL
    ]
    with tempfile.TemporaryDirectory() as name, naming(name):
        folder = Path(name)
        _write_for_loading(weights, folder / WEIGHTS_NAME)

        def loads(names: Iterable[str]) -> bool:
            constants = {name: weights[name].tobytes() for name in names}
            graph = _graph(model, weights.layout, constants)
            (folder / GRAPH_NAME).write_bytes(graph)
            try:
                open_session(folder, Backend.ONNXRUNTIME, RunOptions(prepack=False))
            except (BackendError, StoreError, BlockedError):
                return False
            return True

        inside: set[str] = set()
        # What does not load with all of them inside either fails for another reason,
        # which is told when it is run.
        while not loads(inside) and (inside or loads(small)):
            rest = [name for name in small if name not in inside]
            fails, enough = 0, len(rest)
            while enough - fails > 1:
                middle = (fails + enough) // 2
                if loads(inside.union(rest[:middle])):
                    enough = middle
                else:
                    fails = middle
            inside.add(rest[enough - 1])
    return inside
