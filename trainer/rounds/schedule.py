# SPDX-License-Identifier: Apache-2.0
"""The schedule of a run: rounds of training on growing data, one folder each.

::

    records = run_rounds(load_config("digits.toml"), "runs")

Interrupted runs continue after their last complete round; a round depends on the
recipe, its number, and the rounds before it: what they deployed, and what they
trained unseen.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from edge_runtime.errors import ConfigError
from edge_runtime.formats.model_folder import (
    MODEL_NAME,
    RECORD_NAME,
    list_rounds,
    round_name,
)
from trainer.config import as_dict, make_config
from trainer.data.samples import DataSource
from trainer.folder.once import run_lock
from trainer.folder.record import RoundRecord, read_round_record
from trainer.parallel import is_first, processes
from trainer.recipe.kinds_of_rounds import begins_anew, trains_unseen
from trainer.recipe.schema import PARTIAL_METHODS, Config
from trainer.rounds.deployment import GOLDEN_SAMPLES, check_golden, check_run_id
from trainer.rounds.loop import choose_device, cpu_settings
from trainer.rounds.round import Progress, Report, Run
from trainer.rounds.setup import Setup
from trainer.rounds.speed import computing
from trainer.rounds.training import Pack

# A finished run may be carried on for more rounds, and its data may move.
# The run's id is held against the one that its model folder has.
FREE_KEYS = {("run", "rounds"), ("run", "name"), ("run", "id"), ("data", "root")}


def run_rounds(  # noqa: PLR0913 - all but two have defaults
    config: Config,
    runs_dir: str | PathLike[str],
    *,
    progress: Report = lambda _progress: None,
    resume: bool = True,
    pack: Pack | None = None,
    source: DataSource | None = None,
    on_epoch: Report | None = None,
    on_round: Callable[[RoundRecord], None] | None = None,
) -> list[RoundRecord]:
    """Train every round of a recipe that is not there yet.

    Under ``torchrun`` all processes share the training, and the first one writes.

    Args:
        config: The recipe.
        runs_dir: Folder of the runs; this one is written to ``runs_dir/NAME``.
        progress: Called after every epoch and after every round.
        resume: Continue a run that has rounds already; otherwise refuse.
        pack: From base, target and the subspaces between them (left out where there
            are none) to the size of their patch in bytes, such as
            ``packager.size.patch_size``; needed where the recipe has a budget.
        source: The recipe's data set where it is loaded already
            (:func:`trainer.data.sources.load_source`), as several runs may share one.
        on_epoch: Called after every epoch, with its metrics; by the first process
            only, as ``on_round`` is.
        on_round: Called with the record of every round whose folder is complete.

    Returns:
        The records of all the run's rounds, those found included.

    Raises:
        ConfigError: The run folder was made with another recipe or other data, another
            process is training it, or the data set is too small for this one.
        ExportError: The network cannot be deployed weight for weight.
        TrainingError: The loss is not finite, or the data set cannot be had.
        OSError: Files cannot be read or written.
    """
    if config.update.budget and pack is None:
        raise ConfigError(
            "update.budget needs a function that packs: pass pack= to run_rounds, "
            "for example packager.size.patch_size"
        )
    if pack and config.update.budget and config.update.method == "subspace":
        _insist_on_terms(pack)
    run_dir = Path(runs_dir) / config.run.name
    device, threads = config.train.device, cpu_settings(config.train.threads)
    with ExitStack() as stack:
        if is_first():
            stack.enter_context(run_lock(run_dir))
        records = _finished(run_dir, config, resume=resume)
        if records:
            check_run_id(run_dir, config.run.id)
        if len(records) >= config.run.rounds:
            return records
        stack.enter_context(processes(choose_device(device)))
        stack.enter_context(threads)
        stack.enter_context(computing(config.train, choose_device(device)))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        report = _calling(progress, on_epoch, on_round)
        model = run_dir / MODEL_NAME if records else None
        setup = Setup(config, source, model)
        if model:
            check_golden(model, setup.split.validation[:GOLDEN_SAMPLES])
        run = Run(setup, run_dir, report, pack=pack)
        for number in range(len(records), config.run.rounds):
            samples = setup.split.size_at(number)
            reinitialise = _must_reinitialise(config, records, samples)
            records.append(run.train(number, records, reinitialise=reinitialise))
    return records


def _insist_on_terms(pack: Pack) -> None:
    """Refuse a packer that knows nothing of subspaces, before any training."""
    try:
        signature(pack).bind(None, None, ())
    except TypeError as err:
        raise ConfigError(
            "a subspace with a budget needs a function pack(base, target, terms), as "
            f"packager.size.patch_size is; this one does not take them: {err}"
        ) from err


def _calling(
    progress: Report,
    on_epoch: Report | None,
    on_round: Callable[[RoundRecord], None] | None,
) -> Report:
    """Return one function that reports to all three."""

    def report(found: Progress) -> None:
        progress(found)
        if not is_first():
            return
        if found.record is None and on_epoch:
            on_epoch(found)
        if found.record is not None and on_round:
            on_round(found.record)

    return report


def as_reported(records: Sequence[RoundRecord]) -> list[tuple[float, float]]:
    """Return validation and test accuracy a round, as the paper's code reports them.

    Its chain may go on from a worse model (``update.chain = "paper"``); the reported
    numbers never do: a round that validates worse than the one before shows that one's.
    """
    reported: list[tuple[float, float]] = []
    for record in records:
        row = record.metrics["val_accuracy"], record.metrics["test_accuracy"]
        worse = reported and row[0] < reported[-1][0]
        reported.append(reported[-1] if worse else row)
    return reported


def _finished(run_dir: Path, config: Config, *, resume: bool) -> list[RoundRecord]:
    """Return the run's complete rounds, after checking that they are this recipe's."""
    records = [read_round_record(folder) for folder in list_rounds(run_dir)]
    if not records:
        return records
    if not resume:
        raise ConfigError(
            f"{run_dir} has {len(records)} rounds already; continue it (resume), or "
            "choose another run.name (--name)"
        )
    if [record.round for record in records] != list(range(len(records))):
        numbers = [record.round for record in records]
        raise ConfigError(
            f"{run_dir} has the rounds {numbers}, without gaps they would be "
            f"0 to {len(records) - 1}; put the missing folders back"
        )
    made_with = as_dict(_made_with(run_dir, records[0]))
    problems = list(_differences(made_with, as_dict(config)))
    if problems:
        raise ConfigError(
            f"{run_dir} was made with another recipe; choose another run.name "
            "(--name), or undo these changes:",
            problems=problems,
        )
    return records


def _made_with(run_dir: Path, record: RoundRecord) -> Config:
    """Return the recipe that a run was made with."""
    if not record.config:
        raise ConfigError(
            f"{run_dir} was published by a loop of your own, which has no recipe; "
            "choose another run.name (--name)"
        )
    try:
        # A key that is newer than the run has its default there.
        return make_config(record.config)
    except ConfigError as err:
        raise ConfigError(
            f"{run_dir / round_name(record.round) / RECORD_NAME} states a recipe that "
            "this version does not take: it was written by another one, or changed; "
            "go on with that version, or choose another run.name (--name):",
            problems=err.problems,
        ) from err


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield which keys differ between two resolved recipes, free ones left out."""
    for section in sorted(was.keys() | now.keys()):
        old, new = was.get(section, {}), now.get(section, {})
        for key in sorted(old.keys() | new.keys()):
            found, wanted = old.get(key), new.get(key)
            if found != wanted and (section, key) not in FREE_KEYS:
                yield f"[{section}] {key} was {found!r}, is now {wanted!r}"


def _must_reinitialise(
    config: Config, records: list[RoundRecord], samples: int
) -> bool:
    """Tell whether the next round starts from the init weights again.

    A re-initialised model that was discarded does not count, so it stays due. Where
    rounds train on unseen it counts, even if no epoch beat the init weights.
    """
    update, rule = config.update, config.update.reinit
    if not records or not begins_anew(config):
        return False
    if rule == "auto" and update.method not in PARTIAL_METHODS:
        return True
    unseen, last = trains_unseen(update), records[0]
    for record in records[1:]:
        if record.tried_reinit if unseen else record.reinitialised:
            last = record
    if isinstance(rule, int):
        return len(records) - last.round >= rule
    return samples > update.reinit_growth * last.samples
