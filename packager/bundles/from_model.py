# SPDX-License-Identifier: Apache-2.0
"""First installation of a model from anybody: from one ONNX file to a bundle.

The file's weights become the init weights, stored in the bundle: a device keeps them,
so a patch from this very file will apply for ever, whatever the device has done since.
What a bundle needs beside them is derived from the graph where it is not given.
"""

import io
import json
import math
import re
import tempfile
from collections.abc import Collection, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edge_runtime.errors import (
    BackendError,
    ContractError,
    RoundError,
    StoreError,
    TrialError,
)
from edge_runtime.files import read_bounded
from edge_runtime.formats import bundle as layout
from edge_runtime.formats.arrays import read_npz
from edge_runtime.formats.contract import (
    Contract,
    InputSpec,
    encode_contract,
    parse_contract,
)
from edge_runtime.formats.frames import LEVEL
from edge_runtime.formats.identity import encode_run
from edge_runtime.formats.init_weights import (
    InitSpec,
    TensorInit,
    philox,
    uniform,
    write_init_spec,
)
from edge_runtime.formats.json_file import read_record
from edge_runtime.formats.layout import DTYPES
from edge_runtime.formats.model_folder import (
    CONTRACT_NAME,
    GOLDEN_NAME,
    GRAPH_NAME,
    RUN_NAME,
)
from edge_runtime.formats.weights import Weights
from edge_runtime.limits import limits
from packager.build import (
    PackedPatch,
    check_budget,
    encode_changes,
    prefix_errors,
)
from packager.bundles.from_round import PackedBundle
from packager.diff import diff
from packager.models.read import Model, header_between
from packager.rounds.golden import run_golden, with_outputs
from packager.signing import carried_keys, sign
from packager.zip_file import encode_bundle

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SAMPLES = 4  # golden inputs that are made up where none are given
# Allowed difference of outputs between CPUs, relative to the largest one: kernels for
# half precision and 8 bits round and saturate differently from CPU to CPU.
EXACT_TOLERANCE, COARSE_TOLERANCE = 1e-4, 2e-2
INPUT_FIELDS = ("name", "dtype", "shape", "scale", "mean", "std", "layout")
COARSE_TYPES = {"F16", "BF16", "I8", "U8"} | {
    code for code in DTYPES if code.startswith(("F4", "F6_", "F8_"))
}


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
        golden: An ``.npz`` file with ``inputs``, as a device gets them, and ``labels``
            if there are any. By default a few random inputs, the same each time: they
            tell a broken runtime, not a bad model.
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
    spec = _only_input(model, parse_contract(text))
    arrays = {"inputs": made_up(spec)} if golden is None else _read_golden(golden)
    files = {GRAPH_NAME: model.graph, CONTRACT_NAME: text} | _init(model.weights)
    files[GOLDEN_NAME] = _npz(arrays)
    try:
        files[GOLDEN_NAME] = with_outputs(files, model.weights)
    except (StoreError, BackendError) as err:
        kind = BackendError if isinstance(err, BackendError) else RoundError
        # Not where a copy of the graph lay for a moment.
        reason = re.sub(rf"\S+/{GRAPH_NAME}", "the graph", str(err))
        raise kind(f"{model.path}: ONNX Runtime cannot run it: {reason}") from err
    if model.run:
        files[RUN_NAME] = encode_run(model.run)
    patch = _nothing_to_patch(model, counter, level)
    files[layout.PATCH_NAME] = patch.data
    manifest = {
        "run": model.run.name if model.run else model.name,
        "round": patch.header.round,
        "model": model.model,
        "target": patch.header.target,
    }
    files |= carried_keys(signers)
    data = sign(encode_bundle(manifest, files), signers)
    check_budget(f"the bundle of {model.path.name}", len(data), max_size)
    return PackedBundle(data, patch)


def _nothing_to_patch(model: Model, counter: int, level: int) -> PackedPatch:
    """Return a patch from the init weights to themselves: it carries the release."""
    weights, header = model.weights, header_between(model, model, counter)
    changes = diff(weights, weights)
    data = encode_changes(weights, weights, header, changes, level=level)
    return PackedPatch(data, header, "itself", {change.name: 0 for change in changes})


