# SPDX-License-Identifier: Apache-2.0
"""Where samples come from: named data sets, image folders, your own function.

In memory, or read batch by batch where they are too large for it.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from edge_runtime.errors import MALFORMED, ConfigError, TrainingError
from edge_runtime.sizes import parse_size
from trainer.data.samples import FLOAT, DataSource, LazyInputs, Samples, generator
from trainer.data.targets import as_targets, check_length, check_targets
from trainer.recipe.factory import call_factory, own_place
from trainer.recipe.schema import DataConfig
from trainer.trees import plain

STATISTICS_SAMPLES = 2000
TOKENS = ("int32", "int64")
DIGITS_TEST = 400  # samples; scikit-learn's digits come without a test set


def load_source(config: DataConfig) -> DataSource:
    """Load a data set, downloading it first where it is one that can be.

    Raises:
        ConfigError: The image folder is not laid out as expected.
        TrainingError: The data set is neither at ``root`` nor can it be downloaded.
    """
    root = Path(config.root).expanduser()
    if config.set == "digits":
        source = _digits()
    elif config.set == "folder":
        source = _folder(root, config)
    elif config.factory:
        source = _own(config)
    else:
        source = _torchvision(config.set, root)
    if config.normalise:
        return source
    channels = len(source.mean)
    return replace(source, mean=(0.0,) * channels, std=(1.0,) * channels)


def _digits() -> DataSource:
    """Handwritten digits inside scikit-learn: 1797 images of 8x8, values 0 to 16."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    inputs = torch.from_numpy(images.astype(np.uint8)).view(-1, 1, 8, 8)
    # Neighbours in the file are of one writer: a random test set, but always the same.
    order = torch.from_numpy(generator(0, "digits").permutation(len(inputs)))
    samples = Samples(inputs, torch.from_numpy(labels).long())[order]
    names = tuple(str(digit) for digit in range(10))
    train, test = samples[DIGITS_TEST:], samples[:DIGITS_TEST]
    return DataSource(train, test, names, 1 / 16, (0.3053,), (0.3761,))


