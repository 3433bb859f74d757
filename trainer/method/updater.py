# SPDX-License-Identifier: Apache-2.0
"""Deep Partial Updating around any training loop, by hooks on its optimizers.

::

    updater = PartialUpdater(model.named_parameters(), ratio=0.01).attach(optimizer)
    train(model, optimizer)      # full phase: your loop, unchanged
    updater.select()             # keep the best 1 %, rewind the rest to the base
    train(model, optimizer)      # sparse phase: only the selected weights move
    masks = updater.finish()     # detach; raises if anything else moved

Fewer weights that fit together better, for a little more training::

    updater.select(keep=4)       # four times as many, at first
    train(model, optimizer)
    updater.narrow()             # rank these again, keep the best 1 %, rewind the rest
    train(model, optimizer)

The optimizer's *step* is masked, not the gradient: momentum, weight decay and Adam's
moments move weights whose gradient is zero. The step is also what is measured, so the
local contribution needs no knowledge of the optimizer.

Biases, normalisation and other tensors that are not selectable are left alone: they
train in both phases and travel as the dense part.

Not covered: sharded parameters (FSDP, ZeRO), and averages of weights (EMA) begun before
``select()``; both are refused.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from edge_runtime.errors import StepNotObservedError, TrainingError
from trainer.method.optimizers import (
    at_evaluation,
    parameter_ids,
    to_evaluation,
    unwrap,
)
from trainer.method.phase import Phase
from trainer.method.scores import DPU, Evidence, Score
from trainer.method.selectable import Still, by_name, is_weight
from trainer.method.selection import check_fit, count_of, select_top_k
from trainer.method.step_hooks import StepHooks
from trainer.parallel import masks_of_first


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
        dense: Collection[str] = (),
    ) -> None:
        """Take the current weights as the base.

        Args:
            named_parameters: ``model.named_parameters()``, each parameter once.
            ratio: Share of all selectable weights that may change; of ``N`` weights
                ``int(ratio * N)`` are selected, rounded down as in the paper's code.
                Not needed when ``select`` is given masks.
            score: What ``select()`` ranks the weights by.
            selectable: Called with name and parameter; which tensors to select from.
            dense: Names of further tensors with several axes that may change, and are
                sent whole. Any other that changes without a mask (a layer that was
                frozen here and thawed later) is an error at ``finish()``.

        Raises:
            TrainingError: No weight is selectable, the ratio selects none, or a
                parameter is of a kind that cannot be selected from (complex, lazy,
                without data, sharded over processes).
        """
        named = by_name(named_parameters)
        self._params = {n: p for n, p in named.items() if selectable(n, p)}
        self._still = Still(named, free={*self._params, *dense})
        self._total = sum(p.numel() for p in self._params.values())
        if not self._total:
            raise TrainingError(
                "expected at least one selectable weight, found none: is_weight() "
                "takes trainable parameters with more than one axis; pass "
                "selectable= to choose others"
            )
        if ratio is not None:
            count_of(ratio, self._total)  # or it is refused here
        self.ratio = ratio
        self._score = score
        self._base = {n: p.detach().clone() for n, p in self._params.items()}
        self._masks: Mapping[str, Tensor] = {}
        self._wide = False  # more is selected than the ratio allows
        self._phase = Phase.FULL
        self._hooks = StepHooks(self._params, self._base)

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
        """Local contributions so far, by name; empty where nothing is ranked later."""
        return self._hooks.loss_drop.total

    def attach(self, *optimizers: Any) -> Self:
        """Follow these optimizers; every selectable weight must be in one of them.

        What Accelerate and Lightning make of an optimizer is unwrapped; an optimizer
        around another one (Lookahead) is measured as a whole.

        Raises:
            TrainingError: A weight is in none of the attached optimizers, or an
                argument is no torch optimizer or maximises.
        """
        owned = dict(self._hooks.owned)
        for optimizer in map(unwrap, optimizers):
            held = parameter_ids(optimizer)
            owned[optimizer] = [n for n, p in self._params.items() if id(p) in held]
        missing = self._params.keys() - {n for names in owned.values() for n in names}
        if missing:
            raise TrainingError(
                f"no attached optimizer owns {', '.join(sorted(missing))}: attach all "
                "optimizers in one call, build them before attaching, or freeze these "
                "parameters (requires_grad_(False)) before constructing"
            )
        self._hooks.follow(owned)
        return self

    def select(
        self,
        scores: Mapping[str, Tensor] | None = None,
        *,
        masks: Mapping[str, Tensor] | None = None,
        keep: float = 1,
    ) -> Mapping[str, Tensor]:
        """Select the weights that may change and rewind all others to the base.

        Args:
            scores: One floating-point tensor for each tensor of ``base``; higher is
                better. Any method plugs in here, with or without a full phase.
                Default: the updater's score of the full phase.
            masks: Boolean masks to take as they are, instead of scores.
            keep: How many times as many weights as the ratio says are kept until
                :meth:`narrow`; at most all. Until then steps are measured as well.

        Returns:
            The masks, by name.

        Raises:
            StepNotObservedError: There was no full phase to score.
            TrainingError: Not in the full phase, no ratio given, ``keep`` below 1, or
                scores or masks that do not fit the selectable tensors.
        """
        self._phase.expect(Phase.FULL, "select() comes once, after the full phase")
        if not keep >= 1 or (keep > 1 and masks is not None):
            raise TrainingError(
                f"keep is {keep}: expected at least 1, and no masks beside it"
            )
        with at_evaluation(list(self._hooks.owned)):
            if masks is None:
                masks = self._best(scores, keep)
            self._enter_sparse(masks, wide=keep > 1)
        return self._masks

    def narrow(
        self, scores: Mapping[str, Tensor] | None = None
    ) -> Mapping[str, Tensor]:
        """Select again among the selected weights, as few as the ratio says.

        Args:
            scores: As for :meth:`select`. Default: the updater's score, of what these
                weights did in both phases.

        Returns:
            The masks, by name.

        Raises:
            StepNotObservedError: There was no step since ``select(keep=...)``.
            TrainingError: ``select(keep=...)`` did not come before, or scores that do
                not fit.
        """
        self._phase.expect(Phase.SPARSE, "narrow() comes once, after select(keep=...)")
        if not self._wide:
            raise TrainingError(
                "narrow() comes once, after select(keep=...) with more than 1: there "
                "is nothing to choose from"
            )
        with at_evaluation(list(self._hooks.owned)):
            for name, drop in self.loss_drop.items():
                drop.masked_fill_(~self._masks[name], 0.0)
            self._enter_sparse(self._best(scores, keep=1), wide=False)
        return self._masks

    def _best(
        self, scores: Mapping[str, Tensor] | None, keep: float
    ) -> Mapping[str, Tensor]:
        if self.ratio is None:
            raise TrainingError("pass ratio= to the constructor, or masks= here")
        scores = self._scores() if scores is None else scores
        check_fit(scores, self._params)
        # Our order of tensors, as it decides between equal scores.
        scores = {name: scores[name] for name in self._params}
        for name, mask in self._masks.items():  # selected before: from these alone
            score = scores[name]
            if score.is_floating_point():  # others are refused below
                lowest = torch.finfo(score.dtype).min  # above what was not selected
                scores[name] = score.clamp_min(lowest).masked_fill(~mask, -torch.inf)
        count = min(keep * count_of(self.ratio, self._total), self._total)
        return select_top_k(scores, int(count))

    def _enter_sparse(self, masks: Mapping[str, Tensor], *, wide: bool) -> None:
        """Let only these weights move, and rewind all others."""
        check_fit(masks, self._params, torch.bool)
        masks = {n: masks[n].to(p.device) for n, p in self._params.items()}
        self._masks, self._wide = masks_of_first(masks), wide
        measured = self.loss_drop
        self._start(Phase.SPARSE)
        if wide:
            self._hooks.loss_drop.total, self._hooks.measured = dict(measured), 0
        self._hooks.rewind()

    def finish(self) -> Mapping[str, Tensor]:
        """Detach from the optimizers, verify the freeze and return the masks.

        A schedule-free optimizer is left at the weights that are evaluated.

        Raises:
            FrozenWeightChangedError: A weight that was not selected differs from the
                base, compared as bits, or a tensor of several axes changed that has no
                mask.
            TrainingError: Nothing has been selected, or a selected weight is no number.
        """
        self._phase.expect(Phase.SPARSE, "finish() comes once, after select()")
        if self._wide:
            raise TrainingError(
                "more weights are selected than the ratio allows, as select(keep=...) "
                "asked for: call narrow(), and train on, before finish()"
            )
        self.detach()
        to_evaluation(self._hooks.owned)
        for name, parameter in self._params.items():
            self._hooks.freeze.verify(name)
            if not parameter.detach()[self._masks[name]].isfinite().all():
                raise TrainingError(
                    f"selected weights of {name!r} are no numbers any more (NaN or "
                    "infinite); lower the learning rate, or look for broken samples"
                )
        self._still.verify()
        self._start(Phase.DONE)
        return self._masks

    @torch.no_grad()
    def rewind(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Put the base back into a copy of the model wherever a weight is not selected.

        An average of weights (EMA, SWA) that begins after ``select()`` differs from
        the base there by rounding alone; call this before it is published, and
        go on from what was published::

            updater.rewind(average.module.named_parameters())
            publish_round(run, average, masks)
            model.load_state_dict(average.module.state_dict())

        Raises:
            TrainingError: Before ``select()``, or a selectable tensor is missing.
        """
        if self._phase is Phase.FULL:
            raise TrainingError("rewind() comes after select(): nothing is selected")
        copies = dict(named_parameters)
        if missing := [name for name in self._params if name not in copies]:
            raise TrainingError(
                f"expected the updater's parameters, found no {missing[0]!r} among "
                f"{list(copies)[:3]}; of an AveragedModel, give its .module's"
            )
        for name, base in self._base.items():
            copy, mask = copies[name], self._masks[name].to(copies[name].device)
            torch.where(mask, copy, base.to(copy), out=copy)

    def detach(self) -> None:
        """Let go of the optimizers: their steps are neither measured nor frozen.

        ``finish()`` does it; call it yourself to give a round up half way.
        """
        self._hooks.let_go()

    def summary(self) -> str:
        """Say how much is selected: ``3343 of 668672 weights (0.50 %) in 3 tensors``.

        Only tensors with a selected weight are counted.
        """
        counts = [int(mask.sum()) for mask in self._masks.values()]
        if not counts:
            tensors = len(self._params)
            return f"{self._total} weights in {tensors} tensors, none selected"
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
            "steps": self._hooks.measured,
            "wide": self._wide,
            "base": dict(self._base),
            "masks": dict(self._masks),
            "loss_drop": dict(self.loss_drop),
            "still": self._still.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; attach to the optimizers as well.

        Raises:
            TrainingError: The state belongs to other tensors.
        """
        phase = Phase(state["phase"])
        self._wide = bool(state.get("wide"))
        check_fit(state["base"], self._params)
        if phase is Phase.FULL or self._wide:
            check_fit(state["loss_drop"], self._params)
        if phase is not Phase.FULL:
            check_fit(state["masks"], self._params, torch.bool)
        self._still.load_state_dict(state.get("still"))
        self._hooks.measured = int(state["steps"])
        masks = state["masks"].items()
        self._masks = {n: mask.to(self._base[n].device) for n, mask in masks}
        self._start(phase)
        for name, buffer in self._base.items():
            buffer.copy_(state["base"][name])
        for name, buffer in self.loss_drop.items():
            buffer.copy_(state["loss_drop"][name])

    def _scores(self) -> Mapping[str, Tensor]:
        if not self._hooks.measured:
            raise StepNotObservedError(
                "expected at least one optimizer step with gradients in the "
                f"{self.phase} phase, found none with {len(self._hooks.owned)} "
                "attached optimizers: "
                "attach the optimizer that the loop really steps, or pass scores"
            )
        current = {n: p.detach() for n, p in self._params.items()}
        return self._score(Evidence(self._base, current, self.loss_drop))

    def _start(self, phase: Phase) -> None:
        self._phase, is_sparse = phase, phase is Phase.SPARSE
        measure = phase is Phase.FULL or (is_sparse and self._wide)
        self._hooks.start(self._masks if is_sparse else {}, measure=measure)
