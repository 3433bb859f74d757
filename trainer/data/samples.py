# SPDX-License-Identifier: Apache-2.0
"""Samples as tensors in memory, and the fixed split that a run trains on.

A loop over tensors is several times faster than one that decodes and normalises image
after image. Every random choice has its own generator, keyed by the run's seed and its
purpose, so that two methods with one seed see the same samples in the same order in
every round, however many epochs either of them trains.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edge_runtime.errors import ConfigError
from edge_runtime.formats.init_weights import philox
from trainer.recipe.schema import DataConfig
from trainer.trees import each, plain

MAX_NORMALISED_BYTES = 1 << 30  # larger data sets are normalised batch by batch
DOUBLES_AT_ONCE = 1 << 22  # values that are in memory as float64, where they must be
CROP_PADDING = 4  # pixels
SHIFT_SIDE = 14  # an image is shifted by up to this fraction of its side

CPU = torch.device("cpu")
FLOAT = "float32"
READERS = 8  # threads; decoding an image lets others run

Augment = Callable[[Tensor], Tensor]


class LazyInputs:
    """Inputs of a dataset, read batch by batch.

    Indexing gives another selection and reads nothing; :meth:`read` reads.
    """

    def __init__(self, dataset: Any, shape: tuple[int, ...], which: Tensor) -> None:
        """Select samples of a map-style dataset of (input, label).

        Args:
            dataset: ``dataset[i][0]`` is one input, a tensor; called from threads.
            shape: Of one input.
            which: Indices, (N,) int64.
        """
        self._dataset, self._one, self._which = dataset, shape, which

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of all inputs together, (N, ...)."""
        return (len(self._which), *self._one)

    def __getitem__(self, which: slice | Tensor) -> "LazyInputs":
        if isinstance(which, Tensor):
            which = which.cpu()  # what reads them is
        return LazyInputs(self._dataset, self._one, self._which[which])

    def read(self) -> Tensor:
        """Return the inputs, (N, ...).

        Raises:
            ConfigError: An input has another shape than the first one.
        """
        with ThreadPoolExecutor(READERS) as pool:
            inputs = list(pool.map(self._read_one, self._which.tolist()))
        return torch.stack(inputs)

    def _read_one(self, index: int) -> Tensor:
        found = self._dataset[index][0]
        if tuple(found.shape) != self._one:
            raise ConfigError(
                f"sample {index} has shape {tuple(found.shape)}, the first one has "
                f"{self._one}; set data.size to bring images to one"
            )
        return plain(torch.as_tensor(found))


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Labelled inputs.

    Attributes:
        inputs: (N, ...), such as (N, C, H, W): raw, or as the network takes them; or
            what reads them.
        labels: (N, ...): classes are int64, values float32. For a loss of your own also
            several such tensors, in dicts and tuples.
        prepare: What a batch of ``inputs`` still has to go through before the network.
    """

    inputs: Tensor | LazyInputs
    labels: Any
    prepare: Callable[[Any], Tensor] = lambda inputs: inputs

    def __len__(self) -> int:
        return self.inputs.shape[0]

    def __getitem__(self, which: slice | Tensor) -> "Samples":
        labels = each(partial(_rows, which=which), self.labels)
        inputs = self.inputs
        chosen = (
            inputs[which] if isinstance(inputs, LazyInputs) else _rows(inputs, which)
        )
        return replace(self, inputs=chosen, labels=labels)

    def read(self) -> Tensor:
        """Return the inputs as they are stored, as a tensor."""
        inputs = self.inputs
        return inputs.read() if isinstance(inputs, LazyInputs) else inputs


@dataclass(frozen=True, slots=True, eq=False)
class DataSource:
    """One data set: raw samples, and how they become the network's input.

    The network sees ``(raw * scale - mean) / std``, of the bits that devices compute
    (:meth:`edge_runtime.formats.contract.InputSpec.prepare`), or whole numbers (the
    tokens of a text) as they are.

    Attributes:
        train: Raw training samples: uint8, floats, or int32 and int64 (tokens).
        test: Raw test samples, likewise.
        classes: Names of the network's outputs: of the classes, by label, or of values.
        scale: Factor of a raw value.
        mean: Per channel, of scaled values; empty for none.
        std: Likewise.
        dtype: What the network takes: float32, int64 or int32.
    """

    train: Samples
    test: Samples
    classes: tuple[str, ...]
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: str = FLOAT

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, such as (C, H, W)."""
        return tuple(self.train.inputs.shape[1:])

    def normalise(self, raw: Tensor) -> Tensor:
        """Turn raw inputs (N, ...) into network inputs, of :attr:`dtype`."""
        if self.dtype != FLOAT:
            return raw.to(getattr(torch, self.dtype))
        is_exact = raw.dtype.itemsize <= 2 or raw.dtype == torch.float32
        if is_exact or (self.scale == 1 and not self.mean):
            return self._scaled(raw.float())
        found = torch.empty(raw.shape, device=raw.device, dtype=torch.float32)
        rows = max(1, DOUBLES_AT_ONCE // max(1, math.prod(raw.shape[1:])))
        parts = (torch.split(tensor, rows) for tensor in (raw, found))
        for part, out in zip(*parts, strict=True):
            out.copy_(self._scaled(part.double()))
        return found

    def _scaled(self, values: Tensor) -> Tensor:
        scaled = values.mul(self.scale)
        if not self.mean:
            return scaled
        shape = (-1, *[1] * (values.dim() - 2))
        mean, std = (values.new_tensor(v).view(shape) for v in (self.mean, self.std))
        return scaled.sub_(mean).div_(std)

    def prepared(self, samples: Samples, device: torch.device = CPU) -> Samples:
        """Normalise samples: now where the result fits into memory, else in batches.

        Batches come to be on the device; so do all samples, where they are in memory.
        """
        labels = each(lambda part: part.to(device), samples.labels)
        if isinstance(samples.inputs, LazyInputs):
            return Samples(
                samples.inputs, labels, lambda s: self.normalise(s.read().to(device))
            )
        inputs = samples.inputs.to(device)
        if inputs.numel() * 4 > MAX_NORMALISED_BYTES:
            return Samples(inputs, labels, self.normalise)
        return Samples(self.normalise(inputs), labels)

    def augmentation(
        self,
        kind: str,
        random: np.random.Generator,
        sizes: Sequence[int],
        device: torch.device = CPU,
    ) -> Augment:
        """Return an augmentation of the prepared batches of images of one epoch.

        Images are padded by raw zeros on each side, and cropped at random.

        Args:
            kind: ``crop`` pads by 4 pixels, ``crop_flip`` also turns every second image
                left to right (the CIFAR recipes); ``shift`` pads by a fourteenth of the
                longer side, as digits must not be turned, and hardly be cut.
            random: Where images move to.
            sizes: Of the batches, in their order.
            device: Where they are.
        """
        zeros = torch.zeros(1, self.input_shape[0], 1, 1, dtype=torch.uint8)
        border, pad = self.normalise(zeros).to(device), CROP_PADDING
        height, width = self.input_shape[1:]
        if kind == "shift":
            pad = max(1, round(max(height, width) / SHIFT_SIDE))
        corners, flips = [], []
        for n in sizes:
            corners.append(random.integers(0, 2 * pad + 1, (2, n, 1)))
            if kind == "crop_flip":
                flips.append(random.random((n, 1)) < 0.5)
        # Drawn on the CPU, so that every device sees the same; sent once an epoch.
        corner = torch.from_numpy(np.concatenate(corners, 1))
        across = torch.arange(width)
        if flips:
            flip = torch.from_numpy(np.concatenate(flips))
            across = torch.where(flip, across.flip(0), across)
        places = corner[0] + torch.arange(height), corner[1] + across
        parts = (torch.split(place.to(device), list(sizes)) for place in places)
        batch = iter(zip(*parts, strict=True))  # (N, H) and (N, W)

        def augment(inputs: Tensor) -> Tensor:
            n, channels = inputs.shape[:2]
            shape = (n, channels, height + 2 * pad, width + 2 * pad)
            canvas = border.expand(shape).clone()
            canvas[:, :, pad:-pad, pad:-pad] = inputs
            rows, columns = next(batch)
            sample = torch.arange(n, device=device).view(n, 1, 1)
            # Indices around a slice bring their axes to the front: (N, H, W, C).
            picked = canvas[sample, :, rows[:, :, None], columns[:, None, :]]
            return picked.permute(0, 3, 1, 2).contiguous()

        return augment


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Which samples train, choose the epoch, and test; fixed for a whole run.

    Attributes:
        pool: Raw training samples in the order in which they arrive.
        validation: Raw samples that choose the epoch.
        test: Raw samples that nothing depends on.
        initial: Samples that round_00 trains on.
        growth: Samples that each later round adds.
    """

    pool: Samples
    validation: Samples
    test: Samples
    initial: int
    growth: int

    def size_at(self, round_number: int) -> int:
        """Return how many samples of the pool a round trains on."""
        return self.initial + round_number * self.growth


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return the random stream of one purpose, for example ``(seed, "order", 3)``."""
    name = "/".join(["stream", *map(str, purpose)])
    return np.random.Generator(philox(seed, name))


def split_source(
    source: DataSource, config: DataConfig, *, seed: int, rounds: int
) -> Split:
    """Split a data set for a run.

    Raises:
        ConfigError: The data set is too small for the recipe.
    """
    if problems := [*_missing(source, config, rounds), *_untested(source, config)]:
        raise ConfigError("the data set is too small:", problems=problems)
    from_test = config.validation_from == "test"
    held = source.test if from_test else source.train
    order = torch.from_numpy(generator(seed, "split").permutation(len(held)))
    chosen, left = order[: config.validation], order[config.validation :]
    validation, rest = held[chosen], held[left]
    if from_test:
        arrival = generator(seed, "arrival").permutation(len(source.train))
        pool, test = source.train[torch.from_numpy(arrival)], rest
    else:
        pool, test = rest, source.test
    return Split(pool, validation, test, config.initial, config.growth)


def _missing(source: DataSource, config: DataConfig, rounds: int) -> Iterator[str]:
    """Yield how many training samples are missing, and what to set to need no more."""
    found, growth = len(source.train), config.growth
    keys = {"initial": (config.initial, 2), "growth": (growth, 0)}  # and the least
    if config.validation_from == "train":
        keys["validation"] = (config.validation, 1)
    needed = sum(size for size, _ in keys.values()) + (rounds - 2) * growth
    least = sum(smallest for _, smallest in keys.values())
    if found >= needed:
        return
    ways = []
    if growth and (fewer := rounds - math.ceil((needed - found) / growth)) > 0:
        ways.append(f"run.rounds = {fewer}")
    if found >= least:
        fitting = {
            key: low + (size - low) * (found - least) // (needed - least)
            for key, (size, low) in keys.items()
        }
        ways.append(", ".join(f"data.{key} = {size}" for key, size in fitting.items()))
    yield (
        f"{rounds} rounds need {needed} training samples, "
        + ("those for validation included, " if "validation" in keys else "")
        + f"{config.set or config.factory} has {found}; "
        + ("set " + ", or ".join(ways) if ways else "bring more")
    )


def _untested(source: DataSource, config: DataConfig) -> Iterator[str]:
    """Yield how many test samples are missing."""
    name, found = config.set or config.factory, len(source.test)
    if config.validation_from == "train" and not found:
        yield f"expected at least one test sample, {name} has none"
    elif config.validation_from == "test" and found <= config.validation:
        yield (
            f"expected more than {config.validation} test samples, as many as "
            f"data.validation takes of them, {name} has {found}; "
            + (f"set data.validation = {found // 2}" if found > 1 else "bring more")
        )


def batches(
    samples: Samples,
    size: int,
    order: Tensor | None = None,
    augment: Augment | None = None,
) -> Iterator[tuple[Tensor, Any]]:
    """Yield batches of network inputs (B, ...) and labels (B, ...).

    Args:
        samples: Prepared samples.
        size: Samples of one batch; the last one may be smaller.
        order: A permutation of the samples (int64); default: as they lie. A last batch
            of one sample is then left out, because BatchNorm cannot train on it.
        augment: Applied to the inputs of each batch.
    """
    stop = 0
    for count in batch_sizes(len(samples), size, ordered=order is not None):
        start, stop = stop, stop + count
        which = slice(start, stop) if order is None else order[start:stop]
        chosen = samples[which]
        inputs = samples.prepare(chosen.inputs)
        yield augment(inputs) if augment else inputs, chosen.labels


def batch_sizes(count: int, size: int, *, ordered: bool = True) -> list[int]:
    """Return the sizes of the batches that :func:`batches` yields.

    Args:
        count: Of the samples.
        size: Of one batch.
        ordered: Whether they come in an order of their own.
    """
    rest = count % size
    last = [rest] if rest > 1 or (rest and not ordered) else []
    return [size] * (count // size) + last


def _rows(tensor: Tensor, which: slice | Tensor) -> Tensor:
    if isinstance(which, slice):
        return tensor[which]
    # In a third of the time of tensor[which].
    return tensor.index_select(0, which.to(tensor.device))
