# SPDX-License-Identifier: Apache-2.0
"""Batches with a teacher's answers beside the labels, and the loss for them."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trainer.method.distill import distill_loss
from trainer.recipe.schema import TrainConfig


def with_answers(
    epoch: Iterable[tuple[Tensor, Any]], teacher: nn.Module
) -> Iterator[tuple[Tensor, Any]]:
    """Yield inputs, with labels and the teacher's outputs in place of labels.

    Args:
        epoch: Batches; augmented ones are answered as they are.
        teacher: In eval mode.
    """
    for inputs, labels in epoch:
        with torch.no_grad():
            answers = teacher(inputs)
        yield inputs, (labels, answers)


def taught_loss(
    train: TrainConfig,
) -> Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]:
    """Return a recipe's loss for what :func:`with_answers` gives."""
    weight, temperature = train.teacher_weight, train.teacher_temperature

    def loss(outputs: Tensor, wanted: tuple[Tensor, Tensor]) -> Tensor:
        return distill_loss(outputs, *wanted, weight=weight, temperature=temperature)

    return loss
