# SPDX-License-Identifier: Apache-2.0
"""First installation of a model from anybody: from one ONNX file to a bundle.

The file's weights become the init weights, stored in the bundle: a device keeps them,
so a patch from this very file will apply for ever, whatever the device has done since.
What a bundle needs beside them is derived from the graph where it is not given.
"""

import json
import re
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from numpy.typing import NDArray

from edge_runtime.errors import (
    BackendError,
    ContractError,
    RoundError,
    StoreError,
    TrialError,
    prefix_errors,
)
from edge_runtime.formats import bundle as layout
from edge_runtime.formats.contract import NUMBER_TYPES, Contract, tolerance_between_cpus
from edge_runtime.formats.contract_file import (
    WIDE_SCHEMA,
    encode_contract,
    parse_contract,
)
from edge_runtime.formats.frames import LEVEL
from edge_runtime.formats.identity import encode_run
from edge_runtime.formats.init_weights import (
    InitSpec,
    TensorInit,
    write_init_spec,
)
from edge_runtime.formats.json_file import read_record
from edge_runtime.formats.model_folder import (
    CONTRACT_NAME,
    GOLDEN_NAME,
    GRAPH_NAME,
    INIT_NAME,
    INIT_TENSORS_NAME,
    RUN_NAME,
)
from edge_runtime.formats.weights import Weights
from edge_runtime.update.golden import Golden
from packager.build import PackedPatch, check_budget, pack_changes
from packager.bundles.by_rows import depends_on_others, has_rows
from packager.bundles.from_round import PackedBundle, finished
from packager.bundles.golden_inputs import (
    candidates,
    made_up,
    problem_with,
    read_golden_file,
)
from packager.diff import diff
from packager.models.onnx_words import type_name
from packager.models.read import Model, header_between
from packager.release import as_text
from packager.rounds.golden import (
    check_labels,
    encode_golden,
    judged,
    loaded,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

# Whoever states one of these has said what the model is for.
TASK_FIELDS = {"task", "metric", "bound", "classes", "accuracy_floor"}
# What is said where a model is not, or should not be, asked sample by sample.
_ASKED_WHOLE = (
    "the bundle's task is free, and `dpu-edge infer` asks once for each file; if that "
    "is wrong, give the task with --contract"
)
NO_ROWS = f"it gives no row of numbers for each sample of one input: {_ASKED_WHOLE}"
_BESIDE = "what it gives for a sample depends on the samples beside it"
DEPENDS = f"{_BESIDE}: {_ASKED_WHOLE}"
DEPENDS_THOUGH_STATED = (
    f"{_BESIDE}, and `dpu-edge infer` asks for one at a time, because labels or the "
    'contract say so: give {"task": "free"} with --contract, or --batch there'
)
INPUT_FIELDS = ("name", "dtype", "shape", "scale", "mean", "std", "layout")


def adopt_model(
    model: Model,
    *,
    contract: str | PathLike[str] | None = None,
    golden: str | PathLike[str] | None = None,
    counter: int = 0,
    level: int = LEVEL,
    max_size: int | None = None,
    signers: Sequence["Ed25519PrivateKey"] = (),
) -> PackedBundle:
    """Build the bundle that installs a model on a new device.

    Args:
        model: With its graph.
        contract: A JSON file with any of the contract's fields; the others are derived
            from the graph.
        golden: An ``.npz`` file with an array for each input by its name (or
            ``inputs`` for the only one), as a device gets them, and ``labels`` if there
            are any. By default inputs are made up
            (:mod:`packager.bundles.golden_inputs`).
        counter: Release counter.
        level: zstd level of the patch, which is empty.
        max_size: Largest bundle in bytes, with its signatures.
        signers: Whose keys sign it (:mod:`packager.signing`); their public halves go
            in, for devices that are told to trust on first use.

    Raises:
        OSError: A file cannot be read.
        ContractError: The contract is malformed, or the golden inputs do not fit it; or
            the graph says too little to do without them.
        TrialError: Devices would refuse these weights.
        RoundError: ONNX Runtime cannot load or run the graph.
        BackendError: ONNX Runtime is older than the graph, or lacks an operator.
        BudgetError: The bundle is larger than ``max_size``.
    """
    text = make_contract(model, contract)
    try:
        found, answered, remarks = _tried(model, parse_contract(text), contract, golden)
    except (StoreError, BackendError) as err:
        kind = BackendError if isinstance(err, BackendError) else RoundError
        # Not where a copy of the graph lay for a moment.
        reason = re.sub(rf"\S+/{GRAPH_NAME}", "the graph", str(err))
        raise kind(f"{model.path}: ONNX Runtime cannot run it: {reason}") from err
    files: dict[str, bytes | Weights] = {
        GRAPH_NAME: model.graph,
        CONTRACT_NAME: encode_contract(found),
    }
    files |= {GOLDEN_NAME: encode_golden(answered)} | _init(model.weights)
    if model.run:
        files[RUN_NAME] = encode_run(model.run)
    patch = _nothing_to_patch(model, counter, level)
    files[layout.PATCH_NAME] = patch.data
    manifest = {
        "run": as_text(model.run.name if model.run else model.name),
        "round": patch.header.round,
        "model": model.model,
        "target": patch.header.target,
    }
    data = finished(manifest, files, signers)
    check_budget(f"the bundle of {model.path.name}", len(data), max_size)
    return PackedBundle(data, patch, (*remarks, *unserved(found)), found.task)


def _tried(
    model: Model,
    contract: Contract,
    stated: str | PathLike[str] | None,
    given: str | PathLike[str] | None,
) -> tuple[Contract, Golden, tuple[str, ...]]:
    """Return the contract with its task, golden inputs and outputs, and remarks."""
    graph = onnx.load_model_from_string(model.graph).graph
    with loaded(model.graph, contract, model.weights) as predictor:
        if given is None:
            inputs = made_up(predictor, contract, graph)
            golden = Golden(tuple(inputs.values()))
        else:
            golden = read_golden_file(given, contract)
        says = set(_read_json(Path(stated))) if stated is not None else set()
        is_open = golden.labels is None and not says & TASK_FIELDS
        feed = contract.prepare(golden.by_name(contract))
        in_rows = contract.by_rows and has_rows(predictor, contract, feed)
        depends = in_rows and depends_on_others(
            predictor, contract, feed, is_made_up=given is None
        )
        remarks: tuple[str, ...] = ()
        if is_open and (depends or not in_rows):
            remarks = (DEPENDS if depends else NO_ROWS,)
            contract = replace(contract, task="free")
        elif depends:
            remarks = (DEPENDS_THOUGH_STATED,)
        answered = judged(predictor, contract, golden)
        check_labels(replace(answered, labels=golden.labels), contract)
        return contract, answered, remarks


def _type(dtype: str) -> str:
    """Return what ONNX's types are called here, by NumPy's name or none."""
    return {"object": "text", "": "a map, sequence or optional"}.get(dtype, dtype)


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


def _nothing_to_patch(model: Model, counter: int, level: int) -> PackedPatch:
    """Return a patch from the init weights to themselves: it carries the release."""
    weights, header = model.weights, header_between(model, model, counter)
    changes = diff(weights, weights)
    return pack_changes(
        weights, weights, header, changes, parent_name="itself", level=level
    )


def _init(weights: Weights) -> dict[str, bytes | Weights]:
    """Return the recipe of the init weights, and these: every tensor is stored."""
    tensors = {
        tensor.name: TensorInit(tensor.dtype, tensor.shape, "file")
        for tensor in weights.layout.tensors
    }
    with tempfile.TemporaryDirectory() as name:
        write_init_spec(InitSpec(0, tensors, {}), name)
        recipe = Path(name, INIT_NAME).read_bytes()
    return {INIT_NAME: recipe, INIT_TENSORS_NAME: weights}


# The contract ------------------------------------------------------------------------


def make_contract(model: Model, given: str | PathLike[str] | None = None) -> bytes:
    """Return ``contract.json`` for a graph.

    Args:
        model: With its graph.
        given: A JSON file with fields that replace the derived ones. Entries of its
            ``inputs`` may be partial too: ``{"scale": 0.0039}`` for the only input.

    Raises:
        OSError: ``given`` cannot be read.
        ContractError: It is malformed or names other inputs than the graph; or the
            graph does not say what its inputs are.
    """
    stated = _read_json(Path(given)) if given is not None else {}
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


def _check_known(stated: dict[str, Any], known: Collection[str]) -> None:
    """Insist on known names: a slip of the pen would be no part of the contract."""
    for name in stated:
        if name not in known:
            raise ContractError(f"{name!r} is no field; there are {', '.join(known)}")


def _read_json(path: Path) -> dict[str, Any]:
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


# Before a patch leaves ---------------------------------------------------------------


def check_answers(base: Model, target: Model) -> str:
    """Run a patch's target on made-up inputs, as a trial runs it on golden ones.

    Args:
        base: What devices hold; where its own answers are no good, they tell nothing.
        target: What they shall hold.

    Returns:
        Why nothing could be told; empty if it was run and is good.

    Raises:
        TrialError: Devices would refuse the target.
    """
    graph = onnx.load_model_from_string(target.graph).graph
    try:
        contract = parse_contract(make_contract(target))
        inputs = next(candidates(contract, graph), {})
        problem = _problem(target, contract, inputs) if inputs else None
        if inputs and problem is None:
            return ""
        with loaded(base.graph, contract, base.weights) as predictor:
            inputs = made_up(predictor, contract, graph)
    except (ContractError, StoreError, BackendError) as err:
        return str(err)
    except TrialError:
        return f"{problem}; so does {base.path.name}"
    problem = _problem(target, contract, inputs)
    if isinstance(problem, TrialError):
        raise problem
    return str(problem or "")


def _problem(
    model: Model, contract: Contract, inputs: dict[str, NDArray[Any]]
) -> TrialError | StoreError | None:
    with loaded(model.graph, contract, model.weights) as predictor:
        return problem_with(predictor, contract, inputs)
