"""One round of training: from the start weights to the best weights it found.

Section numbers refer to Deep Partial Updating (Qu, Liu, Thiele, ECCV 2022), whose
Algorithm 1 :func:`_partial` is.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edge_runtime.errors import TrainingError
from edge_runtime.weights import Weights
from trainer.config import Config
from trainer.data import Samples, batches, generator
from trainer.loop import (
    evaluate,
    learning_rate,
    make_optimizer,
    recompute_batchnorm,
    train_epoch,
)
from trainer.scores import DPUScore, magnitude_scores, random_masks, select_top_k
from trainer.tensors import weights_of
from trainer.updater import PartialUpdater, is_weight

Augment = Callable[[Tensor], Tensor]
Masks = Mapping[str, Tensor]


class RoundTraining:
    """The training of one round: model, optimizer, and the best weights so far.

    Attributes:
        model: Holds the start weights at first; trained in place.
        optimizer: Of all trainable parameters; its state goes through both phases.
        epochs: What happened, one record an epoch.
        accuracy: On validation: of the ``start``, of the ``best`` weights, and of
            others by name.
        best: The best weights, or None while nothing beats the start.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        number: int,
        samples: tuple[Samples, Samples],
        *,
        augmentation: Callable[[np.random.Generator], Augment] | None = None,
        on_epoch: Callable[[str], None] = lambda _phase: None,
    ) -> None:
        """Prepare a round.

        Args:
            model: With the start weights.
            config: The recipe.
            number: The round's number; keys its random streams.
            samples: Prepared samples for training and for validation.
            augmentation: Makes the augmentation of an epoch from a random stream.
            on_epoch: Called with the name of the phase after every epoch.
        """
        self.model = model
        self.optimizer = make_optimizer(model, config.train)
        self.epochs: list[dict[str, Any]] = []
        self.best: Weights | None = None
        self._config = config
        self._number = number
        self._train, self._validation = samples
        self._augmentation = augmentation
        self._on_epoch = on_epoch
        start = evaluate(model, self._validation)
        self.accuracy = {"start": start, "best": start}

    def random(self, purpose: str) -> np.random.Generator:
        """Return the stream of one purpose in the epoch that comes next.

        Epochs are counted through the whole round, so every method sees the samples
        of its n-th epoch in the same order.
        """
        epoch = len(self.epochs)
        return generator(self._config.run.seed, purpose, self._number, epoch)

    def random_seed(self, purpose: str) -> int:
        """Return a seed for torch from the stream of one purpose."""
        return int(self.random(purpose).integers(1 << 62))

    def run_phase(self, phase: str, epochs: int, *, keep: bool) -> None:
        """Train for some epochs, with the learning rate schedule from its start.

        Args:
            phase: Name for the records.
            epochs: How many.
            keep: Keep the weights after each epoch that is the best so far.

        Raises:
            TrainingError: The loss is not finite any more.
        """
        train = self._config.train
        for epoch in range(epochs):
            rate = learning_rate(train, epoch, epochs)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            record = {"phase": phase, "epoch": epoch, "lr": rate, "loss": self._epoch()}
            if keep or epoch == epochs - 1:
                accuracy = evaluate(self.model, self._validation)
                kept = keep and accuracy > self.accuracy["best"]
                if kept:
                    self._keep(accuracy)
                record |= {"val_accuracy": accuracy, "kept": kept}
                self.accuracy[phase] = accuracy
            self.epochs.append(record)
            self._on_epoch(phase)

    def consider_rewound(self) -> None:
        """Judge the rewound model: it is kept where no worse than the start.

        The statistics of BatchNorm are made to fit it first.
        """
        # Batches of about equal size, or a small last one would count too much.
        count = math.ceil(len(self._train) / self._config.train.batch)
        size = math.ceil(len(self._train) / count)
        order = torch.arange(len(self._train))
        recompute_batchnorm(self.model, batches(self._train, size, order))
        accuracy = self.accuracy["rewound"] = evaluate(self.model, self._validation)
        if accuracy >= self.accuracy["start"]:
            self._keep(accuracy)

    def _keep(self, accuracy: float) -> None:
        self.accuracy["best"] = accuracy
        self.best = weights_of(self.model)

    def _epoch(self) -> float:
        order = torch.from_numpy(self.random("order").permutation(len(self._train)))
        augment = self._augmentation and self._augmentation(self.random("augment"))
        torch.manual_seed(self.random_seed("dropout"))
        size = self._config.train.batch
        epoch = batches(self._train, size, order, augment)
        loss = train_epoch(self.model, self.optimizer, epoch)
        if not math.isfinite(loss):
            raise TrainingError(
                f"round {self._number}, epoch {len(self.epochs)}: the loss is {loss}; "
                "lower train.lr, or look for broken samples"
            )
        return loss


