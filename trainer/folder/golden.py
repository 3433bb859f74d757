# SPDX-License-Identifier: Apache-2.0
"""Golden samples, brought to the form in which they travel with a model."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from edge_runtime.errors import ContractError, TrainingError
from edge_runtime.formats.contract import Contract, RawInputs
from edge_runtime.update.golden import Golden
from trainer.trees import plain


def golden_of(
    contract: Contract, inputs: RawInputs, labels: ArrayLike | None
) -> Golden:
    """Return the content of ``golden.npz``, which fits the contract.

    Raises:
        TrainingError: The inputs or labels do not.
    """
    try:
        by_name = contract.by_name(inputs)
    except ContractError as err:
        raise TrainingError(f"golden inputs: {err}") from err
    arrays = [_array(array) for array in by_name.values()]
    values = None if labels is None else _array(labels)
    if values is not None and not values.ndim:
        raise TrainingError("golden labels are one value, expected one for each sample")
    for spec, array in zip(contract.inputs, arrays, strict=True):
        shape, rows = list(spec.shape), array.shape[:1]
        sizes = zip(shape, array.shape, strict=False)
        fits = all(want in (None, found) for want, found in sizes)
        fits &= array.ndim == len(shape)
        if spec.has_batch and values is not None:
            fits &= rows == values.shape[:1]
        if not fits:
            count = "no" if values is None else len(values)
            raise TrainingError(
                f"golden inputs of shape {list(array.shape)} with {count} labels do "
                f"not fit the contract's input {spec.name!r} {shape}"
            )
    if values is not None:
        values = _labels(values, contract)
    return Golden(tuple(arrays), values)


def _array(values: ArrayLike) -> NDArray[Any]:
    if isinstance(values, Tensor):
        values = plain(values).cpu()
    return np.asarray(values)


def _labels(labels: NDArray[Any], contract: Contract) -> NDArray[Any]:
    """Return golden labels in the type that the contract's metric takes."""
    if not contract.label_metric:
        raise TrainingError(
            f"golden labels are compared by a metric, and task {contract.task} has "
            "none: give one to make_contract, or no labels"
        )
    if contract.task == "classification":
        return _classes(labels, len(contract.classes))
    if labels.dtype.kind not in "biuf" or not np.isfinite(labels).all():
        raise TrainingError(
            f"golden labels are {labels.dtype}, expected finite numbers"
        )
    if contract.task == "segmentation":
        return labels.astype(np.int64)
    return labels.astype(np.float32) if labels.dtype.kind in "bf" else labels


def _classes(labels: NDArray[Any], classes: int) -> NDArray[np.int64]:
    found = labels.astype(np.int64)
    if not len(found) or found.min() < 0 or found.max() >= classes:
        raise TrainingError(
            f"golden labels must be one or more of 0 to {classes - 1}, as the "
            f"contract has {classes} classes"
        )
    if labels.dtype.kind not in "biu" and (found != labels).any():
        raise TrainingError(
            f"golden labels of classes are whole numbers, these are {labels.dtype} "
            'with fractions; for values, make the contract with task="regression"'
        )
    return found
