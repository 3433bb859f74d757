# SPDX-License-Identifier: Apache-2.0
"""The map of a subspace in torch: from coefficients to displacements, and back.

Weight ``i`` of all weights, tensor after tensor, moves by the sum of one coefficient a
tap, each under a sign: :mod:`edge_runtime.formats.subspace` says which. Row ``b`` of a
table with ``d`` columns holds the weights ``b * d`` and after; tap ``t`` is the same
table with rows that are ``t`` elements longer, so that its columns are shifted by one
more in every row.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from edge_runtime.formats.init_weights import philox
from edge_runtime.formats.subspace import WORD


class SignTable:
    """The signs of all weights, times a scale for each tensor.

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
        self._table = torch.zeros(self._rows * size, device=device)
        self._taps = [self._draw(seed, tap, stop, device) for tap in range(taps)]
        # Of the taps after the first: their table, with room between the rows.
        lengths = [-(-(self._rows * (size + t) + t) // size) for t in range(1, taps)]
        self._longer = [torch.zeros(n * size, device=device) for n in lengths]

    def _draw(self, seed: int, tap: int, count: int, device: torch.device) -> Tensor:
        words = philox(seed, f"subspace {tap}").random_raw(count // WORD)
        bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")
        signs = torch.zeros(self._rows * self._size)
        for span in self.spans.values():  # between them and behind them it stays zero
            signs[span] = 1 - 2 * torch.from_numpy(bits[span]).float()
        return signs.to(device)

    def scale(self, scales: Mapping[str, float]) -> None:
        """Give every tensor's signs a magnitude."""
        for name, span in self.spans.items():
            for signs in self._taps:
                signs[span] = signs[span].sign() * scales[name]

    def fold(self, values: Sequence[Tensor | None]) -> Tensor:
        """Return, for each coefficient, the sum of what its weights have, with signs.

        Args:
            values: One tensor for each of ``spans``; None is zero.
        """
        table = self._table
        for span, value in zip(self.spans.values(), values, strict=True):
            if value is None:
                table[span].zero_()
            else:
                table[span].copy_(value.reshape(-1))
        found = torch.mul(self._taps[0], table).view(-1, self._size).sum(0)
        for tap, longer in enumerate(self._longer, 1):
            rows = self._rows_of(longer, tap)
            torch.mul(self._of(tap), table.view(-1, self._size), out=rows)
            found += longer.view(-1, self._size).sum(0)
            longer.zero_()  # what lies between the rows has to be zero
        return found

    def spread(self, coefficients: Tensor) -> dict[str, Tensor]:
        """Return the displacement of every weight, by name, until the next call."""
        table = self._table.view(-1, self._size)
        torch.mul(self._of(0), coefficients, out=table)
        for tap, longer in enumerate(self._longer, 1):
            longer.view(-1, self._size).copy_(coefficients)
            table.addcmul_(self._of(tap), self._rows_of(longer, tap))
            longer.zero_()
        return {name: self._table[span] for name, span in self.spans.items()}

    def _of(self, tap: int) -> Tensor:
        return self._taps[tap].view(-1, self._size)

    def _rows_of(self, longer: Tensor, tap: int) -> Tensor:
        return longer.as_strided((self._rows, self._size), (self._size + tap, 1), tap)
