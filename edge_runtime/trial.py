"""The trial session: new weights prove themselves before they become active.

It runs in a process of its own, so that a model that crashes, hangs or eats all memory
harms nothing: ``python -m edge_runtime.trial SLOT MODEL`` prints one JSON object. What
the outputs should be may come on standard input.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract import Contract, parse_contract
from edge_runtime.errors import BackendError, DpuError, TrialError
from edge_runtime.infer import Predictor

TIMEOUT_S = 120.0
NO_BACKEND = 11  # what the process ends with where no runtime can run the graph


@dataclass(frozen=True, slots=True)
class TrialResult:
    """What a trial saw.

    Attributes:
        samples: Golden inputs that were tried.
        right: How many golden labels came out.
        finite: Whether every output was a finite number.
        difference: Largest difference to the expected outputs, relative to the
            largest of them; None where nothing is expected.
    """

    samples: int
    right: int
    finite: bool
    difference: float | None = None


def run_trial(
    slot: Path,
    model: Path,
    *,
    expected: bytes | bool = False,
    timeout_s: float = TIMEOUT_S,
) -> TrialResult:
    """Try a slot in a process of its own.

    Args:
        slot: The folder with graph and weights.
        model: The folder with ``contract.json`` and ``golden.npz``.
        expected: Also compare with these outputs for the first golden inputs
            (:attr:`edge_runtime.patch.Patch.outputs`), or, if true, with the golden
            outputs, which belong to the bundle's own weights.
        timeout_s: Kill the process after this many seconds.

    Raises:
        TrialError: It crashed, hung, or its outputs are not good enough.
        BackendError: No runtime here can run the graph, whatever the weights.
    """
    command = [sys.executable, "-m", "edge_runtime.trial", str(slot), str(model)]
    # The very code that runs here, installed or not.
    found = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    try:
        done = subprocess.run(
            command,
            input=expected if isinstance(expected, bytes) else b"",
            capture_output=True,
            timeout=timeout_s,
            check=False,
            process_group=0,  # Ctrl-C for the caller is no verdict on the weights
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, found))},
        )
    except subprocess.TimeoutExpired as err:
        raise TrialError(
            f"the new weights gave no answer within {timeout_s:g} s; nothing changed"
        ) from err
    if done.returncode:
        tail = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["-"]
        if done.returncode == NO_BACKEND:
            raise BackendError(f"no trial, so nothing changed: {tail[0]}")
        raise TrialError(
            f"the trial session ended with {done.returncode}: {tail[0]}; nothing "
            "changed"
        )
    result = TrialResult(**json.loads(done.stdout))
    judge(result, _contract(model), expected=bool(expected))
    return result


def judge(result: TrialResult, contract: Contract, *, expected: bool) -> None:
    """Insist that a trial went well.

    Raises:
        TrialError: It did not.
    """
    if not result.finite:
        raise TrialError("the new weights give outputs that are not finite")
    if result.right < contract.accuracy_floor * result.samples:
        raise TrialError(
            f"the new weights get {result.right} of {result.samples} golden labels "
            f"right, the contract asks for {contract.accuracy_floor:.0%}"
        )
    # A comparison that is true for NaN too.
    if expected and not (result.difference or 0.0) <= contract.output_tolerance:
        raise TrialError(
            f"outputs differ from the expected ones by {result.difference:.2g} of the "
            f"largest, allowed is {contract.output_tolerance:g}: this device's runtime "
            "does not compute what the server's does"
        )


def try_slot(slot: Path, model: Path, expected: bytes = b"") -> TrialResult:
    """Run the golden inputs through a slot, in this process.

    Args:
        slot: The folder with graph and weights.
        model: The folder with ``contract.json`` and ``golden.npz``.
        expected: As for :func:`run_trial`; the golden outputs where empty.

    Raises:
        DpuError: The slot cannot be loaded, or inputs or outputs do not fit.
    """
    with np.load(model / "golden.npz", allow_pickle=False) as golden:
        inputs, labels = golden["inputs"], golden["labels"]
        wanted = golden.get("outputs")
    outputs = found = Predictor(slot, _contract(model)).predict(inputs)
    if expected:
        wanted, each = np.frombuffer(expected, "<f4"), outputs[:1].size
        if not each or wanted.size % each or wanted.size > outputs.size:
            raise TrialError(
                f"the patch expects {wanted.size} output values; the network gives "
                f"{each} for each of {len(outputs)} golden inputs"
            )
        found = outputs.reshape(-1)[: wanted.size]
    return TrialResult(
        samples=len(labels),
        right=int(np.sum(outputs.argmax(axis=-1) == labels)),
        finite=bool(np.isfinite(outputs).all()),
        difference=None if wanted is None else relative_difference(found, wanted),
    )


def relative_difference(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Return the largest difference, relative to the largest absolute value wanted."""
    if found.shape != wanted.shape:
        return float("inf")
    largest = float(np.abs(wanted).max(initial=0.0)) or 1.0
    return float(np.abs(found - wanted).max(initial=0.0)) / largest


def _contract(model: Path) -> Contract:
    return parse_contract((model / "contract.json").read_bytes())


if __name__ == "__main__":
    try:
        arguments = Path(sys.argv[1]), Path(sys.argv[2]), sys.stdin.buffer.read()
        print(json.dumps(asdict(try_slot(*arguments))))
    except DpuError as error:
        print(error, file=sys.stderr)
        sys.exit(NO_BACKEND if isinstance(error, BackendError) else 1)
