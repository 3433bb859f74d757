"""One run at work: its data, its network, and the training of one round after another.

:mod:`trainer.rounds` decides which round comes next and where it starts from.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edge_runtime.errors import ConfigError
from edge_runtime.weights import FILE_NAME, Weights, read_weights
from trainer.config import as_dict
from trainer.data import DataSource, split_source
from trainer.deployment import (
    GOLDEN_SAMPLES,
    make_deployment,
    read_deployment,
    write_deployment,
)
from trainer.folder import write_round
from trainer.loop import evaluate
from trainer.methods import Masks, Pack, is_full, train_round
from trainer.models import build_model
from trainer.parallel import by_first, first_before_others
from trainer.record import Outcome, RoundRecord
from trainer.sections import PARTIAL_METHODS, Config
from trainer.sources import load_source
from trainer.tensors import load_weights
from trainer.training import RoundTraining


@dataclass(frozen=True, slots=True)
class Progress:
    """What a run reports while it works.

    Attributes:
        round: Number of the round.
        rounds: Number of rounds of the run.
        phase: Phase of the epoch that ended.
        epoch: Epochs of this round that are done, at most ``epochs``.
        epochs: Epochs of this round, where nothing has to be repeated.
        record: The round's record once its folder is complete, else None.
    """

    round: int
    rounds: int
    phase: str
    epoch: int
    epochs: int
    record: RoundRecord | None = None


@dataclass(frozen=True, slots=True)
class _Trial:
    """A training, and what came of it.

    Attributes:
        training: How it went.
        masks: What was selected.
        new: Weights to deploy; None where they are no better than what there is.
        test_best: Test accuracy of the best weights, deployed or not.
        epochs: The records of its epochs, with what it started from.
    """

    training: RoundTraining
    masks: Masks
    new: Weights | None
    test_best: float
    epochs: Sequence[Mapping[str, Any]]


Report = Callable[[Progress], None]


class Run:
    """What stays the same from round to round: data, split, network, init weights."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        progress: Report,
        *,
        new: bool,
        pack: Pack | None = None,
        source: DataSource | None = None,
    ) -> None:
        """Load the data, unless given; draw init and export the graph of a new run.

        Raises:
            ConfigError: The data set is too small.
            ExportError: The network cannot be deployed weight for weight.
            TrainingError: The data set cannot be had.
        """
        self.config = config
        self.run_dir = run_dir
        self._progress = progress
        # One size for all processes, as what they do next depends on it.
        self._pack = pack and (lambda *ends: by_first(lambda: pack(*ends)))
        self.device = choose_device(config.train.device)
        with first_before_others():
            self._source = source or load_source(config.data)
        seed, data, rounds = config.run.seed, config.data, config.run.rounds
        self.split = split_source(self._source, data, seed=seed, rounds=rounds)
        self._pool, self._validation, self._test = (
            self._source.prepared(samples, self.device)
            for samples in (self.split.pool, self.split.validation, self.split.test)
        )
        shape = self._source.input_shape
        if config.data.augment != "none" and len(shape) != 3:
            raise ConfigError(
                f"data.augment is for images (C, H, W), these inputs are {shape}"
            )
        # Before any training: a network that cannot be deployed fails at once.
        self._deployment = (
            make_deployment(self.build, shape, seed=seed)
            if new
            else read_deployment(run_dir)
        )

    def build(self) -> nn.Module:
        """Build the network, with the initialisation of its modules."""
        classes = len(self._source.classes)
        shape = self._source.input_shape
        model = build_model(self.config.model, shape, classes)
        if self.config.model.factory:
            _check_outputs(model, shape, classes)
        return model

    def train(
        self, number: int, records: Sequence[RoundRecord], *, reinitialise: bool
    ) -> RoundRecord:
        """Train a round and write its folder.

        Args:
            number: Of the round.
            records: Of the rounds before it.
            reinitialise: Start from the init weights again, and keep the result only
                if it validates no worse than what is deployed. Where it does not, a
                partial method updates the deployed weights instead.

        Returns:
            The round's record, once its folder is complete.
        """
        init, update = self._deployment.init, self.config.update
        folder = self.run_dir / f"round_{number - 1:02d}"
        deployed = read_weights(folder / FILE_NAME) if records else init
        before = records[-1].metrics["val_accuracy"] if records else 0.0
        paper = update.chain == "paper"
        floor = 0.0 if paper and reinitialise else before
        trial = self._try(number, init if reinitialise else deployed, floor)
        epochs, extra = trial.epochs, {}
        if reinitialise and trial.new is None and update.method in PARTIAL_METHODS:
            extra = {"val_reinit": trial.training.accuracy["best"]}
            trial = self._try(number, deployed, before)
            epochs = [*epochs, *trial.epochs]
        target = trial.new or deployed
        model = self.build().to(self.device)
        load_weights(model, target)
        start = trial.training.start if trial.new else deployed
        metrics = {
            "val_accuracy": evaluate(model, self._validation),
            "test_accuracy": evaluate(model, self._test),
            "test_best": trial.test_best,
            "tried_reinit": int(reinitialise),
            **{f"val_{k}": share for k, share in trial.training.accuracy.items()},
            **extra,
            **_counts(start, target, trial.masks),
        }
        if trial.new and self._pack and update.budget:
            metrics["patch_bytes"] = self._pack(start, target)
        if not records:
            self._write_deployment(model)
        everything = update.method == "fu" or is_full(self.config, number)
        ratio = metrics["selected"] / metrics["weights"] if update.budget else None
        record = RoundRecord(
            run=self.config.run.name,
            round=number,
            counter=number,
            outcome=Outcome.UPDATED if trial.new else Outcome.KEPT_BASE,
            parent=start.fingerprint,
            method="fu" if everything else update.method,
            ratio=None if everything else ratio or update.ratio,
            reinitialised=bool(records) and trial.new is not None and start is init,
            packable=not paper,
            samples=self.split.size_at(number),
            metrics=metrics,
            seeds={"run": self.config.run.seed},
            config=as_dict(self.config),
        )
        masks = {**trial.masks, **trial.training.dense.masks()}
        record = by_first(
            lambda: write_round(self.run_dir, record, target, masks, epochs)
        )
        self._report(number, "done", 2 * self.config.train.epochs, record)
        return record

    def _try(self, number: int, start: Weights, floor: float) -> "_Trial":
        """Train from some weights; the result counts where it is no worse than floor.

        Equal weights are no result: there is nothing to send.
        """
        from_init = start is self._deployment.init
        model = self.build().to(self.device)
        load_weights(model, start)
        training = self._prepare(model, number, from_init=from_init)
        training.start = start
        masks = train_round(training, self.config, self._pack)
        load_weights(model, training.best or start)
        test_best = evaluate(model, self._test)
        new = training.best
        if new is not None and (
            training.accuracy["best"] < floor or new.fingerprint == start.fingerprint
        ):
            new = None
        origin = {"start": "init" if from_init else "deployed"}
        epochs = [origin | epoch for epoch in training.epochs]
        return _Trial(training, masks, new, test_best, epochs)

    def _prepare(
        self, model: nn.Module, number: int, *, from_init: bool
    ) -> RoundTraining:
        """Bring together what a round trains with."""
        count = itertools.count(1)
        augmented = self.config.data.augment == "crop_flip"
        return RoundTraining(
            model,
            self.config,
            number,
            (self._pool[: self.split.size_at(number)], self._validation),
            from_init=from_init,
            augmentation=self._source.crop_flip if augmented else None,
            on_epoch=lambda phase: self._report(number, phase, next(count)),
        )

    def _report(
        self, number: int, phase: str, epoch: int, record: RoundRecord | None = None
    ) -> None:
        run, epochs = self.config.run, 2 * self.config.train.epochs
        epoch = min(epoch, epochs)  # a phase that is repeated shows as the last one
        self._progress(Progress(number, run.rounds, phase, epoch, epochs, record))

    def _write_deployment(self, model: nn.Module) -> None:
        """Write the model folder; the model holds what round_00 deploys."""
        floor = self.config.run.accuracy_floor
        if floor is None:
            share = evaluate(model, self._validation[:GOLDEN_SAMPLES])
            floor = (1 / len(self._source.classes) + share) / 2
        golden = self.split.validation[:GOLDEN_SAMPLES]
        by_first(
            lambda: write_deployment(
                self.run_dir, self._deployment, self._source, golden, floor
            )
        )


