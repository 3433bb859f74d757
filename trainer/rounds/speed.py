# SPDX-License-Identifier: Apache-2.0
"""How steps are computed: precision, memory layout, compilation, determinism.

What a recipe asks for holds for training alone: weights are float32 in any case, and
what decides (accuracies, scores, selection) is computed as devices compute.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from edge_runtime.errors import ConfigError
from trainer.recipe.schema import TrainConfig

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
IMAGES = 4  # axes of (N, C, H, W), which have a channels-last form

Autocast = Callable[[], AbstractContextManager[object]]


@contextmanager
def computing(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Compute as a recipe says, and as before afterwards.

    Args:
        config: Its section ``[train]``.
        device: Where the run trains.

    Raises:
        ConfigError: This device cannot.
    """
    if config.precision == "tf32" and device.type != "cuda":
        raise ConfigError(
            'train.precision "tf32" is for GPUs alone; choose "float32" or "bf16"'
        )
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (
        *(cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark),
        torch.are_deterministic_algorithms_enabled(),
    )
    # Else convolutions are in tf32 by torch's default, and multiplications are not.
    cudnn.allow_tf32 = matmul.allow_tf32 = config.precision == "tf32"
    cudnn.benchmark = not config.deterministic
    if config.deterministic:
        os.environ.setdefault(WORKSPACE, ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark, deterministic = before
        torch.use_deterministic_algorithms(deterministic)


def autocast(config: TrainConfig, device: torch.device) -> Autocast:
    """Return what a forward pass and its loss are computed in."""
    if config.precision != "bf16":
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def arranged(model: nn.Module, config: TrainConfig) -> nn.Module:
    """Give a network the memory layout of the recipe, in place; values stay."""
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def arranger(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a function that brings inputs to the network's memory layout."""
    if not _is_channels_last(model):
        return lambda inputs: inputs

    def arrange(inputs: Tensor) -> Tensor:
        if inputs.dim() != IMAGES:
            return inputs
        return inputs.contiguous(memory_format=torch.channels_last)

    return arrange


def _is_channels_last(model: nn.Module) -> bool:
    kernels = (p for p in model.parameters() if p.dim() == IMAGES and p.shape[1] > 1)
    first = next(kernels, None)
    if first is None:
        return False
    return first.is_contiguous(memory_format=torch.channels_last)


def compiled(model: nn.Module, config: TrainConfig) -> nn.Module:
    """Return a network whose forward and backward passes are compiled, if wanted."""
    if not config.compile:
        return model
    found: nn.Module = torch.compile(model)  # type: ignore[assignment]
    return found
