# SPDX-License-Identifier: Apache-2.0
"""A round whose patch has a given size: how many weights it may change.

The number is found by packing, with the packager's own function, which is handed in.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from edge_runtime.errors import TrainingError
from edge_runtime.formats.weights import pack_weights
from trainer.export.tensors import weights_of
from trainer.method.scores import Evidence, Score
from trainer.method.selection import select_top_k
from trainer.rounds.sparse import fine_tune
from trainer.rounds.training import Masks, Pack, RoundTraining, new_updater

LEAST_USE = 0.95  # of the limit; an update below it gets more weights
AIM = 0.98  # of the limit: fine-tuning changes the size by about a per cent
CLOSE = 0.005  # of the limit, around AIM
MAX_PACKS = 16
MAX_ATTEMPTS = 8


@dataclass(frozen=True, slots=True)
class PatchBudget:
    """Limit of a patch's size, and the function that measures it.

    Attributes:
        pack: From base and target to the size of their patch in bytes.
        limit: Largest patch in bytes.
        ratio: Share of the weights to begin the search with.
    """

    pack: Pack
    limit: int
    ratio: float


def train_within(
    training: RoundTraining, epochs: int, score: Score, budget: PatchBudget
) -> Masks:
    """Train as Algorithm 1 does, with as many weights as a patch of a size can carry.

    After the full phase, the number of weights is chosen by packing the rewound update.
    The patch is packed again after fine-tuning; if it is over the limit, or leaves
    more than 5 % of it unused, fewer or more weights are fine-tuned from the same full
    phase.

    Args:
        training: Its ``best`` weights are the result.
        epochs: Of one phase.
        score: What weights are ranked by.
        budget: What the patch may take.

    Raises:
        TrainingError: The dense part alone is over the limit, or no number of weights
            gave a patch within it; but not where a later round starts from init.
    """
    updater = new_updater(training, score=score).attach(training.optimizer)
    training.run_phase("full", epochs, keep=False)
    named = training.model.named_parameters()
    current = {n: p.detach() for n, p in named if n in updater.base}
    scores = score(Evidence(updater.base, current, updater.loss_drop))
    full = _Full(
        training.checkpoint(), copy.deepcopy(updater.state_dict()), scores, score
    )
    updater.detach()
    sizes = _RewoundSizes(training, scores, budget.pack)
    total = sum(score.numel() for score in scores.values())
    if sizes(1) > budget.limit:
        why = f"{sizes(1)} are needed for the dense part alone"
        return _no_patch(training, full, budget.limit, why)
    k = find_k(sizes, max(1, int(budget.ratio * total)), total, budget.limit)
    return _fit(training, epochs, full, k, budget, sizes(1))


def _fit(
    training: RoundTraining,
    epochs: int,
    full: "_Full",
    k: int,
    budget: PatchBudget,
    dense_bytes: int,
) -> Masks:
    """Fine-tune the best ``k`` weights, and more or fewer until the patch fits."""
    total, limit = full.total, budget.limit
    low, high = 0, total + 1  # known to fit, known to be over
    fitting: tuple[Masks, Callable[[], None]] | None = None
    for _ in range(MAX_ATTEMPTS):
        masks = _attempt(training, epochs, full, k)
        if training.best is None and fitting is None:
            return masks  # nothing was better than the start: nothing to send
        if training.best is None:
            break
        size = budget.pack(training.start, training.best)
        if size > limit:
            high = k
        else:
            low, fitting = k, (masks, training.checkpoint())
            if size >= LEAST_USE * limit or k == total:
                return masks
        each = max(size - dense_bytes, 1) / k
        k = min(max(k + int((AIM * limit - size) / each), low + 1), high - 1)
        if low and high <= total:
            # Sizes jump where another epoch is the best one: halving ends, aiming may
            # go to and fro between the two sides of a jump.
            k = (low + high) // 2
        if not low < k < high:
            break
    if fitting is None:
        why = "no number of weights gave a patch within it"
        return _no_patch(training, full, limit, why)
    masks, as_it_was = fitting
    as_it_was()
    return masks


def _no_patch(training: RoundTraining, full: "_Full", limit: int, why: str) -> Masks:
    """End a training that found no patch within the budget, as one that falls short.

    From the init weights the dense part is larger than what later rounds send, and a
    round that tries them goes on from the deployed weights.

    Raises:
        TrainingError: It is the first round, or went on from deployed weights.
    """
    if training.number and training.from_init:
        full.go_back()  # where nothing was kept
        return {}
    raise TrainingError(
        f"the budget is {limit} bytes, but {why}; choose "
        f"{_smaller_dense(training)}a larger update.{training.limit_keys[0]}"
    )


def _smaller_dense(training: RoundTraining) -> str:
    """Return what would make the dense part smaller, where that is not set already."""
    # From the init weights the dense part trains also where the recipe freezes it.
    policy = "budget" if training.from_init else "freeze"
    is_set = training.update.dense in (policy, "budget")
    return "" if is_set else f'update.dense = "{policy}", or '


@dataclass(frozen=True, slots=True)
class _Full:
    """Where the full phase ended.

    Attributes:
        go_back: Takes model, optimizer and records there.
        updater: The updater's state there.
        scores: What its weights are ranked by.
        score: What they are ranked by when a selection is narrowed.
    """

    go_back: Callable[[], None]
    updater: Mapping[str, Any]
    scores: Mapping[str, Tensor]
    score: Score

    @property
    def total(self) -> int:
        """Weights to select from."""
        return sum(score.numel() for score in self.scores.values())


def _attempt(training: RoundTraining, epochs: int, full: _Full, k: int) -> Masks:
    """Fine-tune the best ``k`` weights, from the end of the full phase."""
    full.go_back()
    # Half a weight more: rounding must not make it one less.
    ratio = min(1.0, (k + 0.5) / full.total)
    updater = new_updater(training, ratio=ratio, score=full.score)
    updater.load_state_dict(copy.deepcopy(dict(full.updater)))
    updater.attach(training.optimizer)
    return fine_tune(training, updater, epochs, full.scores)


class _RewoundSizes:
    """The patch size of the rewound update, for a number of selected weights."""

    def __init__(
        self, training: RoundTraining, scores: Mapping[str, Tensor], pack: Pack
    ) -> None:
        self._training, self._scores, self._pack = training, scores, pack
        self._full = weights_of(training.model)
        self._known: dict[int, int] = {}

    def __call__(self, k: int) -> int:
        if k not in self._known:
            start, full = self._training.start, self._full
            arrays = dict(full)
            masks = select_top_k(self._scores, k)
            for name, mask in masks.items():
                chosen = mask.cpu().numpy()
                arrays[name] = np.where(chosen, full[name], start[name])
            weights = pack_weights(arrays, full.layout.types)
            self._training.form.settle(weights, start, masks)
            rewound = self._training.rounded(weights)
            self._known[k] = self._pack(start, rewound)
        return self._known[k]


def find_k(size_of: Callable[[int], int], first: int, total: int, limit: int) -> int:
    """Return how many weights fill a patch of a size to about 98 %.

    Args:
        size_of: Number of weights -> bytes, about proportional above ``size_of(1)``.
        first: Where to begin.
        total: How many weights there are.
        limit: Bytes; at least ``size_of(1)``.
    """
    low, high, k = 1, total + 1, min(first, total)
    for _ in range(MAX_PACKS):
        size = size_of(k)
        low, high = (k, high) if size <= (AIM + CLOSE) * limit else (low, k)
        if abs(size - AIM * limit) <= CLOSE * limit or high - low <= 1:
            break
        each = max(size - size_of(1), 1) / k
        guess = k + round((AIM * limit - size) / each)
        # A guess outside of what is known is not worth a packing: halve instead.
        k = guess if low < guess < high else (low + high) // 2
    return low
