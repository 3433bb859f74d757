# SPDX-License-Identifier: Apache-2.0
"""What happens around each step of an optimizer: it is measured, or frozen.

Two halves of :class:`trainer.method.updater.PartialUpdater`, one a phase. Both have
``before`` and ``after``, called with the names of the tensors that the optimizer steps.
"""

import hashlib
import math
import sys
from collections.abc import Collection, Iterable, Mapping
from types import FrameType

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer, optimizer

from edge_runtime.errors import FrozenWeightChangedError, TrainingError

MOST_BY_PLACE = 0.1  # share of a tensor's weights
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# What FSDP2 (DTensor), FSDP and ZeRO-3 leave on the parameters that they part.
_SHARDED = ("placements", "_fsdp_flattened", "ds_id")


class Running:
    """Which optimizers are in a step: hooks fire at its begin and at its end.

    A step that calls ``super().step()`` fires them twice, and one that fails never
    fires the second ones. So a step that goes on is known by its frame on the stack.
    """

    def __init__(self) -> None:
        """Know of none."""
        self._frames: dict[Optimizer, FrameType | None] = {}

    def __contains__(self, stepped: Optimizer) -> bool:
        return stepped in self._frames

    def is_nested(self, stepped: Optimizer) -> bool:
        """Tell whether a step begins that another step of the same optimizer calls."""
        if stepped not in self._frames:
            return False
        outer = self._frames[stepped]
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not outer:
            frame = frame.f_back
        return outer is None or frame is not None

    def begin(self, stepped: Optimizer) -> bool:
        """Remember a step; tell whether the one before it has failed half way."""
        failed = stepped in self._frames
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename != optimizer.__file__:
            frame = frame.f_back
        self._frames[stepped] = frame
        return failed

    def end(self, stepped: Optimizer) -> None:
        """Forget a step."""
        self._frames.pop(stepped, None)


class LossDrop:
    """Measures steps: by how much did moving each weight lower the loss?

    Attributes:
        total: For every weight the sum of ``-step * gradient``, float32 or wider.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        """Start from zero."""
        self._params = params
        self.total, self._before = self._zeros(), self._zeros()
        self._first: dict[str, Tensor] = {}  # gradients where a step has several

    def before(self, names: list[str]) -> None:
        """Remember where a step starts."""
        torch._foreach_copy_(
            [self._before[n] for n in names], [self._params[n] for n in names]
        )

    def before_evaluation(self, names: list[str], count: int) -> None:
        """Remember the first gradients of a step that evaluates several.

        Args:
            names: Of the tensors that the optimizer steps.
            count: How many evaluations this step has behind it.
        """
        if count == 1:
            params = {n: self._params[n] for n in names}
            self._first = {
                n: p.grad.clone() for n, p in params.items() if p.grad is not None
            }

    def after(self, names: list[str]) -> bool:
        """Add what the step did; tell whether there were gradients to measure it by.

        The gradient is read after the step, as closures compute it inside, and fused
        optimizers remove the loss scale there. Where a closure was called several
        times (LBFGS), it is the mean of the first and the last gradient: exact where
        the loss is quadratic, whatever way the step took.
        """
        params = {n: self._params[n] for n in names}
        gradients = {n: p.grad for n, p in params.items() if p.grad is not None}
        for n, first in self._first.items():
            if n in gradients:
                gradients[n] = (first + gradients[n]) / 2
        self._first = {}
        if not gradients:
            return False
        minus_step = [self._before[n] for n in gradients]
        torch._foreach_sub_(minus_step, [params[n] for n in gradients])
        torch._foreach_mul_(minus_step, list(gradients.values()))
        for product in minus_step:
            # A step that mixed precision skipped is 0 * inf: it moved nothing.
            product.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
        torch._foreach_add_([self.total[n] for n in gradients], minus_step)
        return True

    def _zeros(self) -> dict[str, Tensor]:
        return {
            n: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            for n, p in self._params.items()
        }


class Freeze:
    """Holds every weight that is not selected at the base, bit for bit."""

    def __init__(
        self,
        params: Mapping[str, Tensor],
        base: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
    ) -> None:
        """Change nothing yet; ``masks`` are true where a weight may move."""
        self._params, self._base, self._masks = params, base, masks
        self._versions: dict[str, int] = {}
        self._selected: dict[str, Tensor | None] = {}
        # Schedule-free optimizers go from one set of weights to another and back: of
        # equal values only a zero's sign can change on that way.
        self.switched: set[str] = set()

    def before(self, names: Iterable[str]) -> None:
        """Verify tensors that somebody wrote since the last step, or before the first.

        Raises:
            FrozenWeightChangedError: See :meth:`verify`.
        """
        for name in names:
            if self._params[name]._version != self._versions.get(name):
                self.verify(name)

    def before_evaluation(self, names: Iterable[str], count: int) -> None:
        """Rewind before each further evaluation of a step, as after the step."""
        if count:
            self.rewind(names)

    def mask_gradients(self, names: Iterable[str]) -> None:
        """Take the gradients of weights that are not selected away."""
        for name in names:
            gradient = self._params[name].grad
            if gradient is not None:
                gradient.masked_fill_(~self._masks[name], 0)

    def after(self, names: Iterable[str]) -> None:
        """Undo what the step did to weights that are not selected."""
        self.rewind(names)
        self._versions |= {n: self._params[n]._version for n in names}

    @torch.no_grad()
    def rewind(self, names: Iterable[str]) -> None:
        """Put the base back wherever a weight is not selected, bit for bit."""
        for name in names:
            p, base = self._params[name], self._base[name]
            if name not in self._selected:
                self._selected[name] = _few(self._masks[name], p)
            selected = self._selected[name]
            if selected is None or not p.is_contiguous():
                torch.where(self._masks[name], p, base, out=p)
                continue
            flat = p.view(-1)
            kept = flat.index_select(0, selected)
            p.copy_(base)
            flat.index_copy_(0, selected, kept)

    @torch.no_grad()
    def verify(self, name: str) -> None:
        """Compare the weights of a tensor that are not selected with the base.

        Signs of zeros are put back first where an optimizer switches weights.

        Raises:
            FrozenWeightChangedError: One of them differs, compared as bits.
        """
        p, base = self._params[name], self._base[name]
        bits = _BITS[p.element_size()]
        if name in self.switched:
            torch.where((p == 0) & (base == 0) & ~self._masks[name], base, p, out=p)
        changed = p.detach().view(bits) != base.view(bits)
        count = int((changed & ~self._masks[name]).sum())
        if count:
            raise FrozenWeightChangedError(
                f"{count} weights of {name!r} that were not selected differ from the "
                "base: something other than the attached optimizers wrote them (an "
                "optimizer around the attached one, weight averaging, a checkpoint "
                "loaded after select()); attach the outermost optimizer, or let "
                "other writers start after finish()",
                tensor=name,
                count=count,
            )


def _few(mask: Tensor, parameter: Tensor) -> Tensor | None:
    """Return where few selected weights of a tensor lie in memory.

    A CPU then rewinds four times as fast as by a mask. None where it would not.
    """
    if parameter.device.type != "cpu":
        return None
    few = int(mask.sum()) <= MOST_BY_PLACE * mask.numel()
    return mask.reshape(-1).nonzero()[:, 0] if few else None


def by_name(named_parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return parameters by name, each of them fit to be selected from, and there once.

    Raises:
        TrainingError: One is not; it is named.
    """
    named = dict(named_parameters)
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
