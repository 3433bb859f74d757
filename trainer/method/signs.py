# SPDX-License-Identifier: Apache-2.0
"""The map of a subspace in torch: from coefficients to displacements, and back.

Weight ``i`` of all weights, tensor after tensor, moves by the sum of one coefficient a
tap, each under a sign: :mod:`edge_runtime.formats.subspace` says which. Row ``b`` of a
table with ``d`` columns holds the weights ``b * d`` and after; tap ``t`` is the same
table, its columns shifted by ``t`` more in every row.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from edge_runtime.formats.init_weights import philox
from edge_runtime.formats.subspace import WORD


class SignTable:
    """The signs of all weights, times a scale for each tensor.

    As few passes over memory as can be: on small networks they are what a step costs.

    Attributes:
        spans: By name, where the weights of a tensor lie in the table.
    """

    def __init__(
        self, shapes: Mapping[str, Tensor], size: int, taps: int, seed: int
    ) -> None:
        """Draw the signs.

        Args:
            shapes: Tensors of the weights, by name in file order.
            size: Number of coefficients, d.
            taps: How many coefficients move a weight.
            seed: Of the signs.
        """
        self.spans: dict[str, slice] = {}
        stop = 0
        for name, tensor in shapes.items():
            self.spans[name] = slice(stop, stop + tensor.numel())
            stop = -(-(stop + tensor.numel()) // WORD) * WORD
        self._size, self._rows = size, -(-stop // size)
        device = next(iter(shapes.values())).device
        # Between tensors and behind them signs are zero, and so is what they multiply.
        self._table = torch.zeros(self._rows, size, device=device)
        first, *rest = [self._draw(seed, tap, stop, device) for tap in range(taps)]
        self._signs = first
        # For each later tap: its signs times those of the first; and a buffer with
        # longer rows, whose columns add up what belongs to one coefficient.
        self._others = [first * signs for signs in rest]
        lengths = [-(-(self._rows * (size + t) + t) // size) for t in range(1, taps)]
        self._longer = [torch.zeros(n, size, device=device) for n in lengths]

    def _draw(self, seed: int, tap: int, count: int, device: torch.device) -> Tensor:
        words = philox(seed, f"subspace {tap}").random_raw(count // WORD)
        bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")
        signs = torch.zeros(self._rows * self._size)
        for span in self.spans.values():
            signs[span] = 1 - 2 * torch.from_numpy(bits[span]).float()
        return signs.view(self._rows, self._size).to(device)

    def scale(self, scales: Mapping[str, float]) -> None:
        """Give every tensor's signs a magnitude."""
        signs = self._signs.view(-1)
        for name, span in self.spans.items():
            signs[span] = signs[span].sign() * scales[name]

    def fold(self, values: Sequence[Tensor | None]) -> Tensor:
        """Return, for each coefficient, the sum of what its weights have, with signs.

        Args:
            values: One tensor for each of ``spans``; None is zero.
        """
        table, signs = self._table.view(-1), self._signs.view(-1)
        for span, value in zip(self.spans.values(), values, strict=True):
            if value is None:
                table[span].zero_()
            else:
                torch.mul(signs[span], value.reshape(-1), out=table[span])
        found = self._table.sum(0)
        each = zip(self._others, self._longer, strict=True)
        for tap, (other, longer) in enumerate(each, 1):
            shape, step = (self._rows, self._size), self._size + tap
            torch.mul(other, self._table, out=longer.as_strided(shape, (step, 1), tap))
            found += longer.sum(0)
        self._clear()
        return found

    def move(
        self,
        base: Mapping[str, Tensor],
        coefficients: Tensor,
        out: Mapping[str, Tensor],
    ) -> None:
        """Write the base, moved, into other tensors of the same names.

        Where scales and coefficients are what a patch holds, these are the sums that a
        device makes: all but the last one are exact.
        """
        total = coefficients.expand(self._rows, self._size)
        for tap, other in enumerate(self._others, 1):
            often = (self._rows + 1) * tap // self._size + 2
            rows = coefficients.repeat(often).as_strided(other.shape, (tap, 1), tap)
            total = torch.addcmul(total, other, rows, out=self._table)
        if not self._others:
            total = self._table.copy_(total)
        moves, signs = total.view(-1), self._signs.view(-1)
        for name, span in self.spans.items():
            of = base[name]
            by, sign = moves[span].view_as(of), signs[span].view_as(of)
            torch.addcmul(of, sign, by, out=out[name])
        self._clear()

    def _clear(self) -> None:
        """Leave nothing between the tensors, as the next fold sums whole columns."""
        table, stop = self._table.view(-1), 0
        for span in self.spans.values():
            table[stop : span.start].zero_()
            stop = span.stop
        table[stop:].zero_()
