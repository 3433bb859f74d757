# SPDX-License-Identifier: Apache-2.0
"""Weights as whole steps from -127 to 127: one scale for each slice of the first axis.

The same way on every CPU: one float32 division, rounded to the nearest, ties to even;
and one float32 multiplication back. There and back again is lossless for every step and
every scale that :func:`check_scales` takes: the product is off by at most 2^-24 of
itself, so is the quotient, and 127 steps times twice that is far below half a step.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import WeightsError

MOST = 127  # steps; -128 is left out, so that both sides are alike
SMALLEST, LARGEST = 2.0**-100, 2.0**100  # scales: nothing near them is a weight's


def to_int8(
    values: NDArray[Any], scales: NDArray[Any], every: int = 1
) -> NDArray[np.int8]:
    """Return the nearest steps; what is beyond the last one becomes the last one.

    Args:
        values: Float32 weights; NaN has no place among them.
        scales: Float32, of a shape that goes with them.
        every: A power of two: only its multiples are steps.
    """
    steps = np.rint(values / scales / np.float32(every))
    most = MOST // every
    found: NDArray[np.int8] = np.clip(steps, -most, most).astype(np.int8)
    found *= np.int8(every)
    return found


def to_float32(steps: NDArray[Any], scales: NDArray[Any]) -> NDArray[np.float32]:
    """Return the weights that steps stand for; a zero is positive."""
    values: NDArray[np.float32] = steps.astype(np.float32) * scales
    return values


def by_slice(scales: NDArray[Any], axes: int) -> NDArray[Any]:
    """Give scales the shape that goes with a tensor of so many axes."""
    return scales.reshape(-1, *[1] * (axes - 1))


def check_scales(name: str, scales: NDArray[Any]) -> None:
    """Insist that scales are finite, and of a size that weights have.

    Raises:
        WeightsError: One is not.
    """
    if not ((scales >= SMALLEST) & (scales <= LARGEST)).all():
        raise WeightsError(
            f"the int8 scales of {name!r} go from {scales.min()} to {scales.max()}, "
            f"expected numbers from {SMALLEST:.0e} to {LARGEST:.0e}"
        )
