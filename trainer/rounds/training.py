# SPDX-License-Identifier: Apache-2.0
"""What every method trains a round with: model, optimizer, epochs, the best weights."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edge_runtime.errors import TrainingError
from edge_runtime.formats.weights import Weights
from trainer.data.samples import Samples, batches, generator
from trainer.export.tensors import load_weights, weights_of
from trainer.method.subspace import Movement
from trainer.method.updater import PartialUpdater
from trainer.parallel import data_parallel
from trainer.recipe.schema import Config
from trainer.rounds.dense import DensePart
from trainer.rounds.loop import (
    evaluate,
    learning_rate,
    make_optimizer,
    recompute_batchnorm,
    train_epoch,
)
from trainer.rounds.objective import judge_of, loss_of
from trainer.rounds.rounding import FLOAT32_BITS, round_weights

Augment = Callable[[Tensor], Tensor]
Masks = Mapping[str, Tensor]
Pack = Callable[..., int]  # base, target and the terms between them -> patch bytes


class RoundTraining:
    """The training of one round: model, optimizer, and the best weights so far.

    Attributes:
        model: Holds the start weights at first; trained in place.
        start: The start weights.
        dense: What is not selected weight by weight.
        optimizer: Of all trainable parameters; its state goes through both phases.
        number: The round's number.
        epochs: What happened, one record an epoch.
        judge: Says which of two epochs is better.
        loss: What is minimised.
        values: Of the judge's metric on validation: of the ``start``, of the ``best``
            weights, and of others by name.
        best: The best weights, or None while nothing beats the start.
        movement: Says how the weights have moved, where they move in a subspace.
        kept: How the best ones did.
    """

    def __init__(  # noqa: PLR0913 - all but four by name
        self,
        model: nn.Module,
        config: Config,
        number: int,
        samples: tuple[Samples, Samples],
        *,
        from_init: bool = True,
        start_value: float | None = None,
        augmentation: Callable[[np.random.Generator], Augment] | None = None,
        on_epoch: Callable[[dict[str, Any]], None] = lambda _record: None,
    ) -> None:
        """Prepare a round.

        Args:
            model: With the start weights.
            config: The recipe.
            number: The round's number; keys its random streams.
            samples: Prepared samples for training and for validation.
            from_init: Whether the start weights are the init weights.
            start_value: Of the start weights on validation, where it is known.
            augmentation: Makes the augmentation of an epoch from a random stream.
            on_epoch: Called with the record of every epoch when it is over.
        """
        self.model = model
        self.start = weights_of(model)
        still = config.update.method == "subspace" and config.update.dense == "freeze"
        self.dense = DensePart(
            model, config.update.dense, from_init=from_init and not still
        )
        self.optimizer = make_optimizer(model, config.train)
        self._trained = data_parallel(model)
        self.epochs: list[dict[str, Any]] = []
        self.best: Weights | None = None
        self.movement: Callable[[], Movement] | None = None
        self.kept: Movement | None = None
        self._config = config
        self.number = number
        self._train, self._validation = samples
        self._augmentation = augmentation
        self._on_epoch = on_epoch
        self.judge, self.loss = judge_of(config), loss_of(config)
        start = self._evaluate() if start_value is None else start_value
        self.values = {"start": start, "best": start}

    def random(self, purpose: str) -> np.random.Generator:
        """Return the stream of one purpose in the epoch that comes next.

        Epochs are counted through the whole round, so every method sees the samples
        of its n-th epoch in the same order.
        """
        epoch = len(self.epochs)
        return generator(self._config.run.seed, purpose, self.number, epoch)

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
                with self._as_deployed():
                    value = self._evaluate()
                    kept = keep and self.judge.better(value, self.values["best"])
                    if kept:
                        self._keep(value)
                record |= {f"val_{self.judge.name}": value, "kept": kept}
                self.values[phase] = value
            self.epochs.append(record)
            self._on_epoch(record)

    def consider_rewound(self) -> None:
        """Judge the rewound model: it is kept where no worse than the start.

        The statistics of BatchNorm are made to fit it first.
        """
        if not self.dense.frozen:
            recompute_batchnorm(self.model, self.train_batches())
        with self._as_deployed():
            value = self.values["rewound"] = self._evaluate()
            if self.judge.no_worse(value, self.values["start"]):
                self._keep(value)

    def train_batches(self) -> Iterator[tuple[Tensor, Any]]:
        """Yield the training samples as they lie, without augmentation.

        Batches are of about equal size, or a small last one would count too much.
        """
        count = math.ceil(len(self._train) / self._config.train.batch)
        size = math.ceil(len(self._train) / count)
        return batches(self._train, size, torch.arange(len(self._train)))

    def checkpoint(self) -> Callable[[], None]:
        """Return a function that takes the round back to where it is now."""
        model = copy.deepcopy(self.model.state_dict())
        optimizer = copy.deepcopy(self.optimizer.state_dict())
        epochs, values, best = [*self.epochs], {**self.values}, self.best

        def go_back() -> None:
            self.model.load_state_dict(model)
            # A copy: the optimizer goes on with the very tensors that it is given.
            self.optimizer.load_state_dict(copy.deepcopy(optimizer))
            self.epochs, self.values, self.best = [*epochs], {**values}, best

        return go_back

    def load(self, weights: Weights) -> None:
        """Write weights into the model."""
        load_weights(self.model, weights)

    def rounded(self, weights: Weights) -> Weights:
        """Return what a device would get of these weights."""
        return round_weights(weights, self.start, self._config.update.mantissa_bits)

    @contextmanager
    def _as_deployed(self) -> Iterator[None]:
        """Give the model the values that a device would get, and then its own back."""
        if self._config.update.mantissa_bits == FLOAT32_BITS:
            yield
            return
        exact = weights_of(self.model)
        self.load(self.rounded(exact))
        yield
        self.load(exact)

    def _keep(self, value: float) -> None:
        weights = weights_of(self.model)
        self.dense.verify(weights, self.start)
        self.values["best"], self.best = value, weights
        self.kept = self.movement() if self.movement else None

    def _evaluate(self) -> float:
        return evaluate(self.model, self._validation, self.judge)

    def _seed_torch(self) -> None:
        """Seed torch's streams of the whole process, from which dropout draws."""
        torch.manual_seed(self.random_seed("dropout"))

    def _epoch(self) -> float:
        order = torch.from_numpy(self.random("order").permutation(len(self._train)))
        augment = self._augmentation and self._augmentation(self.random("augment"))
        self._seed_torch()
        size = self._config.train.batch
        epoch = batches(self._train, size, order, augment)
        loss = train_epoch(self._trained, self.optimizer, epoch, self.loss)
        if not math.isfinite(loss):
            raise TrainingError(
                f"round {self.number}, epoch {len(self.epochs)}: the loss is {loss}; "
                "lower train.lr, or look for broken samples"
            )
        return loss


def new_updater(training: RoundTraining, **options: Any) -> PartialUpdater:
    """Take the round's weights as the base of an updater."""
    named = training.model.named_parameters()
    return PartialUpdater(named, selectable=training.dense.is_selectable, **options)
