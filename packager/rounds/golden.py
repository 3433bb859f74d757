# SPDX-License-Identifier: Apache-2.0
"""What a model answers to its golden inputs, in ONNX Runtime here.

A bundle carries the outputs of its own weights, a patch may carry some of its target's:
so a device can tell whether its own runtime computes the same.
"""

import io
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import (
    BackendError,
    BlockedError,
    ContractError,
    RoundError,
    StoreError,
    TrialError,
)
from edge_runtime.files import naming
from edge_runtime.formats.contract import Contract
from edge_runtime.formats.contract_file import parse_contract
from edge_runtime.formats.model_folder import (
    CONTRACT_NAME,
    GOLDEN_NAME,
    GRAPH_NAME,
    WEIGHTS_NAME,
)
from edge_runtime.formats.sections import MAX_COUNTED_BYTES
from edge_runtime.formats.weights import Weights
from edge_runtime.inference.predictor import Predictor
from edge_runtime.inference.session import RunOptions
from edge_runtime.update.golden import (
    MAX_OUTPUTS,
    MAX_WHOLE_BYTES,
    Golden,
    check_outputs,
    first_tensor,
    is_tensor,
    read_golden,
    relative_difference,
)
from edge_runtime.update.metrics import METRICS
from packager.rounds.folder import RoundFolder, read_model_file

# Of the first output, and of each one after it: so much is kept, and one row at least
# if that is no larger than the last.
MAX_FIRST_BYTES, MAX_ROW_BYTES = 1 << 24, 1 << 22
# Share by which inputs are moved to see what other CPUs might answer.
NUDGE = np.float64(1e-6)
# From so many bytes on, weights are used where they lie: answers that are needed once
# are not worth a copy in memory.
UNPACKED_BYTES = 1 << 29
NEEDED = (GRAPH_NAME, CONTRACT_NAME, GOLDEN_NAME)


def expected_outputs(round_: RoundFolder, count: int) -> bytes:
    """Return what a patch to a round may carry: the first rows of the first output.

    Args:
        round_: The round whose weights give them, for the golden inputs.
        count: How many rows; all of them if there are fewer.

    Raises:
        RoundError: They are more than a patch can carry, or nothing to go by.
        DpuError: As :func:`run_golden`.
    """
    files = {name: read_model_file(round_, name) for name in NEEDED}
    contract, golden = _read(files)
    with loaded(files[GRAPH_NAME], contract, round_.weights) as predictor:
        kept = judged(predictor, contract, golden).outputs
        outputs = answers(predictor, contract.prepare(golden.by_name(contract)))
    first = first_tensor(outputs)
    if kept[first] is None:
        raise RoundError(
            f"{round_.path}: {contract.output_title(first)} cannot be compared, it is "
            "random by design, or the last digit of an input turns it; leave "
            "--expect-outputs out"
        )
    output = outputs[first]
    data: bytes = (output[:count] if output.ndim else output).astype("<f4").tobytes()
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
    return encode_golden(run_golden(files, weights))


def encode_golden(golden: Golden) -> bytes:
    """Return ``golden.npz``.

    Raises:
        ContractError: It is over the limit that devices have.
    """
    file = io.BytesIO()
    arrays: dict[str, Any] = golden.arrays()
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
    contract, golden = _read(files)
    with loaded(files[GRAPH_NAME], contract, weights) as predictor:
        return judged(predictor, contract, golden)


def _read(files: Mapping[str, bytes]) -> tuple[Contract, Golden]:
    return parse_contract(files[CONTRACT_NAME]), read_golden(files[GOLDEN_NAME])


@contextmanager
def loaded(graph: bytes, contract: Contract, weights: Weights) -> Iterator[Predictor]:
    """Load a model here, as a device would.

    Raises:
        StoreError: ONNX Runtime cannot load the graph.
        BackendError: It is older than the graph, or lacks an operator.
        BlockedError: There is not the memory for it.
        OSError: There is no room for its files.
    """
    with tempfile.TemporaryDirectory() as name:
        slot = Path(name)
        with naming(name):
            (slot / GRAPH_NAME).write_bytes(graph)
            with (slot / WEIGHTS_NAME).open("wb") as file:
                file.writelines(weights.chunks())
        prepack = weights.layout.file_size < UNPACKED_BYTES
        try:
            predictor = Predictor(slot, contract, RunOptions(prepack=prepack))
        except (StoreError, BackendError, BlockedError) as err:
            # Not where a copy of the graph lies for a moment.
            words = str(err).replace(str(slot / GRAPH_NAME), "the graph")
            raise type(err)(words) from err
        yield predictor


def answers(predictor: Predictor, feed: Mapping[str, NDArray[Any]]) -> list[Any]:
    """Return every output for what the graph takes.

    Raises:
        StoreError: The graph cannot be run on it.
    """
    try:
        return predictor.run(feed)
    except ContractError as err:  # they fit, so it is the graph
        raise StoreError(f"the graph cannot be run on its inputs: {err}") from err


