"""Real rounds to measure patches on, trained once and kept in a folder.

The paper's three networks at the paper's ratios, on less data and for fewer epochs, so
that a CPU has them in some minutes each; and two other selections on the MLP.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.command import say
from edge_runtime.errors import ConfigError
from edge_runtime.weights import Weights
from packager.rounds import find_parent, read_round

RECIPES = Path("trainer/recipes")
# Fewer samples for validation, as there are fewer for training.
_SHORT = ("data.validation=1000", "update.reinit=never", "data.augment=crop_flip")


@dataclass(frozen=True, slots=True)
class Job:
    """A training run.

    Attributes:
        name: Of the run, and what it is called in tables.
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


JOBS = (
    Job("mlp", "mnist_mlp", "mnist", "dpu", ("run.rounds=5",)),
    Job("mlp-gcpu", "mnist_mlp", "mnist", "gcpu", ("run.rounds=2",)),
    Job("mlp-rpu", "mnist_mlp", "mnist", "rpu", ("run.rounds=2",)),
    Job(
        "resnet56",
        "cifar100_resnet56",
        "cifar10",
        "dpu",
        ("run.rounds=2", "train.epochs=10", "train.lr=0.05", *_SHORT),
    ),
    Job(
        "vgg",
        "cifar10_vgg",
        "cifar10",
        "dpu",
        ("run.rounds=2", "train.epochs=5", *_SHORT),
    ),
)


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """Two weight files and where they come from.

    Attributes:
        name: Such as ``mlp/round_03``.
        method: How the weights that changed were selected.
        base: The weights that an update leads from.
        target: The weights that it leads to.
    """

    name: str
    method: str
    base: Weights
    target: Weights


def real_pairs(jobs: Sequence[Job], data: Path, cache: Path) -> Iterator[Pair]:
    """Train what is not in the cache yet, and yield every update.

    Args:
        jobs: The runs.
        data: Where MNIST lies in torchvision's layout (``MNIST/raw``), and CIFAR-10 in
            torchvision's or as images in ``cifar10/train/CLASS`` and ``cifar10/test``.
        cache: Folder of the runs.
    """
    for job in jobs:
        run = cache / job.name
        _train(job, data, cache)
        for folder in sorted(run.glob("round_*")):
            round_ = read_round(folder)
            if round_.record.outcome == "updated":
                base = find_parent(round_).weights
                name = f"{job.name}/{folder.name}"
                yield Pair(name, job.method, base, round_.weights)


def _train(job: Job, data: Path, cache: Path) -> None:
    from trainer.cli import shown_progress  # late: they bring torch
    from trainer.config import load_config
    from trainer.rounds import run_rounds

    overrides = [f"update.method={job.method}", *job.overrides]
    images = data / "cifar10"
    if job.data == "cifar10" and images.is_dir():
        overrides += ["data.set=folder", f"data.root={images}"]
    else:
        overrides += [f"data.set={job.data}", f"data.root={data}"]
    config = load_config(RECIPES / f"{job.recipe}.toml", overrides, name=job.name)
    say(f"{job.name}: {config.run.rounds} rounds in {cache}")
    with shown_progress(config.run.rounds, quiet=False) as progress:
        run_rounds(config, cache, progress=progress)


def choose(names: Sequence[str]) -> list[Job]:
    """Return the jobs of these names, or all of them.

    Raises:
        ConfigError: There is no such job.
    """
    known = {job.name: job for job in JOBS}
    if missing := [name for name in names if name not in known]:
        raise ConfigError(f"no rounds {missing[0]!r}; there are {', '.join(known)}")
    return [known[name] for name in names or known]
