# SPDX-License-Identifier: Apache-2.0
"""The second phase of a round: the selected weights train, all others stay."""

from collections.abc import Mapping

from torch import Tensor

from trainer.method.updater import PartialUpdater
from trainer.rounds.automatic_grid import refine_grid, settle_grid
from trainer.rounds.training import Masks, RoundTraining

WIDE = 4  # times as many weights, before the selection is narrowed


def fine_tune(
    training: RoundTraining,
    updater: PartialUpdater,
    epochs: int,
    scores: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Select after a full phase, rewind the rest, and train what is selected.

    Where the recipe says so, four times as many weights train for the first half; and
    they learn from a teacher.

    Args:
        training: Its ``best`` weights are the result.
        updater: In its full phase, attached to the training's optimizer.
        epochs: Of the whole phase.
        scores: Of all selectable weights; default: the updater's.
    """
    training.teach()
    if training.update.narrow:
        half = max(1, epochs // 2)
        updater.select(scores, keep=WIDE)
        training.fit_batchnorm()
        training.run_phase("wide", half, keep=False)
        masks = updater.narrow()
        epochs = max(1, epochs - half)
    else:
        masks = updater.select(scores)
    settle_grid(training, masks)
    training.consider_rewound()
    training.run_phase("sparse", epochs, keep=True)
    refine_grid(training)
    return updater.finish()