def choose_device(name: str) -> torch.device:
    """Return where to train: ``cpu``, ``cuda``, or what there is for ``auto``.

    Raises:
        ConfigError: There is no such device.
    """
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ConfigError(
            'train.device is "cuda", but torch finds no GPU; choose "auto" or "cpu"'
        )
    return torch.device("cuda" if found and name != "cpu" else "cpu")


@torch.no_grad()
def _check_outputs(model: nn.Module, shape: tuple[int, ...], classes: int) -> None:
    """Refuse a network of your own that does not give one output a class."""
    training = model.training
    outputs = model.eval()(torch.zeros(2, *shape))
    model.train(training)
    found = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs)
    if found != (2, classes):
        raise ConfigError(
            f"the network gives {found} for two inputs of shape {shape}, expected "
            f"{(2, classes)}: one logit for each of {classes} classes"
        )


def _counts(start: Weights, target: Weights, masks: Masks) -> dict[str, int]:
    """Count selectable weights: all, selected, and changed (compared as bits)."""
    changed = 0
    for name in masks:
        bits = np.dtype(f"u{start.layout.by_name[name].item_size}")
        changed += int((start[name].view(bits) != target[name].view(bits)).sum())
    return {
        "weights": sum(mask.numel() for mask in masks.values()),
        "selected": sum(int(mask.sum()) for mask in masks.values()),
        "changed": changed,
    }
