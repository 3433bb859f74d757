"""How much each weight contributed to the drop of the loss, and which ones to keep.

A score is any function from :class:`Evidence` to one tensor a weight tensor; higher is
better. The three of the paper (Qu, Liu, Thiele, *Deep Partial Updating*, ECCV 2022,
"metrics for rewinding") are :data:`DPU`, :data:`GCPU` and :data:`LCPU`.

Selection is an exact, global top-k with one stated tie rule. Ties are common (inputs
that never vary give equal gradients), so without a rule two machines would disagree.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edge_runtime.errors import TrainingError

_DIGIT_BITS = 16
# Entries looked at together: temporaries stay below a few MB, whatever the model.
_CHUNK = 1 << 18

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


def random_scores(
    named: Named, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Return independent uniform scores: a random selection over all tensors.

    Args:
        named: The tensors to score, such as ``updater.base``.
        generator: Where the numbers come from; a CPU one gives the same on any device.
    """
    where = generator.device if generator else None
    return {
        name: torch.rand(tensor.shape, generator=generator, device=where).to(
            tensor.device
        )
        for name, tensor in dict(named).items()
    }


def random_masks(
    named: Named, ratio: float, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Return random masks with the same share of every tensor: the paper's RPU.

    As in the paper's code a tensor of ``n`` weights gets ``round(ratio * n)``, so the
    total can differ from ``int(ratio * N)`` by a few.

    Args:
        named: The tensors to make masks for, such as ``updater.base``.
        ratio: Share of the weights, above 0 and at most 1.
        generator: Where the numbers come from; a CPU one gives the same on any device.

    Raises:
        TrainingError: The ratio is out of range, or selects no weight at all.
    """
    tensors = dict(named)
    check_ratio(ratio)
    where = generator.device if generator else None
    masks = {}
    for name, tensor in tensors.items():
        order = torch.randperm(tensor.numel(), generator=generator, device=where)
        mask = torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device)
        mask.view(-1)[order[: round(ratio * tensor.numel())].to(mask.device)] = True
        masks[name] = mask
    if not any(bool(mask.any()) for mask in masks.values()):
        raise TrainingError(
            f"ratio {ratio} selects no weight of any tensor; choose a larger one"
        )
    return masks


def check_ratio(ratio: float) -> None:
    """Refuse a ratio that is not above 0 and at most 1.

    Raises:
        TrainingError: It is not.
    """
    if not 0 < ratio <= 1:
        raise TrainingError(
            f"expected a ratio above 0 and at most 1 (0.01 is one weight in a "
            f"hundred), found {ratio}"
        )


@torch.no_grad()
def select_top_k(scores: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """Return masks of the ``k`` best scores over all tensors together, exactly.

    Among equal scores the first wins: tensors in the mapping's order, entries in C
    order. -0.0 equals 0.0; infinities are allowed. It runs where the tensors are,
    twice over the data (four times for float64), and beside the masks it needs a few
    MB whatever the model: the threshold is found by counting 16 bits at a time, which
    is tens of times faster than sorting.

    Args:
        scores: Floating-point tensors of any shapes.
        k: How many to select.

    Returns:
        Boolean masks of the scores' shapes; exactly ``k`` entries are true.

    Raises:
        TrainingError: ``k`` is not from 1 to the number of scores, or a score is NaN
            or not floating-point.
    """
    for name, score in scores.items():
        if not score.is_floating_point() or bool(score.isnan().any()):
            raise TrainingError(
                f"expected floating-point scores without NaN, found "
                f"{'NaN' if score.is_floating_point() else score.dtype} in {name!r}; "
                "if training diverged, lower the learning rate"
            )
    total = sum(score.numel() for score in scores.values())
    if not 1 <= k <= total:
        raise TrainingError(f"expected to select 1 to {total} weights, found {k}")
    widest = torch.float32
    if any(score.dtype == torch.float64 for score in scores.values()):
        widest = torch.float64
    comparable = {name: score.to(widest) for name, score in scores.items()}
    threshold, ties = _threshold(comparable, k, widest)
    masks = {}
    for name, score in comparable.items():
        mask = (score > threshold).contiguous()
        flat = mask.view(-1)
        for start, chunk in _chunks(score):
            if not ties:
                break
            tied = (chunk == threshold).nonzero().squeeze(1)[:ties]
            flat[tied + start] = True
            ties -= len(tied)
        masks[name] = mask
    return masks


def _threshold(
    scores: Mapping[str, Tensor], k: int, dtype: torch.dtype
) -> tuple[float, int]:
    """Return the k-th largest score and how many equal to it are among the k best."""
    size = 1 << _DIGIT_BITS
    low = -(size >> 1)  # smallest key of the searched range, in units of the digit
    for shift in range(torch.finfo(dtype).bits - _DIGIT_BITS, -1, -_DIGIT_BITS):
        counts = torch.zeros(size, dtype=torch.int64)
        for score in scores.values():
            for _, chunk in _chunks(score):
                digits = (_sortable(chunk) >> shift) - low
                # All are inside for the first digit; later, those of its bucket.
                inside = digits[(digits >= 0) & (digits < size)]
                counts += torch.bincount(inside, minlength=size).cpu()
        at_least = counts.flip(0).cumsum(0).flip(0)  # scores in this bucket or above
        digit = int((at_least >= k).sum()) - 1
        k -= int(at_least[digit] - counts[digit])
        low = (low + digit) << (_DIGIT_BITS if shift else 0)
    key = torch.tensor([low], dtype=_bits_type(dtype))
    return _flip_negatives(key).view(dtype).item(), k


def _sortable(values: Tensor) -> Tensor:
    """Return integers that sort as the floating-point values do."""
    positive_zero = values + 0.0  # -0.0 equals 0.0 but has other bits
    return _flip_negatives(positive_zero.view(_bits_type(values.dtype)))


def _flip_negatives(bits: Tensor) -> Tensor:
    """Map IEEE 754 bits to two's complement order, and back."""
    info = torch.iinfo(bits.dtype)
    return bits ^ ((bits >> (info.bits - 1)) & info.max)


def _bits_type(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype == torch.float64 else torch.int32


def _chunks(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield a tensor in C order as flat pieces, each with its first index."""
    for i, chunk in enumerate(torch.split(tensor.reshape(-1), _CHUNK)):
        yield i * _CHUNK, chunk


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
