# SPDX-License-Identifier: Apache-2.0
"""Does the graph read its weights from where the weight file has them?

A wrong offset gives a network that runs and is wrong, on every device; so the graph is
held against the weight file before it travels, which is once, in the bundle.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from edge_runtime.errors import BackendError, RoundError
from edge_runtime.formats.layout import Layout
from edge_runtime.formats.model_folder import GRAPH_NAME, WEIGHTS_NAME
from packager.models.onnx_file import check_texts, is_external
from packager.models.onnx_words import type_name

OWN = ("", "ai.onnx")  # the domain of ONNX's own operators
# ONNX names of the types that a weight file can hold.
ONNX_TYPES = {
    "F64": "DOUBLE",
    "I64": "INT64",
    "U64": "UINT64",
    "F32": "FLOAT",
    "I32": "INT32",
    "U32": "UINT32",
    "F16": "FLOAT16",
    "BF16": "BFLOAT16",
    "I16": "INT16",
    "U16": "UINT16",
    "C64": "COMPLEX64",
    "F4": "FLOAT4E2M1",
    "F8_E8M0": "FLOAT8E8M0",
    "F8_E5M2FNUZ": "FLOAT8E5M2FNUZ",
    "F8_E4M3FNUZ": "FLOAT8E4M3FNUZ",
    "F8_E5M2": "FLOAT8E5M2",
    "F8_E4M3": "FLOAT8E4M3FN",
    "I8": "INT8",
    "U8": "UINT8",
    "BOOL": "BOOL",
}


def check_graph(graph: bytes, layout: Layout, path: str = GRAPH_NAME) -> None:
    """Insist that a graph and a weight file fit each other.

    Args:
        graph: The bytes of the ONNX file.
        layout: Of the weight file.
        path: What to call it in an error.

    Raises:
        RoundError: A tensor of the weight file is not an initializer of the graph, or
            an initializer points somewhere else; the tensor is named. Or the graph is
            not valid.
        WeightsError: A name in it is no text.
    """
    model = _load(graph, path)
    external = _external(model)
    for name in [*layout.by_name, *external]:
        if name not in external:
            raise RoundError(
                f"{path} does not read {name!r} from {WEIGHTS_NAME}, so new values of "
                "it would change nothing; leave it out of the checkpoint, or export a "
                "graph that has it as an initializer with external data"
            )
        if name not in layout.by_name:
            raise RoundError(f"{path} reads {name!r}, which {WEIGHTS_NAME} lacks")
    # With another set of tensors, all the places would differ too.
    for name in layout.by_name:
        found = _found(external[name])
        for what, expected in _expected(layout, name).items():
            if found[what] != expected:
                raise RoundError(
                    f"{path} reads {name!r} with {what} {found[what]}, but in "
                    f"{WEIGHTS_NAME} it is {expected}; export the graph again"
                )
    check_valid(model, path)


def weights_read(graph: bytes, path: str = GRAPH_NAME) -> set[str]:
    """Return the names of the tensors that a graph reads from its weight file.

    Raises:
        RoundError: It is not an ONNX file.
        WeightsError: A name in it is no text.
    """
    return set(_external(_load(graph, path)))


def check_valid(model: onnx.ModelProto, path: object) -> None:
    """Insist on what the ONNX checker insists on.

    Of two initializers of one name, say, ONNX Runtime takes one and a weight file the
    other. Values of tensors are not looked at: the checker gets them as inputs.

    Raises:
        RoundError: The checker refuses the model; its reason is in the message.
        BackendError: It is newer than the checker.
    """
    _check_age(model, path)
    bare = onnx.ModelProto(ir_version=model.ir_version, functions=model.functions)
    bare.opset_import.extend(model.opset_import)
    graph = bare.graph
    graph.name = model.graph.name or "graph"
    graph.node.extend(model.graph.node)
    graph.output.extend(map(_with_shape, model.graph.output))
    graph.sparse_initializer.extend(model.graph.sparse_initializer)
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = (v for v in model.graph.input if v.name not in weights)
    graph.input.extend(map(_with_shape, inputs))
    graph.input.extend(
        onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims))
        for t in model.graph.initializer
    )
    with refused(path):
        onnx.checker.check_model(bare)


@contextmanager
def refused(path: object) -> Iterator[None]:
    """Let what ONNX's own code says of a model be an error about its file."""
    try:
        yield
    except (onnx.checker.ValidationError, RuntimeError) as err:
        reason = " ".join(str(err).split())
        raise RoundError(
            f"{path} is not valid ONNX: {reason[:300]}; export it again"
        ) from err


def _load(graph: bytes, path: str) -> onnx.ModelProto:
    try:
        model = onnx.load_model_from_string(graph)
    except DecodeError as err:
        raise RoundError(f"{path} is not an ONNX file: {err}") from err
    check_texts(model, path)
    return model


def _external(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Return by name the initializers whose values lie in another file."""
    return {t.name: t for t in model.graph.initializer if is_external(t)}


def _with_shape(value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    """Return a value that has a shape for the checker; none at all is an open one."""
    given = onnx.ValueInfoProto()
    given.CopyFrom(value)
    if value.type.HasField("tensor_type"):
        given.type.tensor_type.shape.SetInParent()
    return given


def _check_age(model: onnx.ModelProto, path: object) -> None:
    opset = max((o.version for o in model.opset_import if o.domain in OWN), default=1)
    for what, found, known in (
        ("IR version", model.ir_version, int(onnx.IR_VERSION)),
        ("opset", opset, onnx.defs.onnx_opset_version()),
    ):
        if found > known:
            raise BackendError(
                f"{path} has {what} {found}, and onnx {onnx.__version__} here knows up "
                f"to {known}; install a newer one (pip install --upgrade onnx), or "
                "export the model for an older one"
            )


def _expected(layout: Layout, name: str) -> dict[str, object]:
    tensor = layout.by_name[name]
    return {
        "type": ONNX_TYPES.get(tensor.dtype, f"no ONNX type ({tensor.dtype})"),
        "shape": tensor.shape,
        **tensor.external_data(WEIGHTS_NAME),
    }


def _found(initializer: onnx.TensorProto) -> dict[str, object]:
    keys = {entry.key: entry.value for entry in initializer.external_data}
    return {
        "type": type_name(initializer.data_type),
        "shape": tuple(initializer.dims),
        "location": keys.get("location"),
        "offset": keys.get("offset", "0"),
        "length": keys.get("length"),
    }
