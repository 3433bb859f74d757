# SPDX-License-Identifier: Apache-2.0
"""One run at work: its data, its network, and the training of one round after another.

:mod:`trainer.rounds.schedule` decides which round comes next and where it starts from.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edge_runtime.errors import ConfigError
from edge_runtime.formats.model_folder import WEIGHTS_NAME, Outcome, round_name
from edge_runtime.formats.subspace import Term
from edge_runtime.formats.weights import Weights, read_weights
from edge_runtime.sizes import parse_size
from trainer.config import as_dict
from trainer.data.samples import DataSource, batches, split_source
from trainer.data.sources import load_source
from trainer.export.deployed_check import GOLDEN_ROWS, check_answers
from trainer.export.int8 import DeviceForm, DeviceNetwork
from trainer.export.tensors import load_weights
from trainer.folder.record import RoundRecord
from trainer.folder.write import read_shadow, read_shadow_terms, write_round
from trainer.method.updater import is_weight
from trainer.networks.models import build_model
from trainer.parallel import by_first, first_before_others
from trainer.recipe.schema import (
    PARTIAL_METHODS,
    Config,
    UpdateConfig,
    trains_unseen,
)
from trainer.recipe.task import device_metric
from trainer.rounds.attempt import Attempt, counts, with_changes
from trainer.rounds.deployment import (
    GOLDEN_SAMPLES,
    Deployment,
    bound_of,
    contract_of,
    in_int8,
    make_deployment,
    read_deployment,
    write_deployment,
)
from trainer.rounds.loop import choose_device
from trainer.rounds.methods import check_names, train_round
from trainer.rounds.objective import check_objective, judge_of
from trainer.rounds.rounding import FLOAT32_BITS
from trainer.rounds.subspace import regenerated
from trainer.rounds.training import Pack, RoundTraining, is_full
from trainer.rounds.values import Values

CALIBRATION_SAMPLES = 256  # that say the ranges of activations


@dataclass(frozen=True, slots=True)
class Progress:
    """What a run reports while it works.

    Attributes:
        round: Number of the round.
        rounds: Number of rounds of the run.
        phase: Phase of the epoch that ended.
        epoch: Epochs of this round that are done, at most ``epochs``.
        epochs: Epochs of this round, where nothing has to be repeated.
        metrics: Of the epoch that ended, as in ``metrics.jsonl``: ``loss``, ``lr``, and
            ``val_accuracy``, or another metric's, where it was measured.
        record: The round's record once its folder is complete, else None.
    """

    round: int
    rounds: int
    phase: str
    epoch: int
    epochs: int
    record: RoundRecord | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)


Report = Callable[[Progress], None]


class Run:
    """What stays the same from round to round: data, split, network, init weights."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        progress: Report,
        *,
        model: Path | None = None,
        pack: Pack | None = None,
        source: DataSource | None = None,
    ) -> None:
        """Load the data, unless given; draw init and export the graph of a new run.

        Args:
            config: The recipe.
            run_dir: The run's folder.
            progress: Called after every epoch and after every round.
            model: The run's model folder, where it is there.
            pack: As for :func:`run_rounds`.
            source: Likewise.

        Raises:
            ConfigError: The data set is too small.
            ExportError: The network cannot be deployed weight for weight.
            TrainingError: The data set cannot be had.
        """
        self.config = config
        self.run_dir = run_dir
        self._progress = progress
        # One size for all processes, as what they do next depends on it.
        self._pack = pack and (
            lambda base, target, *terms: by_first(
                lambda: pack(self.form.encode(base), self.form.encode(target), *terms)
            )
        )
        self.device = choose_device(config.train.device)
        with first_before_others():
            self._source = source or load_source(config.data)
        seed, data, rounds = config.run.seed, config.data, config.run.rounds
        self.split = split_source(self._source, data, seed=seed, rounds=rounds)
        self._pool, self._validation, test = (
            self._source.prepared(samples, self.device)
            for samples in (self.split.pool, self.split.validation, self.split.test)
        )
        shape = self._source.input_shape
        if config.data.augment != "none" and len(shape) != 3:
            raise ConfigError(
                f"data.augment is for images (C, H, W), these inputs are {shape}"
            )
        self._judge = judge_of(config)
        self._values = Values(
            self._judge,
            self._validation,
            test,
            network=self._network,
            on_device=self._on_device,
        )
        self._teachers: dict[int, nn.Module] = {}  # by round; the last one
        check_objective(self.build(), self._pool, config, self._source.classes)
        check_names(self.build(), config.update)
        # Before any training: a network that cannot be deployed fails at once.
        example = self._golden_inputs()
        self._deployment = (
            read_deployment(model, self.build, example, self._calibration())
            if model
            else make_deployment(self.build, example, seed=seed)
        )
        if not model and config.model.deploy == "int8":
            self._deployment = self._in_int8()

    @property
    def init(self) -> Weights:
        """The init weights, as they train."""
        return self._deployment.init

    @property
    def form(self) -> DeviceForm:
        """How weights lie on a device."""
        return self._deployment.form

    def build(self) -> nn.Module:
        """Build the network, with the initialisation of its modules."""
        shape, outputs = self._source.input_shape, len(self._source.classes)
        return build_model(self.config.model, shape, outputs)

    def train(
        self, number: int, records: Sequence[RoundRecord], *, reinitialise: bool
    ) -> RoundRecord:
        """Train a round and write its folder.

        Args:
            number: Of the round.
            records: Of the rounds before it.
            reinitialise: Start from the init weights again, and keep the result only
                if it validates no worse than what is deployed. Where it does not, a
                partial method updates the deployed weights instead, and with
                ``update.chain = "shadow"`` later rounds go on with it unseen.

        Returns:
            The round's record, once its folder is complete.
        """
        init, update = self._deployment.init, self.config.update
        folder = self.run_dir / round_name(number - 1)
        deployed = init
        if records:
            deployed = self.form.decode(read_weights(folder / WEIGHTS_NAME))
        before, name = self._judge.worst, self._judge.name
        if records:
            before = records[-1].metrics[f"val_{name}"]
            test = records[-1].metrics[f"test_{name}"]
            self._values.know(deployed, validation=before, test=test)
        fresh = init if reinitialise else self._shadow(folder)
        tensors = len(self.form.encode(init))
        self._unseen = read_shadow_terms(folder, tensors) if fresh is not init else ()
        attempts = list(self._attempts(number, deployed, before, fresh))
        attempt = attempts[-1]
        target = attempt.new or deployed
        start = attempt.parent if attempt.new else deployed
        if not number:
            self.write_deployment(target)
        metrics = self._metrics(attempts, start, target)
        whole = is_full(self.config, number)
        record = RoundRecord(
            run=self.config.run.name,
            round=number,
            counter=number,
            outcome=Outcome.UPDATED if attempt.new else Outcome.KEPT_BASE,
            parent=self.form.encode(start).fingerprint,
            method="fu" if whole else update.method,
            ratio=None if whole else self._ratio(attempt, metrics),
            tried_reinit=reinitialise,
            reinitialised=bool(records) and attempt.new is not None and start is init,
            packable=update.chain != "paper",
            samples=self.split.size_at(number),
            metrics=metrics,
            metric=name,
            better="higher" if self._judge.higher else "lower",
            seeds={"run": self.config.run.seed},
            config=as_dict(self.config),
        )
        record = by_first(lambda: self._write(record, attempts, target))
        done = {"phase": "done"}
        self._report(number, done, 2 * self.config.train.epochs, record)
        return record

    def _metrics(
        self, attempts: Sequence[Attempt], start: Weights, target: Weights
    ) -> dict[str, Any]:
        """Return what a round's record says in numbers.

        Args:
            attempts: The trainings; the last one counts.
            start: What devices update from.
            target: What they come to have.
        """
        attempt, name, values = attempts[-1], self._judge.name, self._values
        metrics = {
            f"val_{name}": values.on_validation(target),
            f"test_{name}": values.on_test(target),
            "test_best": values.on_test(attempt.best),
            **{f"val_{k}": value for k, value in attempt.training.values.items()},
            **counts(start, target, attempt.masks),
            **{f"grid_{n}": s for n, s in attempt.training.form.form.steps.items()},
            **(values.on_the_other_side(target) if self.form.is_int8 else {}),
        }
        if len(attempts) > 1:
            metrics["val_reinit"] = attempts[0].training.values["best"]
            if attempts[0].waits:
                metrics["waiting_bytes"] = attempts[0].waits
        if attempt.missed is not None:
            metrics["golden"] = attempt.missed
        if attempt.new and self._pack and self.config.update.budget:
            metrics["patch_bytes"] = self._size(start, target, attempt.terms)
        for term in attempt.terms[-1:]:
            metrics["coefficients"] = len(term.coefficients)
        return metrics

    def _ratio(self, attempt: Attempt, metrics: Mapping[str, Any]) -> float | None:
        """Return the share of weights that were selected; None where all of them are.

        It is counted where the recipe does not say it.
        """
        update, training = self.config.update, attempt.training
        if update.method in ("fu", "subspace"):
            return None
        several = training.start is not attempt.parent
        if update.budget or several or update.method == "named":
            return float(metrics["selected"] / metrics["weights"])
        return training.ratio

    def _write(
        self, record: RoundRecord, attempts: Sequence[Attempt], target: Weights
    ) -> RoundRecord:
        """Write a round's folder, with what is trained on unseen."""
        first, attempt, encode = attempts[0], attempts[-1], self.form.encode
        unseen = len(attempts) > 1 and trains_unseen(self.config.update)
        unseen = unseen and first.best is not self._deployment.init
        return write_round(
            self.run_dir,
            record,
            encode(target),
            {**attempt.masks, **attempt.training.dense.masks()},
            [epoch for one in attempts for epoch in one.epochs],
            encode(first.best) if unseen else None,
            terms=attempt.terms if attempt.new else (),
            shadow_terms=first.terms if unseen else (),
        )

    def _attempts(
        self, number: int, deployed: Weights, before: float, fresh: Weights | None
    ) -> Iterator[Attempt]:
        """Train on from fresh weights, and from deployed ones where that falls short.

        Args:
            number: Of the round.
            deployed: The deployed weights.
            before: How good they are on validation.
            fresh: The init weights, or what earlier rounds made of them unseen.
        """
        update = self.config.update
        if fresh is not None:
            floor = self._judge.worst if update.chain == "paper" else before
            attempt = self._try(number, fresh, floor, parent=self._deployment.init)
            yield attempt
            if attempt.new is not None or update.method not in PARTIAL_METHODS:
                return
        yield self._try(number, deployed, before, parent=deployed)

    def _try(
        self, number: int, start: Weights, floor: float, *, parent: Weights
    ) -> Attempt:
        """Train from some weights; the result counts where it is no worse than floor.

        Equal weights are no result: there is nothing to send.
        """
        model = self._network(start)
        from_init = parent is self._deployment.init
        training = self._prepare(model, number, start, self.config, from_init=from_init)
        training.start = start
        # Deployed weights know their samples by heart; from the init weights, the few
        # coefficients of a subspace learn labels better.
        alone = self.config.update.method == "subspace" and training.fresh
        if self.config.train.teacher == "full" and not alone:
            training.teacher = self._teacher(number)
        masks = train_round(training, self.config, self._pack)
        best, terms = (
            training.best or start,
            self._unseen if start is not parent else (),
        )
        if training.kept:
            device = self.form.encode(best)
            terms = (*terms, training.kept.term(device.layout))
            device = regenerated(device, self.form.encode(parent), terms)
            best = self.form.decode(device)
        load_weights(model, best)
        self._check_answers(model, best)
        # What a training found is not measured again.
        self._values.know(start, validation=training.values["start"])
        self._values.know(best, validation=training.values["best"])
        new, missed = None, None
        is_new = best.fingerprint not in (start.fingerprint, parent.fingerprint)
        if is_new and self._judge.no_worse(training.values["best"], floor):
            missed = self._missed(best)
            new = best if missed is None else None
        waits, origin = 0, "init" if from_init else "deployed"
        if start is not parent:
            origin = "shadow"
            masks = masks if terms else with_changes(masks, parent, best)
            waits = self._too_large(parent, new, terms)
            new = None if waits else new
        epochs = [{"start": origin} | epoch for epoch in training.epochs]
        return Attempt(training, parent, masks, best, new, missed, waits, epochs, terms)

    def _missed(self, weights: Weights) -> float | None:
        """Return what the golden samples give where that is short of the bound."""
        metric = device_metric(self.config.data, self.config.train)
        bound = bound_of(self.config, self.run_dir)
        no_device = self.config.update.chain == "paper"
        if metric is None or bound is None or no_device:
            return None
        value = self._values.golden(weights, metric, GOLDEN_SAMPLES)
        return None if metric.reaches(value, bound) else value

    def _size(self, base: Weights, target: Weights, terms: Sequence[Term]) -> int:
        """Return the size of a patch; a packer of yours need not know of subspaces."""
        if self._pack is None:
            return 0
        return self._pack(base, target, *([terms] if terms else []))

    def _too_large(
        self, parent: Weights, new: Weights | None, terms: Sequence[Term]
    ) -> int:
        """Return the size of a patch if it is over the budget, else 0.

        What several rounds changed unseen travels in one patch.
        """
        update = self.config.update
        if new is None or not update.budget:
            return 0
        size = self._size(parent, new, terms)
        return size if size > parse_size(update.first_budget or update.budget) else 0

    def _teacher(self, number: int) -> nn.Module:
        """Return what full updating gives in this round, which no device gets."""
        if number not in self._teachers:
            self._teachers.clear()
            self._teachers[number] = self._fully_updated(number)
        return self._teachers[number]

    def _fully_updated(self, number: int) -> nn.Module:
        """Train every weight from the init weights, with the data of a round."""
        train = replace(self.config.train, teacher="none")
        config = replace(self.config, update=UpdateConfig(method="fu"), train=train)
        return self._network(self._as_float(number, config))

    def _as_float(self, number: int, config: Config) -> Weights:
        """Return what a recipe makes of the init weights, whatever is deployed."""
        init = self._deployment.init
        model = self._network(init)
        training = self._prepare(model, number, init, config, from_init=True)
        if config.train.teacher == "full":
            training.teacher = self._teacher(number)
        train_round(training, config)
        return training.best or init

    def _in_int8(self) -> Deployment:
        """Settle scales and ranges by a training in float32, with round_00's data.

        With as few weights as any round has: the fewer, the farther they move.
        """
        config = replace(self.config, update=calibrating(self.config.update))
        trained = self._as_float(0, config)
        named = self.build().named_parameters()
        names = [n for n, p in named if is_weight(n, p) and p.dtype == torch.float32]
        return in_int8(self._deployment, names, trained, self._calibration())

    def _calibration(self) -> Tensor:
        """Return the prepared inputs that say the ranges of activations."""
        samples = self._pool[: min(self.split.size_at(0), CALIBRATION_SAMPLES)]
        (inputs, _), *_ = batches(samples, len(samples))
        return inputs.cpu()

    def _network(self, weights: Weights) -> nn.Module:
        """Build the network anew, with these weights."""
        model = self.build().to(self.device)
        load_weights(model, weights)
        return model

    def _on_device(self, weights: Weights) -> nn.Module:
        """Return what answers as a device with these weights."""
        if not self.form.is_int8:
            return self._network(weights)
        return DeviceNetwork(self._deployment.graph, self.form.encode(weights))

    def _shadow(self, folder: Path) -> Weights | None:
        """Return the weights that a round trained unseen, as they train."""
        shadow = read_shadow(folder)
        return shadow and self.form.decode(shadow)

    def _check_answers(self, model: nn.Module, weights: Weights) -> None:
        """Prove that a device will answer as the trained network does.

        Raises:
            ExportError: It would not.
        """
        graph, inputs = self._deployment.plain, self._golden_inputs()
        by_first(lambda: check_answers(model, weights, graph, [inputs]))

    def _golden_inputs(self) -> Tensor:
        """Return a few prepared inputs."""
        samples = self._validation[:GOLDEN_ROWS]
        (inputs, _), *_ = batches(samples, len(samples))
        return inputs.cpu()

    def _prepare(
        self,
        model: nn.Module,
        number: int,
        start: Weights,
        config: Config,
        *,
        from_init: bool,
    ) -> RoundTraining:
        """Bring together what a round trains with."""
        count = itertools.count(1)
        augment = self.config.data.augment

        def report(epoch: Mapping[str, Any]) -> None:
            self._report(number, epoch, next(count))

        move = partial(self._source.augmentation, augment)
        return RoundTraining(
            model,
            config,
            number,
            (self._pool[: self.split.size_at(number)], self._validation),
            from_init=from_init,
            fresh=start is self._deployment.init,
            start_value=self._values.known(start),
            scales=self.form.scales,
            device_layout=self.form.encode(self.init).layout,
            augmentation=None if augment == "none" else move,
            on_epoch=report if config is self.config else lambda _epoch: None,
        )

    def _report(
        self,
        number: int,
        metrics: Mapping[str, Any],
        epoch: int,
        record: RoundRecord | None = None,
    ) -> None:
        run, epochs = self.config.run, 2 * self.config.train.epochs
        epoch = min(epoch, epochs)  # a phase that is repeated shows as the last one
        phase = metrics["phase"]
        self._progress(
            Progress(number, run.rounds, phase, epoch, epochs, record, metrics)
        )

    def write_deployment(self, target: Weights) -> None:
        """Write the model folder; round_00's weights decide the contract's bound."""
        golden = self.split.validation[:GOLDEN_SAMPLES]
        contract = contract_of(
            self.config,
            self._source,
            golden,
            lambda metric: self._values.golden(target, metric, GOLDEN_SAMPLES),
        )
        by_first(
            lambda: write_deployment(
                self.run_dir, self._deployment, contract, golden, self.config.run.id
            )
        )


def calibrating(update: UpdateConfig) -> UpdateConfig:
    """Return the section by which a training says how far weights will move."""
    subspace = update.method == "subspace"  # whose size is known before
    return replace(
        update,
        first="partial",
        first_ratio=0.0,
        budget=update.budget if subspace else "",
        first_budget="",
        anew_budget="",
        grid="",
        dense_grid="",
        mantissa_bits=FLOAT32_BITS,
    )
