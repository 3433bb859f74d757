"""Deep Partial Updating around any training loop, by hooks on its optimizers.

::

    updater = PartialUpdater(model.named_parameters(), ratio=0.01).attach(optimizer)
    train(model, optimizer)      # full phase: your loop, unchanged
    updater.select()             # keep the best 1 %, rewind the rest to the base
    train(model, optimizer)      # sparse phase: only the selected weights move
    masks = updater.finish()     # detach; raises if anything else moved

The optimizer's *step* is masked, not the gradient: momentum, weight decay and Adam's
moments move weights whose gradient is zero. The step is also what is measured, so the
local contribution needs no knowledge of the optimizer.

Biases, normalisation and other tensors that are not selectable are left alone: they
train in both phases and travel as the dense part.

Not covered: sharded parameters (FSDP, ZeRO); optimizers that evaluate several gradients
in one step (LBFGS, SAM) freeze rightly, but their local contribution sees only the last
gradient; averages of weights (EMA) begun before ``select()``.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from edge_runtime.errors import (
    FrozenWeightChangedError,
    StepNotObservedError,
    TrainingError,
)
from trainer.scores import DPU, Evidence, Score, check_ratio, select_top_k

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Phase(StrEnum):
    """Where a :class:`PartialUpdater` is."""

    FULL = "full"  # every weight trains and is measured
    SPARSE = "sparse"  # only the selected weights train
    DONE = "done"  # verified and detached


def is_weight(name: str, parameter: Tensor) -> bool:  # noqa: ARG001 - see `selectable`
    """Tell whether a parameter is selectable: trainable, with more than one axis.

    As in the paper: the weights of linear and convolutional layers. Biases and
    normalisation have one axis and belong to the dense part.
    """
    return parameter.requires_grad and parameter.dim() > 1


class PartialUpdater:
    """Chooses which weights may change in a round, and sees to it that no other does.

    Construct it when the parameters hold the base, on the device where they train.
    Beside the model it holds the base, in the full phase two more copies of the
    selectable weights, and in the sparse phase one byte a weight.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        ratio: float | None = None,
        score: Score = DPU,
        selectable: Callable[[str, Tensor], bool] = is_weight,
    ) -> None:
        """Take the current weights as the base.

        Args:
            named_parameters: ``model.named_parameters()``, each parameter once.
            ratio: Share of all selectable weights that may change; of ``N`` weights
                ``int(ratio * N)`` are selected, rounded down as in the paper's code.
                Not needed when ``select`` is given masks.
            score: What ``select()`` ranks the weights by.
            selectable: Called with name and parameter; which tensors to select from.

        Raises:
            TrainingError: No weight is selectable, or the ratio selects none.
        """
        self._params = {n: p for n, p in named_parameters if selectable(n, p)}
        self._total = sum(p.numel() for p in self._params.values())
        if not self._total:
            raise TrainingError(
                "expected at least one selectable weight, found none: is_weight() "
                "takes trainable parameters with more than one axis; pass "
                "selectable= to choose others"
            )
        if ratio is not None:
            check_ratio(ratio)
            if int(ratio * self._total) == 0:
                raise TrainingError(
                    f"ratio {ratio} of {self._total} selectable weights selects none; "
                    f"choose more than {1 / self._total:.2g}"
                )
        self.ratio = ratio
        self._score = score
        self._base = {n: p.detach().clone() for n, p in self._params.items()}
        self._masks: dict[str, Tensor] = {}
        self._steps = 0
        self._owned: dict[Optimizer, list[str]] = {}
        self._handles: list[Any] = []
        self._start(Phase.FULL)

    @property
    def phase(self) -> Phase:
        """Where it is: full, sparse or done."""
        return self._phase

    @property
    def base(self) -> Mapping[str, Tensor]:
        """The selectable weights at construction, by name."""
        return self._base

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Boolean masks of the selected weights, by name; empty before selection."""
        return self._masks

    @property
    def loss_drop(self) -> Mapping[str, Tensor]:
        """Local contributions so far, by name; empty outside of the full phase."""
        return self._loss_drop

    def attach(self, *optimizers: Any) -> Self:
        """Follow these optimizers; every selectable weight must be in one of them.

        Wrappers with an ``optimizer`` attribute (Accelerate, Lightning) are unwrapped.

        Raises:
            TrainingError: A weight is in none of the attached optimizers, or an
                argument is no torch optimizer or maximises.
        """
        owned = dict(self._owned)
        for optimizer in map(_unwrap, optimizers):
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            owned[optimizer] = [n for n, p in self._params.items() if id(p) in held]
        missing = self._params.keys() - {n for names in owned.values() for n in names}
        if missing:
            raise TrainingError(
                f"no attached optimizer owns {', '.join(sorted(missing))}: attach all "
                "optimizers in one call, build them before attaching, or freeze these "
                "parameters (requires_grad_(False)) before constructing"
            )
        for optimizer in owned.keys() - self._owned.keys():
            if owned[optimizer]:
                self._handles += (
                    optimizer.register_step_pre_hook(self._before_step),
                    optimizer.register_step_post_hook(self._after_step),
                )
        self._owned = owned
        return self

    def select(
        self,
        scores: Mapping[str, Tensor] | None = None,
        *,
        masks: Mapping[str, Tensor] | None = None,
    ) -> Mapping[str, Tensor]:
        """Select the weights that may change and rewind all others to the base.

        Args:
            scores: One floating-point tensor for each tensor of ``base``; higher is
                better. Any method plugs in here, with or without a full phase.
                Default: the updater's score of the full phase.
            masks: Boolean masks to take as they are, instead of scores.

        Returns:
            The masks, by name.

        Raises:
            StepNotObservedError: There was no full phase to score.
            TrainingError: Not in the full phase, no ratio given, or scores or masks
                that do not fit the selectable tensors.
        """
        self._expect(Phase.FULL, "select() comes once, after the full phase")
        if masks is None:
            if self.ratio is None:
                raise TrainingError("pass ratio= to the constructor, or masks= here")
            scores = self._scores() if scores is None else scores
            self._check_fit(scores)
            # Our order of tensors, as it decides between equal scores.
            scores = {name: scores[name] for name in self._params}
            masks = select_top_k(scores, int(self.ratio * self._total))
        self._check_fit(masks, torch.bool)
        self._masks = {n: masks[n].to(p.device) for n, p in self._params.items()}
        self._rewind(self._params)
        self._start(Phase.SPARSE)
        return self._masks

    def finish(self) -> Mapping[str, Tensor]:
        """Detach from the optimizers, verify the freeze and return the masks.

        Raises:
            FrozenWeightChangedError: A weight that was not selected differs from the
                base, compared as bits.
            TrainingError: Nothing has been selected.
        """
        self._expect(Phase.SPARSE, "finish() comes once, after select()")
        for handle in self._handles:
            handle.remove()
        for name in self._params:
            self._verify(name)
        self._start(Phase.DONE)
        return self._masks

    def summary(self) -> str:
        """Say how much is selected: ``3343 of 668672 weights (0.50 %) in 3 tensors``.

        Only tensors with a selected weight are counted.
        """
        counts = [int(mask.sum()) for mask in self._masks.values()]
        if not counts:
            return (
                f"{self._total} weights in {len(self._params)} tensors, none selected"
            )
        tensors = sum(count > 0 for count in counts)
        return (
            f"{sum(counts)} of {self._total} weights "
            f"({100 * sum(counts) / self._total:.2f} %) in {tensors} tensors"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs, beside the states of model and optimizers.

        Tensors are not copies; save it before the next step.
        """
        return {
            "phase": self._phase.value,
            "steps": self._steps,
            "base": dict(self._base),
            "masks": dict(self._masks),
            "loss_drop": dict(self._loss_drop),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; attach to the optimizers as well.

        Raises:
            TrainingError: The state belongs to other tensors.
        """
        phase = Phase(state["phase"])
        self._check_fit(state["base"])
        if phase is Phase.FULL:
            self._check_fit(state["loss_drop"])
        else:
            self._check_fit(state["masks"], torch.bool)
        self._start(phase)
        self._steps = int(state["steps"])
        self._masks = {
            n: mask.to(self._base[n].device) for n, mask in state["masks"].items()
        }
        for key, buffers in (("base", self._base), ("loss_drop", self._loss_drop)):
            for name, buffer in buffers.items():
                buffer.copy_(state[key][name])

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, *_: object) -> None:
        if optimizer in self._stepping:
            return  # a step that calls super().step() fires twice: the outer one counts
        self._stepping.add(optimizer)
        names = self._owned[optimizer]
        if self._phase is Phase.FULL:
            torch._foreach_copy_(
                [self._before[n] for n in names], [self._params[n] for n in names]
            )
        elif self._phase is Phase.SPARSE:
            for name in names:
                # Somebody wrote since our last step, or this is the first one.
                if self._params[name]._version != self._versions.get(name):
                    self._verify(name)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        names = self._owned[optimizer]
        if self._phase is Phase.SPARSE:  # each time: what the outer step adds as well
            self._rewind(names)
            self._versions |= {n: self._params[n]._version for n in names}
        elif self._phase is Phase.FULL and optimizer in self._stepping:
            self._measure(names)
        self._stepping.discard(optimizer)

    def _measure(self, names: list[str]) -> None:
        """Add ``-step * gradient`` to the local contributions.

        The gradient is read after the step, as closures compute it inside, and fused
        optimizers remove the loss scale there.
        """
        params = {n: self._params[n] for n in names}
        gradients = {n: p.grad for n, p in params.items() if p.grad is not None}
        if not gradients:
            return
        minus_step = [self._before[n] for n in gradients]
        torch._foreach_sub_(minus_step, [params[n] for n in gradients])
        torch._foreach_mul_(minus_step, list(gradients.values()))
        for product in minus_step:
            # A step that mixed precision skipped is 0 * inf: it moved nothing.
            product.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
        torch._foreach_add_([self._loss_drop[n] for n in gradients], minus_step)
        self._steps += 1

    @torch.no_grad()
    def _rewind(self, names: Iterable[str]) -> None:
        """Put the base back wherever a weight is not selected, bit for bit."""
        for name in names:
            p = self._params[name]
            torch.where(self._masks[name], p, self._base[name], out=p)

    @torch.no_grad()
    def _verify(self, name: str) -> None:
        """Raise unless every unselected weight of a tensor is its base, as bits."""
        p, base = self._params[name], self._base[name]
        bits = _BITS[p.element_size()]
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

    def _scores(self) -> Mapping[str, Tensor]:
        if not self._steps:
            raise StepNotObservedError(
                "expected at least one optimizer step with gradients in the full "
                f"phase, found none with {len(self._owned)} attached optimizers: "
                "attach the optimizer that the loop really steps, or pass scores"
            )
        current = {n: p.detach() for n, p in self._params.items()}
        return self._score(Evidence(self._base, current, self._loss_drop))

    def _start(self, phase: Phase) -> None:
        """Enter a phase, with its buffers and without those of the one before."""
        self._phase = phase
        self._stepping: set[Optimizer] = set()
        self._versions: dict[str, int] = {}
        self._loss_drop, self._before = self._buffers(), self._buffers()

    def _buffers(self) -> dict[str, Tensor]:
        """Return zeros for every selectable tensor, float32 or wider; only if full."""
        measured = self._base if self._phase is Phase.FULL else {}
        return {
            name: torch.zeros_like(b, dtype=torch.promote_types(b.dtype, torch.float32))
            for name, b in measured.items()
        }

    def _expect(self, phase: Phase, rule: str) -> None:
        if self._phase is not phase:
            raise TrainingError(
                f"expected to be in the {phase} phase, found {self._phase}: {rule}"
            )

    def _check_fit(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> None:
        """Refuse tensors that are not exactly one for each selectable tensor."""
        odd = tensors.keys() ^ self._params.keys()
        if odd:
            raise TrainingError(
                f"expected one tensor for each selectable weight tensor "
                f"({', '.join(self._params)}), found too many or too few: "
                f"{', '.join(sorted(odd))}"
            )
        for name, p in self._params.items():
            found = tensors[name]
            if found.shape != p.shape or dtype not in (None, found.dtype):
                raise TrainingError(
                    f"expected {dtype or 'a tensor'} of shape {tuple(p.shape)} for "
                    f"{name!r}, found {found.dtype} of shape {tuple(found.shape)}"
                )


def _unwrap(optimizer: Any) -> Optimizer:
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(optimizer, Optimizer):
        raise TrainingError(
            f"expected a torch.optim.Optimizer, found {type(optimizer).__name__}"
        )
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise TrainingError(
            "expected an optimizer that minimises, found maximize=True: the local "
            "contribution is a drop of the loss; minimise the negative instead"
        )
    return optimizer
