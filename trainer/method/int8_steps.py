# SPDX-License-Identifier: Apache-2.0
"""Weights of int8 tensors, as float32 in training and whole steps on the device."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_runtime.formats.int8_grid import MOST, by_slice, to_float32, to_int8


class Int8Steps:
    """Converts weights between float32 (training) and whole int8 steps (device).

    All other tensors pass as they are.
    """

    def __init__(
        self, base: Mapping[str, Tensor], scales: Mapping[str, NDArray[np.float32]]
    ) -> None:
        """Count the base in steps.

        Args:
            base: Weights that move, by name; of int8 tensors on their grid.
            scales: Of the tensors that are int8 on the device, one for each slice of
                the first axis; names that do not move are passed over.
        """
        self.scales = {
            name: torch.tensor(by_slice(scales[name], tensor.dim())).to(tensor)
            for name, tensor in base.items()
            if name in scales
        }
        self.base = {
            name: (tensor / self.scales[name]).round() if name in scales else tensor
            for name, tensor in base.items()
        }
        self._moved = {name: torch.empty_like(base[name]) for name in self.scales}

    def gradient(self, name: str, gradient: Tensor | None) -> Tensor | None:
        """Return a gradient of steps, of one of weights."""
        if gradient is None or name not in self.scales:
            return gradient
        return gradient * self.scales[name]

    def out(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the output buffers: steps for int8 tensors, the weights for others."""
        return {**weights, **self._moved}

    def write(self, weights: Mapping[str, Tensor], *, whole: bool) -> None:
        """Write the weights that moved steps stand for.

        Args:
            weights: Where to, by name.
            whole: As a device has them: rounded, to 127 at most.
        """
        for name, scales in self.scales.items():
            steps = self._moved[name]
            if whole:
                steps.round_().clamp_(-MOST, MOST).add_(0.0)  # no zero is negative
            torch.mul(steps, scales, out=weights[name])

    def device(self, name: str, weights: Tensor) -> NDArray[Any]:
        """Return a tensor as it lies on a device."""
        array: NDArray[Any] = weights.detach().cpu().numpy()
        if name in self.scales:
            return to_int8(array, self.scales[name].cpu().numpy())
        return array

    def weights(self, name: str, device: NDArray[Any]) -> NDArray[Any]:
        """Return a tensor as it trains, of one that lies on a device."""
        if name in self.scales:
            return to_float32(device, self.scales[name].cpu().numpy())
        return device
