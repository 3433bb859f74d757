# SPDX-License-Identifier: Apache-2.0
"""Golden outputs: read from ``golden.npz``, and compared with what a model gives."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import (
    ContractError,
    TrialError,
)
from edge_runtime.formats.arrays import read_npz
from edge_runtime.formats.contract import Contract
from edge_runtime.formats.model_folder import (
    GOLDEN_NAME,
)
from edge_runtime.limits import limits

MAX_OUTPUTS = 1024  # of a graph: the outputs after the first are golden arrays too
Array = NDArray[Any]


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
    if not first.size:
        raise TrialError(
            f"the model's first output is {found}: it holds nothing that devices could "
            "compare; make another output the first"
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
