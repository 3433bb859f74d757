# SPDX-License-Identifier: Apache-2.0
"""A model's deployed tensors as a weight file, and back, bit for bit.

Deployed are parameters and persistent buffers, under their state-dict names, without
``num_batches_tracked`` (training state). Tied tensors are one tensor under the first of
their names.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_runtime.errors import ExportError
from edge_runtime.formats.layout import DTYPES, Layout, make_layout
from edge_runtime.formats.weights import Weights, pack_weights

# torch type -> (weight file's type code, ONNX's name).
TYPES: dict[torch.dtype, tuple[str, str]] = {
    torch.float64: ("F64", "DOUBLE"),
    torch.float32: ("F32", "FLOAT"),
    torch.float16: ("F16", "FLOAT16"),
    torch.bfloat16: ("BF16", "BFLOAT16"),
    torch.float8_e5m2: ("F8_E5M2", "FLOAT8E5M2"),
    torch.float8_e4m3fn: ("F8_E4M3", "FLOAT8E4M3FN"),
    torch.int64: ("I64", "INT64"),
    torch.int32: ("I32", "INT32"),
    torch.int16: ("I16", "INT16"),
    torch.int8: ("I8", "INT8"),
    torch.uint64: ("U64", "UINT64"),
    torch.uint32: ("U32", "UINT32"),
    torch.uint16: ("U16", "UINT16"),
    torch.uint8: ("U8", "UINT8"),
    torch.bool: ("BOOL", "BOOL"),
}


def deployed_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's live tensors that a device needs, in state-dict order.

    Raises:
        ExportError: A tensor has a type that a weight file cannot hold, has no data,
            or shares memory with a tensor of another shape.
    """
    tensors = state_tensors(model)
    return {name: tensors[name] for name in dict.fromkeys(owners(tensors).values())}


def layout_of(model: nn.Module) -> Layout:
    """Return the layout of the model's weight file.

    Raises:
        ExportError: As :func:`deployed_tensors`.
    """
    return make_layout(
        {
            name: (TYPES[tensor.dtype][0], tuple(tensor.shape))
            for name, tensor in deployed_tensors(model).items()
        }
    )


def weights_of(model: nn.Module) -> Weights:
    """Return a copy of the model's deployed tensors as a weight file.

    Raises:
        ExportError: As :func:`deployed_tensors`.
    """
    tensors = deployed_tensors(model)
    return pack_weights(
        {name: _array(tensor) for name, tensor in tensors.items()},
        {name: TYPES[tensor.dtype][0] for name, tensor in tensors.items()},
    )


def load_weights(model: nn.Module, weights: Weights) -> None:
    """Write a weight file into the model, in place and bit for bit.

    Raises:
        ExportError: The weights are not this model's; nothing was written.
    """
    check_fit(layout_of(model), weights.layout)
    with torch.no_grad():
        for name, tensor in deployed_tensors(model).items():
            raw = np.array(weights[name]).reshape(-1).view(np.uint8)
            tensor.copy_(torch.from_numpy(raw).view(tensor.dtype).view(tensor.shape))


def check_fit(model: Layout, weights: Layout) -> None:
    """Refuse weights that are not a model's, and name the first tensor that differs.

    Raises:
        ExportError: A tensor is missing, unknown, or of another type or shape.
    """
    for name in [*model.by_name, *weights.by_name]:
        expected = _describe(model.by_name.get(name))
        found = _describe(weights.by_name.get(name))
        if expected != found:
            raise ExportError(
                f"the weights do not fit the model at tensor {name!r}: the model has "
                f"{expected}, the weights have {found}; use the model that these "
                f"weights were written for"
            )


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every state-dict entry but training state; all tied names appear.

    Raises:
        ExportError: An entry has a type that a weight file cannot hold, or no data.
    """
    tensors = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name.rpartition(".")[2] != "num_batches_tracked"
    }
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in TYPES:
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ExportError(
                f"state-dict entry {name!r} is {kind}, which a weight file cannot "
                f"hold; make it a tensor of real numbers or keep it out of the state "
                f"dict (persistent=False)"
            )
        if tensor.is_meta:
            raise ExportError(f"tensor {name!r} has no data: build it on a real device")
    return tensors


def owners(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Map every name to the first name of the same memory (its tied group).

    Raises:
        ExportError: Two tensors share memory but are not the same tensor.
    """
    first: dict[tuple[Any, ...], str] = {}
    groups, spans = {}, []
    for name, t in tensors.items():
        if not t.numel():
            groups[name] = name
            continue
        memory = (str(t.device), t.data_ptr(), t.dtype, t.shape, t.stride())
        groups[name] = first.setdefault(memory, name)
        if groups[name] == name:
            last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
            stop = t.data_ptr() + (last + 1) * t.element_size()
            spans.append((str(t.device), t.data_ptr(), stop, name))
    # Sorted by start, any overlap shows between neighbours.
    for (device, _, stop, name), (other_device, start, _, other) in pairwise(
        sorted(spans)
    ):
        if device == other_device and start < stop:
            raise ExportError(
                f"tensors {name!r} and {other!r} share memory but are not the same "
                f"tensor; tie whole tensors (b.weight = a.weight) or copy one of them"
            )
    return groups


def changed_elements(base: Weights, target: Weights, name: str) -> NDArray[np.bool_]:
    """Return where a tensor differs, compared as bits, in its shape."""
    bits = np.dtype(f"u{base.layout.by_name[name].item_size}")
    return np.asarray(base[name].view(bits) != target[name].view(bits))


def _array(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor's bits; types that NumPy lacks come as unsigned integers."""
    raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return raw.view(DTYPES[TYPES[tensor.dtype][0]]).reshape(tuple(tensor.shape))


def _describe(place: Any) -> str:
    return f"{place.dtype} {list(place.shape)}" if place else "no such tensor"
