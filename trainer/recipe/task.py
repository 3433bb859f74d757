# SPDX-License-Identifier: Apache-2.0
"""What a recipe's task brings with it: loss, metric, and what fits together."""

from collections.abc import Iterator

from edge_runtime.errors import ContractError
from edge_runtime.formats.contract import TASKS, check_bound
from edge_runtime.update.metrics import METRICS, Metric
from trainer.recipe.rules import AUTO
from trainer.recipe.schema import DataConfig, RunConfig, TrainConfig

# Round records have val_best and its like of every run.
TAKEN = (
    *("best", "start", "full", "rewound", "sparse", "reinit"),
    *("wide", "unrounded"),
)

LOSS_OF_TASK = {
    "classification": "cross_entropy",
    "multilabel": "bce",
    "regression": "mse",
    "segmentation": "cross_entropy",
    "free": "",  # what it is for, a function of yours says
}


def loss_name(data: DataConfig, train: TrainConfig) -> str:
    """Return the loss that a recipe names, or that belongs to its task."""
    return LOSS_OF_TASK[data.task] if train.loss == AUTO else train.loss


def metric_name(data: DataConfig, train: TrainConfig) -> str:
    """Return the metric that a recipe names, or that belongs to its task."""
    return TASKS[data.task] if train.metric == AUTO else train.metric


def device_metric(data: DataConfig, train: TrainConfig) -> Metric | None:
    """Return the metric that devices try new weights with, if there is one.

    It is the recipe's, or the task's where that is a function of your own.
    """
    return METRICS.get(metric_name(data, train), METRICS.get(TASKS[data.task]))


def task_problems(
    run: RunConfig, data: DataConfig, train: TrainConfig
) -> Iterator[str]:
    """Yield what is wrong between a task and what it is trained for."""
    if data.task != "classification" and not data.factory:
        yield f"[data] task {data.task} is for data of your own: give data.factory"
    if data.augment != "none" and data.task not in ("classification", "multilabel"):
        yield "[data] augment moves inputs alone: it is for labels of whole images"
    loss, metric = loss_name(data, train), metric_name(data, train)
    for key, name in (("loss", loss), ("metric", metric)):
        if not name:
            yield f"[train] {key} is needed with [data] task free: name a function"
    if metric.partition(":")[2] in TAKEN:
        yield f"[train] metric {metric}: records use that name; rename the function"
    own = ":" in metric
    if own and train.better == AUTO:
        yield '[train] better is needed for a metric of your own: "higher" or "lower"'
    if not own and train.better != AUTO:
        yield "[train] better is for a metric of your own; the others know theirs"
    yield from _bound_problems(run, device_metric(data, train))


def _bound_problems(run: RunConfig, metric: Metric | None) -> Iterator[str]:
    name = metric.name if metric else "none"
    if run.accuracy_floor is not None and name != "top1":
        yield f"[run] accuracy_floor is for metric top1, this is {name}; use run.bound"
    if run.bound is None:
        return
    if run.accuracy_floor is not None:
        yield "[run] bound, or accuracy_floor: expected one of the two"
    if metric is None:
        yield "[run] bound needs a [train] metric that devices know: " + ", ".join(
            METRICS
        )
        return
    try:
        check_bound(metric.name, run.bound)
    except ContractError as err:
        yield f"[run] {err}"
