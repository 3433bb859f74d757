# SPDX-License-Identifier: Apache-2.0
"""Weights in a coarser form: the same model, smaller patches.

The bits that are dropped are mostly noise, and noise does not compress. Rounding comes
before validation, so that accuracy, fingerprint and device are all of these weights.

On a grid, new values are whole multiples of a power of two. A patch then holds small
whole numbers, whatever the weights' size; with fewer mantissa bits it holds values that
are finer the smaller they are, which nobody needs.

Weights that are int8 on the device are whole steps of their channel's scale in any
case; a grid is counted in those steps then.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_runtime.formats.int8_grid import by_slice, to_float32, to_int8
from edge_runtime.formats.weights import Weights, pack_weights
from trainer.export.int8 import Scales
from trainer.export.tensors import deployed_tensors
from trainer.recipe.schema import UpdateConfig

FLOAT32_BITS = 23  # of a float32's mantissa, the leading 1 not counted
FALLBACK_BITS = 7  # where even a finer grid costs too much
FINEST_STEP = 2.0**-24  # finer ones round nothing that matters


@dataclass(frozen=True, slots=True)
class Rounding:
    """Rounding of each tensor: to a grid's step, or to mantissa bits.

    Attributes:
        bits: Mantissa bits, of tensors without a step.
        steps: By tensor, the power of two of which values are multiples; of tensors
            with scales, of which their steps are.
        scales: Of the tensors that are int8 on the device.
    """

    bits: int = FLOAT32_BITS
    steps: Mapping[str, float] = field(default_factory=dict)
    scales: Scales = field(default_factory=dict)

    @property
    def is_exact(self) -> bool:
        """Whether values stay as they are."""
        return self.bits == FLOAT32_BITS and not self.steps and not self.scales

    def round(self, weights: Weights, base: Weights) -> Weights:
        """Round every float32 value that differs from the base, compared as bits.

        To the nearest, ties to even, as IEEE 754 does it; 7 bits are bfloat16's. A
        value beyond the largest one becomes infinite. Values that equal the base,
        infinities, NaN and other types stay as they are. Of int8 the steps end at 127.

        Args:
            weights: What is to be deployed.
            base: What it started from, with the same tensors.
        """
        if self.is_exact:
            return weights
        arrays = {name: np.array(array) for name, array in weights.items()}
        types = weights.layout.types
        for name, array in arrays.items():
            if types[name] == "F32":
                changed = array.view("<u4") != base[name].view("<u4")
                changed &= np.isfinite(array)
                array[changed] = self._rounded(name, array, changed)
        return pack_weights(arrays, types)

    def _rounded(
        self, name: str, array: NDArray[np.float32], changed: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        step, values = self.steps.get(name), array[changed]
        if name in self.scales:
            scales = by_slice(self.scales[name], array.ndim)
            scales = np.broadcast_to(scales, array.shape)[changed]
            return to_float32(to_int8(values, scales, int(step or 1)), scales)
        return round_to(values, step) if step else round_mantissa(values, self.bits)


class RoundForm:
    """The form of what one round deploys, and how it is settled.

    ``update.grid`` is of the tensors that are selected from, ``update.dense_grid`` of
    other parameters; statistics have mantissa bits. Where there are scales, a number as
    ``update.grid`` is one of int8 steps: tensors that stay floats have the dense grid.

    Attributes:
        rounding: As it is now.
        automatic: Whether steps are found in the round.
    """

    def __init__(
        self,
        model: nn.Module,
        update: UpdateConfig,
        selectable: Callable[[str, Tensor], bool],
        *,
        grid: bool = True,
        scales: Scales = MappingProxyType({}),
    ) -> None:
        """Take the steps that the recipe gives; those of ``auto`` come later.

        Args:
            model: The network.
            update: Section of the recipe.
            selectable: Which tensors are selected from.
            grid: Whether the round selects; where every weight changes, none is put
                on a grid.
            scales: Of the tensors that are int8 on the device.
        """
        buffers = {name for name, _ in model.named_buffers()}
        self._grids: dict[str, float | str] = {}
        self._scales = scales
        for name, tensor in deployed_tensors(model).items() if grid else ():
            selected, step = selectable(name, tensor), update.dense_grid
            counts_steps = bool(scales) and isinstance(update.grid, float)
            if selected and (name in scales or not counts_steps):
                step = update.grid
            if step and tensor.dtype == torch.float32 and name not in buffers:
                self._grids[name] = step
        fixed = {n: step for n, step in self._grids.items() if isinstance(step, float)}
        self._fixed, self._bits = fixed, update.mantissa_bits
        self.automatic = len(fixed) < len(self._grids)
        self.rounding = Rounding(self._bits, fixed, scales)

    def settle(
        self, weights: Weights, start: Weights, masks: Mapping[str, Tensor]
    ) -> None:
        """Find the steps of ``auto`` from how far the selected weights have moved.

        Args:
            weights: After the last selection.
            start: What they started from.
            masks: What is selected; tensors without one may change whole.
        """
        if not self.automatic:
            return
        steps = dict(self._fixed)
        for name in self._grids.keys() - steps.keys():
            moved = weights[name] - start[name]
            if name in self._scales:
                moved = moved / by_slice(self._scales[name], moved.ndim)
            moved = moved.ravel()
            if name in masks:
                moved = moved[masks[name].cpu().numpy().ravel()]
            if step := step_for(moved):
                steps[name] = self._possible(name, step)
        self.rounding = Rounding(self._bits, dict(sorted(steps.items())), self._scales)

    def finer(self) -> Iterator[Rounding]:
        """Yield what to try where the form costs too much: finer, then no grid."""
        found = self.rounding.steps.items()
        halved = {
            n: s if n in self._fixed else self._possible(n, s / 2) for n, s in found
        }
        yield Rounding(self._bits, halved, self._scales)
        yield Rounding(min(self._bits, FALLBACK_BITS), self._fixed, self._scales)

    def _possible(self, name: str, step: float) -> float:
        """Return a step that the tensor can have: int8 has whole ones, up to 64."""
        return min(max(step, 1.0), 64.0) if name in self._scales else step


def step_for(moved: Iterable[float] | NDArray[np.floating]) -> float | None:
    """Return the step of ``auto``: half of the root mean square displacement.

    As a power of two. Coarser ones cost accuracy (the root mean square itself up to 2
    points, twice that up to 10), a half and a quarter about the same, near nothing:
    one step of headroom. None where nothing moved, or by less than matters.
    """
    values = np.asarray(moved, np.float64)
    rms = float(np.sqrt(np.mean(values**2))) if values.size else 0.0
    if not 2 * FINEST_STEP <= rms < math.inf:
        return None
    return 2.0 ** (round(math.log2(rms)) - 1)


def round_to(values: NDArray[np.float32], step: float) -> NDArray[np.float32]:
    """Round finite float32 values to multiples of a power of two, ties to even.

    Exact but for values beyond 2^128 steps; a zero is positive.
    """
    power = np.float32(step)
    rounded: NDArray[np.float32] = np.rint(values / power) * power + np.float32(0)
    return rounded


def round_mantissa(values: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Round finite float32 values to ``bits`` mantissa bits, ties to even."""
    drop = FLOAT32_BITS - bits
    if not drop:
        return values
    word = values.view("<u4")
    # Adding just under half a unit, and the last bit that stays, carries where it must;
    # a carry out of the mantissa into the exponent is the next power of two: right too.
    odd = (word >> np.uint32(drop)) & np.uint32(1)
    word = word + (np.uint32((1 << (drop - 1)) - 1) + odd)
    rounded: NDArray[np.float32] = (word >> np.uint32(drop) << np.uint32(drop)).view(
        "<f4"
    )
    return rounded
