# SPDX-License-Identifier: Apache-2.0
"""A round in a seeded subspace: all weights move, by few coefficients."""

from collections.abc import Sequence

import numpy as np

from edge_runtime.errors import FrozenWeightChangedError
from edge_runtime.formats.subspace import Term
from edge_runtime.formats.subspace_moves import move_weights
from edge_runtime.formats.weights import Weights
from trainer.export.subspace_size import coefficients_within
from trainer.method.subspace import SubspaceUpdater
from trainer.recipe.schema import UpdateConfig
from trainer.rounds.training import Masks, RoundTraining

_SEEDS = 1 << 28  # as many as take four bytes in a patch


def move_within(training: RoundTraining, epochs: int, update: UpdateConfig) -> Masks:
    """Train coefficients freely, settle their scales, train on what devices will have.

    Full updating, where it is the teacher, teaches both phases.

    Args:
        training: Its ``best`` weights are the result, ``kept`` says how they moved.
        epochs: Of one phase.
        update: The recipe's section.

    Raises:
        TrainingError: The budget has no room for coefficients.
    """
    updater = SubspaceUpdater(
        training.model.named_parameters(),
        coefficients=coefficients_of(training),
        bits=update.bits,
        taps=update.taps,
        seed=training.random_seed("subspace") % _SEEDS,
        selectable=training.dense.is_selectable,
        int8_scales=training.form.rounding.scales,
    )
    updater.attach(training.optimizer)
    if training.teacher:
        training.teach()
    training.run_phase("full", epochs, keep=False)
    if not training.teacher:
        training.teach()  # by itself, as it is now
    updater.select()
    training.movement = updater.movement
    training.consider_rewound()
    training.run_phase("sparse", epochs, keep=True)
    return updater.finish()


def coefficients_of(training: RoundTraining) -> int:
    """Return how many coefficients a round has: with a budget, what has room there.

    Raises:
        TrainingError: The budget has no room for any.
    """
    update = training.update
    if not update.budget:
        return update.coefficients
    return coefficients_within(
        str(training.limit),  # which may be another where a round leads from init
        training.model,
        bits=update.bits,
        selectable=training.dense.is_selectable,
        still=training.dense.frozen,
        layout=training.device_layout,
    )


def regenerated(best: Weights, parent: Weights, terms: Sequence[Term]) -> Weights:
    """Return weights as a device gets them: with the tensors that move, moved anew.

    Args:
        best: As training left them, and as they lie on a device.
        parent: Where the terms lead from, likewise.
        terms: All that lead from there to ``best``.

    Raises:
        FrozenWeightChangedError: They do not lead there.
    """
    moved, data = move_weights(parent, terms), bytearray(best.data)
    for number in sorted({number for term in terms for number in term.scales}):
        tensor = best.layout.tensors[number]
        count = int(np.count_nonzero(moved[tensor.name] != best[tensor.name]))
        if count:
            raise FrozenWeightChangedError(
                f"{count} weights of {tensor.name!r} are not where the subspace moves "
                "them: something other than the optimizer wrote them",
                tensor=tensor.name,
                count=count,
            )
        data[tensor.start : tensor.stop] = moved.data[tensor.start : tensor.stop]
    return Weights(best.layout, data)
