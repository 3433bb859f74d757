# SPDX-License-Identifier: Apache-2.0
"""The init recipe of a network, from the network's own initialisation.

A device regenerates from a seed what is random by rule; the rest it must be given.
Which is which is found by building the network several times under different torch
seeds and looking at what changes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edge_runtime.errors import TrainingError
from edge_runtime.formats.init_weights import InitSpec, TensorInit
from edge_runtime.formats.layout import DTYPES, Tensor
from edge_runtime.formats.weights import Weights
from trainer.export.tensors import weights_of

BUILDS = 4
# Smaller random tensors are stored: their 256 bytes are not worth a wrong scale. From
# 4 * 64 values on, the scale's standard error is 4.4 % (normal init) or less.
MIN_ELEMENTS = 64


def make_init_spec(
    build: Callable[[], nn.Module], seed: int, *, keep: bool = False
) -> InitSpec:
    """Return the init recipe of a network; the same for the same build and seed.

    The network is built four times, under torch seeds that follow from ``seed``;
    torch's global random state is left as it was. Each tensor becomes

    - ``constant`` if all its elements are equal, in every build;
    - ``uniform`` if it is float32, no element is the same in every build, and the
      elements have mean zero. The scale is sqrt(3) times the standard deviation over
      all elements of all builds, so that the network starts with the variance that
      its own initialisation gives;
    - ``file`` otherwise, with the values of the first build: loaded or computed
      tensors, other types, partly fixed ones (an embedding's padding row), random
      ones around fixed values, random ones of fewer than 64 elements.

    Random elements that depend on each other (orthogonal or repeated rows) keep their
    variance only; use ``keep`` where that matters.

    Args:
        build: Builds the network, always with the same tensors.
        seed: Any integer; the run's seed.
        keep: Store the first build whole, for pretrained networks.

    Raises:
        TrainingError: Two builds have different tensors.
        ExportError: A tensor cannot be deployed.
    """
    builds = [_build(build, seed + index) for index in range(1 if keep else BUILDS)]
    first = builds[0]
    if any(weights.layout != first.layout for weights in builds):
        raise TrainingError(
            "two builds of the network have different tensors; build must make the "
            "same architecture every time"
        )
    tensors = {
        tensor.name: TensorInit(tensor.dtype, tensor.shape, "file")
        if keep
        else _classify(tensor, [weights[tensor.name] for weights in builds])
        for tensor in first.layout.tensors
    }
    stored = {
        name: first[name] for name, init in tensors.items() if init.kind == "file"
    }
    return InitSpec(seed, tensors, stored)


def _build(build: Callable[[], nn.Module], seed: int) -> Weights:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed % 2**63)
        return weights_of(build_network(build))


def build_network(build: Callable[[], nn.Module]) -> nn.Module:
    """Return what a function builds.

    Raises:
        TrainingError: It is a network itself, or gives none.
    """
    found = build if isinstance(build, nn.Module) else build()
    if found is build or not isinstance(found, nn.Module):
        raise TrainingError(
            f"expected a function that builds the network, as it is called several "
            f"times, found {type(build).__name__} that gives {type(found).__name__}: "
            "give the network's class, or lambda: Net(...); what it was trained to is "
            "kept with pretrained=True where the function loads it"
        )
    return found


def _classify(tensor: Tensor, builds: Sequence[NDArray[Any]]) -> TensorInit:
    """Choose a tensor's kind from its values in every build."""
    bits = np.stack([x.reshape(-1).view(f"u{tensor.item_size}") for x in builds])
    same = (bits == bits[0]).all(axis=0)
    if tensor.size and same.all():
        value = float(builds[0].flat[0])
        again = np.full(tensor.size, value, DTYPES[tensor.dtype])
        # As bits: -0.0 and large integers survive the recipe, or are stored.
        if math.isfinite(value) and again.tobytes() == builds[0].tobytes():
            return TensorInit(tensor.dtype, tensor.shape, "constant", value)
    elif tensor.dtype == "F32" and tensor.size >= MIN_ELEMENTS and not same.any():
        scale = _uniform_scale(bits.view("<f4"))
        if scale is not None:
            return TensorInit(tensor.dtype, tensor.shape, "uniform", scale)
    return TensorInit(tensor.dtype, tensor.shape, "file")


def _uniform_scale(values: NDArray[np.float32]) -> float | None:
    """Return the half width of a uniform distribution with the values' variance.

    Args:
        values: Shape (builds, elements).

    Returns:
        None if the elements do not have mean zero. The mean of one element over the
        builds has 1 / builds of the elements' mean square if all is independent with
        mean zero, and more otherwise. The allowance is six standard deviations of
        that ratio: one false alarm in a million tensors, which only costs storage.
    """
    count, size = values.shape
    square = float(np.square(values, dtype=np.float64).mean())
    of_means = float(np.square(values.mean(axis=0, dtype=np.float64)).mean())
    if not math.isfinite(square) or count * of_means > square * (
        1 + 6 * math.sqrt(2 / size)
    ):
        return None
    return float(np.float32(math.sqrt(3 * square)))
