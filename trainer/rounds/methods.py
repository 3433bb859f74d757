# SPDX-License-Identifier: Apache-2.0
"""One round of training: from the start weights to the best weights it found.

Section numbers refer to Deep Partial Updating (Qu, Liu, Thiele, ECCV 2022), whose
Algorithm 1 :func:`_partial` is.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from edge_runtime.errors import ConfigError, TrainingError
from trainer.method.scores import DPUScore, Score, fisher_scores, magnitude_scores
from trainer.method.selectable import is_weight
from trainer.method.selection import random_masks, select_top_k
from trainer.method.updater import PartialUpdater
from trainer.parallel import is_alone
from trainer.recipe.kinds_of_rounds import is_full
from trainer.recipe.schema import Config, UpdateConfig
from trainer.rounds.budget import PatchBudget, train_within
from trainer.rounds.dense import DensePart
from trainer.rounds.sparse import fine_tune
from trainer.rounds.subspace import coefficients_of, move_within
from trainer.rounds.training import Masks, Pack, RoundTraining, new_updater

# Of the epochs of the first phase: where gradual pruning begins and ends.
PRUNED_FROM, PRUNED_TO = 0.1, 0.8


def train_round(
    training: RoundTraining, config: Config, pack: Pack | None = None
) -> Masks:
    """Train one round with the recipe's method.

    Args:
        training: Its ``best`` weights are the result.
        config: The recipe.
        pack: Says how large a patch is; needed where the recipe has a budget.

    Returns:
        Which weights were allowed to change: one boolean mask a selectable tensor.

    Raises:
        TrainingError: The loss is not finite any more.
    """
    epochs, update = config.train.epochs, config.update
    if is_full(config, training.number):
        return _full(training, epochs)
    if update.method == "pruning":
        return _pruned(training, epochs, update.ratio, gradual=update.gradual)
    if update.method in ("fisher", "rpu", "named"):
        return _fixed(training, epochs, update.method)
    if update.method == "subspace":
        return move_within(training, epochs, update)
    score = score_of(config)
    if update.budget:
        if pack is None:
            raise ConfigError("update.budget needs a function that packs: pass pack=")
        budget = PatchBudget(pack, training.limit, training.ratio)
        return train_within(training, epochs, score, budget)
    return _partial(training, epochs, score)


def score_of(config: Config) -> Score:
    """Return what the recipe's method ranks weights by after a full phase."""
    if config.update.method == "magnitude":
        return lambda evidence: magnitude_scores(evidence.current)
    lam = {"dpu": config.update.lam, "gcpu": 1.0, "lcpu": 0.0}
    return DPUScore(lam[config.update.method])


def _partial(training: RoundTraining, epochs: int, score: Score) -> Masks:
    """Update fully, keep the best weights, rewind the rest, fine-tune (Algorithm 1)."""
    updater = new_updater(training, ratio=training.ratio, score=score)
    updater.attach(training.optimizer)
    training.run_phase("full", epochs, keep=False)
    return fine_tune(training, updater, epochs)


def _fixed(training: RoundTraining, epochs: int, method: str) -> Masks:
    """Fine-tune weights that are chosen before training, for the epochs of both phases.

    At random (RPU), by the Fisher information of the start weights, or by name.
    """
    ratio = training.ratio
    updater = new_updater(training, ratio=ratio).attach(training.optimizer)
    training.teach()
    if method == "fisher":
        samples = training.train_batches()
        scores = fisher_scores(
            training.model, samples, updater.base, loss=training.loss
        )
        updater.select(scores)
    elif method == "named":
        masks = named_masks(updater.base, training.update.tensors)
        updater.select(masks=masks)
        for name, parameter in training.model.named_parameters():
            # No gradients that nobody wants; but processes wait for each other's.
            if is_alone() and name in masks and not masks[name].any():
                parameter.requires_grad_(False)
    else:
        random = torch.Generator().manual_seed(training.random_seed("select"))
        updater.select(masks=random_masks(updater.base, ratio, random))
    training.run_phase("sparse", 2 * epochs, keep=True)
    return updater.finish()


