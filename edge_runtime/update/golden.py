# SPDX-License-Identifier: Apache-2.0
"""Golden inputs and outputs: read from ``golden.npz``, compared with a model's."""

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
from edge_runtime.update.metrics import METRICS

MAX_INPUTS = MAX_OUTPUTS = 1024  # of a graph: each is an array
# Of an output that is larger there may be its first rows only.
MAX_WHOLE_BYTES = 1 << 18
Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Golden:
    """The content of ``golden.npz``.

    Attributes:
        inputs: Raw samples, as a device gets them: an array for each input.
        labels: What the answers should be; None where nobody knows.
        outputs: What the bundle's own weights give, in the graph's order; None for
            one that cannot be compared. Of large ones the first rows.
    """

    inputs: tuple[Array, ...]
    labels: Array | None = None
    outputs: tuple[Array | None, ...] = ()

    def by_name(self, contract: Contract) -> dict[str, Array]:
        """Return the inputs by their names in the contract.

        Raises:
            ContractError: They are more, or fewer, or hold no sample.
        """
        names = [spec.name for spec in contract.inputs]
        if len(names) != len(self.inputs):
            raise ContractError(
                f"{GOLDEN_NAME} has {len(self.inputs)} arrays of inputs, the contract "
                f"has {len(names)} inputs ({', '.join(names)})"
            )
        found = dict(zip(names, self.inputs, strict=True))
        batches = [spec for spec in contract.inputs if spec.has_batch]
        counts = [len(spec.batch(found[spec.name])) for spec in batches]
        # Whatever weights answer to nothing is equal to whatever others do.
        if not all(counts) or not any(values.size for values in self.inputs):
            shapes = ", ".join(f"{n!r} {list(v.shape)}" for n, v in found.items())
            raise ContractError(
                f"{GOLDEN_NAME} holds no sample ({shapes}), so that any weights would "
                "pass a trial; give one at least, or install the bundle anew"
            )
        return found

    def insist_on_labels(self, contract: Contract) -> None:
        """Insist on labels where the contract asks for some.

        Raises:
            ContractError: There are none.
        """
        if self.labels is None and contract.asks_for_labels:
            raise ContractError(
                f"{GOLDEN_NAME} lacks 'labels', and the contract asks for "
                f"{contract.label_metric} of {contract.label_bound:g}; give labels, or "
                "install the bundle anew"
            )

    def arrays(self) -> dict[str, Array]:
        """Return all of it by the names that it has in ``golden.npz``."""
        found = {input_name(n): values for n, values in enumerate(self.inputs)}
        if self.labels is not None:
            found["labels"] = self.labels
        for number, values in enumerate(self.outputs):
            if values is not None:
                found[output_name(number)] = values
        return found


def input_name(number: int) -> str:
    """Return the name of an input's array in ``golden.npz``, counted from 0."""
    return f"inputs_{number}" if number else "inputs"


def output_name(number: int) -> str:
    """Return the name of an output's array in ``golden.npz``, counted from 0."""
    return f"outputs_{number}" if number else "outputs"


def read_golden(data: bytes) -> Golden:
    """Read ``golden.npz``, within the limit for it.

    Raises:
        ContractError: It is no such file, lacks inputs, holds outputs that are no
            numbers, or is over the limit.
    """
    takes = [input_name(n) for n in range(MAX_INPUTS)]
    gives = [output_name(n) for n in range(MAX_OUTPUTS)]
    try:
        found = read_npz(data, ("labels", *takes, *gives))
    except ContractError as err:
        raise ContractError(f"{GOLDEN_NAME}: {err}") from err
    inputs = tuple(found[name] for name in takes if name in found)
    if not all(name in found for name in takes[: max(1, len(inputs))]):
        raise ContractError(
            f"{GOLDEN_NAME} lacks inputs ('inputs', and 'inputs_1' and so on for "
            "further ones); give some, as devices get them, or install the bundle anew"
        )
    last = max((n for n in range(MAX_OUTPUTS) if gives[n] in found), default=-1)
    outputs = tuple(found.get(name) for name in gives[: last + 1])
    for number, values in enumerate(outputs):
        if values is not None and not is_tensor(values):
            raise ContractError(
                f"{GOLDEN_NAME}: {output_name(number)!r} is {_kind_of(values)}, "
                "expected numbers; make the bundle anew"
            )
    return Golden(inputs, found.get("labels"), outputs)


