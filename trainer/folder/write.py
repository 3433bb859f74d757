# SPDX-License-Identifier: Apache-2.0
"""Run and round folders, as the packager reads them.

::

    runs/NAME/model/      once: graph.onnx, init.json, contract.json, golden.npz,
                          run.json (the run's id)
    runs/NAME/round_05/   round.json, weights.safetensors, selection.safetensors,
                          metrics.jsonl; shadow.safetensors and subspaces.bin where
                          there are any

A folder is written under a temporary name and renamed: it is complete or absent.
Fingerprints and the network's identity are computed here, from the bytes written. One
process trains a run at a time (:func:`alone`).
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import metadata
from os import PathLike
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from edge_runtime.errors import ConfigError, ContractError, TrainingError
from edge_runtime.files import lock_file, strangers
from edge_runtime.formats import identity
from edge_runtime.formats.contract import (
    METRICS,
    TASKS,
    Contract,
    InputSpec,
    OutputSpec,
    RawInputs,
    encode_contract,
)
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
from edge_runtime.update.golden import Golden
from trainer.export.graph_check import OUTPUT_TOLERANCE, graph_outputs
from trainer.export.tensors import check_fit
from trainer.folder.changes import check_masks
from trainer.folder.contract import GivenContract, as_contract
from trainer.folder.record import (
    RUN_SCHEMA,
    SCHEMA,
    RoundRecord,
    as_json,
    read_round_record,
)

# What a killed process leaves of a folder that it was writing.
_ABANDONED = re.compile(rf"\.(?:{MODEL_NAME}|round_\d{{2,}})\.part")


def make_contract(  # noqa: PLR0913 - all but two by name
    input_shape: Sequence[int | None] | Mapping[str, Sequence[int | None]],
    classes: Sequence[str] = (),
    *,
    scale: float = 1.0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    layout: str = "NCHW",
    dtype: str | Mapping[str, str] = "float32",
    accuracy_floor: float = 0.0,
    task: str = "classification",
    metric: str = "",
    bound: float | None = None,
    threshold: float = 0.0,
) -> Contract:
    """Return what goes into a network, and what comes out of it.

    The network gets ``(raw * scale - mean) / std``.

    Args:
        input_shape: Of one sample, without the batch axis; None for a size that is
            open. Of several inputs a mapping from their names, in the order of forward.
        classes: Names, by label, or of the values that the network gives.
        scale: Factor of a raw value, for example 1/255 for 8-bit images.
        mean: Per channel, or one value, of scaled values; empty for none.
        std: Likewise.
        layout: "NCHW" where the channels are on axis 1, "NHWC": on the last.
        dtype: What the network takes; int64 for tokens. Of several inputs a mapping
            from names too, or one type for all; ``scale`` and the like are for floats.
        accuracy_floor: Share of golden labels that a classifier must get right in a
            device's trial, 0 to 1.
        task: classification, multilabel, regression, segmentation, or free.
        metric: How golden labels are compared: top1, element_accuracy, iou, cosine or
            mae; the task's by default. A free task has none.
        bound: What devices ask of the metric: at least, or at most for mae.
        threshold: Above it, an answer that is yes or no means yes: 0 for logits, 0.5
            for probabilities.

    Raises:
        TrainingError: There is no such task or metric.
        ContractError: The bound is outside of the metric's range, or ``mean`` or
            ``std`` has not a value for each channel.
    """
    name = metric or TASKS.get(task, "")
    if task not in TASKS or name not in ("", *METRICS):
        raise TrainingError(
            f"task is {task!r} and metric {metric!r}, expected one of "
            f"{', '.join(TASKS)}, and of {', '.join(METRICS)}"
        )
    several = isinstance(input_shape, Mapping)
    shapes = input_shape if isinstance(input_shape, Mapping) else {"input": input_shape}
    given = tuple(
        _input(name, shape, dtype, (scale, tuple(mean), tuple(std), layout), several)
        for name, shape in shapes.items()
    )
    one_row = task in ("classification", "multilabel")
    output = OutputSpec("output", "float32", (None, len(classes)))
    return Contract(
        given,
        tuple(classes) if task not in ("regression", "free") else (),
        accuracy_floor,
        OUTPUT_TOLERANCE,
        (output,) if one_row and classes else (),
        task,
        metric,
        bound,
        threshold,
    )


def _input(
    name: str,
    shape: Sequence[int | None],
    dtype: str | Mapping[str, str],
    scaling: tuple[Any, ...],
    several: bool,
) -> InputSpec:
    kind = dtype if isinstance(dtype, str) else dtype.get(name, "float32")
    if several and not kind.startswith("float"):
        return InputSpec(name, kind, (None, *shape))
    return InputSpec(name, kind, (None, *shape), *scaling)


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
    with _written_once(Path(run_dir, MODEL_NAME)) as folder:
        (folder / GRAPH_NAME).write_bytes(graph)
        write_init_spec(recipe, folder)
        run = identity.Run(identity.run_id(run_id), Path(run_dir).absolute().name)
        (folder / RUN_NAME).write_bytes(identity.encode_run(run))
        (folder / CONTRACT_NAME).write_bytes(encode_contract(contract))
        np.savez(folder / GOLDEN_NAME, **arrays)
    return Path(run_dir, MODEL_NAME)


def golden_of(
    contract: Contract, inputs: RawInputs, labels: ArrayLike | None
) -> Golden:
    """Return the content of ``golden.npz``, which fits the contract.

    Raises:
        TrainingError: The inputs or labels do not.
    """
    try:
        by_name = contract.by_name(inputs)
    except ContractError as err:
        raise TrainingError(f"golden inputs: {err}") from err
    arrays = [np.asarray(array) for array in by_name.values()]
    values = None if labels is None else np.asarray(labels)
    for spec, array in zip(contract.inputs, arrays, strict=True):
        shape, rows = list(spec.shape), array.shape[:1]
        sizes = zip(shape, array.shape, strict=False)
        fits = all(want in (None, found) for want, found in sizes)
        fits &= array.ndim == len(shape)
        if spec.has_batch and values is not None:
            fits &= rows == values.shape[:1]
        if not fits:
            count = "no" if values is None else len(values)
            raise TrainingError(
                f"golden inputs of shape {list(array.shape)} with {count} labels do "
                f"not fit the contract's input {spec.name!r} {shape}"
            )
    if values is not None:
        values = _labels(values, contract)
    return Golden(tuple(arrays), values)


def _labels(labels: NDArray[Any], contract: Contract) -> NDArray[Any]:
    """Return golden labels in the type that the contract's metric takes."""
    if not contract.label_metric:
        raise TrainingError(
            f"golden labels are compared by a metric, and task {contract.task} has "
            "none: give one to make_contract, or no labels"
        )
    if contract.task == "classification":
        return _classes(labels, len(contract.classes))
    if labels.dtype.kind not in "biuf" or not np.isfinite(labels).all():
        raise TrainingError(
            f"golden labels are {labels.dtype}, expected finite numbers"
        )
    if contract.task == "segmentation":
        return labels.astype(np.int64)
    return labels.astype(np.float32) if labels.dtype.kind in "bf" else labels


