"""The trial session: new weights prove themselves before they become active.

It runs in a process of its own, so that a model that crashes, hangs or eats all memory
harms nothing: ``python -m edge_runtime.update.trial SLOT MODEL`` ends with 0 where they
did, and says why where they did not. What the outputs should be may come on standard
input; with a third argument they should be the golden ones.
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import BackendError, DpuError, TrialError
from edge_runtime.formats.contract import Contract, parse_contract
from edge_runtime.formats.model_folder import CONTRACT_NAME, GOLDEN_NAME
from edge_runtime.inference.predictor import Predictor
from edge_runtime.update.hooks import run_program

TIMEOUT_S = 120.0
NO_BACKEND = 11  # what the process ends with where no runtime can run the graph


def run_trial(
    slot: Path,
    model: Path,
    *,
    expected: bytes | bool = False,
    timeout_s: float = TIMEOUT_S,
) -> None:
    """Try a slot in a process of its own.

    Args:
        slot: The folder with graph and weights.
        model: The folder with ``contract.json`` and ``golden.npz``.
        expected: Also compare with these outputs for the first golden inputs
            (:attr:`Patch.outputs`), or, if true, with the golden
            outputs, which belong to the bundle's own weights.
        timeout_s: Kill the process after this many seconds.

    Raises:
        TrialError: It crashed, hung, or its outputs are not good enough.
        BackendError: No runtime here can run the graph, whatever the weights.
    """
    command = [sys.executable, "-m", "edge_runtime.update.trial", str(slot), str(model)]
    command += ["golden"] if expected is True else []
    given = expected if isinstance(expected, bytes) else b""
    # The very code that runs here, installed or not.
    found = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    facts = {"PYTHONPATH": os.pathsep.join(filter(None, found))}
    # In a group of its own: Ctrl-C for the caller is no verdict on the weights.
    code, problem = run_program(command, facts, timeout_s, given)
    if problem:
        error = BackendError if code == NO_BACKEND else TrialError
        raise error(f"nothing changed: the trial {problem}")


def try_slot(slot: Path, model: Path, expected: bytes | bool = False) -> None:
    """Run the golden inputs through a slot, in this process; the rest as above.

    Raises:
        TrialError: The outputs are not good enough.
        DpuError: The slot cannot be loaded, or the golden inputs do not fit.
    """
    contract = parse_contract((model / CONTRACT_NAME).read_bytes())
    with np.load(model / GOLDEN_NAME, allow_pickle=False) as golden:
        inputs, labels = golden["inputs"], golden["labels"]
        wanted = golden.get("outputs") if expected is True else None
    outputs = Predictor(slot, contract).predict(inputs)
    if isinstance(expected, bytes) and expected:
        wanted, each = np.frombuffer(expected, "<f4"), outputs[:1].size
        if not each or wanted.size % each or wanted.size > outputs.size:
            raise TrialError(
                f"the patch expects {wanted.size} output values; the network gives "
                f"{each} for each of {len(outputs)} golden inputs"
            )
        wanted = wanted.reshape(-1, *outputs.shape[1:])
    check_outputs(outputs, labels, contract, wanted)


def check_outputs(
    outputs: NDArray[Any],
    labels: NDArray[Any],
    contract: Contract,
    wanted: NDArray[Any] | None = None,
) -> None:
    """Insist that outputs for the golden inputs are good enough.

    Args:
        outputs: What the network gives.
        labels: What classes the inputs are of.
        contract: Says what is good enough.
        wanted: What it should give for the first of the inputs, where that is known.

    Raises:
        TrialError: They are not.
    """
    if not np.isfinite(outputs).all():
        raise TrialError("the new weights give outputs that are not finite")
    right = int(np.sum(outputs.argmax(axis=-1) == labels))
    if right < contract.accuracy_floor * len(labels):
        raise TrialError(
            f"the new weights get {right} of {len(labels)} golden labels right, the "
            f"contract asks for {contract.accuracy_floor:.0%}"
        )
    if wanted is None:
        return
    difference = relative_difference(outputs[: len(wanted)], wanted)
    if not difference <= contract.output_tolerance:  # true for NaN too
        raise TrialError(
            f"outputs differ from the expected ones by {difference:.2g} of the "
            f"largest, allowed is {contract.output_tolerance:g}: this device's runtime "
            "does not compute what the server's does"
        )


def relative_difference(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Return the largest difference, relative to the largest absolute value wanted."""
    if found.shape != wanted.shape:
        return float("inf")
    largest = float(np.abs(wanted).max(initial=0.0)) or 1.0
    return float(np.abs(found - wanted).max(initial=0.0)) / largest


if __name__ == "__main__":
    try:
        slot, model, *golden = sys.argv[1:]
        try_slot(Path(slot), Path(model), bool(golden) or sys.stdin.buffer.read())
    except DpuError as error:
        print(error, file=sys.stderr)
        sys.exit(NO_BACKEND if isinstance(error, BackendError) else 1)
