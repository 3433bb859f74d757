# SPDX-License-Identifier: Apache-2.0
"""Which weights a new round may change, held against the round that it leads from."""

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_runtime.errors import FrozenWeightChangedError, TrainingError
from edge_runtime.formats.layout import Layout
from edge_runtime.formats.model_folder import MODEL_NAME, WEIGHTS_NAME
from edge_runtime.formats.weights import Weights
from trainer.export.tensors import changed_elements


def check_changes(
    parent: Weights,
    weights: Weights,
    masks: Mapping[str, Tensor],
    *,
    source: Path,
    dense: Collection[str] = (),
) -> None:
    """Insist that nothing changed outside of the masks, compared as bits.

    Args:
        parent: The weights that devices hold before the round.
        weights: The new ones.
        masks: True where a weight may change. Tensors of one axis without a mask are
            the dense part.
        source: The file or folder of the parent, for the message.
        dense: Tensors of several axes that may change as a whole.

    Raises:
        FrozenWeightChangedError: A weight outside of its mask changed, or a tensor of
            several axes that has no mask; the first one is named.
        TrainingError: A changed value is no number.
    """
    for tensor in parent.layout.tensors:
        name = tensor.name
        changed = changed_elements(parent, weights, name)
        if not changed.any():
            continue
        _check_finite(name, weights, changed)
        if name in masks:
            count = int((changed & ~masks[name].cpu().numpy()).sum())
            if count:
                raise FrozenWeightChangedError(
                    f"{count} weights of {name!r} outside of its mask differ from "
                    f"those of {source}; nothing was written. The model does not hold "
                    "what finish() verified: a checkpoint was loaded, averaged weights "
                    "were copied into it (begin them after select(), and rewind() them "
                    "before they are published; in a subspace there are none), or it "
                    "was not at the last round's weights when the updater was made. To "
                    "go on, put the last good weights back and train again: "
                    f"{way_back(source)}",
                    tensor=name,
                    count=count,
                )
        elif changed.ndim > 1 and name not in dense:
            count = int(changed.sum())
            raise FrozenWeightChangedError(
                f"{count} weights of {name!r} changed, and it has no mask: it was "
                "frozen when the updater was made, or left out by selectable=; nothing "
                "was written. Make the updater when everything that will train "
                f"requires gradients, or state dense=[{name!r}] to send it whole",
                tensor=name,
                count=count,
            )


def way_back(source: Path) -> str:
    """Return the line of code that gives a model the weights of a round, or the init.

    Args:
        source: The round's folder, or the run's model folder.
    """
    if source.name == MODEL_NAME:
        return (
            "trainer.load_weights(model, "
            f'read_init_spec(Path("{source}")).generate()), '
            "read_init_spec from edge_runtime.formats.init_weights"
        )
    return (
        f'trainer.load_weights(model, read_weights("{source / WEIGHTS_NAME}")), '
        "read_weights from edge_runtime.formats.weights"
    )


def check_masks(layout: Layout, masks: Mapping[str, Tensor]) -> None:
    """Insist that masks are boolean, each in the shape of its tensor.

    Raises:
        TrainingError: One is not.
    """
    for name, mask in masks.items():
        tensor = layout.by_name.get(name)
        if tensor is None:
            raise TrainingError(
                f"there is a mask of {name!r}, which the run's network does not have; "
                "give the masks of the network that is published, as its updater's "
                "finish() returned them"
            )
        if mask.dtype != torch.bool or tuple(mask.shape) != tensor.shape:
            raise TrainingError(
                f"the mask of {name!r} is {mask.dtype} {tuple(mask.shape)}, the tensor "
                f"is {tensor.shape}; masks are boolean, in their tensor's shape"
            )


def _check_finite(name: str, weights: Weights, changed: NDArray[np.bool_]) -> None:
    values = weights[name][changed]
    if weights.layout.by_name[name].dtype == "BF16":
        # NumPy has no such type: they are the upper halves of float32.
        values = (values.astype("<u4") << 16).view("<f4")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise TrainingError(
            f"{name!r} has new values that are no numbers (NaN or infinite); nothing "
            "was written. Lower the learning rate, or look for broken samples"
        )
