# SPDX-License-Identifier: Apache-2.0
"""The trial session: new weights prove themselves before they become active.

It runs in a process of its own (:mod:`edge_runtime.update.trial_process`), so that a
model that crashes, hangs or eats all memory harms nothing. How that process ends says
whether the weights are at fault, or this device.
"""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import (
    BackendError,
    BlockedError,
    ContractError,
    DpuError,
    LimitError,
    StoreError,
    TrialCutOffError,
    TrialError,
)
from edge_runtime.files import read_bounded
from edge_runtime.formats.arrays import read_npz
from edge_runtime.formats.contract import Contract, parse_contract
from edge_runtime.formats.model_folder import (
    CONTRACT_NAME,
    GOLDEN_NAME,
    GRAPH_NAME,
    WEIGHTS_NAME,
)
from edge_runtime.inference.predictor import Predictor
from edge_runtime.limits import limits
from edge_runtime.update import trial_ends
from edge_runtime.update.programs import (
    Ended,
    own_command,
    own_environment,
    run_program,
)

TIMEOUT_S = 120.0
PROCESS = "edge_runtime.update.trial_process"  # whose main() judges
MAX_OUTPUTS = 1024  # of a graph: the outputs after the first are golden arrays too
_CRASHES = {-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS}
Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Expected:
    """What a trial compares a model's outputs with.

    Attributes:
        golden: Whether with the golden outputs, which belong to the bundle's own
            weights. They are of every output that can be compared.
        values: What the first output should hold for the first golden inputs, as a
            patch carries it (:attr:`edge_runtime.formats.patch.Patch.outputs`).
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
        TrialCutOffError: The process crashed, hung or was killed.
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
            apart=len(trial_ends.BEGUN),
        )
    except (OSError, MemoryError) as err:
        raise BlockedError(
            f"nothing changed: the trial cannot be started ({err})"
        ) from err
    if error := end_of_trial(ended):
        raise error


def end_of_trial(ended: Ended) -> DpuError | None:
    """Return the error that an ended trial process stands for; None for success."""
    if not ended.code:
        return None
    text = f"nothing changed: the trial {ended.problem}"
    if ended.code == trial_ends.VERDICT:
        return TrialError(text)
    if ended.code == trial_ends.NO_BACKEND:
        return BackendError(text)
    if ended.timeout_s:
        return TrialCutOffError(text)
    had_begun = ended.printed == trial_ends.BEGUN
    out_of_memory = ended.code in _CRASHES and trial_ends.tells_of_the_system(
        ended.said
    )
    if ended.code < 0 and had_begun and not out_of_memory:
        return TrialCutOffError(text)
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
        contract.prepare(golden.inputs)
    except (ContractError, LimitError) as err:
        # At an installation the bundle is at fault, and later this device's own files.
        kind = TrialError if expected.golden else BlockedError
        raise kind(f"{model}: {err}") from err
    begin()
    outputs = _answers(slot, contract, golden.inputs)
    if expected.golden:
        check_outputs(outputs, golden.labels, contract, golden.outputs)
        return
    wanted = [_of_the_patch(expected.values, outputs[0])] if expected.values else []
    check_outputs(outputs, golden.labels, contract, wanted)


def _read(model: Path, name: str, limit: str) -> bytes:
    return read_bounded(model / name, limit, name, ContractError)


def _answers(slot: Path, contract: Contract, inputs: Array) -> list[Any]:
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


def _asked(slot: Path, contract: Contract, inputs: Array) -> list[Any]:
    predictor = Predictor(slot, contract)
    try:
        return predictor.predict_all(inputs)
    except DpuError:
        raise
    except Exception as err:
        # Whatever the runtime raises for a graph that it loaded, but cannot run.
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


def _of_the_patch(values: bytes, found: Any) -> Array:
    wanted, each = np.frombuffer(values, "<f4"), np.asarray(found)[:1].size
    if not each or wanted.size % each or wanted.size > np.size(found):
        raise TrialError(
            f"the patch expects {wanted.size} output values; the network gives "
            f"{each} for each of {len(found)} golden inputs"
        )
    return wanted.reshape(-1, *np.shape(found)[1:])


# Golden inputs -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Golden:
    """The content of ``golden.npz``.

    Attributes:
        inputs: Raw samples, as a device gets them.
        labels: What classes they are of.
        outputs: What the bundle's own weights give: of the first output, then of the
            others; None for one that cannot be compared.
    """

    inputs: Array
    labels: Array
    outputs: tuple[Array | None, ...] = ()


def output_name(number: int) -> str:
    """Return the name of an output's array in ``golden.npz``, counted from 0."""
    return f"outputs_{number}" if number else "outputs"


