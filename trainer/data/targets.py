# SPDX-License-Identifier: Apache-2.0
"""Targets of every task: brought to the type that its losses take, and checked."""

from typing import Any

import torch
from torch import Tensor

from edge_runtime.errors import ConfigError
from trainer.trees import each, leaves, plain

IGNORED = -100  # torch's label for what counts nowhere


def as_targets(labels: Any, task: str) -> Any:
    """Return targets as tensors of the type that a task trains with.

    Args:
        labels: Arrays or tensors; for task ``free`` also dicts and tuples of them.
        task: As in ``[data] task``.

    Raises:
        ConfigError: They are no such targets.
    """
    if task == "free":
        return each(_plain, labels)
    tensor = torch.as_tensor(labels).detach()
    if task in ("classification", "segmentation"):
        whole = tensor.long()
        if not whole.to(tensor.dtype).equal(tensor):
            raise ConfigError(
                f"labels of {task} are whole numbers, these are {tensor.dtype} with "
                'fractions; for values, set [data] task = "regression"'
            )
        return whole
    return tensor.to(torch.float32)


def check_targets(labels: Any, task: str, names: tuple[str, ...]) -> None:
    """Insist on targets that fit a task and the names of the network's outputs.

    Raises:
        ConfigError: They do not.
    """
    count = len(names)
    if task == "free":
        return
    shape = tuple(labels.shape)
    if task == "classification":
        if len(shape) != 1:
            raise ConfigError(
                f"labels have shape {shape}, classification takes one class a sample; "
                "for several at once, or one a pixel, set [data] task to multilabel or "
                "segmentation"
            )
        _check_classes(labels, names)
    elif task == "segmentation":
        if len(shape) < 2:
            raise ConfigError(
                f"labels have shape {shape}, segmentation takes one class an element, "
                "such as (samples, height, width)"
            )
        _check_classes(labels[labels != IGNORED], names)
    elif len(shape) <= 2 and (shape[1:] or (1,)) != (count,):
        raise ConfigError(
            f"labels have shape {shape}, expected (samples, {count}), as there are "
            f"{count} names of outputs"
        )
    elif task == "multilabel" and not ((labels == 0) | (labels == 1)).all():
        raise ConfigError("labels of multilabel are 0 and 1, others were found")
    elif not labels.isfinite().all():
        raise ConfigError("labels hold NaN or infinite values; leave such samples out")


def _check_classes(labels: Tensor, names: tuple[str, ...]) -> None:
    if not labels.numel() or labels.min() < 0 or labels.max() >= len(names):
        raise ConfigError(
            f"labels must be 0 to {len(names) - 1}, as there are {len(names)} "
            "class names, and there must be samples"
        )


def check_length(inputs: int, labels: Any) -> None:
    """Insist on as many targets as inputs, in every tensor of them.

    Raises:
        ConfigError: They are more, or fewer.
    """
    for part in leaves(labels):
        if len(part) != inputs:
            raise ConfigError(f"{inputs} inputs have {len(part)} labels")


def _plain(values: Any) -> Tensor:
    tensor = plain(torch.as_tensor(values))
    return tensor.float() if tensor.dtype == torch.float64 else tensor
