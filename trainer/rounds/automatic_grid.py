# SPDX-License-Identifier: Apache-2.0
"""How coarse the steps of ``grid = "auto"`` may be: found in the round, and judged.

What they cost is measured on validation, beside the same weights before rounding.
"""

from collections.abc import Sequence

import numpy as np

from edge_runtime.formats.weights import Weights
from edge_runtime.update.metrics import Metric, Sums
from trainer.export.tensors import weights_of
from trainer.rounds.loop import batch_sums
from trainer.rounds.objective import Judge
from trainer.rounds.training import Masks, RoundTraining

MAX_COST = 0.005  # what an automatic grid may cost: half a point of accuracy
CHANCE = 2  # a cost below so many standard errors may be chance: ignored
MEASURED_BATCHES = 20  # that the error is estimated from

_Measured = tuple[float, Sequence[Sums]]  # the judge's metric, and its batches' sums


def settle_grid(training: RoundTraining, masks: Masks) -> None:
    """Find the steps of an automatic grid, after the last selection."""
    if training.form.automatic:
        training.form.settle(weights_of(training.model), training.start, masks)


def refine_grid(training: RoundTraining) -> None:
    """Take finer steps where those of an automatic grid cost too much.

    At the end of a round: beside the same weights before rounding, and then beside the
    finest form, which has the recipe's own steps. What those cost is no reason for
    larger patches.
    """
    if not training.form.automatic or not training.form.rounding.steps:
        return
    exact = training.unrounded
    if exact is None:
        exact = weights_of(training.model)
    fine = _measure(training, training.folded(exact))
    training.values["unrounded"] = fine[0]
    coarse = _measure(training, training.rounded(exact))
    if costs_too_much(training.judge, fine, coarse):
        _take_finer(training, exact, coarse)
    training.load(exact)


def _take_finer(training: RoundTraining, exact: Weights, coarse: _Measured) -> None:
    """Go on to finer steps until they cost little beside the finest form."""
    form, judge = training.form, training.judge
    forms = [*form.finer()]
    finest = _measure(training, forms[-1].round(training.folded(exact), training.start))
    for rounding in forms:
        if not costs_too_much(judge, finest, coarse):
            break
        form.rounding = rounding
        coarse = _measure(training, training.rounded(exact))
        if judge.better(coarse[0], training.values["best"]):
            training.keep(coarse[0], exact)


def costs_too_much(judge: Judge, fine: _Measured, coarse: _Measured) -> bool:
    """Tell whether rounding costs more than it may, and more than chance does.

    A step to a finer form adds half to a patch: on few validation samples, what
    single samples happen to give must not decide it.

    Args:
        judge: Of the round.
        fine: What it says of the weights before rounding.
        coarse: What it says of them as they are rounded.
    """
    if not isinstance(judge.metric, Metric):
        return judge.cost(fine[0], coarse[0]) > MAX_COST
    cost, error = judge.cost_of(fine[1], coarse[1])
    return cost > max(MAX_COST, CHANCE * error)


def _measure(training: RoundTraining, weights: Weights) -> _Measured:
    """Load weights, and return their value on validation and how it is made up."""
    training.load(weights)
    metric = training.judge.metric
    if not isinstance(metric, Metric):
        return training.evaluate(), []
    samples = training.validation
    sums = batch_sums(training.model, samples, metric, count=MEASURED_BATCHES)
    return metric.value(np.sum(sums, axis=0)), sums
