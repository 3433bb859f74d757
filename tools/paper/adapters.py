# SPDX-License-Identifier: Apache-2.0
"""Networks with an adapter of low rank beside every layer (LoRA, Hu et al. 2022).

A baseline of equal bytes: after a full first round only the adapters train, and a patch
is those. A convolution's adapter is one to ``rank`` channels, and one of 1x1 back.
"""

from typing import Any

from torch import Tensor, nn

from trainer.networks import models


class Adapted(nn.Module):
    """A layer, and what its adapter adds to it: nothing at first."""

    def __init__(self, base: nn.Module, down: nn.Module, up: nn.Module) -> None:
        """Put two layers beside one; the second starts with zeros."""
        super().__init__()
        self.base, self.down, self.up = base, down, up
        nn.init.zeros_(up.get_parameter("weight"))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return what layer and adapter give together."""
        adapted: Tensor = self.base(inputs) + self.up(self.down(inputs))
        return adapted


def adapt(module: nn.Module, rank: int) -> nn.Module:
    """Give every convolution and linear layer of a network an adapter, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            sizes: dict[str, Any] = {
                "kernel_size": child.kernel_size,
                "stride": child.stride,
                "padding": child.padding,
            }
            down = nn.Conv2d(child.in_channels, rank, bias=False, **sizes)
            up: nn.Module = nn.Conv2d(rank, child.out_channels, 1, bias=False)
            setattr(module, name, Adapted(child, down, up))
        elif isinstance(child, nn.Linear):
            narrow = nn.Linear(child.in_features, rank, bias=False)
            up = nn.Linear(rank, child.out_features, bias=False)
            setattr(module, name, Adapted(child, narrow, up))
        else:
            adapt(child, rank)
    return module


def mlp(
    shape: models.Shape, classes: int, *, hidden: list[int], rank: int
) -> nn.Module:
    """Return the MLP with adapters."""
    return adapt(models.mlp(shape, classes, hidden=hidden), rank)


def vgg(shape: models.Shape, classes: int, *, width: int, rank: int) -> nn.Module:
    """Return the VGG with adapters."""
    return adapt(models.vgg(shape, classes, width=width), rank)


def resnet20(shape: models.Shape, classes: int, *, rank: int) -> nn.Module:
    """Return the ResNet20 with adapters."""
    return adapt(models.resnet20(shape, classes), rank)