def read_golden(data: bytes) -> Golden:
    """Read ``golden.npz``, within the limit for it.

    Raises:
        ContractError: It is no such file, lacks an array, or is over the limit.
    """
    names = [output_name(n) for n in range(MAX_OUTPUTS)]
    limit = limits().golden_bytes
    try:
        found = read_npz(data, ("inputs", "labels", *names), limit=limit)
        inputs, labels = found.pop("inputs"), found.pop("labels")
    except KeyError as err:
        raise ContractError(
            f"{GOLDEN_NAME} lacks {err}; install the bundle anew"
        ) from err
    except ContractError as err:
        raise ContractError(f"{GOLDEN_NAME}: {err}") from err
    last = max((n for n in range(MAX_OUTPUTS) if names[n] in found), default=-1)
    return Golden(inputs, labels, tuple(found.get(n) for n in names[: last + 1]))


# Judging -----------------------------------------------------------------------------


def check_outputs(
    outputs: Sequence[Any],
    labels: Array,
    contract: Contract,
    wanted: Sequence[Array | None] = (),
) -> None:
    """Insist that outputs for the golden inputs are good enough.

    Args:
        outputs: What the network gives: every output, in the graph's order.
        labels: What classes the inputs are of.
        contract: Says what is good enough.
        wanted: What the outputs should be for the first of the inputs, in the same
            order; None, or fewer, where that is not known.

    Raises:
        TrialError: They are not.
    """
    for number, output in enumerate(outputs):
        if not all(np.isfinite(values).all() for values in _numbers(output)):
            which = f" (output {number + 1} of {len(outputs)})" if number else ""
            raise TrialError(f"the new weights give outputs that are not finite{which}")
    answers = first_output(outputs).argmax(axis=-1)
    fits = answers.shape == labels.shape
    right = int(np.sum(answers == labels)) if fits else 0
    if right < contract.accuracy_floor * len(labels):
        raise TrialError(
            f"the new weights get {right} of {len(labels)} golden labels right, the "
            f"contract asks for {contract.accuracy_floor:.0%}"
        )
    if len(wanted) > len(outputs):
        raise TrialError(
            f"{len(wanted)} outputs are expected, the network gives {len(outputs)}"
        )
    for number, values in enumerate(wanted):
        if values is not None:
            _compare(outputs[number], values, contract.output_tolerance, number)


def first_output(outputs: Sequence[Any]) -> Array:
    """Return the output by which a model is tried: the first.

    Raises:
        TrialError: A device cannot compare it.
    """
    first = outputs[0] if outputs else None
    found = (
        f"{first.dtype} of shape {list(first.shape)}"
        if isinstance(first, np.ndarray)
        else type(first).__name__
    )
    if not isinstance(first, np.ndarray) or first.dtype.kind not in "iuf":
        raise TrialError(
            f"the model's first output is {found}, and devices compare numbers: end "
            "the graph with a Cast to float32, or make another output the first"
        )
    if not first.ndim:
        raise TrialError(
            f"the model's first output is {found}: one number for all inputs, where "
            "devices need one row for each; export the model without the last "
            "reduction, or make another output the first"
        )
    return first


def comparable(output: Any) -> bool:
    """Return whether an output after the first one is compared: if it is floating.

    Whole numbers and truth values come from comparing, and jump where CPUs differ.
    """
    return isinstance(output, np.ndarray) and output.dtype.kind == "f"


def _numbers(output: Any) -> Iterator[Array]:
    """Yield every floating array in an output: graphs may give lists and maps too."""
    if isinstance(output, list | tuple):
        for part in output:
            yield from _numbers(part)
    elif isinstance(output, dict):
        yield from _numbers(list(output.values()))
    elif isinstance(output, np.ndarray | np.generic | float):
        values = np.asarray(output)
        if values.dtype.kind in "fc":
            yield values


def _compare(output: Any, wanted: Array, tolerance: float, number: int) -> None:
    found = np.asarray(output)
    difference = relative_difference(
        found[: len(wanted)] if wanted.ndim else found, wanted
    )
    if not difference <= tolerance:  # true for NaN too
        which = f" (output {number + 1})" if number else ""
        raise TrialError(
            f"outputs differ from the expected ones by {difference:.2g} of the "
            f"largest, allowed is {tolerance:g}{which}: this device's runtime "
            "does not compute what the server's does"
        )


def relative_difference(found: Array, wanted: Array) -> float:
    """Return the largest difference, relative to the largest absolute value wanted."""
    if found.shape != wanted.shape:
        return float("inf")
    if found.dtype.kind in "iub":  # their differences would wrap around
        found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    largest = float(np.abs(wanted).max(initial=0.0)) or 1.0
    return float(np.abs(found - wanted).max(initial=0.0)) / largest