# Class in torchvision.datasets, mean and deviation of the training images (0 to 1).
_TORCHVISION = {
    "mnist": ("MNIST", (0.1307,), (0.3081,)),
    "cifar10": ("CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ("CIFAR100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def _torchvision(name: str, root: Path) -> DataSource:
    from trainer.data.vision import torchvision

    class_name, mean, std = _TORCHVISION[name]
    open_set = getattr(torchvision.datasets, class_name)
    try:
        halves = [open_set(root, train=t, download=True) for t in (True, False)]
    except (OSError, RuntimeError) as err:
        reason = str(err).partition("\n")[0].rstrip(":")  # the others are addresses
        raise TrainingError(
            f"{name} is neither in {root} nor can it be downloaded ({reason}); put it "
            "there, or say where it is with data.root"
        ) from err
    train, test = (
        Samples(_nchw(half.data), torch.as_tensor(half.targets)) for half in halves
    )
    digits = tuple(str(digit) for digit in range(10))
    classes = digits if name == "mnist" else tuple(halves[0].classes)
    return DataSource(train, test, classes, 1 / 255, mean, std)


def _nchw(images: Tensor | np.ndarray) -> Tensor:
    """Bring (N, H, W) or (N, H, W, C) to (N, C, H, W)."""
    tensor = torch.as_tensor(images)
    if tensor.dim() == 3:
        return tensor.unsqueeze(1)
    return tensor.permute(0, 3, 1, 2).contiguous()


def _folder(root: Path, config: DataConfig) -> DataSource:
    """Read train/CLASS/* and test/CLASS/* (or val/CLASS/*) as RGB."""
    from trainer.data.vision import torchvision

    tests = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not tests:
        raise ConfigError(
            f"{root} is not an image folder: expected train/CLASS/* and test/CLASS/* "
            "(or val/CLASS/*) in it; set data.root"
        )
    steps: list[Callable[[Any], Any]] = [torchvision.transforms.PILToTensor()]
    if config.size:
        transforms, size = torchvision.transforms, config.size
        steps = [transforms.Resize(size), transforms.CenterCrop(size), *steps]
    transform = torchvision.transforms.Compose(steps)
    open_folder = torchvision.datasets.ImageFolder
    folders = [open_folder(half, transform) for half in (root / "train", tests[0])]
    if folders[0].classes != folders[1].classes:
        raise ConfigError(f"{root}: train and {tests[0].name} hold different classes")
    memory = _memory(config)
    train, test = (_samples(folder, memory) for folder in folders)
    step = max(1, len(train) // STATISTICS_SAMPLES)
    mean, std = _channel_statistics(train[::step].read())
    return DataSource(train, test, tuple(folders[0].classes), 1 / 255, mean, std)


def _memory(config: DataConfig) -> int:
    return parse_size(config.memory) if config.memory else 0


def _own(config: DataConfig) -> DataSource:
    found = call_factory(config.factory)
    try:
        return as_source(found, _memory(config), config.task)
    except (*MALFORMED, RuntimeError) as err:
        if own_place(err, config.factory):
            raise  # out of a data set of yours, not about what it is
        raise ConfigError(
            f"what {config.factory} returned cannot be taken as samples ({err}); "
            "expected (train, test, class names), where train and test are pairs of "
            "tensors (inputs, labels) or map-style data sets"
        ) from err


def as_source(found: Any, memory: int, task: str = "classification") -> DataSource:
    """Turn what your own function returned into a data source.

    Args:
        found: A :class:`DataSource`; or a tuple of training samples, test samples,
            class names and, if wanted, a mapping with ``scale``, ``mean`` and ``std``.
            Samples are a pair of tensors (inputs, labels) or a map-style torch
            ``Dataset`` of (input tensor, label). Inputs of uint8 and floating-point
            types become float32; int32 and int64 without a scale stay what they are.
        memory: Bytes; a ``Dataset`` that is larger is read batch by batch.
        task: What the labels are for, as in ``[data] task``.

    Raises:
        ConfigError: It is something else.
    """
    if isinstance(found, DataSource):
        train, test = (_taken(half, task) for half in (found.train, found.test))
        _check_halves(train, test, task, found.classes)
        return replace(found, train=train, test=test)
    if not isinstance(found, tuple) or len(found) not in (3, 4):
        raise ConfigError(
            "a data function returns (train, test, class names) or a DataSource, found "
            f"{type(found).__name__}"
        )
    train, test = (_own_samples(half, memory, task) for half in found[:2])
    classes = tuple(map(str, found[2]))
    _check_halves(train, test, task, classes)
    about = found[3] if len(found) == 4 else {}
    dtype = _input_type(train.inputs, about)
    mean, std = (tuple(map(float, about.get(key, ()))) for key in ("mean", "std"))
    channels = train.inputs.shape[1] if len(train.inputs.shape) > 1 else 0
    if len(mean) != len(std) or len(mean) not in (0, 1, channels):
        raise ConfigError(
            f"mean has {len(mean)} values and std {len(std)}, expected one for each of "
            f"{channels} channels, or for all"
        )
    scale = float(about.get("scale", 1))
    return DataSource(train, test, classes, scale, mean, std, dtype)


def _check_halves(
    train: Samples, test: Samples, task: str, classes: tuple[str, ...]
) -> None:
    """Insist on targets that fit the task, and on inputs of one shape."""
    for half in (train, test):
        check_targets(half.labels, task, classes)
    if train.inputs.shape[1:] != test.inputs.shape[1:]:
        raise ConfigError(
            f"training inputs are {tuple(train.inputs.shape[1:])}, test inputs "
            f"{tuple(test.inputs.shape[1:])}"
        )


def _input_type(inputs: Tensor | LazyInputs, about: Mapping[str, Any]) -> str:
    """Return what the network takes: whole numbers that nobody scales are tokens.

    Raises:
        ConfigError: The data function asks for a type that no network here takes.
    """
    found = inputs[:1].read() if isinstance(inputs, LazyInputs) else inputs
    name = str(found.dtype).removeprefix("torch.")
    scaled = {"scale", "mean", "std"} & about.keys()
    wanted = str(about.get("dtype", name if name in TOKENS and not scaled else FLOAT))
    if wanted not in ((FLOAT,) if scaled else (FLOAT, *TOKENS)):
        raise ConfigError(
            f"dtype is {wanted!r}, expected what the network takes: {FLOAT}, or "
            f"{' or '.join(TOKENS)} without scale, mean and std"
        )
    return wanted


def _own_samples(half: Any, memory: int, task: str) -> Samples:
    if not isinstance(half, tuple | list):
        return _samples(half, memory, task)
    inputs, labels = half
    return _taken(Samples(inputs, labels), task)


def _taken(half: Samples, task: str) -> Samples:
    """Return samples with their labels as the task trains with them."""
    inputs = half.inputs
    if not isinstance(inputs, LazyInputs):
        inputs = plain(torch.as_tensor(inputs))
    labels = as_targets(half.labels, task)
    check_length(inputs.shape[0], labels)
    return replace(half, inputs=inputs, labels=labels)


def _samples(dataset: Any, memory: int, task: str = "classification") -> Samples:
    """Take a map-style dataset of (input, label) into memory, if it fits."""
    first = torch.as_tensor(dataset[0][0])
    inputs = LazyInputs(dataset, tuple(first.shape), torch.arange(len(dataset)))
    labels = None
    if task == "classification" and _gives_its_targets(dataset):
        labels = getattr(dataset, "targets", None)
    if labels is None:
        labels = default_collate([dataset[index][1] for index in range(len(dataset))])
    samples = Samples(inputs, as_targets(labels, task))
    if len(dataset) * first.numel() * first.element_size() > memory:
        return samples
    return replace(samples, inputs=samples.read())


def _gives_its_targets(dataset: Any) -> bool:
    """Whether ``targets`` are the labels that come with the samples.

    So it is of torchvision's own data sets, whose images then need not be decoded to
    know their classes; not of classes made from them, or with transforms of labels.
    """
    both = getattr(dataset, "transforms", None)
    return (
        type(dataset).__module__.startswith("torchvision.")
        and getattr(dataset, "target_transform", None) is None
        and getattr(both, "target_transform", both) is None
    )


def _channel_statistics(
    raw: Tensor,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation per channel of uint8 images (N, C, H, W) over 255."""
    sample = raw.float() / 255
    mean = sample.mean((0, 2, 3)).tolist()
    std = sample.std((0, 2, 3)).clamp_min(1 / 255).tolist()
    return tuple(round(v, 4) for v in mean), tuple(round(v, 4) for v in std)
