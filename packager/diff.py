# SPDX-License-Identifier: Apache-2.0
"""Two weight files -> which elements differ.

Compared as bits, because comparing floats as numbers loses -0.0 and NaN payloads.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import WrongModelError
from edge_runtime.formats.layout import Layout, Tensor
from edge_runtime.formats.spool import Spool
from edge_runtime.formats.tensor_index import WINDOW
from edge_runtime.formats.weights import Weights

_COMPARED = 1 << 20  # elements at a time, a multiple of WINDOW


@dataclass(frozen=True, slots=True, eq=False)
class TensorChange:
    """Where one tensor differs; one bit for each of its elements is kept.

    Attributes:
        name: The state-dict name.
        count: How many elements differ.
    """

    name: str
    count: int
    _bitmap: Spool
    _start: int  # of its bits in the bitmap of all tensors, in bytes
    _size: int

    def __len__(self) -> int:
        """Return how many elements differ."""
        return self.count

    def pieces(self) -> Iterator[NDArray[np.int64]]:
        """Yield flat positions in C order, ascending, of ``WINDOW`` elements a time."""
        for first in range(0, self._size if self.count else 0, WINDOW):
            some = min(WINDOW, self._size - first)
            start = self._start + first // 8
            raw = np.frombuffer(self._bitmap.read(start, start + (some + 7) // 8), "u1")
            if raw.any():
                (found,) = np.unpackbits(raw, bitorder="little").nonzero()
                found += first
                yield found

    @property
    def positions(self) -> NDArray[np.int64]:
        """(changed,) int64, ascending, all of them at once."""
        return np.concatenate([np.zeros(0, np.int64), *self.pieces()])


def diff(base: Weights, target: Weights) -> list[TensorChange]:
    """Compare two weight files of one network, bit by bit.

    Returns:
        One entry a tensor, in file order, unchanged tensors included. Of large files
        they lie in a temporary file: one bit an element.

    Raises:
        WrongModelError: The files hold different tensors.
        OSError: There is no room for temporary files.
    """
    check_same_tensors(base.layout, target.layout)
    bitmap = Spool()
    return [_differing(tensor, base, target, bitmap) for tensor in base.layout.tensors]


def _differing(
    tensor: Tensor, base: Weights, target: Weights, bitmap: Spool
) -> TensorChange:
    start, count = bitmap.size, 0
    for first in range(0, tensor.size, _COMPARED):
        stop = min(first + _COMPARED, tensor.size)
        changed = base.bits(tensor, first, stop) != target.bits(tensor, first, stop)
        count += int(np.count_nonzero(changed))
        bitmap.write(np.packbits(changed, bitorder="little"))
    return TensorChange(tensor.name, count, bitmap, start, tensor.size)


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
