# SPDX-License-Identifier: Apache-2.0
"""Run and round folders, as the packager reads them.

::

    runs/NAME/model/      once: graph.onnx, init.json, contract.json, golden.npz,
                          run.json (the run's id)
    runs/NAME/round_05/   round.json, weights.safetensors, selection.safetensors,
                          metrics.jsonl; subspaces.bin, shadow.safetensors and
                          shadow_subspaces.bin where there are any

A folder is written under a temporary name and renamed: it is complete or absent.
Fingerprints and the network's identity are computed here, from the bytes written. One
process trains a run at a time (:mod:`trainer.folder.once`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from os import PathLike
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from edge_runtime.errors import TrainingError
from edge_runtime.formats import identity
from edge_runtime.formats.contract import RawInputs
from edge_runtime.formats.contract_file import encode_contract
from edge_runtime.formats.init_weights import InitSpec, read_init_spec, write_init_spec
from edge_runtime.formats.model_folder import (
    CONTRACT_NAME,
    GOLDEN_NAME,
    GRAPH_NAME,
    METRICS_NAME,
    MODEL_NAME,
    RECORD_NAME,
    RUN_NAME,
    SELECTION_NAME,
    SHADOW_NAME,
    SHADOW_SUBSPACES_NAME,
    SUBSPACES_NAME,
    WEIGHTS_NAME,
    Outcome,
    list_rounds,
    round_name,
)
from edge_runtime.formats.subspace import Term, decode_terms, encode_terms
from edge_runtime.formats.weights import (
    Weights,
    fingerprint_chunks,
    pack_weights,
    read_weights,
    write_weights,
)
from trainer.export.graph_check import graph_outputs
from trainer.export.tensors import check_fit
from trainer.folder.changes import check_masks
from trainer.folder.contract import GivenContract, as_contract
from trainer.folder.golden import golden_of
from trainer.folder.once import written_once
from trainer.folder.record import (
    RUN_SCHEMA,
    SCHEMA,
    RoundRecord,
    as_json,
    read_round_record,
    telling_of,
)


def write_model(
    run_dir: str | PathLike[str],
    *,
    graph: bytes,
    recipe: InitSpec,
    contract: GivenContract,
    golden_inputs: RawInputs,
    golden_labels: ArrayLike | None = None,
    run_id: str = "",
) -> Path:
    """Write a run's ``model`` folder and return its path.

    Args:
        run_dir: The run's folder; made if need be.
        graph: The bytes of ``graph.onnx``.
        recipe: The init weights.
        contract: What goes into the network and comes out of it, as an object, a
            mapping of its fields, or a JSON file.
        golden_inputs: Shape (samples, ...), as a device gets them: before scale, mean
            and standard deviation. Of several inputs the arrays by name, or a tuple.
        golden_labels: What the answers should be, a row for each sample; of a
            classifier shape (samples,), integers. None where nobody knows.
        run_id: Tells the run from others of the same network; drawn by default
            (:func:`edge_runtime.formats.identity.run_id`).

    Raises:
        TrainingError: The run has a model already, or the golden samples do not fit
            the contract; nothing was written.
        OSError: The files cannot be written.
    """
    contract = as_contract(contract)
    arrays: dict[str, Any] = golden_of(contract, golden_inputs, golden_labels).arrays()
    if not contract.outputs or contract.random_outputs:
        contract = replace(contract, outputs=graph_outputs(graph))
    known = [spec.name for spec in contract.outputs]
    if unknown := [n for n in contract.random_outputs if n not in known]:
        raise TrainingError(
            f"the contract's random_outputs name {', '.join(map(repr, unknown))}; the "
            f"graph's outputs are {', '.join(known)}"
        )
    with written_once(Path(run_dir, MODEL_NAME)) as folder:
        (folder / GRAPH_NAME).write_bytes(graph)
        write_init_spec(recipe, folder)
        run = identity.Run(identity.run_id(run_id), Path(run_dir).absolute().name)
        (folder / RUN_NAME).write_bytes(identity.encode_run(run))
        (folder / CONTRACT_NAME).write_bytes(encode_contract(contract))
        np.savez(folder / GOLDEN_NAME, **arrays)
    return Path(run_dir, MODEL_NAME)


def write_round(  # noqa: PLR0913 - all but six by name
    run_dir: str | PathLike[str],
    record: RoundRecord,
    weights: Weights,
    masks: Mapping[str, Tensor],
    epochs: Sequence[Mapping[str, Any]],
    shadow: Weights | None = None,
    *,
    terms: Sequence[Term] = (),
    shadow_terms: Sequence[Term] = (),
) -> RoundRecord:
    """Write a round folder and return its record as written.

    Args:
        run_dir: The run's folder, with the model in it.
        record: What to state about the round.
        weights: The deployed weights, whole; for a kept base the base.
        masks: For each selectable tensor, in its shape, what was selected. Tensors
            without a mask are the dense part.
        epochs: What happened in each epoch, one line of ``metrics.jsonl`` each.
        shadow: Weights that no device gets yet, and that the next round trains on.
        terms: The subspaces that move the parent's tensors to the deployed ones,
            before masks and dense part count.
        shadow_terms: Those that lead from the init weights to the shadow.

    Raises:
        TrainingError: Weights, masks or record do not fit the run or each other, or
            the round exists already; nothing was written.
        PatchFormatError: There are more terms than one patch may have; likewise.
        OSError: The files cannot be read or written; a folder of another name may be
            left, which the next round removes.
    """
    model = Path(run_dir, MODEL_NAME)
    recipe = read_init_spec(model)
    check_fit(recipe.layout(), weights.layout)
    check_masks(weights.layout, masks)
    graph = (model / GRAPH_NAME).read_bytes()
    run = identity.identify(weights.layout.header, graph, model)
    complete = replace(
        record,
        model=run.model,
        target=weights.fingerprint,
        versions=record.versions or _versions(),
    )
    for name in ("model", "target"):
        if getattr(record, name) not in ("", getattr(complete, name)):
            raise TrainingError(
                f"the record states {name} {getattr(record, name)}, the files give "
                f"{getattr(complete, name)}"
            )
    _check_parent(Path(run_dir), complete, recipe)
    schema = RUN_SCHEMA if run.run else SCHEMA
    text = _to_json({"schema": schema} | as_json(complete), indent=2) + "\n"
    lines = "".join(_to_json(epoch) + "\n" for epoch in epochs)
    count = len(weights.layout.tensors)
    moves = {SUBSPACES_NAME: terms, SHADOW_SUBSPACES_NAME: shadow_terms}
    encoded = {n: encode_terms(some, count) for n, some in moves.items() if some}
    with written_once(Path(run_dir, round_name(record.round))) as folder:
        write_weights(weights, folder / WEIGHTS_NAME)
        write_weights(_packed(masks), folder / SELECTION_NAME)
        if shadow:
            write_weights(shadow, folder / SHADOW_NAME)
        for name, data in encoded.items():
            (folder / name).write_bytes(data)
        (folder / METRICS_NAME).write_text(lines, encoding="utf-8")
        (folder / RECORD_NAME).write_text(text, encoding="utf-8")
    return complete


def read_shadow(folder: Path) -> Weights | None:
    """Read the weights that a round trained but did not deploy; None without them.

    Raises:
        OSError: They cannot be read.
        RoundError: They are damaged.
    """
    path = folder / SHADOW_NAME
    with telling_of(path):
        return read_weights(path) if path.exists() else None


def read_shadow_terms(folder: Path, tensors: int) -> tuple[Term, ...]:
    """Read the subspaces that lead from the init weights to a round's shadow.

    Args:
        folder: The round's.
        tensors: Number of tensors of its weight file.

    Raises:
        OSError: They cannot be read.
        RoundError: They are damaged.
    """
    path = folder / SHADOW_SUBSPACES_NAME
    with telling_of(path):
        return decode_terms(path.read_bytes(), tensors) if path.exists() else ()


def _check_parent(run_dir: Path, record: RoundRecord, recipe: InitSpec) -> None:
    """Refuse a record whose update the packager could not find or would not send."""
    if (record.outcome == Outcome.KEPT_BASE) != (record.parent == record.target):
        raise TrainingError(
            f"round {record.round} is {record.outcome}, but leads from {record.parent} "
            f"to {record.target}; equal means kept_base"
        )
    if not record.packable:
        return  # leads from weights that were never deployed
    deployed = (read_round_record(path).target for path in list_rounds(run_dir))
    if record.parent not in deployed and record.parent != fingerprint_chunks(
        recipe.chunks()
    ):
        raise TrainingError(
            f"round {record.round} leads from {record.parent}, which is neither a "
            f"round of {run_dir} nor its init weights"
        )


def _packed(masks: Mapping[str, Tensor]) -> Weights:
    return pack_weights(
        {
            name: np.packbits(mask.cpu().numpy().ravel(), bitorder="little")
            for name, mask in masks.items()
        }
    )


def _versions() -> dict[str, str]:
    """Return versions that mean the same everywhere: without ``+cpu`` and its like."""
    libraries = {name: metadata.version(name) for name in ("torch", "numpy")}
    found = {"python": python_version()} | libraries
    return {name: version.partition("+")[0] for name, version in found.items()}


def _to_json(value: Any, indent: int | None = None) -> str:
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except (TypeError, ValueError) as err:
        raise TrainingError(
            f"something to be recorded is not finite, or not JSON ({err}): {value}"
        ) from err
