# SPDX-License-Identifier: Apache-2.0
"""First installation of a model from anybody: from one ONNX file to a bundle.

The file's weights become the init weights, stored in the bundle: a device keeps them,
so a patch from this very file will apply for ever, whatever the device has done since.
What a bundle needs beside them is derived from the graph where it is not given.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from edge_runtime.errors import BackendError, BlockedError, RoundError, StoreError
from edge_runtime.files import naming
from edge_runtime.formats import bundle as layout
from edge_runtime.formats.contract import Contract
from edge_runtime.formats.contract_file import encode_contract, parse_contract
from edge_runtime.formats.frames import LEVEL
from edge_runtime.formats.identity import encode_run
from edge_runtime.formats.init_weights import InitSpec, TensorInit, write_init_spec
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
from packager.bundles.derived_contract import make_contract, read_stated, unserved
from packager.bundles.from_round import PackedBundle, finished
from packager.bundles.golden_inputs import made_up, read_golden_file
from packager.diff import diff
from packager.models.read import Model, header_between
from packager.release import as_text
from packager.rounds.golden import check_labels, encode_golden, judged, loaded

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
        BlockedError: There is not the memory to run it.
        BudgetError: The bundle is larger than ``max_size``.
    """
    text = make_contract(model, contract)
    try:
        found, answered, remarks = _tried(model, parse_contract(text), contract, golden)
    except (StoreError, BackendError, BlockedError) as err:
        kind = RoundError if isinstance(err, StoreError) else type(err)
        raise kind(f"{model.path}: ONNX Runtime cannot run it: {err}") from err
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
        says = set(read_stated(Path(stated))) if stated is not None else set()
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
    with tempfile.TemporaryDirectory() as name, naming(name):
        write_init_spec(InitSpec(0, tensors, {}), name)
        recipe = Path(name, INIT_NAME).read_bytes()
    return {INIT_NAME: recipe, INIT_TENSORS_NAME: weights}
