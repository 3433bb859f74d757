# SPDX-License-Identifier: Apache-2.0
"""The dense part: what is not selected weight by weight, and what to do with it.

Biases, normalisation and its statistics are few, but where they train they travel
whole in every patch. ``update.dense`` decides.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edge_runtime.errors import FrozenWeightChangedError
from edge_runtime.formats.weights import Weights
from trainer.export.tensors import deployed_tensors
from trainer.method.selectable import is_weight


class DensePart:
    """The dense part of one network in one round.

    Attributes:
        frozen: The tensors that must not change in this round, by name.
    """

    def __init__(self, model: nn.Module, policy: str, *, from_init: bool) -> None:
        """Freeze what the policy says, in the model.

        A round that starts from the init weights has to train all of it: statistics
        and biases of an untrained network are of no use to a trained one.

        Args:
            model: With the start weights; changed in place.
            policy: ``train``, ``freeze`` or ``budget``, as ``update.dense``.
            from_init: Whether the round starts from the init weights.
        """
        self._all = policy == "budget"
        tensors = {} if policy == "train" or from_init else deployed_tensors(model)
        self.frozen = {n: t for n, t in tensors.items() if not self.is_selectable(n, t)}
        for tensor in self.frozen.values():
            tensor.requires_grad_(False)
        if self.frozen:
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.register_forward_pre_hook(_as_on_the_device)

    def is_selectable(self, name: str, parameter: Tensor) -> bool:
        """Tell whether weights of this tensor are selected one by one."""
        if self._all:
            return parameter.requires_grad
        return is_weight(name, parameter)

    def masks(self) -> dict[str, Tensor]:
        """Return masks that say of every frozen tensor that nothing may change."""
        return {
            n: torch.zeros_like(t, dtype=torch.bool) for n, t in self.frozen.items()
        }

    def verify(self, weights: Weights, start: Weights) -> None:
        """Raise if a frozen tensor differs from the start, as bits.

        Raises:
            FrozenWeightChangedError: A module changes a buffer of its own in training.
        """
        for name in self.frozen:
            if weights[name].tobytes() != start[name].tobytes():
                count = int((weights[name] != start[name]).sum())
                raise FrozenWeightChangedError(
                    f"{name!r} changed in training although update.dense froze it: its "
                    'module writes to it; choose update.dense = "train"',
                    tensor=name,
                    count=count,
                )


def _as_on_the_device(module: nn.Module, _inputs: Any) -> None:
    # model.train() has this module use the statistics of a batch; devices use the
    # frozen ones, and the network must train with what it gets there.
    module.training = False
