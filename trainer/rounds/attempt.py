# SPDX-License-Identifier: Apache-2.0
"""The result of one training attempt of a round, and what it changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edge_runtime.formats.subspace import Term
from edge_runtime.formats.weights import Weights
from trainer.export.tensors import changed_elements
from trainer.rounds.training import Masks


@dataclass(frozen=True, slots=True)
class Attempt:
    """Result of one training attempt of a round.

    The training itself, with its model and optimizer, is not kept.

    Attributes:
        values: Of the judge's metric on validation, by name.
        steps: Of the grid, by name of the tensor.
        ratio: Share of the weights that was selected in this training.
        start: What it started from.
        still: Masks of the frozen tensors: none of their elements may change.
        parent: What devices would update from.
        masks: What was selected, or has changed since the parent.
        best: The best weights; what it started from where none are better.
        new: Weights to deploy; None where they are no better than what there is, or
            devices would refuse them, or wait for a smaller patch.
        missed: What the golden samples gave, where that is short of the bound.
        waits: Size of their patch in bytes, where it is over the budget, so that they
            are not deployed yet; else 0.
        epochs: The records of its epochs, with what it started from.
        terms: The subspaces that lead from the parent to the best weights.
    """

    values: Mapping[str, float]
    steps: Mapping[str, float]
    ratio: float
    start: Weights
    still: Masks
    parent: Weights
    masks: Masks
    best: Weights
    new: Weights | None
    missed: float | None
    waits: int
    epochs: Sequence[Mapping[str, Any]]
    terms: tuple[Term, ...]


def with_changes(masks: Masks, parent: Weights, target: Weights) -> Masks:
    """Return masks that also hold what has changed since the parent, as bits."""
    changed = {name: changed_elements(parent, target, name) for name in masks}
    return {
        name: mask | torch.from_numpy(changed[name]).to(mask.device)
        for name, mask in masks.items()
    }


def counts(start: Weights, target: Weights, masks: Masks) -> dict[str, int]:
    """Count selectable weights: all, selected, and changed (compared as bits)."""
    changed = (changed_elements(start, target, name) for name in masks)
    return {
        "weights": sum(mask.numel() for mask in masks.values()),
        "selected": sum(int(mask.sum()) for mask in masks.values()),
        "changed": sum(int(elements.sum()) for elements in changed),
    }
