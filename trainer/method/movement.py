# SPDX-License-Identifier: Apache-2.0
"""How a round moved the weights of a network in a subspace, and in what units."""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from edge_runtime.formats.layout import Layout
from edge_runtime.formats.subspace import Term

_SCALES = np.linspace(0.05, 1.2, 47)  # tried, in units of the largest coefficient


class Movement(dict[str, Tensor]):
    """How a round moved the weights of a network.

    As a mapping it is what ``publish_round`` takes as masks: of the tensors that move,
    nothing is selected one by one.

    Attributes:
        scales: By name of the tensor.
        coefficients: Odd integers.
        bits: Of a coefficient.
        taps: How many coefficients move a weight.
        seed: Of the signs.
    """

    def __init__(
        self,
        masks: Mapping[str, Tensor],
        scales: Mapping[str, float],
        coefficients: NDArray[np.int16],
        *,
        bits: int,
        taps: int,
        seed: int,
    ) -> None:
        super().__init__(masks)
        self.scales, self.coefficients = dict(scales), coefficients
        self.bits, self.taps, self.seed = bits, taps, seed

    def term(self, layout: Layout, scales: Mapping[str, float] | None = None) -> Term:
        """Return it as a patch for this weight file has it.

        Args:
            layout: Of the weight file.
            scales: By the names that the tensors have there, where they are others.
        """
        numbers = {tensor.name: n for n, tensor in enumerate(layout.tensors)}
        named = self.scales if scales is None else scales
        moved = {numbers[name]: scale for name, scale in named.items()}
        return Term(self.seed, self.bits, self.taps, moved, self.coefficients)


def quantise(values: Tensor, unit: float, bits: int) -> Tensor:
    """Return the odd integers, of so many bits, nearest to values in this unit."""
    most = (1 << bits) - 1
    return (2 * (values / (2 * unit)).floor() + 1).clamp(-most, most)


def best_scale(values: Tensor, bits: int) -> float:
    """Return the unit in which rounding values to odd integers costs least."""
    sizes = values.abs()
    if bits == 1:
        return float(sizes.mean())
    largest = float(sizes.max()) / ((1 << bits) - 1)
    units = [float(largest * share) for share in _SCALES]
    errors = (quantise(values, unit, bits) * unit - values for unit in units)
    return units[int(np.argmin([float(error.square().sum()) for error in errors]))]


def relative_scales(base: Mapping[str, Tensor]) -> dict[str, float]:
    """Return how far each tensor moves: the RMS of its weights over that of all.

    Normalisation and biases move as far as all weights on average.
    """
    matrices = [b for b in base.values() if b.dim() > 1]
    total = sum(float(b.double().square().sum()) for b in matrices)
    mean = math.sqrt(total / max(1, sum(b.numel() for b in matrices)))
    found = {}
    for name, tensor in base.items():
        own = math.sqrt(float(tensor.double().square().mean()))
        found[name] = own / mean if tensor.dim() > 1 and own > 0 else 1.0
    return found
