# SPDX-License-Identifier: Apache-2.0
"""What happens around each step of an optimizer: it is measured, or frozen.

Two halves, one a phase of :class:`trainer.method.updater.PartialUpdater`, and what
calls them. Both have ``before`` and ``after``, called with the names of the tensors
that the optimizer steps.
"""

import math
import sys
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer, optimizer

from edge_runtime.errors import FrozenWeightChangedError
from trainer.method.optimizers import (
    has_two_sets,
    is_coupled,
    second_weights,
    with_closure,
)

MOST_BY_PLACE = 0.1  # share of a tensor's weights
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
    """Holds every weight that is not selected at the base, bit for bit.

    Attributes:
        masks: By name, true where a weight may move; empty where all may.
        switched: Names of the tensors that a schedule-free optimizer takes from one
            set of weights to another and back: of equal values only a zero's sign can
            change on that way.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        base: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
    ) -> None:
        """Change nothing yet."""
        self._params, self._base, self.masks = params, base, masks
        self._versions: dict[str, int] = {}
        self._selected: dict[str, Tensor | None] = {}
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
                gradient.masked_fill_(~self.masks[name], 0)

    def after(self, names: Iterable[str], stepped: Optimizer) -> None:
        """Undo what the step did to weights that are not selected."""
        self.rewind(names)
        self.rewind_second(names, stepped)
        self._versions |= {n: self._params[n]._version for n in names}

    @torch.no_grad()
    def rewind(self, names: Iterable[str]) -> None:
        """Put the base back wherever a weight is not selected, bit for bit."""
        for name in names:
            p, base = self._params[name], self._base[name]
            if name not in self._selected:
                self._selected[name] = _few(self.masks[name], p)
            selected = self._selected[name]
            if selected is None or not p.is_contiguous():
                torch.where(self.masks[name], p, base, out=p)
                continue
            flat = p.view(-1)
            kept = flat.index_select(0, selected)
            p.copy_(base)
            flat.index_copy_(0, selected, kept)

    @torch.no_grad()
    def rewind_second(self, names: Iterable[str], stepped: Optimizer) -> None:
        """Rewind the second set of weights that a schedule-free optimizer keeps."""
        for name in names:
            second = second_weights(stepped, self._params[name])
            if second is not None:
                base = self._base[name].to(second.dtype)
                torch.where(self.masks[name], second, base, out=second)

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
            torch.where((p == 0) & (base == 0) & ~self.masks[name], base, p, out=p)
        changed = p.detach().view(bits) != base.view(bits)
        count = int((changed & ~self.masks[name]).sum())
        if count:
            raise FrozenWeightChangedError(
                f"{count} weights of {name!r} that were not selected differ from the "
                "base: something other than the attached optimizers wrote them (an "
                "optimizer that was made later, or around the attached one, weight "
                "averaging, a checkpoint loaded after select()); attach that optimizer "
                "too, the outermost one, or let other writers start after finish()",
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


class StepHooks:
    """Has the steps of optimizers measured, frozen, both, or neither.

    Attributes:
        owned: Names of the weights that each optimizer steps.
        loss_drop: Measures; of no weights where nothing is measured.
        freeze: Freezes; without masks where nothing is frozen.
        measured: How many steps were.
    """

    def __init__(
        self, params: Mapping[str, Tensor], base: Mapping[str, Tensor]
    ) -> None:
        """Follow no optimizer yet, and measure."""
        self._params, self._base = params, base
        self.owned: dict[Optimizer, list[str]] = {}
        self.measured = 0
        self._handles: list[Any] = []
        self.start({}, measure=True)

    def start(self, masks: Mapping[str, Tensor], *, measure: bool) -> None:
        """Begin a phase, with its buffers and without those of the one before."""
        self._running = Running()
        self.loss_drop = LossDrop(self._params if measure else {})
        self.freeze = Freeze(self._params, self._base, masks)
        self._mark_switched()

    def follow(self, owned: dict[Optimizer, list[str]]) -> None:
        """Hook in the optimizers that are not followed yet."""
        known = self.owned.keys() if self._handles else set()  # let go: of none
        for stepped in owned.keys() - known:
            if owned[stepped]:
                self._handles += (
                    stepped.register_step_pre_hook(self._before_step),
                    stepped.register_step_post_hook(self._after_step),
                )
        self.owned = owned
        self._mark_switched()

    def let_go(self) -> None:
        """Take the hooks off the optimizers, and undo what a step that failed wrote."""
        for stepped, names in self.owned.items():
            if stepped in self._running and self.freeze.masks:
                self.freeze.after(names, stepped)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def rewind(self) -> None:
        """Rewind what is frozen, in the weights and in what optimizers remember."""
        self.freeze.rewind(self._params)
        for stepped, names in self.owned.items():
            self.freeze.rewind_second(names, stepped)
            if is_coupled(stepped):
                stepped.state.clear()

    # A compiled step would trace the hooks and measure nothing, or something else.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _before_step(
        self, stepped: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._running.is_nested(stepped):
            return None  # the outer one counts
        names = self.owned[stepped]
        if self._running.begin(stepped) and self.freeze.masks:
            self.freeze.after(names, stepped)  # what a failed step wrote
        measured = [self.loss_drop] if self.loss_drop.total else []
        frozen = [self.freeze] if self.freeze.masks else []
        halves: list[Freeze | LossDrop] = [*frozen, *measured]
        for half in halves:
            half.before(names)

        def before(count: int) -> None:
            for half in halves:
                half.before_evaluation(names, count)

        def after() -> None:
            if frozen and is_coupled(stepped):
                self.freeze.mask_gradients(names)

        return with_closure(args, kwargs, before, after)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _after_step(self, stepped: Optimizer, *_: object) -> None:
        names = self.owned[stepped]
        if self.freeze.masks:  # each time: what the outer step adds as well
            self.freeze.after(names, stepped)
        if self.loss_drop.total and stepped in self._running:
            self.measured += self.loss_drop.after(names)
        self._running.end(stepped)

    def _mark_switched(self) -> None:
        self.freeze.switched = {
            n for o, names in self.owned.items() if has_two_sets(o) for n in names
        }
