# SPDX-License-Identifier: Apache-2.0
"""The trial session: new weights prove themselves before they become active.

It runs in a process of its own (:mod:`edge_runtime.update.trial_process`), so that a
model that crashes, hangs or eats all memory harms nothing. How that process ends says
whether the weights are at fault, or this device.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edge_runtime.errors import (
    BackendError,
    BlockedError,
    ContractError,
    DpuError,
    LimitError,
    StoreError,
    TrialCutOffError,
    TrialError,
    tells_of_the_system,
)
from edge_runtime.formats.contract import Contract
from edge_runtime.formats.contract_file import parse_contract
from edge_runtime.formats.model_folder import (
    CONTRACT_NAME,
    GOLDEN_NAME,
    GRAPH_NAME,
    WEIGHTS_NAME,
)
from edge_runtime.inference.predictor import Predictor
from edge_runtime.reading import read_bounded
from edge_runtime.update import trial_ends
from edge_runtime.update.golden import (
    Array,
    check_outputs,
    compare_output,
    first_tensor,
    read_golden,
)
from edge_runtime.update.programs import (
    Ended,
    own_command,
    own_environment,
    run_program,
)

TIMEOUT_S = 120.0
_PROOF = trial_ends.BEGUN + trial_ends.PASSED
PROCESS = "edge_runtime.update.trial_process"  # whose main() judges
_CRASHES = {-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS}
# What a process brings on itself; any other signal came from outside, such as the
# SIGKILL of the system when memory runs out, and says nothing of the model.
_OWN_SIGNALS = _CRASHES | {
    *(-signal.SIGILL, -signal.SIGFPE, -signal.SIGTRAP),
    *(-signal.SIGSYS, -signal.SIGXCPU),
}


@dataclass(frozen=True, slots=True)
class Expected:
    """What a trial compares a model's outputs with.

    Attributes:
        golden: Whether with the golden outputs, which belong to the bundle's own
            weights. They are of every output that can be compared.
        values: What the first rows of the first output should hold, as a patch
            carries it (:attr:`edge_runtime.formats.patch.Patch.outputs`).
    """

    golden: bool = False
    values: bytes = b""


NOTHING = Expected()


class Trial(Protocol):
    """Tries a slot, and raises where its weights may not become active."""

    def __call__(self, slot: Path, model: Path, *, expected: Expected) -> None:
        """Try a slot; as :func:`run_trial`."""


def run_trial(
    slot: Path,
    model: Path,
    *,
    expected: Expected = NOTHING,
    timeout_s: float = TIMEOUT_S,
) -> None:
    """Try a slot in a process of its own.

    Args:
        slot: The folder with graph and weights.
        model: The folder with ``contract.json`` and ``golden.npz``.
        expected: What to compare the outputs with.
        timeout_s: Kill the process after this many seconds.

    Raises:
        TrialError: The outputs are not good enough, or the model cannot be loaded.
        TrialCutOffError: The process crashed or hung.
        BackendError: No runtime here can run the graph, whatever the weights.
        BlockedError: This device cannot do it now, whatever the weights: it lacks
            memory, or its own files cannot be read.
    """
    command = own_command(
        PROCESS,
        *(
            str(os.getpid()),
            str(timeout_s),
            str(slot.absolute()),
            str(model.absolute()),
        ),
        "golden" if expected.golden else "",
    )
    env = own_environment()
    env.setdefault("OPENBLAS_NUM_THREADS", str(trial_ends.THREADS))
    try:
        # In a group of its own: Ctrl-C for the caller is no verdict on the weights.
        ended = run_program(
            command,
            env,
            timeout_s,
            given=expected.values,
            folder=Path("/"),
            apart=len(_PROOF),
        )
    except (OSError, MemoryError) as err:
        raise BlockedError(
            f"nothing changed: the trial cannot be started ({err})"
        ) from err
    if error := end_of_trial(ended):
        raise error


def end_of_trial(ended: Ended) -> DpuError | None:
    """Return the error that an ended trial process stands for; None for success."""
    problem = ended.problem or "ended without a word that it passed"
    text = f"nothing changed: the trial {problem}"
    if ended.timeout_s:
        return TrialCutOffError(text)
    if not ended.code and ended.printed == _PROOF:
        return None
    if ended.code == trial_ends.VERDICT:
        return TrialError(text)
    if ended.code == trial_ends.NO_BACKEND:
        return BackendError(text)
    had_begun = ended.printed.startswith(trial_ends.BEGUN)
    out_of_memory = ended.code in _CRASHES and tells_of_the_system(ended.said)
    if ended.code in _OWN_SIGNALS and had_begun and not out_of_memory:
        return TrialCutOffError(text)
    if ended.code == -signal.SIGKILL:
        text += "; the system does this where memory runs out"
    return BlockedError(text)


def try_slot(
    slot: Path,
    model: Path,
    expected: Expected = NOTHING,
    begin: Callable[[], None] = lambda: None,
) -> None:
    """Run the golden inputs through a slot, in this process; the rest as above.

    Args:
        slot: The folder with graph and weights.
        model: The folder with ``contract.json`` and ``golden.npz``.
        expected: What to compare the outputs with.
        begin: Called when everything is read, before the model's turn.

    Raises:
        TrialError: The outputs are not good enough.
        DpuError: The slot cannot be loaded, or the golden inputs do not fit.
        OSError: A file cannot be read.
    """
    try:
        contract = parse_contract(_read(model, CONTRACT_NAME, "contract_bytes"))
        golden = read_golden(_read(model, GOLDEN_NAME, "golden_bytes"))
        inputs = golden.by_name(contract)
        golden.insist_on_labels(contract)
        contract.prepare(inputs)
    except (ContractError, LimitError) as err:
        # At an installation the bundle is at fault, and later this device's own files.
        kind = TrialError if expected.golden else BlockedError
        raise kind(f"{model}: {err}") from err
    begin()
    outputs = _answers(slot, contract, inputs)
    if expected.golden:
        check_outputs(outputs, golden.labels, contract, golden.outputs)
        return
    check_outputs(outputs, golden.labels, contract)
    first = first_tensor(outputs)
    if expected.values and not contract.is_random(first):
        found, wanted = _of_the_patch(expected.values, outputs[first])
        compare_output(found, wanted, contract, first)


def _read(model: Path, name: str, limit: str) -> bytes:
    return read_bounded(model / name, limit, name, ContractError)


def _answers(slot: Path, contract: Contract, inputs: dict[str, Array]) -> list[Any]:
    """Return the outputs of a slot; a failure counts only if it comes twice.

    The runtime reads the files itself, and of a disk that failed meanwhile it may say
    that the graph is malformed. What is wrong with the files is wrong a second time.
    """
    try:
        return _asked(slot, contract, inputs)
    except StoreError:
        for name in (GRAPH_NAME, WEIGHTS_NAME):
            read_all(slot / name)
        return _asked(slot, contract, inputs)


def _asked(slot: Path, contract: Contract, inputs: dict[str, Array]) -> list[Any]:
    predictor = Predictor(slot, contract)
    try:
        return predictor.predict_all(inputs)
    except ContractError as err:
        # The inputs fit, as was seen before: the graph cannot be run.
        raise StoreError(f"cannot run {slot}: {err}") from err


def read_all(path: Path) -> None:
    """Read a file to its end, so that a broken disk is not taken for a bad model.

    Raises:
        OSError: The disk refuses.
    """
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(1 << 20)
        while file.readinto(buffer):
            pass


def _of_the_patch(values: bytes, found: Array) -> tuple[Array, Array]:
    """Return as much of an output as a patch expects, and what it expects."""
    wanted, each = np.frombuffer(values, "<f4"), found[:1].size if found.ndim else 1
    if not each or wanted.size % each or wanted.size > found.size:
        raise TrialError(
            f"the patch expects {wanted.size} output values; the network gives "
            f"{each} for each of {len(np.atleast_1d(found))} rows"
        )
    if not found.ndim:
        return found, wanted.reshape(())
    wanted = wanted.reshape(-1, *found.shape[1:])
    return found[: len(wanted)], wanted
