# SPDX-License-Identifier: Apache-2.0
"""The contract of a model from anybody: read off its graph where it is not stated."""

import json
from collections.abc import Collection, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import onnx

from edge_runtime.errors import ContractError, prefix_errors
from edge_runtime.formats.contract import NUMBER_TYPES, Contract, tolerance_between_cpus
from edge_runtime.formats.contract_file import (
    WIDE_SCHEMA,
    encode_contract,
    parse_contract,
)
from edge_runtime.formats.json_file import read_record
from packager.models.onnx_words import type_name
from packager.models.read import Model

INPUT_FIELDS = ("name", "dtype", "shape", "scale", "mean", "std", "layout")


def make_contract(model: Model, given: str | PathLike[str] | None = None) -> bytes:
    """Return ``contract.json`` for a graph.

    Args:
        model: With its graph.
        given: A JSON file with fields that replace the derived ones. Entries of its
            ``inputs`` may be partial too: ``{"scale": 0.0039}`` for the only input.

    Raises:
        OSError: ``given`` cannot be read.
        ContractError: It is malformed or names other inputs than the graph; or the
            graph does not say what its inputs are, or that they are something else.
    """
    stated = read_stated(Path(given)) if given is not None else {}
    name = "the contract" if given is None else given
    graph = onnx.load_model_from_string(model.graph).graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [_describe(v) for v in graph.input if v.name not in weights]
    _check_inputs(inputs)
    derived = {
        "schema": WIDE_SCHEMA,
        "inputs": inputs,
        "outputs": [_describe(value) for value in graph.output],
        "classes": [],
        "accuracy_floor": 0.0,
        "output_tolerance": tolerance_between_cpus(model.weights.layout),
        "task": "classification",
        "metric": "",
        "bound": None,
        "threshold": 0.0,
        "random_outputs": [],
        "probabilities": _ends_in_softmax(graph),
    }
    with prefix_errors(name):
        _check_known(stated, derived.keys())
        merged = _merge(inputs, stated.get("inputs", []))
        found = parse_contract(json.dumps(derived | stated | {"inputs": merged}))
        _check_fits(found, inputs)
        names = [spec.name for spec in found.outputs]
        known = [value.name for value in graph.output]
        if names != known[: len(names)]:
            raise ContractError(
                f"the contract describes the outputs {', '.join(names)}; the graph "
                f"gives, in this order, {', '.join(known)}"
            )
        return encode_contract(found)


def _ends_in_softmax(graph: onnx.GraphProto) -> bool:
    """Return whether the first output is a softmax, as it is or in another type."""
    makers = {name: node for node in graph.node for name in node.output}
    node = makers.get(graph.output[0].name) if graph.output else None
    while node and node.op_type in ("Cast", "Identity"):
        node = makers.get(node.input[0])
    return node is not None and node.op_type == "Softmax"


def _check_inputs(inputs: list[dict[str, Any]]) -> None:
    """Insist on inputs that a device can feed."""
    if not inputs:
        raise ContractError(
            "the graph takes no inputs, so there is nothing to answer; export it with "
            "its inputs"
        )
    for entry in inputs:
        if entry["dtype"] not in NUMBER_TYPES:
            raise ContractError(
                f"input {entry['name']!r} takes {_type(entry['dtype'])}, and "
                f"devices feed tensors of {', '.join(NUMBER_TYPES)}; export the part "
                "behind the tokenizer, lookup or cast"
            )
        if entry["shape"] is None:
            raise ContractError(
                f"input {entry['name']!r} has no shape in the graph, not even a number "
                "of axes; export it with one (sizes may stay open)"
            )


def _check_fits(contract: Contract, inputs: list[dict[str, Any]]) -> None:
    """Insist on types and sizes that the graph takes; its open sizes may be stated."""
    for spec, entry in zip(contract.inputs, inputs, strict=True):
        known = entry["shape"]
        fits = len(known) == len(spec.shape) and all(
            size in (None, stated)
            for size, stated in zip(known, spec.shape, strict=True)
        )
        if not fits or spec.dtype != entry["dtype"]:
            raise ContractError(
                f"input {spec.name!r} is {spec.dtype} {list(spec.shape)}, and the "
                f"graph takes {entry['dtype']} {known} (None: any size); leave type "
                "and shape out: 'scale', 'mean' and 'std' say how raw values of any "
                "type become these numbers"
            )


def _check_known(stated: dict[str, Any], known: Collection[str]) -> None:
    """Insist on known names: a slip of the pen would be no part of the contract."""
    for name in stated:
        if name not in known:
            raise ContractError(f"{name!r} is no field; there are {', '.join(known)}")


def read_stated(path: Path) -> dict[str, Any]:
    """Read what somebody states of a contract, with any of its fields."""
    stated = read_record(path, "contract_bytes", str(path), ContractError)
    stated.records("inputs", ())  # each is an object
    return dict(stated.values)


def _merge(derived: list[dict[str, Any]], stated: list[Any]) -> list[dict[str, Any]]:
    names = [entry["name"] for entry in derived]
    found: dict[str, dict[str, Any]] = {}
    for entry in stated:
        _check_known(entry, INPUT_FIELDS)
        name = entry.get("name", names[0] if len(names) == 1 else None)
        if name not in names:
            raise ContractError(
                f"the contract describes an input {name!r}, the graph takes "
                f"{', '.join(names)}"
            )
        if name in found:
            raise ContractError(f"the contract describes the input {name!r} twice")
        found[name] = entry
    return [entry | found.get(entry["name"], {}) for entry in derived]


def _describe(value: onnx.ValueInfoProto) -> dict[str, Any]:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type"):  # a list or map, as some outputs are
        return {"name": value.name, "dtype": "", "shape": None}
    shape: list[int | None] | None = None
    if kind.HasField("shape"):
        # Some exporters write -1 where any size goes.
        sizes = [(d.HasField("dim_value"), d.dim_value) for d in kind.shape.dim]
        shape = [size if given and size >= 0 else None for given, size in sizes]
    if kind.elem_type not in onnx.TensorProto.DataType.values()[1:]:
        raise ContractError(
            f"the type of {value.name!r} is {type_name(kind.elem_type)}, expected one "
            "of ONNX's; export the model again"
        )
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    return {"name": value.name, "dtype": dtype, "shape": shape}


def unserved(contract: Contract) -> Iterator[str]:
    """Yield in words what a model gives and devices do not serve."""
    for spec in contract.outputs:
        if spec.dtype not in NUMBER_TYPES:
            kind = f"of {_type(spec.dtype)}" if spec.dtype else "a map or sequence"
            yield (
                f"output {spec.name!r} is {kind}: devices neither compare nor print "
                "it; export the numbers themselves (scikit-learn: options={'zipmap': "
                "False}), or cast them to float32"
            )


def _type(dtype: str) -> str:
    """Return what ONNX's types are called here, by NumPy's name or none."""
    return {"object": "text", "": "a map, sequence or optional"}.get(dtype, dtype)