def _init(weights: Weights) -> dict[str, bytes]:
    tensors = {
        tensor.name: TensorInit(tensor.dtype, tensor.shape, "file")
        for tensor in weights.layout.tensors
    }
    with tempfile.TemporaryDirectory() as name:
        write_init_spec(InitSpec(0, tensors, weights), name)
        return {path.name: path.read_bytes() for path in Path(name).iterdir()}


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
    coarse = any(t.dtype in COARSE_TYPES for t in model.weights.layout.tensors)
    derived = {
        "schema": 1,
        "inputs": inputs,
        "outputs": [_describe(value) for value in graph.output],
        "classes": [],
        "accuracy_floor": 0.0,
        "output_tolerance": COARSE_TOLERANCE if coarse else EXACT_TOLERANCE,
    }
    with prefix_errors(name):
        _check_known(stated, derived.keys())
        merged = _merge(inputs, stated.get("inputs", []))
        return encode_contract(
            parse_contract(json.dumps(derived | stated | {"inputs": merged}))
        )


def _check_known(stated: dict[str, Any], known: Collection[str]) -> None:
    """Insist on known names: a slip of the pen would be no part of the contract."""
    for name in stated:
        if name not in known:
            raise ContractError(f"{name!r} is no field; there are {', '.join(known)}")


def _read_json(path: Path) -> dict[str, Any]:
    stated = dict(read_record(path, "contract_bytes", str(path), ContractError).values)
    if not isinstance(stated.get("inputs", []), list):
        raise ContractError(f"{path} is no contract: an object with a list of inputs")
    return stated


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
    try:
        _run_made_up(target)
    except (ContractError, StoreError, BackendError) as err:
        return str(err)
    except TrialError as err:
        try:
            _run_made_up(base)
        except TrialError:
            return f"{err}; so does {base.path.name}"
        raise
    return ""


def _run_made_up(model: Model) -> None:
    text = make_contract(model)
    inputs = made_up(_only_input(model, parse_contract(text)))
    golden = _npz({"inputs": inputs})
    files = {GRAPH_NAME: model.graph, CONTRACT_NAME: text, GOLDEN_NAME: golden}
    run_golden(files, model.weights)


# Golden inputs -----------------------------------------------------------------------


def _only_input(model: Model, contract: Contract) -> InputSpec:
    if len(contract.inputs) != 1:
        names = ", ".join(spec.name for spec in contract.inputs) or "none"
        raise ContractError(
            f"{model.path} takes several inputs or none ({names}); devices try new "
            "weights with one array of golden inputs, so a bundle is for models with "
            "one input"
        )
    return contract.inputs[0]


def made_up(spec: InputSpec) -> NDArray[Any]:
    """Return random inputs, the same everywhere; the graph gets values in [0, 1).

    Raises:
        ContractError: A size other than the batch is open.
    """
    batch, *rest = spec.shape or (None,)
    sizes = [n for n in rest if n is not None]
    if len(sizes) < len(rest) or not spec.shape:
        raise ContractError(
            f"input {spec.name!r} has shape {list(spec.shape)}: its sizes are open, so "
            "golden inputs cannot be made up; give some with --golden"
        )
    shape = (SAMPLES if batch is None else batch, *sizes)
    words = philox(0, spec.name)
    values = uniform(words, math.prod(shape), 0.5).reshape(shape) + np.float32(0.5)
    if np.dtype(spec.dtype).kind == "f":
        return np.asarray(values / np.float32(spec.scale))
    return np.asarray(np.rint(values), spec.dtype)  # 0 or 1: valid as an index, too


def _read_golden(path: str | PathLike[str]) -> dict[str, NDArray[Any]]:
    what = f"golden inputs {path}"
    data = read_bounded(Path(path), "golden_bytes", what, ContractError)
    try:
        arrays = read_npz(data, ("inputs", "labels"), limit=limits().golden_bytes)
    except ContractError as err:
        raise ContractError(
            f"{path} is no .npz file of arrays ({err}); make one with "
            "numpy.savez(FILE, inputs=..., labels=...)"
        ) from err
    if "inputs" not in arrays:
        raise ContractError(
            f"{path} lacks an array 'inputs'; beside it there may be 'labels'"
        )
    if len({len(np.atleast_1d(array)) for array in arrays.values()}) > 1:
        raise ContractError(f"{path} has more inputs than labels, or fewer")
    return arrays


def _npz(arrays: dict[str, NDArray[Any]]) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()
