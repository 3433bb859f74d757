# SPDX-License-Identifier: Apache-2.0
"""What a model answers to its golden inputs, in ONNX Runtime here.

A bundle carries the outputs of its own weights, a patch may carry some of its target's:
so a device can tell whether its own runtime computes the same.
"""

import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import (
    ContractError,
    DpuError,
    RoundError,
    StoreError,
    TrialError,
)
from edge_runtime.formats.contract import Contract, parse_contract
from edge_runtime.formats.model_folder import (
    CONTRACT_NAME,
    GOLDEN_NAME,
    GRAPH_NAME,
    WEIGHTS_NAME,
)
from edge_runtime.formats.sections import MAX_COUNTED_BYTES
from edge_runtime.formats.weights import Weights
from edge_runtime.inference.predictor import Predictor
from edge_runtime.update.golden import (
    MAX_OUTPUTS,
    Golden,
    check_outputs,
    comparable,
    first_output,
    read_golden,
    relative_difference,
)
from edge_runtime.update.metrics import METRICS
from packager.rounds.folder import RoundFolder, read_model_file

# Of each output after the first: so much is kept of it, and one row at least if that
# is no larger than the second.
MAX_OTHER_BYTES, MAX_ROW_BYTES = 1 << 18, 1 << 22
NEEDED = (GRAPH_NAME, CONTRACT_NAME, GOLDEN_NAME)


def expected_outputs(round_: RoundFolder, count: int) -> bytes:
    """Return what a patch to a round may carry: outputs for the first golden inputs.

    Args:
        round_: The round whose weights give them.
        count: For how many inputs; all of them if there are fewer.

    Raises:
        RoundError: They are more than a patch can carry.
        DpuError: As :func:`run_golden`.
    """
    files = {name: read_model_file(round_, name) for name in NEEDED}
    first = first_output(run_golden(files, round_.weights).outputs)
    data = first[:count].astype("<f4").tobytes()
    if len(data) > MAX_COUNTED_BYTES:
        raise RoundError(
            f"{round_.path}: the expected outputs have {len(data)} bytes, a patch "
            f"carries up to {MAX_COUNTED_BYTES}: ask for fewer"
        )
    return data


def try_round(round_: RoundFolder) -> list[str]:
    """Run a round's weights on its golden inputs, as every device's trial will.

    Returns:
        Names of files that the run lacks for it; where there are some, nothing was run.

    Raises:
        TrialError: Devices would refuse these weights.
        DpuError: As :func:`run_golden`.
    """
    folder = round_.model_folder
    if lacking := [name for name in NEEDED if not (folder / name).is_file()]:
        return lacking
    files = {name: read_model_file(round_, name) for name in NEEDED}
    run_golden(files, round_.weights)
    return []


def with_outputs(files: Mapping[str, bytes], weights: Weights) -> bytes:
    """Return ``golden.npz`` with the outputs of these weights: :func:`run_golden`."""
    file = io.BytesIO()
    arrays: dict[str, Any] = run_golden(files, weights).arrays()
    np.savez(file, **arrays)
    read_golden(file.getvalue())  # as devices will, within their limits
    return file.getvalue()


def run_golden(files: Mapping[str, bytes], weights: Weights) -> Golden:
    """Return golden inputs, labels and outputs, after their trial.

    Args:
        files: ``graph.onnx``, ``contract.json`` and ``golden.npz``, by name. Golden
            inputs without labels get what these weights answer, so that the contract's
            floor says how far later releases may stray from them.
        weights: What the graph reads.

    Raises:
        ContractError: The contract is malformed or the golden inputs do not fit it.
        TrialError: Devices would refuse these weights: an output is not finite, is no
            number, or differs from run to run.
        StoreError: ONNX Runtime cannot load the graph.
    """
    golden = read_golden(files[GOLDEN_NAME])
    contract = parse_contract(files[CONTRACT_NAME])
    inputs, labels = golden.by_name(contract), golden.labels
    with tempfile.TemporaryDirectory() as name:
        slot = Path(name)
        try:
            (slot / GRAPH_NAME).write_bytes(files[GRAPH_NAME])
            (slot / WEIGHTS_NAME).write_bytes(weights.data)
        except OSError as err:  # a full disk names no file
            raise OSError(err.errno, err.strerror, name) from err
        predictor = Predictor(slot, contract)
        try:
            outputs, again = (predictor.predict_all(inputs) for _ in range(2))
        except DpuError:
            raise
        except Exception as err:
            # ONNX Runtime's own exceptions share no base but this one.
            raise StoreError(f"the graph cannot be run on its inputs: {err}") from err
    answer = first_output(outputs)
    metric = METRICS.get(contract.label_metric)
    if labels is None and metric and metric.name == "top1" and answer.ndim < 2:
        # What is no classifier has no answer; any label of the right length will do.
        labels = np.zeros(len(golden.inputs[0]), np.int64)
    elif labels is None and metric and contract.label_bound is not None:
        labels = metric.labels(answer, contract.threshold)
    check_outputs(outputs, labels, contract)
    _check_repeats(outputs, again, contract)
    return Golden(golden.inputs, labels, _kept(outputs, contract))


def check_labels(golden: Golden, contract: Contract) -> None:
    """Insist that golden labels, and the names of classes, fit the first output.

    Args:
        golden: With outputs, as :func:`run_golden` gives it.
        contract: Names classes and metric.

    Raises:
        ContractError: They do not.
    """
    output, metric = golden.outputs[0], METRICS.get(contract.label_metric)
    if output is None:
        return
    axis = 1 if contract.task == "segmentation" else -1
    width = output.shape[axis] if output.ndim > 1 else 1
    if contract.classes and len(contract.classes) != width:
        raise ContractError(
            f"the contract names {len(contract.classes)} classes, the first output has "
            f"{width} numbers for each input (shape {list(output.shape)})"
        )
    if golden.labels is not None and metric and output.ndim > 1:
        metric.sums(output, golden.labels, contract.threshold)


def _check_repeats(first: list[Any], again: list[Any], contract: Contract) -> None:
    for number, (output, other) in enumerate(zip(first, again, strict=True)):
        if contract.is_random(number) or (number and not comparable(output)):
            continue
        difference = relative_difference(np.asarray(other), np.asarray(output))
        if not difference <= contract.output_tolerance:
            raise TrialError(
                f"output {number + 1} differs by {difference:.2g} of the largest value "
                "when the model runs again on the same inputs: it draws random "
                "numbers, and every device would refuse it; export it for inference "
                "(model.eval(), no Dropout, no RandomNormal), or name the output in "
                "the contract's random_outputs"
            )


def _kept(outputs: list[Any], contract: Contract) -> tuple[NDArray[Any] | None, ...]:
    """Return what devices compare: the first output, and the first rows of others."""
    found: list[NDArray[Any] | None] = []
    for number, output in enumerate(outputs[:MAX_OUTPUTS]):
        found.append(None)
        if contract.is_random(number):
            continue
        if not number:
            found[0] = output
        elif comparable(output) and output.nbytes:
            rows = (
                max(1, len(output) * MAX_OTHER_BYTES // output.nbytes)
                if output.ndim
                else 0
            )
            kept = output[:rows] if output.ndim else output
            if kept.nbytes <= MAX_ROW_BYTES:
                found[number] = kept
    return tuple(found)
