# SPDX-License-Identifier: Apache-2.0
"""BatchNorm in two values a channel instead of four: what inference needs.

A trained BatchNorm sends scale, shift and two statistics in every round, although
inference only sees ``y = a * x + b``. Folded, the statistics stay as the device has
them and scale and shift are expressed beside them: the same function, the same graph,
half of the values, and as these are near 1 and 0, few bits are enough.

::

    norms = FoldedBatchNorm(model)  # at the deployed weights
    norms.unfold(batches)           # not where these are the init weights
    train(model, optimizer)         # as ever
    norms.fold()                    # then publish

Of several processes all call both; the first one's samples and statistics count.

The price: deployed statistics mean nothing by themselves. Training on from them as they
are would normalise by wrong values, so a folded model refuses to train until it is
unfolded. A model that is loaded from a file cannot know it: unfold it as well.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edge_runtime.errors import TrainingError
from trainer.parallel import is_alone, of_first

Values = NDArray[np.float64]  # one for each channel

MAX_SAMPLES = 2000  # of training samples that statistics are measured on
_FOLDABLE = (torch.float32, torch.float64)


class FoldedBatchNorm:
    """The BatchNorm modules of a model, and their statistics as they are deployed.

    Modules without statistics, or without scale and shift, or that share one of these
    with another module, are left alone.

    Attributes:
        modules: The modules that are folded, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        """Remember the statistics; the model holds what devices have."""
        self._model = model
        users = Counter(
            id(tensor)
            for module in model.modules()
            for tensor in {*module._parameters.values(), *module._buffers.values()}
        )
        self.modules = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm)
            and module.track_running_stats
            and module.affine
            and module.weight.dtype in _FOLDABLE
            and all(users[id(tensor)] == 1 for tensor in _tensors(module))
        }
        self._deployed = {
            name: tuple(map(_wide, _tensors(module)[2:]))
            for name, module in self.modules.items()
        }
        self._unfolded: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    @torch.no_grad()
    def unfold(self, batches: Iterable[tuple[Tensor, Any]]) -> None:
        """Give every module the statistics of its inputs, and the same function.

        Args:
            batches: Training samples without augmentation, and whatever comes with
                them; the first 2000 are used.

        Raises:
            TrainingError: There are none.
        """
        moments = {name: _Moments() for name in self.modules}
        hooks = [
            module.register_forward_pre_hook(moments[name].see)
            for name, module in self.modules.items()
        ]
        mode, seen = self._model.training, 0
        self._model.eval()
        try:
            for inputs, _ in batches:
                self._model(inputs)
                seen += len(inputs)
                if seen >= MAX_SAMPLES:
                    break
        finally:
            for hook in hooks:
                hook.remove()
            self._model.train(mode)
        seen = self._of_first(seen, moments)
        if self.modules and not seen:
            raise TrainingError(
                "expected batches of training samples to unfold with, found none: give "
                "a DataLoader, or a list, that nothing has used up before"
            )
        for name, module in self.modules.items():
            if moments[name].count:  # else this part of the network is never used
                before = _copies(module)
                _express(module, moments[name].statistics())
                self._unfolded[name] = before, _copies(module)
            for key in _guards(module):
                del module._forward_pre_hooks[key]

    @torch.no_grad()
    def fold(self) -> None:
        """Put the statistics back as deployed, with scale and shift to fit them."""
        for name, module in self.modules.items():
            for statistic in _tensors(module)[2:]:
                statistic.copy_(of_first(statistic))
            now = _copies(module)
            _express(module, self._deployed[name])
            deployed = _copies(module)[2:]
            # A channel that did not move keeps its bits: rounding must not send it.
            _put(module, now, where=_same(now[2:], deployed))
            if name in self._unfolded:
                before, after = self._unfolded[name]
                still = _same(now, after) & _same(before[2:], deployed)
                _put(module, before, where=still)
            if not _guards(module):
                module.register_forward_pre_hook(_refuse_to_train)

    def _of_first(self, seen: int, moments: Mapping[str, "_Moments"]) -> int:
        """Take what the first process saw, so that all train on one network.

        Each may have samples of its own.
        """
        if is_alone() or not self.modules:
            return seen
        likes = {name: _tensors(module)[2] for name, module in self.modules.items()}
        for name, like in likes.items():
            moments[name].take_first(like)
        return int(of_first(next(iter(likes.values())).new_tensor(seen)))

    def folded(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return a weight file's arrays with every module folded.

        Args:
            arrays: By state-dict name; all of the model's.
        """
        found = dict(arrays)
        for prefix, module in self.modules.items():
            part = f"{prefix}." if prefix else ""
            names = [
                part + n for n in ("weight", "bias", "running_mean", "running_var")
            ]
            values = [arrays[name].astype(np.float64) for name in names]
            new = _expressed(values, self._deployed[prefix], module.eps)
            for name, value in zip(names, new, strict=True):
                found[name] = value.astype(arrays[name].dtype)
        return found

    @torch.no_grad()
    def idle_biases(self, inputs: Tensor) -> list[Tensor]:
        """Return the biases right in front of a folded module, which takes them away.

        They need not train, and then need not be sent.

        Args:
            inputs: A batch, to see what follows what.
        """
        made: dict[int, tuple[Tensor, Tensor]] = {}  # output, bias
        found: dict[int, Tensor] = {}

        def after(module: nn.Module, _inputs: Any, output: Any) -> None:
            bias = getattr(module, "bias", None)
            if (
                isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
                and bias is not None
            ):
                made[id(output)] = output, bias  # kept: ids of the living are unique

        def before(_module: nn.Module, given: Any) -> None:
            if id(given[0]) in made:
                bias = made[id(given[0])][1]
                found[id(bias)] = bias

        hooks = [m.register_forward_hook(after) for m in self._model.modules()]
        hooks += [m.register_forward_pre_hook(before) for m in self.modules.values()]
        mode = self._model.training
        try:
            self._model.eval()(inputs)
        finally:
            self._model.train(mode)
            for hook in hooks:
                hook.remove()
        return list(found.values())


class _Moments:
    """Mean and variance, a channel, of all that a module was given."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0

    def see(self, _module: nn.Module, inputs: Any) -> None:
        x = inputs[0].transpose(0, 1).flatten(1).double()
        self.count += x.shape[1]
        self._sum = self._sum + x.sum(1)
        self._squares = self._squares + x.square().sum(1)

    def take_first(self, like: Tensor) -> None:
        """Take what the first process saw of a module with such statistics."""
        zeros = torch.zeros_like(like, dtype=torch.float64)
        values = (self.count, self._sum, self._squares)
        found = of_first(torch.stack([zeros + value for value in values]))
        self.count, self._sum, self._squares = int(found[0, 0]), found[1], found[2]

    def statistics(self) -> tuple[Values, ...]:
        mean = torch.as_tensor(self._sum) / self.count
        var = torch.as_tensor(self._squares) / self.count - mean**2
        return _wide(mean), _wide(var.clamp_min(0))


def _tensors(module: _BatchNorm) -> list[Tensor]:
    """Return scale, shift, mean and variance of a module that has them all."""
    found = (module.weight, module.bias, module.running_mean, module.running_var)
    return [tensor for tensor in found if tensor is not None]


def _copies(module: _BatchNorm) -> list[Tensor]:
    return [tensor.clone() for tensor in _tensors(module)]


def _same(values: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Tell of each channel whether all of its values are the same."""
    pairs = zip(values, others, strict=True)
    return torch.stack([value == other for value, other in pairs]).all(0)


def _put(module: _BatchNorm, values: Sequence[Tensor], *, where: Tensor) -> None:
    """Give some channels of a module other values."""
    for tensor, value in zip(_tensors(module), values, strict=True):
        torch.where(where, value, tensor, out=tensor)


def _express(module: _BatchNorm, statistics: Sequence[Values]) -> None:
    """Give a module other statistics, with scale and shift for the same function."""
    tensors = _tensors(module)
    new = _expressed([*map(_wide, tensors)], statistics, module.eps)
    for tensor, value in zip(tensors, new, strict=True):
        tensor.copy_(torch.from_numpy(value))


def _expressed(
    values: Sequence[Values], statistics: Sequence[Values], eps: float
) -> tuple[Values, ...]:
    """Return scale, shift and statistics of the same function with other statistics.

    Args:
        values: Scale, shift, mean and variance.
        statistics: The other mean and variance.
        eps: What the module adds to a variance.
    """
    (scale, shift, mean, var), (new_mean, new_var) = values, statistics
    slope = scale / np.sqrt(var + eps)
    offset = shift - mean * slope
    return slope * np.sqrt(new_var + eps), offset + new_mean * slope, *statistics


def _wide(tensor: Tensor) -> Values:
    return tensor.detach().cpu().double().numpy().copy()


def _guards(module: nn.Module) -> list[int]:
    """Return where a module keeps its guards, as copies and pickles of it do too."""
    hooks = module._forward_pre_hooks
    return [key for key, hook in hooks.items() if hook is _refuse_to_train]


def _refuse_to_train(module: nn.Module, _inputs: Any) -> None:
    if module.training:
        raise TrainingError(
            "this model's BatchNorm is folded for deployment, and its statistics are "
            "not those of its inputs; call FoldedBatchNorm(model).unfold(batches) "
            "before training it on"
        )
