# SPDX-License-Identifier: Apache-2.0
"""Real rounds for the benchmarks: found in run folders, or trained.

The paper's three networks at the paper's ratios, on less data and for fewer epochs, so
that a CPU has them in some minutes each; and two other selections on the MLP. What was
shortened is in ``JOBS`` and, in full, in each round's ``round.json``.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.errors import ConfigError, RoundError
from edge_runtime.formats.model_folder import (
    RECORD_NAME,
    WEIGHTS_NAME,
    Outcome,
    list_rounds,
)
from edge_runtime.formats.weights import Weights, read_weights
from packager.rounds.folder import find_parent, read_round
from packager.rounds.names import full_name, list_runs
from packager.rounds.record import read_record

Say = Callable[[str], None]

RECIPES = Path("trainer/recipes")
# Fewer samples for validation, as there are fewer for training.
_SHORT = (
    "run.rounds=2",
    "train.epochs=10",
    "data.validation=1000",
    "update.reinit=never",
    "data.augment=crop_flip",
)


@dataclass(frozen=True, slots=True)
class Job:
    """A training run.

    Attributes:
        name: Of the run.
        recipe: File name of a built-in recipe.
        data: ``mnist`` or ``cifar10``.
        method: How weights are selected.
        overrides: Changes of the recipe.
    """

    name: str
    recipe: str
    data: str
    method: str
    overrides: tuple[str, ...]


JOBS = {
    job.name: job
    for job in (
        Job("mlp", "mnist_mlp", "mnist", "dpu", ("run.rounds=5",)),
        Job("mlp-gcpu", "mnist_mlp", "mnist", "gcpu", ("run.rounds=2",)),
        Job("mlp-rpu", "mnist_mlp", "mnist", "rpu", ("run.rounds=2",)),
        # A learning rate of 0.1 diverges on this little data.
        Job(
            "resnet56",
            "cifar100_resnet56",
            "cifar10",
            "dpu",
            (*_SHORT, "train.lr=0.05"),
        ),
        Job("vgg", "cifar10_vgg", "cifar10", "dpu", _SHORT),
    )
}


@dataclass(frozen=True, slots=True)
class Pair:
    """Two weight files of one network, before and after a round.

    Attributes:
        name: For example ``mnist_mlp/round_03``.
        base: The weight file that the update leads from.
        target: The weight file that it leads to.
        file_size: Bytes of each.
        changed: Elements that differ, compared as bits.
        method: How the weights that changed were selected; may be empty.
        note: How it was trained, in a few words; may be empty.
    """

    name: str
    base: Path
    target: Path
    file_size: int
    changed: int
    method: str = ""
    note: str = ""

    def read(self) -> tuple[Weights, Weights]:
        """Return base and target."""
        return read_weights(self.base), read_weights(self.target)


def find_pairs(path: Path, scratch: Path, *, every: bool = False) -> Iterator[Pair]:
    """Yield the rounds that a path stands for.

    Args:
        path: A round folder; a folder with ``base.safetensors`` and
            ``target.safetensors``; a run, which stands for its last update of an
            earlier round (of the init weights, if there is no other); or a folder of
            runs.
        scratch: Where parents are written to.
        every: A run stands for all its updates instead.

    Raises:
        RoundError: There is none.
    """
    if (path / "base.safetensors").exists():
        yield _pair(path.name, path / "base.safetensors", path / "target.safetensors")
    elif (path / RECORD_NAME).exists():
        yield _round_pair(path, scratch)
    else:
        runs = [path] if list_rounds(path) else list(dict.fromkeys(
            folder.parent for folder in list_runs(path)
        ))  # fmt: skip
        if not runs:
            raise RoundError(
                f"{path} is neither a round, a run, a folder of runs, nor one with "
                "base.safetensors and target.safetensors; make rounds with --data"
            )
        for run in runs:
            for folder in _updates(run) if every else [_last_update(run)]:
                yield _round_pair(folder, scratch)


def _updates(run: Path) -> list[Path]:
    """Return the rounds that update anything.

    Raises:
        RoundError: There is none.
    """
    rounds = list_rounds(run)
    found = [f for f in rounds if read_record(f).outcome is Outcome.UPDATED]
    if not found:
        raise RoundError(f"{run} has no round that updates anything")
    return found


def _last_update(run: Path) -> Path:
    """Return the last round that updates an earlier one, or else the init weights."""
    updates = _updates(run)
    targets = {read_record(folder).target for folder in list_rounds(run)}
    later = [folder for folder in updates if read_record(folder).parent in targets]
    return (later or updates)[-1]


def _round_pair(folder: Path, scratch: Path) -> Pair:
    round_ = read_round(folder)
    parent = find_parent(round_)
    name = full_name(round_.path)
    base = scratch / f"{name.replace('/', '-')}-base.safetensors"
    base.write_bytes(parent.weights.data)
    told = json.loads((folder / RECORD_NAME).read_text())
    method = str(told.get("method", ""))
    return _pair(name, base, folder / WEIGHTS_NAME, method, _note(told))


def _note(told: dict[str, Any]) -> str:
    """Say in a few words how a round was trained, as far as its record tells."""
    if "config" not in told or "metrics" not in told:
        return ""  # of another trainer: the packager does not ask for these
    train, metrics = told["config"]["train"], told["metrics"]
    return (
        f"{told['method']}, k = {told['ratio']:g}, {told['samples']} samples, "
        f"{train['epochs']} + {train['epochs']} epochs with {train['optimizer']}, "
        f"test accuracy {metrics['test_accuracy']:.1%}"
    )


def _pair(
    name: str, base: Path, target: Path, method: str = "", note: str = ""
) -> Pair:
    old, new = read_weights(base), read_weights(target)
    changed = 0
    for tensor in old.layout.tensors:
        bits = f"<u{tensor.item_size}"
        a, b = (weights[tensor.name].reshape(-1).view(bits) for weights in (old, new))
        changed += int(np.count_nonzero(a != b))
    return Pair(name, base, target, old.layout.file_size, changed, method, note)


def make_rounds(names: Sequence[str], data: Path, runs: Path, say: Say) -> None:
    """Train the rounds that are not there yet.

    Args:
        names: Of ``JOBS``; none stands for all.
        data: Where MNIST lies in torchvision's layout (``MNIST/raw``), and CIFAR-10 in
            torchvision's or as images in ``cifar10/train/CLASS`` and ``cifar10/test``.
        runs: Folder of the runs.
        say: Shows progress.

    Raises:
        ConfigError: There is no such job, or the data is not there or too small.
        TrainingError: The loss is not finite.
    """
    from trainer.config import load_config
    from trainer.progress import shown_progress  # late: they bring torch
    from trainer.rounds.schedule import run_rounds

    if missing := [name for name in names if name not in JOBS]:
        raise ConfigError(f"no rounds {missing[0]!r}; there are {', '.join(JOBS)}")
    for job in [JOBS[name] for name in names or JOBS]:
        # The rounds are what they were before the recipes had another chain.
        pinned = ("update.chain=deployed", *job.overrides)
        overrides = [f"update.method={job.method}", *pinned]
        images = data / "cifar10"
        if job.data == "cifar10" and images.is_dir():
            overrides += ["data.set=folder", f"data.root={images}"]
        else:
            overrides += [f"data.set={job.data}", f"data.root={data}"]
        config = load_config(RECIPES / f"{job.recipe}.toml", overrides, name=job.name)
        say(f"{job.name}: {config.run.rounds} rounds in {runs}")
        with shown_progress(quiet=False) as progress:
            run_rounds(config, runs, progress=progress)
