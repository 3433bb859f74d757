# SPDX-License-Identifier: Apache-2.0
"""How much each weight contributed to the drop of the loss.

A score is any function from :class:`Evidence` to one tensor a weight tensor; higher is
better. The three of the paper (Qu, Liu, Thiele, *Deep Partial Updating*, ECCV 2022,
"metrics for rewinding") are :data:`DPU`, :data:`GCPU` and :data:`LCPU`.
:mod:`trainer.method.selection` takes the best of them.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edge_runtime.errors import TrainingError

Named = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the full phase showed about the selectable weights. Nothing is a copy.

    Attributes:
        base: The weights that it started from.
        current: The weights that it ended with.
        loss_drop: For every weight the sum over all steps of ``-step * gradient``: to
            first order, by how much moving this weight lowered the loss. The gradient
            is the loop's, without the optimizer's own weight decay. float32 or wider.
    """

    base: Mapping[str, Tensor]
    current: Mapping[str, Tensor]
    loss_drop: Mapping[str, Tensor]


Score = Callable[[Evidence], Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class DPUScore:
    """The paper's score: ``lam * gc / sum(gc) + (1 - lam) * lc / sum(lc)``.

    ``gc`` is the global contribution, the squared displacement from the base; ``lc`` is
    the local contribution, ``Evidence.loss_drop``. Both sums run over all selectable
    tensors. Where the paper leaves the sums open:

    - a sum of zero: that term contributes nothing; if no term is left, it is an error;
    - a sum that is not finite: an error, training has diverged;
    - a negative sum of ``lc`` (the phase raised the loss): its magnitude is taken, or
      the ranking would be turned upside down.

    Attributes:
        lam: Share of the global contribution, from 0 to 1.
    """

    lam: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.lam <= 1:
            raise TrainingError(
                f"expected a share of the global contribution (lam) from 0 to 1, "
                f"found {self.lam}"
            )

    @torch.no_grad()
    def __call__(self, evidence: Evidence) -> dict[str, Tensor]:
        """Return one score tensor for each weight tensor, float32 or wider.

        Raises:
            TrainingError: Weights or gradients are not finite, or nothing moved.
        """
        scores = {
            name: (_wide(now) - evidence.base[name]).square_()
            for name, now in evidence.current.items()
        }
        gc_sum = _finite_sum(scores, "global contribution (squared displacement)")
        lc_sum = 0.0
        if self.lam < 1:
            lc_sum = abs(_finite_sum(evidence.loss_drop, "local contribution"))
        if not (self.lam and gc_sum) and not lc_sum:
            raise TrainingError(
                f"there is nothing to rank: with lam={self.lam} the contributions of "
                "all weights add up to zero; check that the learning rate is not 0 "
                "and that mixed precision did not skip every step"
            )
        for name, score in scores.items():
            # Sums of contributions can be tiny: divide, as 1 / sum may overflow.
            score.mul_(self.lam).div_(gc_sum or 1.0)
            if lc_sum:
                score.add_(evidence.loss_drop[name] / lc_sum, alpha=1 - self.lam)
        return scores


DPU = DPUScore(0.5)
GCPU = DPUScore(1.0)
LCPU = DPUScore(0.0)


def magnitude_scores(named: Named) -> dict[str, Tensor]:
    """Return the magnitude of every weight as its score."""
    return {name: tensor.detach().abs() for name, tensor in dict(named).items()}


def _wide(tensor: Tensor) -> Tensor:
    """Return the values in float32, or float64 where they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _finite_sum(tensors: Mapping[str, Tensor], what: str) -> float:
    """Return the sum over all tensors; one that is not finite is an error."""
    total = 0.0
    for name, tensor in tensors.items():
        part = tensor.sum().item()
        if not math.isfinite(part):
            raise TrainingError(
                f"the {what} of {name!r} adds up to {part}: training diverged; "
                "lower the learning rate or clip the gradients"
            )
        total += part
    return total


def fisher_scores(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Any]],
    names: Iterable[str],
    *,
    loss: Callable[[Any, Any], Tensor] = functional.cross_entropy,
) -> dict[str, Tensor]:
    """Return each weight's squared gradient, summed over batches, as its score.

    Fisher information, as in FISH masks (Sung, Nair, Raffel, NeurIPS 2021).

    With batches of one sample this is the diagonal of the empirical Fisher information;
    larger ones are faster and average within a batch before they square. The model is
    left as it was, gradients included, but in eval mode.

    Args:
        model: At the weights to be scored; returns what ``loss`` takes.
        batches: Inputs and labels.
        names: Of the parameters to score, such as ``updater.base``.
        loss: From outputs and labels to the mean loss.
    """
    model.eval()
    known = dict(model.named_parameters())
    chosen = {name: known[name] for name in names}
    scores = {name: torch.zeros_like(p) for name, p in chosen.items()}
    for inputs, labels in batches:
        gradients = torch.autograd.grad(
            loss(model(inputs), labels),
            list(chosen.values()),
            allow_unused=True,
            materialize_grads=True,
        )
        for name, gradient in zip(chosen, gradients, strict=True):
            dense = gradient.to_dense()
            scores[name].addcmul_(dense, dense)
    return scores
