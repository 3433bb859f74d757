# SPDX-License-Identifier: Apache-2.0
"""One run at work: the training of one round after another.

:mod:`trainer.rounds.schedule` decides which round comes next and where it starts from.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from edge_runtime.formats.model_folder import Outcome, round_name
from edge_runtime.formats.subspace import Term, together
from edge_runtime.formats.weights import Weights
from edge_runtime.sizes import parse_size
from trainer.config import as_dict
from trainer.export.tensors import load_weights
from trainer.folder.record import RoundRecord, read_deployed
from trainer.folder.write import read_shadow, read_shadow_terms, write_round
from trainer.parallel import by_first
from trainer.recipe.kinds_of_rounds import is_full, trains_unseen
from trainer.recipe.schema import PARTIAL_METHODS
from trainer.recipe.task import device_metric
from trainer.rounds.attempt import Attempt, counts, with_changes
from trainer.rounds.deployment import GOLDEN_SAMPLES, bound_of
from trainer.rounds.methods import train_round
from trainer.rounds.objective import finite_only
from trainer.rounds.setup import Setup
from trainer.rounds.subspace import regenerated
from trainer.rounds.training import Pack


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
    """The rounds of one run: each starts from what is deployed, and may replace it."""

    def __init__(
        self, setup: Setup, run_dir: Path, progress: Report, *, pack: Pack | None = None
    ) -> None:
        """Get ready.

        Args:
            setup: What stays the same from round to round.
            run_dir: The run's folder.
            progress: Called after every epoch and after every round.
            pack: As for :func:`run_rounds`.
        """
        self.config, self._setup, self._values = setup.config, setup, setup.values
        self._judge, self._init = setup.judge, setup.init
        encode = self._encode = setup.form.encode
        self._decode = setup.form.decode
        self.run_dir = run_dir
        self._progress = progress
        # One size for all processes, as what they do next depends on it.
        self._pack = pack and (
            lambda base, target, *terms: by_first(
                lambda: pack(encode(base), encode(target), *terms)
            )
        )

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
                ``update.chain = "shadow"`` later rounds go on with it unseen (but in a
                subspace with a budget).

        Returns:
            The round's record, once its folder is complete.
        """
        init, update = self._init, self.config.update
        folder = self.run_dir / round_name(number - 1)
        deployed, before, name = init, self._judge.worst, self._judge.name
        if records:
            deployed = self._decode(read_deployed(folder))
            before = records[-1].metrics.get(f"val_{name}", math.nan)
            test = records[-1].metrics.get(f"test_{name}", math.nan)
            self._values.know(deployed, validation=before, test=test)
        fresh, unseen = (init, ()) if reinitialise else self._shadow(folder)
        attempts = list(self._attempts(number, deployed, before, fresh, unseen))
        attempt = attempts[-1]
        target = attempt.new or deployed
        start = attempt.parent if attempt.new else deployed
        if not number:
            self._setup.write(self.run_dir, target)
        metrics = self._metrics(attempts, start, target)
        whole = is_full(self.config, number)
        record = RoundRecord(
            run=self.config.run.name,
            round=number,
            counter=number,
            outcome=Outcome.UPDATED if attempt.new else Outcome.KEPT_BASE,
            parent=self._encode(start).fingerprint,
            method="fu" if whole else update.method,
            ratio=None if whole else self._ratio(attempt, metrics),
            tried_reinit=reinitialise,
            reinitialised=bool(records) and attempt.new is not None and start is init,
            packable=update.chain != "paper",
            samples=self._setup.split.size_at(number),
            metrics=metrics,
            metric=name,
            better="higher" if self._judge.higher else "lower",
            seeds={"run": self.config.run.seed},
            config=as_dict(self.config),
        )
        record = by_first(lambda: self._write(record, attempts, target))
        end = itertools.repeat(2 * self.config.train.epochs)
        self._report(number, end, {"phase": "done"}, record)
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
            **{f"val_{k}": value for k, value in attempt.values.items()},
            **counts(start, target, attempt.masks),
            **{f"grid_{name}": step for name, step in attempt.steps.items()},
            **(values.int8_cost(target) if self._setup.form.is_int8 else {}),
        }
        if len(attempts) > 1:
            metrics["val_reinit"] = attempts[0].values["best"]
            if attempts[0].missed is not None:
                metrics["golden_reinit"] = attempts[0].missed
            if attempts[0].waits:
                metrics["waiting_bytes"] = attempts[0].waits
        if attempt.missed is not None:
            metrics["golden"] = attempt.missed
        if attempt.new and self._pack and self.config.update.budget:
            metrics["patch_bytes"] = self._size(start, target, attempt.terms)
        for term in attempt.terms[-1:]:
            metrics["coefficients"] = len(term.coefficients)
        return finite_only(metrics)

    def _ratio(self, attempt: Attempt, metrics: Mapping[str, Any]) -> float | None:
        """Return the share of weights that were selected; None where all of them move.

        It is counted where the recipe does not say it.
        """
        update = self.config.update
        if update.method == "subspace":
            return None
        several = attempt.start is not attempt.parent
        if update.budget or several or update.method == "named":
            return float(metrics["selected"] / metrics["weights"])
        return attempt.ratio

    def _write(
        self, record: RoundRecord, attempts: Sequence[Attempt], target: Weights
    ) -> RoundRecord:
        """Write a round's folder, with what is trained on unseen."""
        first, attempt = attempts[0], attempts[-1]
        unseen = len(attempts) > 1 and trains_unseen(self.config.update)
        unseen = unseen and first.best is not self._init and self._fit(first.terms)
        return write_round(
            self.run_dir,
            record,
            self._encode(target),
            {**attempt.masks, **attempt.still},
            [epoch for one in attempts for epoch in one.epochs],
            self._encode(first.best) if unseen else None,
            terms=attempt.terms if attempt.new else (),
            shadow_terms=first.terms if unseen else (),
        )

    def _attempts(
        self,
        number: int,
        deployed: Weights,
        before: float,
        fresh: Weights | None,
        unseen: tuple[Term, ...],
    ) -> Iterator[Attempt]:
        """Train on from fresh weights, and from deployed ones where that falls short.

        Args:
            number: Of the round.
            deployed: The deployed weights.
            before: How good they are on validation.
            fresh: The init weights, or what earlier rounds made of them unseen.
            unseen: The subspaces that lead there.
        """
        update = self.config.update
        if fresh is not None:
            floor = self._judge.worst if update.chain == "paper" else before
            attempt = self._try(number, fresh, floor, parent=self._init, terms=unseen)
            yield attempt
            if attempt.new is not None or update.method not in PARTIAL_METHODS:
                return
        yield self._try(number, deployed, before, parent=deployed)

    def _try(
        self,
        number: int,
        start: Weights,
        floor: float,
        *,
        parent: Weights,
        terms: tuple[Term, ...] = (),
    ) -> Attempt:
        """Train from some weights; the result counts where it is no worse than floor.

        Where the best weights equal the start or the parent, ``new`` is None: there
        is nothing to send.

        Args:
            number: Of the round.
            start: The weights.
            floor: Of the judge's metric on validation.
            parent: What devices would update from.
            terms: The subspaces that lead from there to the start.
        """
        from_init = parent is self._init
        training = self._setup.training(
            self.config,
            number,
            start,
            from_init=from_init,
            on_epoch=partial(self._report, number, itertools.count(1)),
        )
        masks = train_round(training, self.config, self._pack)
        best = training.best or start
        if training.kept:
            device = self._encode(best)
            terms = (*terms, training.kept.term(device.layout))
            device = regenerated(device, self._encode(parent), terms)
            best = self._decode(device)
        load_weights(training.model, best)
        self._setup.check_answers(training.model, best)
        # What a training found is not measured again.
        self._values.know(start, validation=training.values["start"])
        self._values.know(best, validation=training.values["best"])
        good, missed = self._judge.no_worse(training.values["best"], floor), None
        is_new = best.fingerprint not in (start.fingerprint, parent.fingerprint)
        if is_new and good:
            missed = self._missed(best)
        good = good and missed is None
        waits, origin = 0, "init" if from_init else "deployed"
        if start is not parent:
            origin = "shadow"
            masks = masks if terms else with_changes(masks, parent, best)
            waits = self._too_large(parent, best, terms) if good else 0
        return Attempt(
            values=training.values,
            steps=training.form.rounding.steps,
            ratio=training.ratio,
            start=start,
            still=training.dense.masks(),
            parent=parent,
            masks=masks,
            best=best,
            new=best if is_new and good and not waits and self._fit(terms) else None,
            missed=missed,
            waits=waits,
            epochs=[{"start": origin} | epoch for epoch in training.epochs],
            terms=terms,
        )

    def _missed(self, weights: Weights) -> float | None:
        """Return what the golden samples give where that is short of the bound."""
        metric = device_metric(self.config.data, self.config.train)
        bound = bound_of(self.config, self.run_dir)
        no_device = self.config.update.chain == "paper"
        if metric is None or bound is None or no_device:
            return None
        value = self._values.golden(weights, metric, GOLDEN_SAMPLES)
        return None if metric.reaches(value, bound) else value

    def _fit(self, terms: Sequence[Term]) -> bool:
        """Tell whether one patch may have so many subspaces; unseen rounds add some."""
        return not terms or bool(together([terms], len(self._encode(self._init))))

    def _size(self, base: Weights, target: Weights, terms: Sequence[Term]) -> int:
        """Return the size of a patch."""
        if self._pack is None:
            return 0
        return self._pack(base, target, *([terms] if terms else []))

    def _too_large(self, parent: Weights, new: Weights, terms: Sequence[Term]) -> int:
        """Return the size of a patch if it is over the budget, else 0.

        What several rounds changed unseen travels in one patch.
        """
        update = self.config.update
        if not update.budget:
            return 0
        size = self._size(parent, new, terms)
        return size if size > parse_size(update.first_budget or update.budget) else 0

    def _shadow(self, folder: Path) -> tuple[Weights | None, tuple[Term, ...]]:
        """Return the weights that a round trained unseen, and the subspaces to them."""
        shadow = read_shadow(folder)
        if shadow is None:
            return None, ()
        return self._decode(shadow), read_shadow_terms(folder, len(shadow))

    def _report(
        self,
        number: int,
        count: Iterator[int],
        metrics: Mapping[str, Any],
        record: RoundRecord | None = None,
    ) -> None:
        """Report an epoch, whose number comes from the count, or a whole round."""
        run, epochs = self.config.run, 2 * self.config.train.epochs
        epoch = min(next(count), epochs)  # a phase that is repeated shows as the last
        phase = metrics["phase"]
        self._progress(
            Progress(number, run.rounds, phase, epoch, epochs, record, metrics)
        )