def check_names(model: nn.Module, update: UpdateConfig) -> None:
    """Refuse names of tensors that a network does not have, before any training.

    Raises:
        ConfigError: One of them is of no selectable tensor.
    """
    dense = DensePart(model, update.dense, from_init=True)
    named = model.named_parameters()
    tensors = {name: p for name, p in named if dense.is_selectable(name, p)}
    named_masks(tensors, update.tensors)


def check_room(training: RoundTraining) -> int:
    """Refuse a round in which nothing could change, before any training.

    With a budget, how many weights fit is not known before; coefficients are.

    Returns:
        How many coefficients it has; 0 for methods that have none.

    Raises:
        ConfigError: The message names the key that allows more.
    """
    update = training.update
    key = "first_ratio" if training.fresh and update.first_ratio else "ratio"
    if update.budget:
        key = " or ".join(training.limit_keys)
    try:
        if update.method == "subspace":
            return coefficients_of(training)
        new_updater(training, ratio=None if update.budget else training.ratio)
    except TrainingError as err:
        where = "later rounds" if training.number else "round_00"
        raise ConfigError(f"[update] {key}, in {where}: {err}") from err
    return 0


def named_masks(base: Mapping[str, Tensor], wanted: str) -> Masks:
    """Select whole tensors by their names.

    Args:
        base: All selectable tensors.
        wanted: Names or shell patterns, with commas between.

    Raises:
        ConfigError: One of them is of no selectable tensor.
    """
    patterns = [text.strip() for text in wanted.split(",") if text.strip()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in base):
            raise ConfigError(
                f"[update] tensors: {pattern!r} is none of the tensors that weights "
                f"are selected from: {', '.join(base)}"
            )
    return {
        name: torch.full_like(
            tensor, any(fnmatchcase(name, p) for p in patterns), dtype=torch.bool
        )
        for name, tensor in base.items()
    }


def _full(training: RoundTraining, epochs: int) -> Masks:
    """Update every weight (FU), for the epochs of both phases."""
    if training.teacher:  # by itself there is nothing to learn: it knows nothing yet
        training.teach()
    training.run_phase("full", 2 * epochs, keep=True)
    return _everything(training.model)


def _pruned(
    training: RoundTraining, epochs: int, ratio: float, *, gradual: bool
) -> Masks:
    """Train fully, keep the largest weights, zero the rest, fine-tune."""
    if gradual:
        _prune_in_training(training, epochs, ratio)
    else:
        training.run_phase("full", epochs, keep=False)
    masks = _largest(training.model, ratio)
    _zero_others(training.model, masks)
    # The base of this updater is the pruned network: what it freezes stays zero.
    updater = PartialUpdater(training.model.named_parameters())
    updater.attach(training.optimizer).select(masks=masks)
    training.consider_rewound()
    training.run_phase("sparse", epochs, keep=True)
    updater.finish()
    return _everything(training.model)


def _prune_in_training(training: RoundTraining, epochs: int, ratio: float) -> None:
    """Train fully, while ever fewer weights are left; the rest stays zero.

    From a tenth of the epochs to eight the share falls as a cube, as Zhu and Gupta
    (2017) have it. Each epoch is a phase of its own: the learning rate stays high, or
    weights could not move to where others were taken.
    """
    model, masks = training.model, dict[str, Tensor]()

    def zero(*_: object) -> None:
        _zero_others(model, masks)

    handle = training.optimizer.register_step_post_hook(zero)
    try:
        for epoch in range(epochs):
            left = 1 - (epoch / epochs - PRUNED_FROM) / (PRUNED_TO - PRUNED_FROM)
            share = ratio + (1 - ratio) * min(max(left, 0.0), 1.0) ** 3
            masks |= _largest(model, share)
            zero()
            training.run_phase("full", 1, keep=False)
    finally:
        handle.remove()


def _largest(model: nn.Module, ratio: float) -> Masks:
    """Return masks of the largest weights of all."""
    scores = magnitude_scores(_weights(model))
    total = sum(score.numel() for score in scores.values())
    return select_top_k(scores, int(ratio * total))


@torch.no_grad()
def _zero_others(model: nn.Module, masks: Masks) -> None:
    for name, weight in _weights(model).items():
        weight.masked_fill_(~masks[name], 0.0)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the selectable weights by name."""
    named = model.named_parameters()
    return {name: p.detach() for name, p in named if is_weight(name, p)}


def _everything(model: nn.Module) -> Masks:
    weights = _weights(model)
    return {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
