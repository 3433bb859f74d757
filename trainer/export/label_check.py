# SPDX-License-Identifier: Apache-2.0
"""Hold a network's answers against golden labels, and against those to one sample."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from edge_runtime.errors import ContractError, TrainingError
from edge_runtime.formats.contract import Contract
from edge_runtime.update.golden import Golden
from edge_runtime.update.metrics import METRICS
from trainer.export.deployed_check import (
    ALONE_TOLERANCE,
    DEPENDS_ON_OTHERS,
    answer_of,
    depends_on_others,
)

SOME_ROWS = 4  # golden inputs that are asked for one by one


def check_labels(
    model: nn.Module, contract: Contract, golden: Golden, *, reach: bool
) -> None:
    """Insist that a model's answers can be held against its golden labels.

    Args:
        model: The network; left in the mode in which it was.
        contract: Names classes, metric and bound.
        golden: Inputs, and labels if there are any.
        reach: Insist on the bound too.

    Raises:
        TrainingError: Labels or classes do not fit the first output, or the metric
            falls short of the bound, and devices would refuse the weights.
    """
    if golden.labels is None:
        return
    feed = contract.prepare(golden.by_name(contract))
    batch = tuple(torch.tensor(array) for array in feed.values())
    output = answer_of(model, batch)[0].numpy()
    _check_width(output, contract)
    metric, bound = METRICS[contract.label_metric], contract.label_bound
    try:
        value = metric.score(output, golden.labels, contract.threshold)
    except ContractError as err:
        raise TrainingError(f"golden labels: {err}") from err
    if reach and bound is not None and not metric.reaches(value, bound):
        raise TrainingError(
            f"{metric.name} of the golden samples is {value:.6g}, the contract asks "
            f"for {metric.asked(bound)}: devices would refuse these weights; nothing "
            "was written"
        )


def check_rows(model: nn.Module, contract: Contract, golden: Golden) -> None:
    """Insist on a model that answers sample by sample where its contract says so.

    Args:
        model: The network; left in the mode in which it was.
        contract: Names the task.
        golden: Inputs that are tried.

    Raises:
        TrainingError: What it answers to a sample depends on the samples beside it.
    """
    if not contract.by_rows or contract.is_random(0):
        return
    some = golden.by_name(contract)
    for spec in contract.inputs:
        if spec.has_batch:
            some[spec.name] = some[spec.name][:SOME_ROWS]
    batch = [torch.tensor(array) for array in contract.prepare(some).values()]
    has_rows = [spec.has_batch for spec in contract.inputs]
    tolerance = max(ALONE_TOLERANCE, contract.output_tolerance)
    if depends_on_others(model, batch, has_rows, tolerance):
        raise TrainingError(DEPENDS_ON_OTHERS)


def _check_width(output: NDArray[Any], contract: Contract) -> None:
    """Insist on one number for each class in the first output."""
    width = contract.class_count(output.shape)
    if contract.classes and width != len(contract.classes):
        raise TrainingError(
            f"the contract has {len(contract.classes)} classes, the network's first "
            f"output has {width} for each (shape {list(output.shape)})"
        )
