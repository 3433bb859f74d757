"""Does the graph read its weights from where the weight file has them?

A wrong offset gives a network that runs and is wrong, on every device; so the graph is
held against the weight file before it travels, which is once, in the bundle.
"""

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from edge_runtime.errors import RoundError
from edge_runtime.formats.model_folder import GRAPH_NAME, WEIGHTS_NAME
from edge_runtime.formats.weights import Layout

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
            an initializer points somewhere else; the tensor is named.
    """
    try:
        model = onnx.load_model_from_string(graph)
    except DecodeError as err:
        raise RoundError(f"{path} is not an ONNX file: {err}") from err
    external = {
        tensor.name: tensor
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    for name in [*layout.by_name, *external]:
        if name not in external:
            raise RoundError(
                f"{path} does not read {name!r} from {WEIGHTS_NAME}, so new values of "
                "it would change nothing; export the graph with it as an initializer "
                "with external data"
            )
        if name not in layout.by_name:
            raise RoundError(f"{path} reads {name!r}, which {WEIGHTS_NAME} lacks")
        found = _found(external[name])
        for what, expected in _expected(layout, name).items():
            if found[what] != expected:
                raise RoundError(
                    f"{path} reads {name!r} with {what} {found[what]}, but in "
                    f"{WEIGHTS_NAME} it is {expected}; export the graph again"
                )


def _expected(layout: Layout, name: str) -> dict[str, object]:
    tensor = layout.by_name[name]
    return {
        "type": ONNX_TYPES[tensor.dtype],
        "shape": tensor.shape,
        "location": WEIGHTS_NAME,
        "offset": str(tensor.start),
        "length": str(tensor.stop - tensor.start),
    }


def _found(initializer: onnx.TensorProto) -> dict[str, object]:
    keys = {entry.key: entry.value for entry in initializer.external_data}
    return {
        "type": onnx.TensorProto.DataType.Name(initializer.data_type),
        "shape": tuple(initializer.dims),
        "location": keys.get("location"),
        "offset": keys.get("offset", "0"),
        "length": keys.get("length"),
    }
