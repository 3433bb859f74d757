# SPDX-License-Identifier: Apache-2.0
"""Training in a seeded subspace around any loop, by hooks on its optimizer.

::

    updater = SubspaceUpdater(model.named_parameters(), coefficients=8192)
    updater.attach(optimizer)
    train(model, optimizer)        # your loop, unchanged: coefficients move freely
    updater.select()               # settle the scales: coefficients take few bits
    train(model, optimizer)        # your loop again, on what devices will have
    movement = updater.finish()    # detach; raises if a device would get other bits

Every weight moves, by the sum of a few coefficients under random signs; a patch carries
the coefficients. What the optimizer steps are the coefficients: before its step the
gradients are folded into theirs, and some of the weights' own memory holds them; after
it, the weights are made anew. Momentum, moments and weight decay are then those of the
coefficients: decay pulls a weight to the base, not to zero.

So every optimizer is right that steps each element by that element alone (SGD, Adam,
AdamW, RMSprop and their like); others are refused. Gradients that the loop clips or
scales before the step are taken as they are. Biases and other tensors that are not
selectable train as ever, and travel as the dense part.

Where it fails: see docs/subspace.md.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from edge_runtime.errors import (
    FrozenWeightChangedError,
    StepNotObservedError,
    TrainingError,
)
from trainer.method.carriers import Latents
from trainer.method.movement import Movement
from trainer.method.optimizers import (
    check_elementwise,
    check_groups,
    forget,
    parameter_ids,
    unwrap,
    with_closure,
)
from trainer.method.phase import Phase
from trainer.method.selectable import Still, by_name, is_weight
from trainer.method.signs import SignTable
from trainer.method.step_hooks import Running
from trainer.method.subspace_weights import SubspaceWeights, check_subspace
from trainer.parallel import of_first


class SubspaceUpdater:
    """Lets the weights move in a subspace of few dimensions only.

    Construct it when the parameters hold the base, on the device where they train.
    Beside the model it holds the base and, for every weight, two float32 a tap; two
    more for one that is int8 on the device.
    """

    def __init__(  # noqa: PLR0913 - all but one by name
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        coefficients: int,
        bits: int = 1,
        taps: int = 2,
        seed: int = 0,
        selectable: Callable[[str, Tensor], bool] = is_weight,
        dense: Collection[str] = (),
        int8_scales: Mapping[str, NDArray[np.float32]] = MappingProxyType({}),
    ) -> None:
        """Take the current weights as the base.

        Args:
            named_parameters: ``model.named_parameters()``, each parameter once.
            coefficients: How many there are; a multiple of 64. A patch takes so many
                times ``bits`` bits for them; :func:`coefficients_within` finds their
                number for a size.
            bits: Of a coefficient, 1 to 8.
            taps: How many coefficients move a weight, 1 to 4; with two, of one bit, it
                moves by -1, 0 or 1.
            seed: Of the signs; a round should have one of its own. One from 2**28 takes
                up to 5 bytes more in a patch.
            selectable: Called with name and parameter; which tensors move.
            dense: As for :class:`PartialUpdater`.
            int8_scales: Of the tensors that are int8 on the device, one for each slice
                of the first axis; the base lies on their grid, and they move by whole
                steps.

        Raises:
            TrainingError: No weight moves, there are no fewer weights than
                coefficients, or a parameter is of a kind that cannot move.
        """
        named = by_name(named_parameters)
        # The weight file's order, on which signs depend: large types first, then names,
        # which have nothing that torch.compile adds.
        plain = {name: name.replace("_orig_mod.", "") for name in named}
        names = sorted(named, key=lambda name: (name in int8_scales, plain[name]))
        self._params = {n: named[n] for n in names if selectable(n, named[n])}
        check_subspace(self._params, coefficients, bits=bits, taps=taps, seed=seed)
        self._still = Still(named, free={*self._params, *dense})
        self.bits, self.taps, self.seed = bits, taps, seed
        self._kind = {"seed": int(seed), "bits": bits, "taps": taps}
        self._base = {n: p.detach().clone() for n, p in self._params.items()}
        signs = SignTable(self._base, coefficients, taps, seed)
        self._weights = SubspaceWeights(self._base, signs, bits, int8_scales)
        self._latents = Latents(self._params, coefficients)
        self._latent = self._latents.values
        self._phase, self._steps = Phase.FULL, 0
        self._running = Running()
        self._optimizer: Optimizer | None = None
        self._handles: list[Any] = []

    @property
    def phase(self) -> Phase:
        """Where it is: full (free coefficients), sparse (of few bits) or done."""
        return self._phase

    @property
    def base(self) -> Mapping[str, Tensor]:
        """The weights that move, at construction, by name."""
        return self._base

    def attach(self, *optimizers: Any, elementwise: bool = False) -> Self:
        """Follow these optimizers; one of them must own every weight that moves.

        What it knows of those weights (moments) is forgotten, as what it steps from
        now on are coefficients.

        Args:
            optimizers: As for :meth:`PartialUpdater.attach`.
            elementwise: You know that an optimizer that is not known here steps each
                element by that element alone.

        Raises:
            TrainingError: None owns them all, or it steps an element by others too.
        """
        wanted = {id(p) for p in self._params.values()}
        owning = [o for o in map(unwrap, optimizers) if wanted <= parameter_ids(o)]
        if not owning:
            raise TrainingError(
                "expected one attached optimizer that owns every weight that moves, as "
                f"they share coefficients, found none: {', '.join(self._params)} have "
                "to be in one; others may have what does not move"
            )
        check_elementwise(owning[0], elementwise=elementwise)
        check_groups(owning[0], wanted)
        self.detach()
        self._optimizer = owning[0]
        self._forget()
        self._handles = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]
        return self

    @torch.no_grad()
    def select(self) -> Mapping[str, float]:
        """Settle the scales; from now on the weights are those that devices will have.

        Returns:
            The scales, by name of the tensor.

        Raises:
            StepNotObservedError: Nothing has moved yet.
            TrainingError: Not in the first phase, or a coefficient is no number.
        """
        self._phase.expect(Phase.FULL, "select() comes once, after the first phase")
        self._latent.copy_(of_first(self._latent))
        if not self._steps or not self._latent.any():
            raise StepNotObservedError(
                "expected at least one optimizer step with gradients before select(), "
                "found none that moved anything: attach the optimizer that the loop "
                "really steps"
            )
        self._insist_on_numbers()
        self._weights.settle(self._latent)
        self._phase = Phase.SPARSE
        self._write()
        return self._weights.scales

    @torch.no_grad()
    def finish(self) -> Movement:
        """Detach, prove that a device gets these very weights, and return the movement.

        The weights are moved from the base by the runtime's own code, and compared.

        Raises:
            FrozenWeightChangedError: They differ: something else wrote them.
            TrainingError: The scales are not settled, or a coefficient is no number.
        """
        self._phase.expect(Phase.SPARSE, "finish() comes once, after select()")
        self.detach()
        self._forget()
        movement = self.movement()
        for name, expected in self._weights.on_device(movement):
            parameter = self._params[name]
            if count := int((parameter != expected).sum()):
                raise FrozenWeightChangedError(
                    f"{count} weights of {name!r} are not where the subspace moves "
                    "them: something other than the attached optimizer wrote them "
                    "(an optimizer that was made later, weight averaging, a checkpoint "
                    "loaded after select()); attach the optimizer that the loop steps "
                    "now, load the updater's state with the model's, and let other "
                    "writers start after finish()",
                    tensor=name,
                    count=count,
                )
            parameter.copy_(expected)  # -0.0 and denormal numbers too
        self._still.verify()
        self._phase = Phase.DONE
        return movement

    def movement(self) -> Movement:
        """Return how the weights have moved so far; ``finish()`` proves it.

        Raises:
            TrainingError: The scales are not settled, or a coefficient is no number.
        """
        if not self._weights.scales:
            raise TrainingError("nothing has moved for good before select()")
        self._insist_on_numbers()
        masks = {n: torch.zeros_like(b).bool() for n, b in self._base.items()}
        codes = self._weights.rounded(self._latent).cpu().numpy().astype(np.int16)
        return Movement(masks, self._weights.scales, codes, **self._kind)

    def _insist_on_numbers(self) -> None:
        if not self._latent.isfinite().all():
            raise TrainingError(
                "coefficients are no numbers any more (NaN or infinite); lower the "
                "learning rate, or look for broken samples"
            )

    def detach(self) -> None:
        """Let go of the optimizer, as :meth:`PartialUpdater.detach`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._give_up()

    def summary(self) -> str:
        """Say what moves: ``668672 weights in 3 tensors by 8192 coefficients``."""
        total, count = sum(p.numel() for p in self._params.values()), len(self._latent)
        bits = f"{self.bits} bit{'s' * (self.bits > 1)}"
        return (
            f"{total} weights in {len(self._params)} tensors by {count} coefficients "
            f"of {bits}, {self.taps} for each weight"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs, beside the states of model and optimizer.

        Tensors are not copies; save it before the next step.
        """
        return {
            **self._kind,
            "phase": self._phase.value,
            "steps": self._steps,
            "base": dict(self._base),
            "latent": self._latent,
            "unit": self._weights.unit,
            "scales": dict(self._weights.scales),
            "still": self._still.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; attach to the optimizer before.

        The optimizer's own state is loaded after :meth:`attach`, which forgets moments.

        Raises:
            TrainingError: The state belongs to other tensors, coefficients or signs.
        """
        for name, value in self._kind.items():  # earlier versions did not keep it
            if (found := state.get(name, value)) != value:
                raise TrainingError(
                    f"the state is of {name}={found}, this updater has {name}={value}: "
                    "make it with the same"
                )
        shapes = {n: tuple(t.shape) for n, t in state["base"].items()}
        mine = {n: tuple(t.shape) for n, t in self._base.items()}
        if shapes != mine or len(state["latent"]) != len(self._latent):
            raise TrainingError(
                f"the state is of {len(state['latent'])} coefficients and other "
                f"tensors than the {len(self._latent)} of this updater"
            )
        self._still.load_state_dict(state.get("still"))
        self._latents.give_up()
        self._weights.move_from(state["base"], float(state["unit"]), state["scales"])
        self._latent.copy_(state["latent"])
        self._phase, self._steps = Phase(state["phase"]), int(state["steps"])
        self._write()

    # A compiled step would trace the hooks.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._running.is_nested(optimizer):
            return None
        # A scheduler with a function for each group parts them after attach().
        check_groups(optimizer, {id(p) for p in self._params.values()})
        if self._running.begin(optimizer) and self._latents.are_lent:
            self._give_up()
            raise TrainingError(
                "the step before this one failed half way, and these gradients are of "
                "what it left behind; now the weights are as they were before it: "
                "compute gradients again, and step"
            )

        def once(_count: int) -> None:
            if self._latents.are_lent:
                self._give_up()
                raise TrainingError(
                    f"{type(optimizer).__name__} evaluates its closure twice a step, "
                    "which coefficients do not allow: choose another optimizer"
                )

        # Where there is a closure, gradients are computed inside of the step.
        arguments = with_closure(args, kwargs, before=once, after=self._enter)
        if arguments is None:
            self._enter()
        return arguments

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        if self._latents.are_lent:
            self._latents.take_back()
            self._write()
        self._running.end(optimizer)

    @torch.no_grad()
    def _give_up(self) -> None:
        """Bring the weights back to where they were before a step that failed."""
        if self._latents.are_lent:
            self._latents.give_up()
            self._write()

    def _enter(self) -> None:
        """Put the coefficients and their gradients where the optimizer steps."""
        found = [p.grad for p in self._params.values()]
        gradients = [None if g is None else g.to_dense() for g in found]
        if all(gradient is None for gradient in gradients):
            return
        self._steps += 1
        self._latents.lend(self._weights.fold(gradients))

    def _forget(self) -> None:
        if self._optimizer:
            forget(self._optimizer, self._params.values())

    def _write(self) -> None:
        """Make the weights anew from base and coefficients."""
        self._weights.write(self._params, self._latent)
