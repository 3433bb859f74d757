# SPDX-License-Identifier: Apache-2.0
"""The networks that recipes name.

A model is a function from the shape of one input and the number of classes to a
module; its keyword-only arguments are the options of section ``[model]``. Every other
name is looked up among torchvision's classifiers.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edge_runtime.errors import ConfigError
from edge_runtime.formats.weights import read_weights
from trainer.export.tensors import TYPES
from trainer.networks.linear import Linear
from trainer.recipe.factory import call_factory
from trainer.recipe.schema import ModelConfig

Shape = tuple[int, ...]  # of one input, such as (C, H, W)


def mlp(
    shape: Shape,
    classes: int,
    *,
    hidden: Sequence[int] = (512, 512),
    batch_norm: bool = False,
) -> nn.Module:
    """Linear and ReLU; the default is the paper's 784-512-512-10 on MNIST."""
    layers: list[nn.Module] = [nn.Flatten()]
    width = math.prod(shape)
    for size in hidden:
        layers += [Linear(width, size), *_norm(nn.BatchNorm1d, size, batch_norm)]
        width = size
    return nn.Sequential(*layers, Linear(width, classes))


def small_cnn(
    shape: Shape,
    classes: int,
    *,
    channels: Sequence[int] = (16, 32),
    hidden: int = 64,
) -> nn.Module:
    """Convolution, BatchNorm, ReLU and pooling, once for each of ``channels``."""
    layers: list[nn.Module] = []
    width, area = shape[0], shape[1:]
    for size in channels:
        layers += [*_convolution(width, size), nn.MaxPool2d(2)]
        width, area = size, tuple(side // 2 for side in area)
    head = [Linear(width * math.prod(area), hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), *head, Linear(hidden, classes))


def vgg(
    shape: Shape, classes: int, *, width: int = 128, batch_norm: bool = True
) -> nn.Module:
    """The paper's 2x128C3-MP2-2x256C3-MP2-2x512C3-MP2-2x1024FC; 14 M weights on CIFAR.

    The paper's code comes without its models; BatchNorm after every hidden layer is
    what this network has in the papers that it is taken from. ``width`` is the channels
    of the first layers, and the others are multiples of it.
    """
    layers: list[nn.Module] = []
    inputs = shape[0]
    for channels in (width, 2 * width, 4 * width):
        for _ in range(2):
            layers += _convolution(inputs, channels, batch_norm)
            inputs = channels
        layers.append(nn.MaxPool2d(2))
    layers.append(nn.Flatten())
    inputs *= math.prod(side // 8 for side in shape[1:])
    for _ in range(2):
        units = 8 * width
        layers += [Linear(inputs, units), *_norm(nn.BatchNorm1d, units, batch_norm)]
        inputs = units
    return nn.Sequential(*layers, Linear(inputs, classes))


def resnet20(shape: Shape, classes: int, *, width: int = 16) -> nn.Module:
    """The CIFAR ResNet with 3x3 blocks of 16, 32 and 64 channels (``width`` = 16)."""
    return _cifar_resnet(shape, classes, blocks=3, width=width)


def resnet56(shape: Shape, classes: int, *, width: int = 16) -> nn.Module:
    """The CIFAR ResNet with 3x9 blocks of 16, 32 and 64 channels (``width`` = 16)."""
    return _cifar_resnet(shape, classes, blocks=9, width=width)


def _cifar_resnet(shape: Shape, classes: int, *, blocks: int, width: int) -> nn.Module:
    layers: list[nn.Module] = [*_convolution(shape[0], width)]
    inputs = width
    for channels in (width, 2 * width, 4 * width):
        for _ in range(blocks):
            layers.append(_Block(inputs, channels))
            inputs = channels
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *pool, Linear(inputs, classes))


class _Block(nn.Module):
    """Two convolutions beside a shortcut without parameters (He et al., option A)."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.stride = 1 if width == size else 2
        self.added = size - width
        first = nn.Conv2d(width, size, 3, self.stride, padding=1, bias=False)
        second = nn.Conv2d(size, size, 3, padding=1, bias=False)
        self.body = nn.Sequential(
            first, nn.BatchNorm2d(size), nn.ReLU(), second, nn.BatchNorm2d(size)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (N, width, H, W) to (N, size, H / stride, W / stride)."""
        shortcut = inputs[:, :, :: self.stride, :: self.stride]
        half = self.added // 2
        shortcut = functional.pad(shortcut, (0, 0, 0, 0, half, self.added - half))
        return functional.relu(self.body(inputs) + shortcut)


def _norm(kind: Callable[[int], nn.Module], size: int, on: bool) -> list[nn.Module]:
    return [kind(size), nn.ReLU()] if on else [nn.ReLU()]


def _convolution(width: int, size: int, batch_norm: bool = True) -> list[nn.Module]:
    # BatchNorm takes the mean away again, so a bias before it would do nothing.
    layer = nn.Conv2d(width, size, 3, padding=1, bias=not batch_norm)
    return [layer, *_norm(nn.BatchNorm2d, size, batch_norm)]


MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "small_cnn": small_cnn,
    "vgg": vgg,
    "resnet20": resnet20,
    "resnet56": resnet56,
}


