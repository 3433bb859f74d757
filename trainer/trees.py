# SPDX-License-Identifier: Apache-2.0
"""Targets and outputs of several tensors: dicts, lists and tuples, one in the other."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def each(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return a value with a function of every tensor in place of the tensor."""
    if isinstance(value, Mapping):
        return {key: each(function, part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return tuple(each(function, part) for part in value)
    return function(value)


def plain(tensor: Tensor) -> Tensor:
    """Return values as NumPy and files can hold them: no graph, bfloat16 as float32."""
    tensor = tensor.detach()
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def leaves(value: Any) -> Iterator[Any]:
    """Yield every tensor of a value, or whatever is where tensors should be."""
    if isinstance(value, Mapping | tuple | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from leaves(part)
    else:
        yield value


def concatenated(values: Sequence[Any]) -> Any:
    """Concatenate equally nested values along the first axis."""
    first = values[0]
    if isinstance(first, Mapping):
        return {key: concatenated([value[key] for value in values]) for key in first}
    if isinstance(first, tuple | list):
        return tuple(concatenated(parts) for parts in zip(*values, strict=True))
    return torch.cat([*values])
