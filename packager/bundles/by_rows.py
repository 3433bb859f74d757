# SPDX-License-Identifier: Apache-2.0
"""Whether a model from anybody answers sample by sample: found by asking it.

A first axis of any size may as well be time, or the points of one scene. Then the
answer to a row alone is another one than its row in the answer to all, and nothing in
a graph says so.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import StoreError
from edge_runtime.formats.contract import Contract
from edge_runtime.inference.predictor import Predictor
from edge_runtime.update.golden import first_tensor, is_tensor, relative_difference
from packager.rounds.golden import answers

SINGLES = 4  # rows that are asked alone: so many at least, where there are more
Array = NDArray[Any]


def has_rows(
    predictor: Predictor, contract: Contract, feed: Mapping[str, Array]
) -> bool:
    """Return whether a model of one input gives a row of numbers for each sample.

    Args:
        predictor: The model.
        contract: What goes in and comes out.
        feed: What the graph takes, by input.

    Raises:
        StoreError: The graph cannot be run on it.
        TrialError: It gives no tensor.
    """
    if len(contract.inputs) != 1:
        return False
    outputs = answers(predictor, feed)
    output = outputs[first_tensor(outputs)]
    rows = len(np.atleast_1d(feed[contract.inputs[0].name]))
    has_numbers = output.dtype.kind in "iuf" and output.size > 0
    return has_numbers and output.shape[:1] == (rows,)


def depends_on_others(
    predictor: Predictor,
    contract: Contract,
    feed: Mapping[str, Array],
    *,
    is_made_up: bool,
) -> bool:
    """Return whether the answer to a sample changes with the samples beside it.

    Every tensor is compared, as near as devices are held to golden outputs. Where the
    weights are int8 that is wide enough for activations that are quantised by the range
    of the whole call (DynamicQuantizeLinear): a ResNet-18 moves by 0.013 of the largest
    value, and where rows do depend on each other it was 0.1 and more.

    Args:
        predictor: A model of one input.
        contract: What goes in and comes out.
        feed: What the graph takes, by input.
        is_made_up: Whether other values would be as good.
    """
    (spec,) = contract.inputs
    if not spec.has_batch:
        return False
    tries = _tries(feed[spec.name], is_made_up=is_made_up)
    return any(_differs(predictor, contract, rows) for rows in tries)


def _tries(rows: Array, *, is_made_up: bool) -> Iterator[Array]:
    """Yield samples, two at least; made-up ones of both signs too.

    In [0, 1) all is positive, sums of any rows too: a branch on them would not be seen.
    """
    if len(rows) == 1:
        rows = np.concatenate([rows, np.asarray(rows / 2, rows.dtype)])
    yield rows
    if is_made_up and rows.dtype.kind in "fi":
        signed = rows.copy()
        signed[1::2] *= -1
        yield signed


def _differs(predictor: Predictor, contract: Contract, rows: Array) -> bool:
    name, count = contract.inputs[0].name, len(rows)
    try:
        whole, rest = (answers(predictor, {name: x}) for x in (rows, rows[1:]))
    except StoreError:
        return False  # it takes no other number of samples, or no such values
    tensors = [number for number, output in enumerate(whole) if is_tensor(output)]
    if not all(np.isfinite(whole[number]).all() for number in tensors):
        return False  # such values tell nothing
    parts = [(slice(1, None), rest)]
    for row in range(0, count, max(1, count // SINGLES)):
        one = slice(row, row + 1)
        try:
            parts.append((one, answers(predictor, {name: rows[one]})))
        except StoreError:
            return True  # only several together
    first, tolerance = first_tensor(whole), contract.output_tolerance
    return any(
        (number == first and found[number].shape[:1] == (count,))
        or not (
            contract.is_random(number)
            or _agrees(found[number], whole[number], part, tolerance)
        )
        for part, found in parts
        for number in tensors
    )


def _agrees(found: Array, whole: Array, part: slice, tolerance: float) -> bool:
    """Return whether an answer is a part of the whole one, or the same for any rows.

    A part along any axis: the states of an LSTM have their samples on the second.
    """
    if found.shape == whole.shape:
        return relative_difference(found, whole) <= tolerance  # false for NaN
    for axis in range(whole.ndim):
        at = (slice(None),) * axis + (part,)
        if found.shape == whole[at].shape:
            joined = whole.copy()
            joined[at] = found
            if relative_difference(joined, whole) <= tolerance:
                return True
    return False
