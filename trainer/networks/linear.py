# SPDX-License-Identifier: Apache-2.0
"""A linear layer whose matrix products are as fast as the CPU allows, in float32.

torch multiplies float32 matrices with MKL, which on AMD processors keeps to 256-bit
vectors: about 100 GFLOP/s a core, where the same product takes oneDNN, which torch
brings as well, half of the time, or as long where the CPU is no faster with 512 bits.
Neither rounds its operands, and both are equally far from float64.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# What torch.compile calls for a linear layer on a CPU; there is no public name for it.
_PAYS = (
    hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
)


class Linear(nn.Linear):
    """``nn.Linear`` that multiplies with oneDNN where that is faster.

    Elsewhere (GPUs, other types, mixed precision, compiled or exported networks, CPUs
    without AVX-512) it is ``nn.Linear`` itself. Sums are in another order, so results
    differ from those of ``nn.Linear`` in their last bits, as they do between machines.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (N, in) to (N, out)."""
        if not _pays(inputs, self.weight):
            return functional.linear(inputs, self.weight, self.bias)
        product = _product(inputs, self.weight)
        return product if self.bias is None else product + self.bias


def _pays(inputs: Tensor, weight: Tensor) -> bool:
    return (
        _PAYS
        and type(inputs) is Tensor  # not one that only stands for values
        and inputs.dim() == 2
        and inputs.dtype == weight.dtype == torch.float32
        and inputs.device.type == weight.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _product(x: Tensor, w: Tensor) -> Tensor:
    """Return ``x @ w.T``, on the tape only where somebody records one."""
    if torch.is_grad_enabled():
        taped: Tensor = _Product.apply(x, w)  # type: ignore[no-untyped-call]
        return taped
    plain: Tensor = torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return plain


class _Product(torch.autograd.Function):
    """``x @ w.T``; its own backward pass consists of such products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:  # (N, in), (out, in)
        ctx.save_for_backward(x, w)
        return _product(x, w)  # inside a Function nobody records

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # (N, out)
        (gradient,) = gradients
        x, w = ctx.saved_tensors
        needs_x, needs_w = ctx.needs_input_grad
        return (
            _product(gradient, w.t()) if needs_x else None,
            _product(gradient.t(), x.t()) if needs_w else None,
        )