def train_round(training: RoundTraining, config: Config) -> Masks:
    """Train one round with the recipe's method.

    Args:
        training: Its ``best`` weights are the result.
        config: The recipe.

    Returns:
        Which weights were allowed to change: one boolean mask a selectable tensor.

    Raises:
        TrainingError: The loss is not finite any more.
    """
    epochs, update = config.train.epochs, config.update
    if update.method == "fu":
        return _full(training, epochs)
    if update.method == "pruning":
        return _pruned(training, epochs, update.ratio)
    if update.method == "rpu":
        return _random(training, epochs, update.ratio)
    lam = {"dpu": update.lam, "gcpu": 1.0, "lcpu": 0.0}[update.method]
    return _partial(training, epochs, update.ratio, DPUScore(lam))


def _partial(
    training: RoundTraining, epochs: int, ratio: float, score: DPUScore
) -> Masks:
    """Update fully, keep the best weights, rewind the rest, fine-tune (Algorithm 1)."""
    named = training.model.named_parameters()
    updater = PartialUpdater(named, ratio=ratio, score=score)
    updater.attach(training.optimizer)
    training.run_phase("full", epochs, keep=False)
    updater.select()
    training.consider_rewound()
    training.run_phase("sparse", epochs, keep=True)
    return updater.finish()


def _random(training: RoundTraining, epochs: int, ratio: float) -> Masks:
    """Fine-tune weights chosen at random (RPU), for the epochs of both phases."""
    updater = PartialUpdater(training.model.named_parameters())
    updater.attach(training.optimizer)
    random = torch.Generator().manual_seed(training.random_seed("select"))
    updater.select(masks=random_masks(updater.base, ratio, random))
    training.run_phase("sparse", 2 * epochs, keep=True)
    return updater.finish()


def _full(training: RoundTraining, epochs: int) -> Masks:
    """Update every weight (FU), for the epochs of both phases."""
    training.run_phase("full", 2 * epochs, keep=True)
    return _everything(training.model)


def _pruned(training: RoundTraining, epochs: int, ratio: float) -> Masks:
    """Train fully, keep the largest weights, zero the rest, fine-tune."""
    training.run_phase("full", epochs, keep=False)
    scores = magnitude_scores(_weights(training.model))
    k = int(ratio * sum(score.numel() for score in scores.values()))
    masks = select_top_k(scores, k)
    with torch.no_grad():
        for name, weight in _weights(training.model).items():
            weight.masked_fill_(~masks[name], 0.0)
    # The base of this updater is the pruned network: what it freezes stays zero.
    updater = PartialUpdater(training.model.named_parameters())
    updater.attach(training.optimizer).select(masks=masks)
    training.consider_rewound()
    training.run_phase("sparse", epochs, keep=True)
    updater.finish()
    return _everything(training.model)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the selectable weights by name."""
    named = model.named_parameters()
    return {name: p.detach() for name, p in named if is_weight(name, p)}


def _everything(model: nn.Module) -> Masks:
    weights = _weights(model)
    return {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
