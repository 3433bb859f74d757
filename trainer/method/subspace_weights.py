# SPDX-License-Identifier: Apache-2.0
"""Where coefficients move the weights: in training, and to the bit on a device."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_runtime.errors import TrainingError
from edge_runtime.formats.subspace import (
    MAX_BITS,
    MAX_COEFFICIENTS,
    MAX_TAPS,
    WORD,
    round_scale,
)
from edge_runtime.formats.subspace_moves import move_weights
from edge_runtime.formats.weights import pack_weights
from trainer.method.carriers import room
from trainer.method.int8_steps import Int8Steps
from trainer.method.movement import Movement, best_scale, quantise, relative_scales
from trainer.method.signs import SignTable

MOST_BITS = 7 << 20  # of all coefficients: what a patch has room for


class SubspaceWeights:
    """Weights as a function of coefficients: free ones, then of few bits.

    Attributes:
        unit: What coefficients are rounded in; 1 while they are free.
        scales: How far one moves each tensor, by name; none while they are free.
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        signs: SignTable,
        bits: int,
        int8_scales: Mapping[str, NDArray[np.float32]],
    ) -> None:
        """Begin with free coefficients.

        Args:
            base: Weights that move, by name.
            signs: Of these weights.
            bits: Of a coefficient.
            int8_scales: As for :class:`Int8Steps`.
        """
        self._base, self._signs, self._bits = base, signs, bits
        self._int8_scales = int8_scales
        self.move_from(base, 1.0, {})

    def move_from(
        self, base: Mapping[str, Tensor], unit: float, scales: Mapping[str, float]
    ) -> None:
        """Take other values of the base, and these of unit and scales."""
        for name, tensor in self._base.items():
            tensor.copy_(base[name])
        self._steps = Int8Steps(self._base, self._int8_scales)
        # How far tensors move beside each other, in what they move by.
        self._relative = relative_scales(self._base)
        for name, steps in self._steps.scales.items():
            self._relative[name] /= float(steps.mean())
        self._scale(unit, scales)

    def settle(self, coefficients: Tensor) -> None:
        """Choose unit and scales, in which rounding these coefficients costs least."""
        unit = best_scale(coefficients, self._bits)
        self._scale(unit, {n: round_scale(unit * r) for n, r in self._relative.items()})

    def _scale(self, unit: float, scales: Mapping[str, float]) -> None:
        self.unit, self.scales = unit, dict(scales)
        self._signs.scale(self.scales or self._relative)

    def fold(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Return gradients of the weights, in their order, as one of coefficients."""
        each = zip(self._base, gradients, strict=True)
        of_moves = [self._steps.gradient(name, g) for name, g in each]
        return self._signs.fold(of_moves) / self.unit

    def write(self, weights: Mapping[str, Tensor], coefficients: Tensor) -> None:
        """Write the weights that coefficients stand for: rounded, once settled."""
        settled = bool(self.scales)
        found = self.rounded(coefficients) if settled else coefficients
        self._signs.move(self._steps.base, found, self._steps.out(weights))
        self._steps.write(weights, whole=settled)

    def rounded(self, coefficients: Tensor) -> Tensor:
        """Return coefficients of few bits: odd integers, as floats."""
        return quantise(coefficients, self.unit, self._bits)

    def on_device(self, movement: Movement) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights, by name, as the runtime's own code moves the base."""
        steps = self._steps
        base = pack_weights({n: steps.device(n, b) for n, b in self._base.items()})
        moved = move_weights(base, [movement.term(base.layout)])
        for name, tensor in self._base.items():
            found = steps.weights(name, moved[name])
            yield name, torch.tensor(found, device=tensor.device)


def check_subspace(
    weights: Mapping[str, Tensor], coefficients: int, *, bits: int, taps: int, seed: int
) -> None:
    """Refuse a subspace that no patch holds, or that these weights cannot move in.

    Raises:
        TrainingError: It is one; the message says what is possible.
    """
    total = sum(p.numel() for p in weights.values())
    most = min(total, MAX_COEFFICIENTS, MOST_BITS // max(bits, 1))
    if not 0 < coefficients <= most or coefficients % WORD:
        raise TrainingError(
            f"expected a multiple of {WORD} coefficients, at most {most} "
            f"of {bits} bits for {total} weights that move, found {coefficients}"
        )
    if not (1 <= bits <= MAX_BITS and 1 <= taps <= MAX_TAPS):
        raise TrainingError(
            f"expected 1 to {MAX_BITS} bits and 1 to {MAX_TAPS} taps, found {bits} "
            f"and {taps}"
        )
    if not 0 <= seed < 1 << 63:
        raise TrainingError(f"expected a seed from 0 to 2**63 - 1, found {seed}")
    if sum(map(room, weights.values())) < coefficients:
        holes = [name for name, p in weights.items() if not room(p)]
        raise TrainingError(
            f"{', '.join(holes)} have holes between their elements in memory, and "
            f"{coefficients} coefficients find no room in the others: make them "
            "contiguous (p.data = p.data.contiguous()) before the updater is made"
        )
    for name, parameter in weights.items():
        first = next(iter(weights.values()))
        if parameter.dtype != torch.float32 or parameter.device != first.device:
            raise TrainingError(
                f"{name!r} is {parameter.dtype} on {parameter.device}; weights "
                f"that move are torch.float32 on one device, here {first.device}: "
                "train under autocast rather than in half precision"
            )
