"""One run at work: its data, its network, and the training of one round after another.

:mod:`trainer.rounds` decides which round comes next and where it starts from.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from edge_runtime.weights import FILE_NAME, Weights, read_weights
from trainer.config import Config, as_dict
from trainer.data import split_source
from trainer.deployment import (
    GOLDEN_SAMPLES,
    make_deployment,
    read_deployment,
    write_deployment,
)
from trainer.folder import Outcome, RoundRecord, write_round
from trainer.loop import evaluate
from trainer.methods import Masks, RoundTraining, train_round
from trainer.models import build_model
from trainer.sources import load_source
from trainer.tensors import load_weights


@dataclass(frozen=True, slots=True)
class Progress:
    """What a run reports while it works.

    Attributes:
        round: Number of the round.
        rounds: Number of rounds of the run.
        phase: Phase of the epoch that ended.
        epoch: Epochs of this round that are done.
        epochs: Epochs of this round.
        record: The round's record once its folder is complete, else None.
    """

    round: int
    rounds: int
    phase: str
    epoch: int
    epochs: int
    record: RoundRecord | None = None


Report = Callable[[Progress], None]


class Run:
    """What stays the same from round to round: data, split, network, init weights."""

    def __init__(
        self, config: Config, run_dir: Path, progress: Report, *, new: bool
    ) -> None:
        """Load the data; draw init weights and export the graph of a new run.

        Raises:
            ConfigError: The data set is too small.
            ExportError: The network cannot be deployed weight for weight.
            TrainingError: The data set cannot be had.
        """
        self.config = config
        self.run_dir = run_dir
        self._progress = progress
        self._source = load_source(config.data)
        seed, rounds = config.run.seed, config.run.rounds
        self.split = split_source(self._source, config.data, seed=seed, rounds=rounds)
        self._pool, self._validation, self._test = (
            self._source.prepared(samples)
            for samples in (self.split.pool, self.split.validation, self.split.test)
        )
        shape = self._source.input_shape
        # Before any training: a network that cannot be deployed fails at once.
        self._deployment = (
            make_deployment(self.build, shape, seed=seed)
            if new
            else read_deployment(run_dir)
        )

    def build(self) -> nn.Module:
        """Build the network, with the initialisation of its modules."""
        classes = len(self._source.classes)
        return build_model(self.config.model, self._source.input_shape, classes)

    def train(
        self, number: int, records: Sequence[RoundRecord], *, reinitialise: bool
    ) -> RoundRecord:
        """Train a round and write its folder.

        Args:
            number: Of the round.
            records: Of the rounds before it.
            reinitialise: Start from the init weights again, and keep the result only
                if it validates no worse than what is deployed.

        Returns:
            The round's record, once its folder is complete.
        """
        init = self._deployment.init
        folder = self.run_dir / f"round_{number - 1:02d}"
        deployed = read_weights(folder / FILE_NAME) if records else init
        start = init if reinitialise else deployed
        model = self.build()
        load_weights(model, start)
        training = self._prepare(model, number)
        masks = train_round(training, self.config)

        before = records[-1].metrics["val_accuracy"] if records else 0.0
        best, updated = training.best, training.accuracy["best"] >= before
        if best is None or not updated or best.fingerprint == start.fingerprint:
            start = best = deployed
        load_weights(model, best)
        metrics = {
            "val_accuracy": evaluate(model, self._validation),
            "test_accuracy": evaluate(model, self._test),
            "tried_reinit": int(reinitialise),
            **{f"val_{name}": share for name, share in training.accuracy.items()},
            **_counts(start, best, masks),
        }
        if not records:
            self._write_deployment(model)
        method = self.config.update.method
        record = RoundRecord(
            run=self.config.run.name,
            round=number,
            counter=number,
            outcome=Outcome.KEPT_BASE if best is deployed else Outcome.UPDATED,
            parent=start.fingerprint,
            method=method,
            ratio=None if method == "fu" else self.config.update.ratio,
            reinitialised=reinitialise and best is not deployed,
            packable=True,
            samples=self.split.size_at(number),
            metrics=metrics,
            seeds={"run": self.config.run.seed},
            config=as_dict(self.config),
        )
        record = write_round(self.run_dir, record, best, masks, training.epochs)
        self._report(number, "done", len(training.epochs), record)
        return record

    def _prepare(self, model: nn.Module, number: int) -> RoundTraining:
        """Bring together what a round trains with."""
        count = itertools.count(1)
        augmented = self.config.data.augment == "crop_flip"
        return RoundTraining(
            model,
            self.config,
            number,
            (self._pool[: self.split.size_at(number)], self._validation),
            augmentation=self._source.crop_flip if augmented else None,
            on_epoch=lambda phase: self._report(number, phase, next(count)),
        )

    def _report(
        self, number: int, phase: str, epoch: int, record: RoundRecord | None = None
    ) -> None:
        run, epochs = self.config.run, 2 * self.config.train.epochs
        self._progress(Progress(number, run.rounds, phase, epoch, epochs, record))

    def _write_deployment(self, model: nn.Module) -> None:
        """Write the model folder; the model holds what round_00 deploys."""
        floor = self.config.run.accuracy_floor
        if floor is None:
            share = evaluate(model, self._validation[:GOLDEN_SAMPLES])
            floor = (1 / len(self._source.classes) + share) / 2
        golden = self.split.validation[:GOLDEN_SAMPLES]
        write_deployment(self.run_dir, self._deployment, self._source, golden, floor)


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
