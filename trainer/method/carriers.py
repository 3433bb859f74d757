# SPDX-License-Identifier: Apache-2.0
"""Which weights' own memory holds the coefficients while an optimizer steps them."""

from collections.abc import Mapping

from torch import Tensor


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
    """Return the tensors that have room for so many values: small ones, and few."""
    enough = [name for name in sizes if sizes[name] >= count]
    if enough:
        return [min(enough, key=lambda name: sizes[name])]
    largest = max(sizes, key=lambda name: sizes[name])
    rest = {name: size for name, size in sizes.items() if name != largest}
    return [largest, *with_room(rest, count - sizes[largest])]
