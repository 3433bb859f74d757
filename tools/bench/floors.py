# SPDX-License-Identifier: Apache-2.0
"""What no coder can be expected to beat: floors of positions and values of a round.

The entropy of the index, ``log2 C(n, m)`` summed over tensors, is no floor, as masks
cluster by row, column and kernel. The floor used here is the code length of a context
mixer: for every element of the mask, probabilities from what has been coded before it
(density of the tensor, of its row so far, of its column, its kernel, its neighbours,
and counts in three tables of contexts) are mixed by a logistic regression whose weights
are fitted to the tensor and paid for with 12 bits each.

The floor of the values is the cross-validated code length of the best of a family of
histograms with bins of equal mass: of the new value or of the step, given nothing, the
tensor, the octile of the base's magnitude, or both. A density over real numbers gives
bits by the spacing of float32 at the new value.

Neither is a proof. Both know the round's statistics better than a coder can that has to
send them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

_GROUP = 8  # neighbours in a row of a matrix; in a convolution it is a kernel
_FEATURES = 9
_WEIGHT_BITS = 12
_FIT_ELEMENTS = 1 << 20
_LEAST = 1e-5  # probabilities are kept this far from 0 and 1
_BINS = (8, 16, 32, 64, 128)
_FOLDS = 5


def entropy_bits(size: int, count: int) -> float:
    """Return log2 of the number of ways to choose ``count`` of ``size``."""
    ways = (
        math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)
    )
    return ways / math.log(2)


# Index -------------------------------------------------------------------------------


def index_floor_bits(shape: Sequence[int], positions: NDArray[np.int64]) -> float:
    """Return the bits that the mask of one tensor takes.

    Args:
        shape: The tensor's.
        positions: Flat positions of the changed elements.
    """
    size = math.prod(shape)
    entropy = entropy_bits(size, len(positions))
    if not 0 < len(positions) < size or len(shape) < 2:
        return entropy
    mask, valid = _grouped(shape, positions)
    features = _features(mask, valid)
    order = mask.transpose(0, 2, 1)  # as coded: one element of every group at a time
    used = np.broadcast_to(valid.T, order.shape).ravel()
    columns = features.transpose(2, 0, 1, 3).reshape(_FEATURES, -1)[:, used]
    mixed = _mix(columns, order.ravel()[used]) + _FEATURES * _WEIGHT_BITS
    return min(mixed + math.log2(size), entropy)


def _grouped(shape: Sequence[int], positions: NDArray[np.int64]) -> tuple[Mask, Mask]:
    """Return the mask as (rows, groups, width), and which elements are no padding."""
    width = math.prod(shape[2:]) if len(shape) > 2 else _GROUP
    columns = math.prod(shape[1:])
    padding = -columns % width
    flat = np.zeros(math.prod(shape), bool)
    flat[positions] = True
    mask = np.pad(flat.reshape(shape[0], columns), ((0, 0), (0, padding)))
    valid = np.arange(columns + padding) < columns
    return mask.reshape(shape[0], -1, width), valid.reshape(-1, width)


class _Table:
    """Adaptive probabilities by context."""

    def __init__(self, shape: tuple[int, ...], density: float) -> None:
        self._counts = np.full((*shape, 2), 0.5)
        self._counts[..., 0] *= density

    def __getitem__(self, context: tuple[Any, ...]) -> Floats:
        counts: Floats = self._counts[context]
        return counts[:, 0] / counts[:, 1]

    def learn(self, context: tuple[Any, ...], ones: Mask, seen: Mask) -> None:
        np.add.at(self._counts, (*context, 0), ones.astype(float))
        np.add.at(self._counts, (*context, 1), seen.astype(float))


def _features(mask: Mask, valid: Mask) -> NDArray[np.float32]:
    """Return log odds of each element, from what is coded before it.

    Rows are coded one after the other; in a row the first element of all groups, then
    the second of all, and so on.

    Args:
        mask: (rows, groups, width).
        valid: (groups, width).

    Returns:
        (rows, width, features, groups)
    """
    rows, groups, width = mask.shape
    density = mask.mean()
    in_kernel = _Table((width, 4, 2, 3), density)
    in_row = _Table((width, 4, 4), density)
    in_group = _Table((4, 5, 5), density)
    out = np.empty((rows, width, _FEATURES, groups), np.float32)
    ones, seen = 1.0, 1.0 / density
    column_ones, group_ones = np.zeros((groups, width)), np.zeros(groups)
    above, last_row = np.zeros((groups, width), bool), density
    for r in range(rows):
        row_ones, row_seen, found = 0.0, 0.0, np.zeros(groups, np.int64)
        for k in range(width):
            element, used = mask[r, :, k], valid[:, k]
            tensor = ones / seen
            row = (row_ones + 3 * tensor) / (row_seen + 3)
            group = (group_ones + 2 * tensor) / (r * width + 2)
            few = np.minimum(found, 3)
            beside = np.minimum(np.append(found[1:], 0) + np.append(0, found[:-1]), 3)
            kernel_context = (k, few, above[:, k] * 1, np.minimum(above.sum(1), 2))
            row_context = (k, few, beside)
            group_context = (few, _level(row, tensor), _level(group, tensor))
            probabilities = (
                tensor,
                (column_ones[:, k] + 2 * tensor) / (r + 2),
                group,
                row,
                in_kernel[kernel_context],
                in_row[row_context],
                in_group[group_context],
                last_row,
            )
            out[r, k, 0] = 1.0
            for feature, probability in enumerate(probabilities, 1):
                p = np.clip(probability, _LEAST, 1 - _LEAST)
                out[r, k, feature] = np.log(p / (1 - p))
            in_kernel.learn(kernel_context, element, used)
            in_row.learn(row_context, element, used)
            in_group.learn(group_context, element, used)
            new = np.array([element.sum(), used.sum()], float)
            ones, seen = ones + new[0], seen + new[1]
            row_ones, row_seen = row_ones + new[0], row_seen + new[1]
            column_ones[:, k] += element
            found = found + element
        group_ones += found
        above, last_row = mask[r], (row_ones + ones / seen) / (row_seen + 1)
    return out


def _level(density: Any, average: float) -> NDArray[np.int64]:
    ratio = np.log2(np.maximum(density, 1e-9) / average)
    return np.atleast_1d(np.clip(ratio + 2, 0, 4).astype(np.int64))


def _mix(columns: NDArray[np.float32], ones: Mask) -> float:
    """Return the bits of ``ones`` under the best logistic mixture of the columns."""
    step = len(ones) // _FIT_ELEMENTS + 1
    x, y = columns[:, ::step].astype(np.float64), ones[::step]
    weights = np.zeros(_FEATURES)
    weights[5:8] = 1 / 3
    for _ in range(8):  # Newton
        p = 1 / (1 + np.exp(-np.clip(weights @ x, -16, 16)))
        curvature = (x * (p * (1 - p))) @ x.T
        curvature += np.eye(_FEATURES) * max(1e-2, 1e-6 * np.trace(curvature))
        weights += np.clip(np.linalg.solve(curvature, x @ (y - p)), -1, 1)
    odds = np.clip(weights @ columns, -16, 16)
    bits = np.logaddexp(0, np.where(ones, -odds, odds)).sum() / math.log(2)
    return float(bits)


# Values ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Moves:
    """float32 values that change, of several tensors.

    Attributes:
        base: What they were.
        target: What they become.
        tensor: The number of each value's tensor.
    """

    base: NDArray[np.float32]
    target: NDArray[np.float32]
    tensor: NDArray[np.int64]


def value_floor_bits(moves: Moves) -> tuple[float, str]:
    """Return the bits of the new values under the best model, and its name."""
    if not len(moves.base):
        return 0.0, "none"
    base, target = moves.base.astype(np.float64), moves.target.astype(np.float64)
    spacing = -np.log2(np.spacing(np.abs(moves.target).clip(2.0**-126))).sum()
    size = np.abs(base)
    octile = np.searchsorted(np.quantile(size, np.arange(1, 8) / 8), size)
    variables = {"value": target, "step": target - base}
    contexts = {
        "": np.zeros(len(base), np.int64),
        " given tensor": moves.tensor,
        " given base octile": octile,
        " given tensor and base octile": moves.tensor * 8 + octile,
    }
    return min(
        (float(_cross_validated(x, context, bins) + spacing), f"{name}{given}, {bins}")
        for name, x in variables.items()
        for given, context in contexts.items()
        for bins in _BINS
    )


def _cross_validated(x: Floats, context: NDArray[np.int64], bins: int) -> float:
    """Return -log2 of the density of ``x``, by histograms that have not seen it."""
    fold = np.random.default_rng(0).integers(0, _FOLDS, len(x))
    total = 0.0
    order = np.argsort(context, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(context[order])) + 1):
        for held_out in range(_FOLDS):
            tested = x[members[fold[members] == held_out]]
            known = x[members[fold[members] != held_out]]
            if len(known) < 8:  # too few to learn from
                known = x[fold != held_out]
            if len(tested):
                total += _log_loss(tested, known, bins, (x.min(), x.max()))
    return total


def _log_loss(
    tested: Floats, known: Floats, bins: int, ends: tuple[float, float]
) -> float:
    share = np.linspace(0, 1, min(bins, max(2, len(known) // 4)) + 1)
    edges = np.quantile(known, share)
    margin = (edges[-1] - edges[0]) / 2 + 1e-12
    outer = [min(edges[0] - margin, ends[0] - 1e-9), edges[0] - margin]
    outer += [edges[-1] + margin, max(edges[-1] + margin, ends[1] + 1e-9)]
    edges = np.unique(np.concatenate([edges, outer]))
    counts = np.histogram(known, edges)[0] + 0.5
    density = counts / counts.sum() / np.diff(edges)
    found = np.searchsorted(edges, tested, side="right") - 1
    return float(-np.log2(density[np.clip(found, 0, len(density) - 1)]).sum())
