# SPDX-License-Identifier: Apache-2.0
"""How good outputs are, held against labels: the metrics that a contract can name.

One implementation for devices, the packager and the trainer. A metric adds up parts
and makes one number of the sums: batches and processes give what the whole would.

::

    sums = METRICS["mae"].sums(outputs, labels)  # of a batch; more may be added
    METRICS["mae"].value(sums)

Labels of classes are whole numbers, without the axis on which the output has a number
for each class: the last one for ``top1``; else axis 1 as in torch, or the last one. An
output as wide as its labels (or with one number for each) answers yes or no: yes is
above the threshold, which is 0 for logits. Negative labels of several axes (torch
writes -100) do not count.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ContractError
from edge_runtime.formats import contract

Array = NDArray[Any]
Sums = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Metric:
    """One way to hold outputs against labels.

    Attributes:
        name: As a contract has it.
        parts: From output, labels and threshold to what is added up.
        value: From the sums to the metric.
        labels: From an output and the threshold to the labels that it would have right.
    """

    name: str
    parts: Callable[[Array, Array, float], Sums]
    value: Callable[[Sums], float]
    labels: Callable[[Array, float], Array]

    @property
    def higher(self) -> bool:
        """Whether more is better."""
        return contract.METRICS[self.name]

    @property
    def range(self) -> tuple[float, float]:
        """Its least and its largest value."""
        return contract.RANGES.get(self.name, (0.0, 1.0))

    @property
    def title(self) -> str:
        """What records and reports call it."""
        return "accuracy" if self.name == "top1" else self.name

    @property
    def better(self) -> str:
        """Which values are better: ``"higher"`` or ``"lower"`` ones."""
        return "higher" if self.higher else "lower"

    def sums(self, output: Array, labels: Array, threshold: float = 0.0) -> Sums:
        """Return the parts of a batch; those of several batches are added.

        Raises:
            ContractError: Labels and output do not fit each other.
        """
        for what, values in (("outputs", output), ("labels", labels)):
            if values.dtype.kind not in "biuf":
                raise ContractError(
                    f"{self.name} compares numbers, these {what} are {values.dtype}"
                )
        if not output.size:
            raise _misfit(self.name, output, labels)
        return self.parts(output, labels, threshold)

    def score(self, output: Array, labels: Array, threshold: float = 0.0) -> float:
        """Return the metric of all samples at once.

        Raises:
            ContractError: Labels and output do not fit each other, or there are none.
        """
        if not labels.size:
            raise ContractError(f"there are no labels to compute {self.name} with")
        return self.value(self.sums(output, labels, threshold))

    def reaches(self, value: float, bound: float) -> bool:
        """Tell whether a value is as good as a bound; NaN never is."""
        return value >= bound if self.higher else value <= bound

    def shown(self, sums: Sums) -> str:
        """Return what sums came to, in words."""
        value = f"{self.title} {self.value(sums):.6g}"
        if self.value is not _mean or self.parts in (_absolute, _cosine):
            return value
        return f"{value} ({sums[0]:.0f} of {sums[1]:.0f} right)"

    def asked(self, bound: float) -> str:
        """Return what a bound asks for, in words."""
        return f"{'at least' if self.higher else 'at most'} {bound:.6g}"


def _top1(output: Array, labels: Array, _threshold: float) -> Sums:
    answers = _largest(output, 0.0)
    if answers.shape != labels.shape or labels.dtype.kind not in "iu":
        raise _misfit("top1", output, labels)
    return np.array([(answers == labels).sum(), labels.size], np.float64)


def _elements(output: Array, labels: Array, threshold: float) -> Sums:
    answers, true, _ = _classes("element_accuracy", output, labels, threshold)
    return np.array([(answers == true).sum(), true.size], np.float64)


def _overlap(output: Array, labels: Array, threshold: float) -> Sums:
    """Return for each class how often it is answered rightly, and answered or true."""
    answers, true, classes = _classes("iou", output, labels, threshold)
    counts = (np.bincount(v, minlength=classes) for v in (answers, true))
    both = np.bincount(true[answers == true], minlength=classes)
    return np.stack([both, sum(counts) - both]).astype(np.float64)


def _absolute(output: Array, labels: Array, _threshold: float) -> Sums:
    found, wanted = _alike("mae", output, labels)
    return np.array([np.abs(found - wanted).sum(), wanted.size])


def _cosine(output: Array, labels: Array, _threshold: float) -> Sums:
    found, wanted = (v.reshape(len(v), -1) for v in _alike("cosine", output, labels))
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
    products = (found * wanted).sum(axis=1)
    # A vector of zeros points nowhere: 0.
    known = np.divide(products, lengths, where=lengths > 0, out=np.zeros(len(found)))
    return np.array([known.sum(), len(found)])


def _mean(sums: Sums) -> float:
    return float(sums[0] / sums[1])


def _mean_overlap(sums: Sums) -> float:
    """Return the mean over the classes that occur."""
    both, either = sums
    return float((both[either > 0] / either[either > 0]).mean())


def _largest(output: Array, _threshold: float) -> Array:
    return np.asarray(output.argmax(axis=-1)) if output.ndim else np.array(0)


def _maps(output: Array, threshold: float) -> Array:
    """Return class maps: of the classes on axis 1, or yes and no where it is one."""
    if output.ndim < 2 or output.shape[1] == 1:
        return _yes(output, threshold)
    return np.asarray(output.argmax(axis=1))


def _yes(output: Array, threshold: float) -> Array:
    return (output > threshold).astype(np.int64)


def _itself(output: Array, _threshold: float) -> Array:
    return output


def _alike(name: str, output: Array, labels: Array) -> tuple[Array, Array]:
    """Return both in float64 and in one shape; a lone value needs no axis."""
    found, wanted = output.astype(np.float64), labels.astype(np.float64)
    of_one = (*found.shape, 1) == wanted.shape or found.shape == (*wanted.shape, 1)
    if not found.ndim or not (of_one or found.shape == wanted.shape):
        raise _misfit(name, output, labels)
    return found, wanted.reshape(found.shape)


def _classes(
    name: str, output: Array, labels: Array, threshold: float
) -> tuple[Array, Array, int]:
    """Return answers and truth, flat, and how many classes there are."""
    axes = [1, -1] if output.ndim > 1 else []
    chosen = [a for a in axes if _without(output.shape, a) == labels.shape]
    if output.shape == labels.shape and labels.ndim:
        answers, classes = _yes(output, threshold), 2
    elif not chosen:
        raise _misfit(name, output, labels)
    elif output.shape[chosen[0]] == 1:
        answers, classes = _yes(output, threshold).reshape(labels.shape), 2
    else:
        answers, classes = output.argmax(axis=chosen[0]), output.shape[chosen[0]]
    true = labels.astype(np.int64)
    if (true != labels).any():
        raise ContractError(
            f"{name} takes labels that are whole numbers, these are {labels.dtype} "
            "with a fraction"
        )
    if true.max(initial=0) >= classes:
        raise ContractError(
            f"{name}: there is a label {true.max()}, the output "
            f"({_shown(output)}) has classes 0 to {classes - 1}"
        )
    counts = true >= 0
    return answers[counts], true[counts], classes


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis:][1:]


def _misfit(name: str, output: Array, labels: Array) -> ContractError:
    return ContractError(
        f"{name} cannot hold an output of {_shown(output)} against labels of "
        f"{_shown(labels)}"
    )


def _shown(array: Array) -> str:
    return f"{array.dtype} of shape {list(array.shape)}"


METRICS = {
    metric.name: metric
    for metric in (
        Metric("top1", _top1, _mean, _largest),
        Metric("element_accuracy", _elements, _mean, _yes),
        Metric("iou", _overlap, _mean_overlap, _maps),
        Metric("cosine", _cosine, _mean, _itself),
        Metric("mae", _absolute, _mean, _itself),
    )
}
