# SPDX-License-Identifier: Apache-2.0
"""Which weights to keep: the best of all tensors together, or a random share of each.

The global top-k is exact and has one stated tie rule. Ties are common (inputs that
never vary give equal gradients), so without a rule two machines would disagree.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from edge_runtime.errors import TrainingError
from trainer.method.scores import Named

_DIGIT_BITS = 16
# Entries looked at together: temporaries stay below a few MB, whatever the model; on a
# GPU below a few hundred, as each piece costs some launches there.
_CHUNKS = {"cpu": 1 << 18}
_GPU_CHUNK = 1 << 24


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


def count_of(ratio: float, total: int) -> int:
    """Return how many of all selectable weights a ratio selects, rounded down.

    Raises:
        TrainingError: The ratio is out of range, or selects no weight at all.
    """
    check_ratio(ratio)
    if int(ratio * total) == 0:
        raise TrainingError(
            f"ratio {ratio} of {total} selectable weights selects none; "
            f"choose more than {1 / total:.2g}"
        )
    return int(ratio * total)


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
        parts = []
        for score in scores.values():
            count = torch.zeros(size, dtype=torch.int64, device=score.device)
            for _, chunk in _chunks(score):
                digits = (_sortable(chunk) >> shift) - low
                # All are inside for the first digit; later, those of its bucket.
                inside = digits[(digits >= 0) & (digits < size)]
                count += torch.bincount(inside, minlength=size)
            parts.append(count.cpu())
        counts = torch.stack(parts).sum(0)
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
    size = _CHUNKS.get(tensor.device.type, _GPU_CHUNK)
    for i, chunk in enumerate(torch.split(tensor.reshape(-1), size)):
        yield i * size, chunk


def check_fit(
    tensors: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> None:
    """Refuse tensors that are not exactly one for each selectable tensor.

    Args:
        tensors: Scores or masks, by name.
        params: The selectable tensors, by name.
        dtype: What the tensors must be; None for any.

    Raises:
        TrainingError: A tensor is missing, unknown, or of another shape or type.
    """
    odd = tensors.keys() ^ params.keys()
    if odd:
        raise TrainingError(
            f"expected one tensor for each selectable weight tensor "
            f"({', '.join(params)}), found too many or too few: "
            f"{', '.join(sorted(odd))}"
        )
    for name, p in params.items():
        found = tensors[name]
        if found.shape != p.shape or dtype not in (None, found.dtype):
            raise TrainingError(
                f"expected {dtype or 'a tensor'} of shape {tuple(p.shape)} for "
                f"{name!r}, found {found.dtype} of shape {tuple(found.shape)}"
            )
