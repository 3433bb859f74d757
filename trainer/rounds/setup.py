# SPDX-License-Identifier: Apache-2.0
"""What stays the same from round to round: data, split, network, init weights."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edge_runtime.errors import ConfigError
from edge_runtime.formats.weights import Weights
from trainer.data.samples import DataSource, Samples, batches, split_source
from trainer.data.sources import load_source
from trainer.export.deployed_check import GOLDEN_ROWS, check_answers
from trainer.export.int8 import DeviceForm
from trainer.export.tensors import load_weights
from trainer.method.selectable import is_weight
from trainer.networks.models import build_model
from trainer.parallel import by_first, first_before_others
from trainer.recipe.kinds_of_rounds import begins_anew, is_full
from trainer.recipe.schema import Config, UpdateConfig
from trainer.rounds.deployment import (
    GOLDEN_SAMPLES,
    Deployment,
    contract_of,
    in_int8,
    make_deployment,
    read_deployment,
    write_deployment,
)
from trainer.rounds.loop import choose_device
from trainer.rounds.methods import check_names, check_room, train_round
from trainer.rounds.objective import check_objective, judge_of
from trainer.rounds.rounding import FLOAT32_BITS
from trainer.rounds.training import RoundTraining
from trainer.rounds.values import Values

CALIBRATION_SAMPLES = 256  # that say the ranges of activations

OnEpoch = Callable[[dict[str, Any]], None]


class Setup:
    """One run's data, split, network and init weights, and trainings with them.

    Attributes:
        config: The recipe.
        split: Which samples train, judge and test.
        judge: Says which weights are better.
        values: How good weights are, as far as it was measured.
    """

    def __init__(
        self,
        config: Config,
        source: DataSource | None = None,
        model: Path | None = None,
    ) -> None:
        """Load the data, unless given; draw init and export the graph of a new run.

        Args:
            config: The recipe.
            source: Its data set where it is loaded already.
            model: The run's model folder, where it is there.

        Raises:
            ConfigError: The data set is too small.
            ExportError: The network cannot be deployed weight for weight.
            TrainingError: The data set cannot be had.
        """
        self.config = config
        self._device = choose_device(config.train.device)
        with first_before_others():
            self._source = source or load_source(config.data)
        seed, data, rounds = config.run.seed, config.data, config.run.rounds
        self.split = split_source(self._source, data, seed=seed, rounds=rounds)
        self._pool, self._validation, test = (
            self._source.prepared(samples, self._device)
            for samples in (self.split.pool, self.split.validation, self.split.test)
        )
        shape, outputs = self._source.input_shape, len(self._source.classes)
        if config.data.augment != "none" and len(shape) != 3:
            raise ConfigError(
                f"data.augment is for images (C, H, W), these inputs are {shape}"
            )
        # Plain functions, as bound methods would make cycles of references, which keep
        # all samples in memory until Python looks for them.
        self._build = partial(build_model, config.model, shape, outputs)
        self._network = partial(_with_weights, self._build, self._device)
        self.judge = judge_of(config)
        self._teachers: dict[int, nn.Module] = {}  # by round; the last one
        check_objective(self._build(), self._pool, config, self._source.classes)
        check_names(self._build(), config.update)
        # Before any training: a network that cannot be deployed fails at once.
        example = self._inputs(self._validation[:GOLDEN_ROWS])
        self._deployment = (
            read_deployment(model, self._build, example, self._calibration())
            if model
            else make_deployment(self._build, example, seed=seed)
        )
        measure = partial(Values, self.judge, self._validation, test, self._network)
        self.values = measure(self._deployment)
        # What a run that exists could not do was refused when it was started.
        coefficients = 0 if model else self._check_rounds()
        if not model and config.model.deploy == "int8":
            self._deployment = self._in_int8(coefficients)
            self.values = measure(self._deployment)
            self._check_rounds()  # ranges of activations take room as well

    @property
    def init(self) -> Weights:
        """The init weights, as they train."""
        return self._deployment.init

    @property
    def form(self) -> DeviceForm:
        """How weights lie on a device."""
        return self._deployment.form

    def training(
        self,
        config: Config,
        number: int,
        start: Weights,
        *,
        from_init: bool,
        on_epoch: OnEpoch = lambda _epoch: None,
    ) -> RoundTraining:
        """Bring together what a round trains with.

        Args:
            config: The run's recipe, or one that differs in how weights are trained.
            number: Of the round.
            start: Weights to start from.
            from_init: Whether devices update from the init weights.
            on_epoch: Called with the record of every epoch.
        """
        augment = config.data.augment
        move = partial(self._source.augmentation, augment)
        training = RoundTraining(
            self._network(start),
            config,
            number,
            (self._pool[: self.split.size_at(number)], self._validation),
            from_init=from_init,
            fresh=start is self.init,
            start_value=self.values.known(start),
            scales=self.form.scales,
            device_layout=self.form.encode(self.init).layout,
            augmentation=None if augment == "none" else move,
            on_epoch=on_epoch,
        )
        # A teacher helps weights that fit their samples already, as deployed ones do.
        # From the init weights, the coefficients of a subspace learn labels better.
        alone = config.update.method == "subspace" and training.fresh
        if config.train.teacher == "full" and not alone:
            training.teacher = self._teacher(number)
        return training

    def check_answers(self, model: nn.Module, weights: Weights) -> None:
        """Prove that a device will answer as the trained network does.

        Raises:
            ExportError: It would not.
        """
        graph = self._deployment.plain
        inputs = [self._inputs(self._validation[:GOLDEN_ROWS])]
        by_first(lambda: check_answers(model, weights, graph, inputs))

    def write(self, run_dir: Path, target: Weights) -> None:
        """Write the model folder; round_00's weights decide the contract's bound."""
        golden = self.split.validation[:GOLDEN_SAMPLES]
        contract = contract_of(
            self.config,
            self._source,
            golden,
            lambda metric: self.values.golden(target, metric, GOLDEN_SAMPLES),
        )
        by_first(
            lambda: write_deployment(
                run_dir, self._deployment, contract, golden, self.config.run.id
            )
        )

    def _teacher(self, number: int) -> nn.Module:
        """Return what full updating gives in this round, which no device gets."""
        if number not in self._teachers:
            self._teachers.clear()
            train = replace(self.config.train, teacher="none")
            full = replace(self.config, update=UpdateConfig(method="fu"), train=train)
            self._teachers[number] = self._network(self._from_init(full, number))
        return self._teachers[number]

    def _from_init(self, config: Config, number: int) -> Weights:
        """Return what a recipe makes of the init weights, whatever is deployed."""
        training = self.training(config, number, self.init, from_init=True)
        train_round(training, config)
        return training.best or self.init

    def _check_rounds(self) -> int:
        """Refuse what a round could not do, while the recipe may still be changed.

        Returns:
            How many coefficients rounds have at least, where they have some.

        Raises:
            ConfigError: A limit has no room, or a share selects nothing.
        """
        config, counts = self.config, list[int]()
        plain = replace(config, train=replace(config.train, teacher="none"))
        one = config.run.rounds == 1 and config.update.first == "partial"
        kinds = 1 if one else 2 + begins_anew(config)
        for number, fresh in ((0, True), (1, False), (1, True))[:kinds]:
            if is_full(config, number):
                continue
            training = self.training(plain, number, self.init, from_init=fresh)
            self.values.know(self.init, validation=training.values["start"])
            training.fresh = fresh  # or as if these were deployed
            counts.append(check_room(training))
        return min(counts, default=0)

    def _in_int8(self, coefficients: int) -> Deployment:
        """Settle scales and ranges by a training in float32, with round_00's data.

        With as few weights as any round has: the fewer, the farther they move.
        """
        update = calibrating(self.config.update, coefficients)
        config = replace(self.config, update=update)
        trained = self._from_init(config, 0)
        named = self._build().named_parameters()
        names = [n for n, p in named if is_weight(n, p) and p.dtype == torch.float32]
        return in_int8(self._deployment, names, trained, self._calibration())

    def _calibration(self) -> Tensor:
        """Return the prepared inputs that say the ranges of activations."""
        count = min(self.split.size_at(0), CALIBRATION_SAMPLES)
        return self._inputs(self._pool[:count])

    def _inputs(self, samples: Samples) -> Tensor:
        (inputs, _), *_ = batches(samples, len(samples))
        return inputs.cpu()


def _with_weights(
    build: Callable[[], nn.Module], device: torch.device, weights: Weights
) -> nn.Module:
    """Build a network anew, with these weights."""
    model = build().to(device)
    load_weights(model, weights)
    return model


def calibrating(update: UpdateConfig, coefficients: int) -> UpdateConfig:
    """Return the section by which a training says how far weights will move.

    Args:
        update: The recipe's section.
        coefficients: As few as any of its rounds has; 0 where they have none.
    """
    return replace(
        update,
        first="partial",
        first_ratio=0.0,
        coefficients=coefficients or update.coefficients,
        budget="",
        first_budget="",
        anew_budget="",
        grid="",
        dense_grid="",
        mantissa_bits=FLOAT32_BITS,
    )
