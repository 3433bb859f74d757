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

from edge_runtime.errors import RoundError
from edge_runtime.formats.contract import parse_contract
from edge_runtime.formats.model_folder import (
    CONTRACT_NAME,
    GOLDEN_NAME,
    GRAPH_NAME,
    WEIGHTS_NAME,
)
from edge_runtime.formats.sections import MAX_COUNTED_BYTES
from edge_runtime.formats.weights import Weights
from edge_runtime.inference.predictor import Predictor
from edge_runtime.update.trial import check_outputs
from packager.rounds.folder import RoundFolder, read_model_file

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
    data = run_golden(files, round_.weights)["outputs"][:count].astype("<f4").tobytes()
    if len(data) > MAX_COUNTED_BYTES:
        raise RoundError(
            f"{round_.path}: the expected outputs have {len(data)} bytes, a patch "
            f"carries up to {MAX_COUNTED_BYTES}: ask for fewer"
        )
    return data


def with_outputs(files: Mapping[str, bytes], weights: Weights) -> bytes:
    """Return ``golden.npz`` with the outputs of these weights: :func:`run_golden`."""
    file = io.BytesIO()
    np.savez(file, **run_golden(files, weights))  # type: ignore[arg-type]
    return file.getvalue()


def run_golden(files: Mapping[str, bytes], weights: Weights) -> dict[str, NDArray[Any]]:
    """Return golden ``inputs``, ``labels`` and ``outputs``, after their trial.

    Args:
        files: ``graph.onnx``, ``contract.json`` and ``golden.npz``, by name. Golden
            inputs without labels get what these weights answer, so that the contract's
            floor says how far later releases may stray from them.
        weights: What the graph reads.

    Raises:
        ContractError: The contract is malformed or the golden inputs do not fit it.
        TrialError: Devices would refuse these weights.
        StoreError: ONNX Runtime cannot load the graph.
    """
    with np.load(io.BytesIO(files[GOLDEN_NAME]), allow_pickle=False) as golden:
        inputs, labels = golden["inputs"], golden.get("labels")
    contract = parse_contract(files[CONTRACT_NAME])
    with tempfile.TemporaryDirectory() as name:
        slot = Path(name)
        (slot / GRAPH_NAME).write_bytes(files[GRAPH_NAME])
        (slot / WEIGHTS_NAME).write_bytes(weights.data)
        outputs = Predictor(slot, contract).predict(inputs)
    if labels is None:
        # What is no classifier has no answer; any label of the right length will do.
        answers = outputs.argmax(axis=-1)
        labels = answers if outputs.ndim > 1 else np.zeros(len(inputs), np.int64)
    check_outputs(outputs, labels, contract)
    return {"inputs": inputs, "labels": labels, "outputs": outputs}
