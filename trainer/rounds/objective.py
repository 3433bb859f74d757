# SPDX-License-Identifier: Apache-2.0
"""What a run trains for: its loss, and the metric that chooses the best epoch."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional

from edge_runtime.errors import ConfigError, ContractError
from edge_runtime.update.metrics import METRICS, Metric, Sums
from trainer.data.samples import Samples, batches
from trainer.export.deployed_check import DEPENDS_ON_OTHERS, depends_on_others
from trainer.recipe.factory import load_factory
from trainer.recipe.schema import Config
from trainer.recipe.task import device_metric, loss_name, metric_name
from trainer.trees import leaves

Loss = Callable[[Any, Any], Tensor]


def _bce(output: Tensor, labels: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(*_alike(output, labels))


def _mse(output: Tensor, labels: Tensor) -> Tensor:
    return functional.mse_loss(*_alike(output, labels))


def _l1(output: Tensor, labels: Tensor) -> Tensor:
    return functional.l1_loss(*_alike(output, labels))


def _alike(output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Give labels the shape of the output where a lone value has an axis, or none.

    torch would make a table of all pairs of them.
    """
    of_one = (*labels.shape, 1) == output.shape or labels.shape == (*output.shape, 1)
    return output, labels.reshape(output.shape) if of_one else labels


LOSSES: dict[str, Loss] = {
    "cross_entropy": functional.cross_entropy,
    "bce": _bce,
    "mse": _mse,
    "l1": _l1,
}


@dataclass(frozen=True, slots=True)
class Judge:
    """Says how good a network is on samples, and which of two values is better.

    Attributes:
        name: What records call the metric: ``val_NAME``, ``test_NAME``.
        higher: Whether more is better.
        metric: One that devices know; or a function of your own, from outputs and
            targets of all samples to a number.
    """

    name: str
    higher: bool
    metric: Metric | Callable[[Any, Any], Any]

    def better(self, value: float, other: float) -> bool:
        """Tell whether a value is better than another; one that is NaN never is."""
        if math.isnan(value) or math.isnan(other):
            return not math.isnan(value)
        return value > other if self.higher else value < other

    def no_worse(self, value: float, other: float) -> bool:
        """Tell whether a value is better than another, or as good."""
        return value == other or self.better(value, other)

    def cost(self, value: float, other: float) -> float:
        """Return by how much ``other`` is worse than a value.

        Of a metric where lower is better, as a share of the value.
        """
        if self.higher:
            return value - other
        return (other - value) / abs(value) if value else other

    def cost_of(
        self, parts: Sequence[Sums], others: Sequence[Sums]
    ) -> tuple[float, float]:
        """Return by how much others are worse, and the standard error of that.

        Both are of the same samples, in the same batches, so what samples have in
        common cancels: of a jackknife over batches.

        Args:
            parts: Sums of a metric that devices know, of each batch.
            others: Likewise.
        """
        metric = self.metric
        if not isinstance(metric, Metric):
            raise ConfigError("a function of yours has no sums of batches")
        all_parts, all_others = np.sum(parts, axis=0), np.sum(others, axis=0)
        whole = self.cost(metric.value(all_parts), metric.value(all_others))
        without = [
            self.cost(metric.value(all_parts - one), metric.value(all_others - other))
            for one, other in zip(parts, others, strict=True)
        ]
        return whole, float(np.std(without)) * math.sqrt(len(without) - 1)

    @property
    def worst(self) -> float:
        """What every value is better than, or as good as."""
        return -math.inf if self.higher else math.inf


