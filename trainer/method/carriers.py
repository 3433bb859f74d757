# SPDX-License-Identifier: Apache-2.0
"""Lets an optimizer step the coefficients of a subspace, in its weights' memory."""

from collections.abc import Mapping

import torch
from torch import Tensor

from edge_runtime.errors import TrainingError


class Latents:
    """The coefficients; during a step they lie in the memory of some weights.

    The optimizer knows only weights.

    Attributes:
        values: The coefficients, (N,) float32.
    """

    def __init__(self, weights: Mapping[str, Tensor], count: int) -> None:
        """Begin with zeros.

        Args:
            weights: What the optimizer knows, by name; no fewer than coefficients.
            count: Of the coefficients.
        """
        self._weights = weights
        device = next(iter(weights.values())).device
        self.values = torch.zeros(count, device=device)
        sizes = {name: room(weight) for name, weight in weights.items()}
        self._gradients = {
            name: torch.zeros_like(weights[name].detach())
            for name in with_room(sizes, count)
        }
        self._kept: dict[Tensor, Tensor | None] = {}  # weights' gradients
        self._lent: list[tuple[Tensor, Tensor]] = []

    @property
    def are_lent(self) -> bool:
        """Whether the optimizer has them."""
        return bool(self._kept)

    def lend(self, gradient: Tensor) -> None:
        """Put coefficients and their gradient where the optimizer looks for weights.

        Args:
            gradient: Of the loss by each coefficient, (N,).

        Raises:
            TrainingError: The weights' memory is in another order than it was.
        """
        for name, carried in self._gradients.items():
            if self._weights[name].stride() != carried.stride():
                raise TrainingError(
                    f"{name!r} lies in memory in another order than when the updater "
                    "was made; call model.to(memory_format=...) before that"
                )
        self._kept = {weight: weight.grad for weight in self._weights.values()}
        for weight in self._kept:
            weight.grad = None
        at, self._lent = 0, []
        for name, carried in self._gradients.items():
            weight = self._weights[name]
            mine = self.values[at : at + weight.numel()]
            theirs = memory(weight)[: len(mine)]
            theirs.copy_(mine)
            memory(carried)[: len(mine)] = gradient[at : at + len(mine)]
            weight.grad = carried
            self._lent.append((mine, theirs))
            at += len(mine)

    def take_back(self) -> None:
        """Read what the optimizer made of them, and give weights their gradients back.

        The weights themselves have to be made anew.
        """
        for mine, theirs in self._lent:
            mine.copy_(theirs)
        self.give_up()

    def give_up(self) -> None:
        """Give weights their gradients back, and forget what the optimizer did."""
        for weight, gradient in self._kept.items():
            weight.grad = gradient
        self._kept = {}


def memory(tensor: Tensor) -> Tensor:
    """Return all elements of a tensor without holes, as they lie in memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def room(tensor: Tensor) -> int:
    """Return how many elements a tensor has; none where it has holes."""
    last = sum(
        (n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.numel() if last + 1 == tensor.numel() else 0


def with_room(sizes: Mapping[str, int], count: int) -> list[str]:
    """Return few, small tensors that together hold ``count`` values."""
    enough = [name for name in sizes if sizes[name] >= count]
    if enough:
        return [min(enough, key=lambda name: sizes[name])]
    largest = max(sizes, key=lambda name: sizes[name])
    rest = {name: size for name, size in sizes.items() if name != largest}
    return [largest, *with_room(rest, count - sizes[largest])]
