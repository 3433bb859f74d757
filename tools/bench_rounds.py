"""Real rounds for the benchmarks: found in run folders, or trained.

Three of the paper's settings, shortened so that a CPU trains them in minutes; what was
shortened is in ``SETTINGS`` and, in full, in each round's ``round.json``.
"""

import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.errors import RoundError
from edge_runtime.weights import FILE_NAME, read_weights
from packager.record import RECORD_NAME, Outcome, read_record
from packager.rounds import find_parent, list_rounds, list_runs, read_round

Say = Callable[[str], None]

# Of CIFAR-10: VGG on all 10,000 test images would cost more than its training.
TRAIN_IMAGES, TEST_IMAGES = 400, 100  # a class

# Run name -> recipe, sub-folder of the data, and what differs from the recipe.
_CIFAR10 = (
    "data.set=folder",
    "data.validation=1000",
    "run.rounds=2",
    "run.accuracy_floor=0.0",
)
SETTINGS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "mnist_mlp": ("mnist_mlp", "", ("run.rounds=4",)),
    # A learning rate of 0.1 diverges on this little data.
    "cifar10_resnet56": (
        "cifar100_resnet56",
        "cifar10",
        (*_CIFAR10, "train.epochs=5", "train.lr=0.02"),
    ),
    "cifar10_vgg": (
        "cifar10_vgg",
        "cifar10",
        (*_CIFAR10, "data.initial=500", "data.growth=500", "train.epochs=2"),
    ),
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
        note: How it was trained, in a few words; may be empty.
    """

    name: str
    base: Path
    target: Path
    file_size: int
    changed: int
    note: str = ""


def find_pairs(path: Path, scratch: Path) -> Iterator[Pair]:
    """Yield the rounds that a path stands for.

    Args:
        path: A round folder; a folder with ``base.safetensors`` and
            ``target.safetensors``; a run, which stands for its last update of an
            earlier round (of the init weights, if there is no other); or a folder of
            runs.
        scratch: Where parents are written to that are in no round folder.

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
            yield _round_pair(_last_update(run), scratch)


def _last_update(run: Path) -> Path:
    """Return the last round that updates an earlier one, or else the init weights."""
    rounds = {folder: read_record(folder) for folder in list_rounds(run)}
    targets = {record.target for record in rounds.values()}
    updates = [f for f, r in rounds.items() if r.outcome is Outcome.UPDATED]
    later = [folder for folder in updates if rounds[folder].parent in targets]
    if not updates:
        raise RoundError(f"{run} has no round that updates anything")
    return (later or updates)[-1]


def _round_pair(folder: Path, scratch: Path) -> Pair:
    round_ = read_round(folder)
    parent = find_parent(round_)
    name = f"{round_.path.parent.name}/{round_.name}"
    base = scratch / f"{name.replace('/', '-')}-base.safetensors"
    base.write_bytes(parent.weights.data)
    return _pair(name, base, folder / FILE_NAME, _note(folder))


def _note(folder: Path) -> str:
    """Say in a few words how a round was trained, as far as its record tells."""
    told = json.loads((folder / RECORD_NAME).read_text())
    if "config" not in told or "metrics" not in told:
        return ""  # of another trainer: the packager does not ask for these
    train, metrics = told["config"]["train"], told["metrics"]
    return (
        f"{told['method']}, k = {told['ratio']:g}, {told['samples']} samples, "
        f"{train['epochs']} + {train['epochs']} epochs with {train['optimizer']}, "
        f"test accuracy {metrics['test_accuracy']:.1%}"
    )


def _pair(name: str, base: Path, target: Path, note: str = "") -> Pair:
    old, new = read_weights(base), read_weights(target)
    changed = 0
    for tensor in old.layout.tensors:
        bits = f"<u{tensor.item_size}"
        a, b = (weights[tensor.name].reshape(-1).view(bits) for weights in (old, new))
        changed += int(np.count_nonzero(a != b))
    return Pair(name, base, target, old.layout.file_size, changed, note)


def make_rounds(data: Path, runs: Path, say: Say) -> None:
    """Train the rounds that are not there yet.

    Args:
        data: A folder with ``MNIST/raw`` as torchvision lays it out, and ``cifar10``
            (``train/CLASS/*`` and ``test/CLASS/*``) or a ``cifar10*.zip`` of it.
        runs: Folder of the runs.
        say: Shows progress.

    Raises:
        ConfigError: The data is not there or too small.
        TrainingError: The loss is not finite.
    """
    from trainer.cli import shown_progress
    from trainer.config import load_config
    from trainer.rounds import run_rounds

    recipes = Path(str(files("trainer"))) / "recipes"
    for name, (recipe, folder, changes) in SETTINGS.items():
        say(f"training {name}: {recipe} with {', '.join(changes)}")
        root = _few_images(data, runs, say) if folder else data
        changes = (f"data.root={root}", *changes)
        config = load_config(recipes / f"{recipe}.toml", changes, name=name)
        with shown_progress(config.run.rounds, quiet=False) as progress:
            run_rounds(config, runs, progress=progress)


def _few_images(data: Path, runs: Path, say: Say) -> Path:
    """Put the first images of each CIFAR-10 class into a folder of their own.

    Raises:
        RoundError: The data is not there.
    """
    few = runs / "data" / "cifar10"
    if few.is_dir():
        return few
    say(f"putting {TRAIN_IMAGES} + {TEST_IMAGES} images a class into {few}")
    part = few.with_name(few.name + ".part")
    found = [*data.glob("cifar10"), *data.glob("cifar10*.zip")]
    if not found:
        raise RoundError(f"{data} has neither cifar10/train/CLASS/* nor a cifar10*.zip")
    # Both an unpacked folder and an archive know these few operations.
    root: Any = found[0] if found[0].is_dir() else zipfile.Path(found[0])
    for half, count in (("train", TRAIN_IMAGES), ("test", TEST_IMAGES)):
        for kind in (root / half).iterdir():
            folder = part / half / kind.name
            folder.mkdir(parents=True, exist_ok=True)
            images = sorted(kind.iterdir(), key=lambda image: image.name)
            for image in images[:count]:
                (folder / image.name).write_bytes(image.read_bytes())
    part.rename(few)
    return few
