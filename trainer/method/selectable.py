# SPDX-License-Identifier: Apache-2.0
"""Which parameters are selected from; that those nobody may change stay the same."""

import hashlib
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from edge_runtime.errors import FrozenWeightChangedError, TrainingError

# What FSDP2 (DTensor), FSDP and ZeRO-3 leave on the parameters that they part.
_SHARDED = ("placements", "_fsdp_flattened", "ds_id")


def is_weight(name: str, parameter: Tensor) -> bool:  # noqa: ARG001 - see `selectable`
    """Tell whether a parameter is selectable: trainable, with more than one axis.

    As in the paper: the weights of linear and convolutional layers. Biases and
    normalisation have one axis and belong to the dense part.
    """
    return parameter.requires_grad and parameter.dim() > 1


def by_name(named_parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return parameters by name, each of them fit to be selected from, and there once.

    Raises:
        TrainingError: One is not; it is named. Or they have no names.
    """
    try:
        named = dict(named_parameters)
        "".join(named)  # a tensor of two rows is a pair too, but of no name
    except (TypeError, ValueError) as err:
        raise TrainingError(
            "expected names and parameters, as model.named_parameters() gives them, "
            f"found a {type(named_parameters).__name__} of something else ({err})"
        ) from err
    names: dict[int, str] = {}
    for name, parameter in named.items():
        check_parameter(name, parameter)
        if (first := names.setdefault(id(parameter), name)) != name:
            raise TrainingError(
                f"{first!r} and {name!r} are one parameter, which would be selected "
                "from twice; give each once, as model.named_parameters() does without "
                "remove_duplicate=False"
            )
    return named


def check_parameter(name: str, parameter: Tensor) -> None:
    """Refuse parameters that cannot be selected from weight by weight.

    Raises:
        TrainingError: It is lazy, has no data, is complex, or is one process's share
            of a sharded parameter.
    """
    if isinstance(parameter, UninitializedParameter):
        found = "is lazy and has no shape yet: run one batch through the model first"
    elif parameter.is_meta:
        found = "has no data (device 'meta'): build the model on a real device"
    elif parameter.is_complex():
        found = "is complex, which a weight file cannot hold: keep two real parameters"
    elif any(hasattr(parameter, mark) for mark in _SHARDED):
        found = (
            "is sharded over processes (FSDP, ZeRO-3), and the best weights are chosen "
            "among all of them: use DistributedDataParallel"
        )
    else:
        return
    raise TrainingError(f"parameter {name!r} {found}; then make the updater")


class Still:
    """Tensors that are neither selected from nor dense, and so have to stay the same.

    Their bytes are hashed, not copied: they may be most of a network.
    """

    def __init__(self, named: Mapping[str, Tensor], free: Collection[str]) -> None:
        """Take the present values.

        Args:
            named: All parameters of the network.
            free: Those that may change, beside the ones of a single axis.
        """
        self._params = {
            name: p for name, p in named.items() if p.dim() > 1 and name not in free
        }
        self.take()

    def take(self) -> None:
        """Take the present values in place of those before."""
        self._digests = {name: _digest(p) for name, p in self._params.items()}

    def state_dict(self) -> dict[str, str]:
        """Return the digests by name."""
        return dict(self._digests)

    def load_state_dict(self, state: Mapping[str, str] | None) -> None:
        """Compare with the values of the process that made the state.

        Args:
            state: Its digests; None of earlier versions, which kept none: the present
                values count.

        Raises:
            TrainingError: They are of other tensors.
        """
        if state is None:
            self.take()
            return
        if others := state.keys() ^ self._digests.keys():
            raise TrainingError(
                f"the state and this updater differ in what has to stay the same: "
                f"{', '.join(sorted(others))}; make the updater as the one before "
                "(the same layers frozen, selectable= and dense=)"
            )
        self._digests = dict(state)

    def verify(self) -> None:
        """Compare with the values that were taken.

        Raises:
            FrozenWeightChangedError: A tensor changed; it is named.
        """
        for name, parameter in self._params.items():
            if _digest(parameter) != self._digests[name]:
                raise FrozenWeightChangedError(
                    f"{name!r} changed in training, and nothing was selected from it: "
                    "it was frozen when the updater was made and thawed later, or "
                    "selectable= left it out. Make the updater when everything that "
                    f"will train requires gradients, or pass dense=[{name!r}] to send "
                    "it whole",
                    tensor=name,
                    count=parameter.numel(),
                )


def _digest(tensor: Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()
