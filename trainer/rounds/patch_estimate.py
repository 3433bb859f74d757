# SPDX-License-Identifier: Apache-2.0
"""Estimates what a patch takes from the shape of a network alone.

The formulas were held against committed results: 15 % of error for small shares of
float32 weights, rounded or not.
"""

import math
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from edge_runtime.formats.header import HEADER_BYTES
from trainer.export.tensors import deployed_tensors
from trainer.method.selectable import is_weight

ERROR = 0.15  # of the estimates, either way
MEASURED = 0.05  # up to this share of the weights
# Bits of one value beside its place: what committed patches have.
FLOAT_BITS, DENSE_BITS = 21, 5
# On a grid: the more weights, the more of them are a step or two from the base, and
# the more values there are; what patches of 0.25 to 80 % of the weights have.
GRID_BITS, GRID_BITS_A_DECADE = 3, 0.4
INT8_BITS = 5.5  # without a grid, where weights move by steps of int8
LEAST_SHARE = 0.002  # fewer selected weights have not been tried


@dataclass(frozen=True, slots=True)
class NetworkSizes:
    """The sizes of a network that decide how large its patches are.

    Attributes:
        weights: How many are selected from, or moved.
        dense: Bytes of all else, as it is.
        folded: Values of all else once BatchNorm is folded.
        normed: Whether it has BatchNorm.
        full: Bytes of all of it, as devices have it.
        int8: Whether weights are int8 there.
    """

    weights: int
    dense: int
    folded: int
    normed: bool
    full: int
    int8: bool = False

    @classmethod
    def of(cls, model: nn.Module, *, int8: bool = False) -> "NetworkSizes":
        """Measure a network, which devices may have in int8."""
        tensors = deployed_tensors(model)
        named = dict(model.named_parameters())
        chosen = {n for n, p in named.items() if is_weight(n, p)}
        dense = {n: t for n, t in tensors.items() if n not in chosen}
        weights = sum(named[n].numel() for n in chosen)
        rest = sum(t.numel() * t.element_size() for t in dense.values())
        return cls(
            weights,
            rest,
            sum(t.numel() for n, t in dense.items() if n in named),
            any(isinstance(module, _BatchNorm) for module in model.modules()),
            (1 if int8 else 4) * weights + rest,
            int8,
        )


def place_bits(share: float) -> float:
    """Return the bits a selected weight's place takes: the entropy of a random mask."""
    if not 0 < share < 1:
        return 0.0
    rest = 1 - share
    return -math.log2(share) - rest / share * math.log2(rest)


def patch_bytes(network: NetworkSizes, share: float, *, lean: bool) -> int:
    """Estimate the bytes of a patch in which a share of the weights is selected."""
    each = place_bits(share) + _value_bits(network, share, lean=lean)
    rest = network.folded * DENSE_BITS / 8 if lean else network.dense
    return round(HEADER_BYTES + rest + network.weights * share * each / 8)


def _value_bits(network: NetworkSizes, share: float, *, lean: bool) -> float:
    """Return the bits of a selected weight's new value."""
    if lean:
        return GRID_BITS + GRID_BITS_A_DECADE * math.log10(max(share, LEAST_SHARE))
    return INT8_BITS if network.int8 else FLOAT_BITS


def share_within(network: NetworkSizes, budget: int, *, lean: bool) -> float:
    """Return the share of the weights whose patch has about a size; 0 for no room."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        fits = patch_bytes(network, middle, lean=lean) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return low if low * network.weights >= 1 else 0.0