def finite_only(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values without NaN and infinity, which JSON cannot hold.

    A metric may have no value yet: precision, before anything was found.
    """
    return {
        name: value
        for name, value in values.items()
        if not isinstance(value, float) or math.isfinite(value)
    }


ACCURACY = Judge("accuracy", True, METRICS["top1"])


def loss_of(config: Config) -> Loss:
    """Return the loss that a recipe names, or that belongs to its task.

    Raises:
        ConfigError: There is no such function of yours.
    """
    name = loss_name(config.data, config.train)
    return LOSSES[name] if name in LOSSES else load_factory(name)


def judge_of(config: Config) -> Judge:
    """Return what chooses a recipe's best epoch.

    Raises:
        ConfigError: There is no such function of yours.
    """
    name = metric_name(config.data, config.train)
    if metric := METRICS.get(name):
        return Judge(metric.title, metric.higher, metric)
    own, higher = load_factory(name), config.train.better == "higher"
    return Judge(name.partition(":")[2], higher, own)


def check_objective(
    model: nn.Module, samples: Samples, config: Config, names: Sequence[str]
) -> None:
    """Refuse a network, labels, loss and metric that do not fit, before any training.

    Args:
        model: On the CPU, or where the samples are; left in eval mode.
        samples: Prepared; two of them are tried.
        config: The recipe.
        names: Of the classes, or of the values that the network gives.

    Raises:
        ConfigError: They do not fit each other.
    """
    inputs, labels = next(iter(batches(samples[:2], 2)))
    mixable = isinstance(inputs, Tensor) and inputs.is_floating_point()
    if config.train.teacher_mix and not mixable:
        raise ConfigError(
            "[train] teacher_mix mixes inputs of one floating-point tensor, these "
            "are of another kind: leave it out"
        )
    outputs = model.to(inputs.device).eval()(inputs)
    output, task = next(leaves(outputs), None), config.data.task
    if not isinstance(output, Tensor):
        raise ConfigError(f"the network gives {output!r}, expected tensors")
    if task != "free":
        _check_shape(output, labels, task, len(names), tuple(inputs.shape[1:]))
        if depends_on_others(model, (inputs,)):
            raise ConfigError(DEPENDS_ON_OTHERS)
    name = loss_name(config.data, config.train)
    if name in LOSSES:
        _check_built_in(name, outputs, labels)
    value = loss_of(config)(outputs, labels)
    if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
        found = f"shape {list(value.shape)}" if isinstance(value, Tensor) else value
        raise ConfigError(
            f"[train] loss {name} returned {found!r}, expected a tensor of one number "
            "that follows from the network's weights: the mean loss of the batch"
        )
    metrics = judge_of(config).metric, device_metric(config.data, config.train)
    for metric in metrics:
        if isinstance(metric, Metric):
            _check_metric(metric, output.detach(), labels)


def _check_shape(
    output: Tensor, labels: Tensor, task: str, width: int, shape: tuple[int, ...]
) -> None:
    """Insist on one number for each class or value in the first output."""
    rest = tuple(labels.shape[1:])
    if task in ("classification", "segmentation"):
        wanted = (len(labels), width, *rest)
        what = f"one logit for each of {width} classes"
    else:
        wanted = (len(labels), *(rest or (1,)))
        what = "one number for each label"
    found = tuple(output.shape)
    if found != wanted and not (found == (len(labels),) and wanted[1:] == (1,)):
        raise ConfigError(
            f"the network gives {found} for two inputs of shape {shape}, expected "
            f"{wanted}: {what}"
        )


def _check_built_in(name: str, outputs: Any, labels: Any) -> None:
    if not isinstance(outputs, Tensor) or not isinstance(labels, Tensor):
        raise ConfigError(
            f"[train] loss {name} takes one output and one tensor of labels, this "
            f"network and data have {len([*leaves(outputs)])} and "
            f"{len([*leaves(labels)])}; name a function, package.module:function"
        )
    shape, given = tuple(outputs.shape), tuple(labels.shape)
    classes = name == "cross_entropy"
    fits = (
        not labels.is_floating_point() and (shape[0], *shape[2:]) == given
        if classes
        else labels.is_floating_point() and _alike(outputs, labels)[1].shape == shape
    )
    if not fits:
        wanted = (
            f"whole numbers of shape {(shape[0], *shape[2:])}"
            if classes
            else f"floating-point numbers of shape {shape}"
        )
        raise ConfigError(
            f"[train] loss {name} takes {wanted} as labels of outputs of shape "
            f"{shape}, these are {labels.dtype} of shape {given}"
        )


def _check_metric(metric: Metric, output: Tensor, labels: Any) -> None:
    if not isinstance(labels, Tensor):
        raise ConfigError(
            f"[train] metric {metric.name} takes one tensor of labels, these are "
            f"{len([*leaves(labels)])}; name a function of yours"
        )
    try:
        metric.sums(output.cpu().numpy(), labels.cpu().numpy())
    except ContractError as err:
        raise ConfigError(f"[train] metric: {err}") from err