def build_model(config: ModelConfig, input_shape: Shape, classes: int) -> nn.Module:
    """Build the network that a recipe names, with the initialisation of its modules.

    Args:
        config: Name and options.
        input_shape: Shape of one input, such as (C, H, W).
        classes: Number of classes.

    Raises:
        ConfigError: The network does not take such inputs or options, or its file with
            pretrained weights does not fit it.
    """
    model = _build(config, input_shape, classes)
    if config.weights:
        load_pretrained(model, config.weights)
    return model


def _build(config: ModelConfig, input_shape: Shape, classes: int) -> nn.Module:
    if config.factory:
        own = call_factory(config.factory, input_shape, classes, **config.options)
        if not isinstance(own, nn.Module):
            raise ConfigError(
                f"{config.factory} returned {type(own).__name__}, expected a module"
            )
        return own
    try:
        if config.name in MODELS:
            return MODELS[config.name](input_shape, classes, **config.options)
        from trainer.data.vision import torchvision

        model: nn.Module = torchvision.models.get_model(
            config.name, weights=None, num_classes=classes, **config.options
        )
    except (TypeError, ValueError, RuntimeError) as err:
        raise ConfigError(
            f"cannot build {config.name} with {dict(config.options)} for inputs of "
            f"shape {input_shape}: {err}"
        ) from err
    return model


def load_pretrained(model: nn.Module, path: str) -> None:
    """Load a file of weights into a network: safetensors, or a torch state dict.

    The layer that gives the classes may have another shape there (pretrained for other
    classes): one module's tensors of another shape keep their own initialisation.

    Raises:
        ConfigError: The file is of another network.
        OSError: It cannot be read.
    """
    found = _read_tensors(path)
    wanted = model.state_dict()
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}
    odd = sorted((found.keys() ^ wanted.keys()) - counters)
    reshaped = [n for n in wanted.keys() & found if wanted[n].shape != found[n].shape]
    if odd or len({name.rpartition(".")[0] for name in reshaped}) > 1:
        raise ConfigError(
            f"{path} is of another network; tensors that differ: "
            f"{_listed(sorted([*odd, *reshaped])[:8])}"
        )
    kept = {name: tensor for name, tensor in found.items() if name not in reshaped}
    model.load_state_dict(kept, strict=False)


def _read_tensors(path: str) -> dict[str, Tensor]:
    file = Path(path).expanduser()
    if file.suffix == ".safetensors":
        weights = read_weights(file)
        types = {code: dtype for dtype, (code, _) in TYPES.items()}
        return {
            tensor.name: torch.from_numpy(np.array(weights[tensor.name]).reshape(-1))
            .view(types[tensor.dtype])
            .view(tensor.shape)
            for tensor in weights.layout.tensors
        }
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError) as err:
        raise ConfigError(
            f"{path} is no state dict of tensors; save one with "
            "torch.save(model.state_dict(), file), or as .safetensors"
        ) from err
    return dict(state.get("state_dict", state))


def option_problems(name: str, options: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the keys of section ``[model]``."""
    if name not in MODELS:
        yield from _torchvision_problems(name)
        return
    parameters = inspect.signature(MODELS[name]).parameters.values()
    known = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
    for key, value in options.items():
        if key not in known:
            yield f"[model] {key} is unknown; {name} has {_listed(known)}"
            continue
        expected, holds = _OPTION_RULES[known[key]]
        if not holds(value):
            yield f"[model] {key} should be {expected}, found {value!r}"


def _torchvision_problems(name: str) -> Iterator[str]:
    from trainer.data.vision import torchvision

    known = [*MODELS, *torchvision.models.list_models(module=torchvision.models)]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known: {_listed(known)}"
        yield f"[model] name {name!r} is unknown; {hint}"


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


_OPTION_RULES: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("true or false", lambda value: type(value) is bool),
    int: ("an integer above 0", _is_size),
    Sequence[int]: (
        "a list of integers above 0",
        lambda value: isinstance(value, list) and all(map(_is_size, value)),
    ),
}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "no options"