def judged(predictor: Predictor, contract: Contract, golden: Golden) -> Golden:
    """Return golden inputs and labels with the outputs of a model, after their trial.

    Raises:
        DpuError: As :func:`run_golden`.
    """
    feed = contract.prepare(golden.by_name(contract))
    outputs, again = (answers(predictor, feed) for _ in range(2))
    number, labels = first_tensor(outputs), golden.labels
    if not (first := outputs[number]).size:
        raise TrialError(
            f"{contract.output_title(number)} has no elements for the golden inputs "
            f"(shape {list(first.shape)}), so that any weights would pass a trial; "
            "give inputs that it answers (--golden)"
        )
    metric = METRICS.get(contract.label_metric)
    is_flat = first.ndim < 2
    if labels is None and metric and metric.name == "top1" and is_flat:
        # What is no classifier has no answer; any label of the right length will do.
        labels = np.zeros(len(np.atleast_1d(golden.inputs[0])), np.int64)
    elif labels is None and metric and contract.label_bound is not None:
        labels = metric.labels(first, contract.threshold)
    check_outputs(outputs, labels, contract)
    _check_repeats(outputs, again, contract)
    if contract.by_rows and len(outputs) == 1 and first.dtype.kind == "f":
        kept = _kept(outputs, outputs, contract)  # as it is: nothing is to be seen
    else:
        kept = _kept(outputs, _nudged(predictor, feed), contract)
    return Golden(golden.inputs, labels, kept)


def check_labels(golden: Golden, contract: Contract) -> None:
    """Insist that golden labels, and the names of classes, fit the first output.

    Args:
        golden: With outputs, as :func:`run_golden` gives it.
        contract: Names classes and metric.

    Raises:
        ContractError: They do not.
    """
    # Of a large one there are its first rows.
    output = next((values for values in golden.outputs if values is not None), None)
    metric = METRICS.get(contract.label_metric)
    if output is None:
        return
    width = contract.class_count(output.shape)
    if contract.classes and len(contract.classes) != width:
        raise ContractError(
            f"the contract names {len(contract.classes)} classes, the first output has "
            f"{width} numbers for each input (shape {list(output.shape)})"
        )
    if golden.labels is not None and metric and output.ndim > 1:
        metric.sums(output, golden.labels[: len(output)], contract.threshold)
        odd = golden.labels[(golden.labels < 0) | (golden.labels >= width)]
        if metric.name == "top1" and odd.size:
            raise ContractError(
                f"a golden label is {odd[0]}, and the first output has {width} numbers "
                f"for each input: labels are 0 to {width - 1}"
            )


def _check_repeats(first: list[Any], again: list[Any], contract: Contract) -> None:
    for number, (output, other) in enumerate(zip(first, again, strict=True)):
        if not is_tensor(output) or contract.is_random(number):
            continue
        difference = relative_difference(np.asarray(other), np.asarray(output))
        if not difference <= contract.output_tolerance:
            raise TrialError(
                f"{contract.output_title(number)} differs by {difference:.2g} of the "
                "largest value when the model runs again on the same inputs: it draws "
                "random numbers, and every device would refuse it; export it for "
                "inference (model.eval(), no Dropout, no RandomNormal), or name the "
                "output in the contract's random_outputs"
            )


def _nudged(predictor: Predictor, feed: dict[str, Any]) -> list[Any]:
    """Return the outputs for inputs that are a little larger.

    Another CPU rounds otherwise. Where so little changes what is counted, chosen or
    sorted, no device could be held to it.
    """
    moved = {
        name: np.asarray(x * (1 + NUDGE), x.dtype)
        for name, x in feed.items()
        if x.dtype.kind == "f"
    }
    return answers(predictor, feed | moved)


def _kept(
    outputs: list[Any], nudged: list[Any], contract: Contract
) -> tuple[NDArray[Any] | None, ...]:
    """Return what devices compare: what holds, and of large outputs the first rows."""
    found: list[NDArray[Any] | None] = []
    first = first_tensor(outputs)
    for number, output in enumerate(outputs[:MAX_OUTPUTS]):
        found.append(None)
        if not is_tensor(output) or contract.is_random(number):
            continue
        as_ever = number == first and contract.by_rows and output.dtype.kind == "f"
        difference = relative_difference(nudged[number], output)
        if as_ever or difference <= contract.output_tolerance:
            most = MAX_FIRST_BYTES if number == first else MAX_WHOLE_BYTES
            found[number] = _first_rows(output, most)
    return tuple(found)


def _first_rows(output: NDArray[Any], most: int) -> NDArray[Any] | None:
    """Return as many rows as fit, one at least; None where even that is too much."""
    if not output.ndim or output.nbytes <= most:
        return output
    rows = output[: max(1, len(output) * most // output.nbytes)]
    return rows if rows.nbytes <= max(most, MAX_ROW_BYTES) else None
