# SPDX-License-Identifier: Apache-2.0
"""Two weight files -> which elements differ.

Compared as bits, because comparing floats as numbers loses -0.0 and NaN payloads.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import WrongModelError
from edge_runtime.formats.layout import Layout, Tensor
from edge_runtime.formats.weights import Weights


@dataclass(frozen=True, slots=True, eq=False)
class TensorChange:
    """Where one tensor differs.

    Attributes:
        name: The state-dict name.
        positions: (changed,) int64, ascending, flat positions in C order.
    """

    name: str
    positions: NDArray[np.int64]


def diff(base: Weights, target: Weights) -> list[TensorChange]:
    """Compare two weight files of one network, bit by bit.

    Returns:
        One entry a tensor, in file order, unchanged tensors included. Beside the
        positions, one byte an element of the largest tensor is needed.

    Raises:
        WrongModelError: The files hold different tensors.
    """
    check_same_tensors(base.layout, target.layout)
    return [
        TensorChange(tensor.name, _differing(tensor, base, target))
        for tensor in base.layout.tensors
    ]


def _differing(tensor: Tensor, base: Weights, target: Weights) -> NDArray[np.int64]:
    changed = _bits(tensor, base) != _bits(tensor, target)
    return np.flatnonzero(changed).astype(np.int64, copy=False)


def _bits(tensor: Tensor, weights: Weights) -> NDArray[Any]:
    return weights[tensor.name].reshape(-1).view(f"<u{tensor.item_size}")


def check_same_tensors(base: Layout, target: Layout) -> None:
    """Insist that two weight files hold tensors of the same names, types and shapes.

    Raises:
        WrongModelError: They do not; the first tensor that differs is named.
    """
    if base.header == target.header:
        return
    a, b = _specs(base), _specs(target)
    name = next(name for name in a | b if a.get(name) != b.get(name))
    raise WrongModelError(
        f"the weight files are of different networks: {name!r} is "
        f"{a.get(name, 'missing')} in the base, {b.get(name, 'missing')} in the target",
        expected=hashlib.sha256(base.header).hexdigest(),
        actual=hashlib.sha256(target.header).hexdigest(),
    )


def _specs(layout: Layout) -> dict[str, str]:
    return {t.name: f"{t.dtype} {list(t.shape)}" for t in layout.tensors}