def check_outputs(
    outputs: Sequence[Any],
    labels: Array | None,
    contract: Contract,
    wanted: Sequence[Array | None] = (),
) -> None:
    """Insist that outputs for the golden inputs are good enough.

    Args:
        outputs: What the network gives: every output, in the graph's order.
        labels: What the answers should be; None where nobody knows.
        contract: Says what is good enough.
        wanted: What the outputs should be, in the same order, or their first rows;
            None, or fewer, where that is not known.

    Raises:
        TrialError: They are not.
    """
    for number, output in enumerate(outputs):
        if not all(np.isfinite(values).all() for values in _numbers(output)):
            which = f" (output {number + 1} of {len(outputs)})" if number else ""
            raise TrialError(f"the new weights give outputs that are not finite{which}")
    first = first_tensor(outputs)
    if labels is not None:
        _check_labels(outputs[first], labels, contract)
    if len(wanted) > len(outputs):
        raise TrialError(
            f"{len(wanted)} outputs are expected, the network gives {len(outputs)}"
        )
    for number, values in enumerate(wanted):
        if values is not None and not contract.is_random(number):
            found = np.asarray(outputs[number])
            if values.ndim and found.nbytes > MAX_WHOLE_BYTES:
                found = found[: len(values)]
            compare_output(found, values, contract, number)


def _check_labels(output: Array, labels: Array, contract: Contract) -> None:
    """Insist on the contract's bound for golden labels."""
    bound = contract.label_bound
    if bound is None or not contract.asks_for_labels:
        return  # anything will do, also what is no classifier
    metric = METRICS[contract.label_metric]
    try:
        sums = metric.sums(output, labels, contract.threshold)
    except ContractError as err:
        raise TrialError(f"the new weights' answers: {err}") from err
    if not metric.reaches(metric.value(sums), bound):
        raise TrialError(
            f"the new weights give {metric.shown(sums)} on golden labels, the contract "
            f"asks for {metric.asked(bound)}"
        )


def first_tensor(outputs: Sequence[Any]) -> int:
    """Return the place of the output by which a model is tried: the first of numbers.

    Raises:
        TrialError: There is none.
    """
    for number, output in enumerate(outputs):
        if is_tensor(output):
            return number
    found = ", ".join(map(_kind_of, outputs)) or "nothing"
    raise TrialError(
        f"the model gives {found}, and devices take tensors of numbers: end the graph "
        "with a Cast to float32, or export it without the last step that makes maps "
        "or text of numbers (ZipMap: options={'zipmap': False})"
    )


def is_tensor(output: Any) -> bool:
    """Return whether an output is a tensor of numbers or truth values."""
    return isinstance(output, np.ndarray) and output.dtype.kind in "biuf"


def _kind_of(output: Any) -> str:
    if isinstance(output, np.ndarray):
        text = "text" if output.dtype.kind in "OUS" else str(output.dtype)
        return f"{text} of shape {list(output.shape)}"
    if isinstance(output, list | dict):
        return "a sequence" if isinstance(output, list) else "a map"
    return "a tensor of a type that NumPy lacks"


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


def compare_output(
    found: Array, wanted: Array, contract: Contract, number: int
) -> None:
    """Insist that an output is what it should be, as near as the contract asks.

    Raises:
        TrialError: It is not.
    """
    which = f" ({contract.output_title(number)})" if number else ""
    if found.shape != wanted.shape:
        raise TrialError(
            f"an output has shape {list(found.shape)}, expected is "
            f"{list(wanted.shape)}{which}: this device's runtime does not compute what "
            "the server's does"
        )
    difference = relative_difference(found, wanted)
    if not difference <= contract.output_tolerance:  # true for NaN too
        raise TrialError(
            f"outputs differ from the expected ones by {difference:.2g} of the "
            f"largest, allowed is {contract.output_tolerance:g}{which}: this device's "
            "runtime does not compute what the server's does"
        )


def relative_difference(found: Array, wanted: Array) -> float:
    """Return the largest difference, relative to the largest absolute value wanted."""
    if found.shape != wanted.shape:
        return float("inf")
    if found.dtype.kind in "iub":  # their differences would wrap around
        found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    largest = float(np.abs(wanted).max(initial=0.0)) or 1.0
    return float(np.abs(found - wanted).max(initial=0.0)) / largest