def _classes(labels: NDArray[Any], classes: int) -> NDArray[np.int64]:
    found = labels.astype(np.int64)
    if not len(found) or found.min() < 0 or found.max() >= classes:
        raise TrainingError(
            f"golden labels must be one or more of 0 to {classes - 1}, as the "
            f"contract has {classes} classes"
        )
    if labels.dtype.kind not in "biu" and (found != labels).any():
        raise TrainingError(
            f"golden labels of classes are whole numbers, these are {labels.dtype} "
            'with fractions; for values, make the contract with task="regression"'
        )
    return found


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
        OSError: The files cannot be read or written.
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
    with _written_once(_round_folder(run_dir, record.round)) as folder:
        write_weights(weights, folder / WEIGHTS_NAME)
        write_weights(_packed(masks), folder / SELECTION_NAME)
        if shadow:
            write_weights(shadow, folder / SHADOW_NAME)
        for name, some in (
            (SUBSPACES_NAME, terms),
            (SHADOW_SUBSPACES_NAME, shadow_terms),
        ):
            if some:
                data = encode_terms(some, len(weights.layout.tensors))
                (folder / name).write_bytes(data)
        (folder / METRICS_NAME).write_text(lines, encoding="utf-8")
        (folder / RECORD_NAME).write_text(text, encoding="utf-8")
    return complete


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Keep other processes from training the same run; the kernel lets go if we die.

    Raises:
        ConfigError: Another process is training it, or something else lies there.
        OSError: The folder cannot be made or opened.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        handle = os.open(run_dir, os.O_RDONLY)
        stack.callback(os.close, handle)
        try:
            lock_file(handle, run_dir)
        except BlockingIOError as err:
            raise ConfigError(
                f"another process is training {run_dir}; wait for it, or choose "
                "another run.name"
            ) from err
        # Not before it is ours: an empty folder may be another's first round.
        stack.callback(_remove_if_empty, run_dir)
        _insist_on_run(run_dir)
        yield


def _insist_on_run(folder: Path) -> None:
    """Insist that a folder is a run's, or may become one: nobody's things lie there.

    Raises:
        ConfigError: Something else lies there.
    """
    if (folder / MODEL_NAME).is_dir() or list_rounds(folder):
        return
    parts = [p.name for p in folder.iterdir() if _ABANDONED.fullmatch(p.name)]
    if found := strangers(folder, ["lost+found", *parts]):
        raise ConfigError(
            f"{folder} is not empty and holds no run: found {found}; choose another "
            "run.name, or give another folder with --runs"
        )


def _remove_if_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()


def read_shadow(folder: Path) -> Weights | None:
    """Read the weights that a round trained but did not deploy; None without them.

    Raises:
        OSError: They cannot be read.
        WeightsError: They are malformed.
    """
    path = folder / SHADOW_NAME
    return read_weights(path) if path.exists() else None


def read_shadow_terms(folder: Path, tensors: int) -> tuple[Term, ...]:
    """Read the subspaces that lead from the init weights to a round's shadow.

    Args:
        folder: The round's.
        tensors: Number of tensors of its weight file.

    Raises:
        OSError: They cannot be read.
        PatchFormatError: They are malformed.
    """
    path = folder / SHADOW_SUBSPACES_NAME
    return decode_terms(path.read_bytes(), tensors) if path.exists() else ()


def _round_folder(run_dir: str | PathLike[str], number: int) -> Path:
    return Path(run_dir, round_name(number))


@contextmanager
def _written_once(folder: Path) -> Iterator[Path]:
    """Give a temporary folder that gets its name once everything is in it."""
    if folder.exists():
        raise TrainingError(
            f"{folder} exists already and is never written again; remove it, or choose "
            f"another run"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.parent.glob(".*.part"):
        if _ABANDONED.fullmatch(abandoned.name):  # else it is somebody's
            shutil.rmtree(abandoned)
    part = folder.with_name(f".{folder.name}.part")
    part.mkdir()
    yield part
    part.rename(folder)


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
    except ValueError as err:
        raise TrainingError(f"a number to be recorded is not finite: {value}") from err
