# SPDX-License-Identifier: Apache-2.0
"""What every method trains a round with: model, optimizer, epochs, the best weights."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edge_runtime.errors import TrainingError
from edge_runtime.formats.layout import Layout
from edge_runtime.formats.weights import Weights, pack_weights
from edge_runtime.sizes import parse_size
from trainer.data.samples import Augment, Samples, batch_sizes, batches, generator
from trainer.export.int8 import Scales
from trainer.export.tensors import load_weights, weights_of
from trainer.method.batchnorm import FoldedBatchNorm
from trainer.method.movement import Movement
from trainer.method.updater import PartialUpdater
from trainer.parallel import data_parallel
from trainer.recipe.kinds_of_rounds import is_full
from trainer.recipe.schema import Config
from trainer.rounds.dense import DensePart
from trainer.rounds.loop import (
    evaluate,
    learning_rate,
    make_optimizer,
    recompute_batchnorm,
    train_epoch,
)
from trainer.rounds.objective import Loss, finite_only, judge_of, loss_of
from trainer.rounds.rounding import RoundForm
from trainer.rounds.speed import arranged, autocast, compiled
from trainer.rounds.teacher import Teacher, taught_loss
from trainer.trees import leaves

Masks = Mapping[str, Tensor]
Pack = Callable[..., int]  # base, target and the terms between them -> patch bytes


class RoundTraining:
    """The training of one round: model, optimizer, and the best weights so far.

    Attributes:
        model: Holds the start weights at first; trained in place.
        start: The start weights.
        update: The recipe's section of that name.
        from_init: Whether devices update from the init weights.
        fresh: Whether the start weights are the init weights.
        teacher: What full updating gives, where the recipe wants it as a teacher.
        dense: What is not selected weight by weight.
        device_layout: Of a device's weight file, where it is not the network's own.
        form: How what is deployed is rounded.
        optimizer: Of all trainable parameters; its state goes through both phases.
        number: The round's number.
        epochs: What happened, one record an epoch.
        judge: Says which of two epochs is better.
        loss: What is minimised.
        values: Of the judge's metric on validation: of the ``start``, of the ``best``
            weights, and of others by name.
        best: The best weights, or None while nothing beats the start.
        unrounded: What became the best, where an automatic grid rounded it.
        validation: The samples that judge.
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
        fresh: bool = True,
        start_value: float | None = None,
        scales: Scales = MappingProxyType({}),
        device_layout: Layout | None = None,
        augmentation: Callable[..., Augment] | None = None,
        on_epoch: Callable[[dict[str, Any]], None] = lambda _record: None,
    ) -> None:
        """Prepare a round.

        Args:
            model: With the start weights.
            config: The recipe.
            number: The round's number; keys its random streams.
            samples: Prepared samples for training and for validation.
            from_init: Whether devices update from the init weights.
            fresh: Whether the start weights are the init weights.
            start_value: Of the start weights on validation, where it is known.
            scales: Of the tensors that are int8 on the device.
            device_layout: Of a device's weight file, where it is not the network's.
            augmentation: Makes the augmentation of an epoch from a random stream, the
                sizes of its batches, and where they are.
            on_epoch: Called with the record of every epoch when it is over.
        """
        self.model, self.number = arranged(model, config.train), number
        self._config = config
        self.start = weights_of(model)
        still = config.update.method == "subspace" and config.update.dense == "freeze"
        self.dense = DensePart(
            model, config.update.dense, from_init=from_init and not still
        )
        self.update = config.update
        self.from_init, self.fresh = from_init, fresh
        self.teacher: nn.Module | None = None
        self._taught_by: Teacher | None = None
        self.form = RoundForm(
            model,
            config.update,
            self.dense.is_selectable,
            grid=not is_full(config, number),
            scales=scales,
        )
        self.device_layout = device_layout
        self._train, self.validation = samples
        self.judge, self.loss = judge_of(config), loss_of(config)
        start = self.evaluate() if start_value is None else start_value
        self.values = {"start": start, "best": start}
        self._norms = FoldedBatchNorm(model) if config.update.fold_batchnorm else None
        if self._norms:
            self._unfold(self._norms, fresh=fresh)
        self.optimizer = make_optimizer(model, config.train)
        self._trained = compiled(data_parallel(model), config.train)
        self.epochs: list[dict[str, Any]] = []
        self.best: Weights | None = None
        self.unrounded: Weights | None = None
        self.movement: Callable[[], Movement] | None = None
        self.kept: Movement | None = None
        self._augmentation = augmentation
        self._on_epoch = on_epoch

    @property
    def ratio(self) -> float:
        """Share of the weights that may change."""
        first = self.update.first_ratio if self.fresh else 0.0
        return first or self.update.ratio

    @property
    def limit_keys(self) -> tuple[str, ...]:
        """Keys that say how large the patch may be: the first one that is set."""
        if not self.number:
            return "first_budget", "budget"
        if self.update.method == "subspace" and self.fresh:
            return "anew_budget", "first_budget", "budget"
        return ("budget",)

    @property
    def limit(self) -> int:
        """Largest patch, in bytes, of a recipe with a budget."""
        sizes = (getattr(self.update, key) for key in self.limit_keys)
        return parse_size(next(filter(None, sizes), ""))

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
        lr = train.lr if self.fresh else train.deployed_lr or train.lr
        for epoch in range(epochs):
            rate = learning_rate(train, epoch, epochs, lr)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            record = {"phase": phase, "epoch": epoch, "lr": rate, "loss": self._epoch()}
            if keep or epoch == epochs - 1:
                with self._as_deployed() as exact:
                    value = self.evaluate()
                    kept = keep and self.judge.better(value, self.values["best"])
                    if kept:
                        self.keep(value, exact)
                record |= finite_only({f"val_{self.judge.name}": value}) | {
                    "kept": kept
                }
                self.values[phase] = value
            self.epochs.append(record)
            self._on_epoch(record)

    def consider_rewound(self) -> None:
        """Judge the rewound model: it is kept where no worse than the start.

        The statistics of BatchNorm are made to fit it first.
        """
        self.fit_batchnorm()
        with self._as_deployed() as exact:
            value = self.values["rewound"] = self.evaluate()
            if self.judge.no_worse(value, self.values["start"]):
                self.keep(value, exact)

    def teach(self) -> None:
        """Let what trains from here on learn from the recipe's teacher."""
        train = self._config.train
        model = copy.deepcopy(self.model) if train.teacher == "self" else self.teacher
        if model:
            self._taught_by = Teacher(model, len(self._train), train.teacher_mix)

    def fit_batchnorm(self) -> None:
        """Give BatchNorm the statistics of the weights as they are now."""
        if not self.dense.frozen:
            recompute_batchnorm(self.model, self.train_batches())

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
        epochs, values = [*self.epochs], {**self.values}
        best, rounding = (self.best, self.unrounded), self.form.rounding
        kept, taught_by = self.kept, self._taught_by

        def go_back() -> None:
            self.model.load_state_dict(model)
            # A copy: the optimizer goes on with the very tensors that it is given.
            self.optimizer.load_state_dict(copy.deepcopy(optimizer))
            self.epochs, self.values = [*epochs], {**values}
            (self.best, self.unrounded), self.form.rounding = best, rounding
            self.kept, self._taught_by = kept, taught_by

        return go_back

    def load(self, weights: Weights) -> None:
        """Write weights into the model."""
        load_weights(self.model, weights)

    def rounded(self, weights: Weights) -> Weights:
        """Return what a device would get of these weights."""
        return self.form.rounding.round(self.folded(weights), self.start)

    def folded(self, weights: Weights) -> Weights:
        """Return weights as they are deployed, but for rounding."""
        if self._norms is None:
            return weights
        return pack_weights(self._norms.folded(weights), weights.layout.types)

    def _unfold(self, norms: FoldedBatchNorm, *, fresh: bool) -> None:
        """Make a model trainable whose BatchNorm is folded, or is going to be."""
        (inputs, _), *_ = itertools.islice(self.train_batches(), 1)
        for bias in norms.idle_biases(inputs):
            bias.requires_grad_(False)
        if not fresh:
            norms.unfold(self.train_batches())

    @contextmanager
    def _as_deployed(self) -> Iterator[Weights | None]:
        """Give the model the values that a device would get, and then its own back."""
        if self.form.rounding.is_exact and self._norms is None:
            yield None
            return
        exact = weights_of(self.model)
        self.load(self.rounded(exact))
        yield exact
        self.load(exact)

    def keep(self, value: float, exact: Weights | None) -> None:
        """Keep what the model holds, with the weights that it was rounded from."""
        weights = weights_of(self.model)
        self.dense.verify(weights, self.start)
        self.values["best"], self.best = value, weights
        self.kept = self.movement() if self.movement else None
        if self.form.automatic:
            self.unrounded = exact

    def evaluate(self) -> float:
        """Return what the model is worth on validation."""
        return evaluate(self.model, self.validation, self.judge)

    def _seed_torch(self) -> None:
        """Seed torch's streams of the whole process, from which dropout draws."""
        torch.manual_seed(self.random_seed("dropout"))

    def _epoch(self) -> float:
        count, size = len(self._train), self._config.train.batch
        device = next(leaves(self._train.labels)).device
        # Sent once: a step waits for nothing.
        order = torch.from_numpy(self.random("order").permutation(count)).to(device)
        augment = self._augmentation and self._augmentation(
            self.random("augment"), batch_sizes(count, size), device
        )
        self._seed_torch()
        epoch = batches(self._train, size, order, augment)
        loss_of: Loss = self.loss
        if self._taught_by:
            known = None if augment else order
            epoch = self._taught_by.beside(epoch, known, self.random("mix"))
            loss_of = taught_loss(self._config.train)
        how = autocast(self._config.train, device)
        loss = train_epoch(self._trained, self.optimizer, epoch, loss_of, how)
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
