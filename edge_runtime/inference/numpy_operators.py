# SPDX-License-Identifier: Apache-2.0
"""ONNX's operators in NumPy, each a plain transcription of its definition.

That is why agreement with ONNX Runtime says something. They are what multilayer
perceptrons, convolutional networks and masked embeddings need, in int8 (QDQ) too. A
function's signature is its operator's table: positional are inputs, keyword-only (in
lower case) attributes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Ints = Sequence[int]
OPSETS = range(13, 25)  # between them these operators mean the same
# NumPy's types by ONNX's numbers.
TYPES = {
    1: "<f4", 2: "u1", 3: "i1", 4: "<u2", 5: "<i2", 6: "<i4", 7: "<i8", 9: "?",
    10: "<f2", 11: "<f8", 12: "<u4", 13: "<u8",
}  # fmt: skip


def _pad(x: Array, pads: Array, value: Any = None) -> Array:
    """Put values around an array; where a pad is negative, cut off as many."""
    sides = np.reshape(pads, (2, -1)).T
    cut = np.maximum(-sides, 0)
    kept = (slice(a, max(n - b, 0)) for (a, b), n in zip(cut, x.shape, strict=True))
    fill = 0 if value is None else value
    return np.pad(x[tuple(kept)], np.maximum(sides, 0), constant_values=fill)


def _taps(x: Array, fill: float, /, **window: Ints) -> Iterator[Array]:
    """Yield the inputs under each position of a kernel, each (N, C, *output)."""
    kernel, ones = window["kernel_shape"], [1] * (x.ndim - 2)
    strides, dilations = window.get("strides", ones), window.get("dilations", ones)
    if any(window.get("pads", ())):
        sides = np.reshape(window["pads"], (2, -1))
        x = _pad(x, np.pad(sides, ((0, 0), (2, 0))), fill)
    axes = (x.shape[2:], kernel, strides, dilations)
    if any(n < (k - 1) * d for n, k, _, d in zip(*axes, strict=True)):
        raise ValueError(f"a kernel of {kernel} is larger than its input, {x.shape}")
    for offset in np.ndindex(*kernel):
        where: list[Any] = [
            slice(at * dilation, size - (k - 1 - at) * dilation, stride)
            for at, size, k, stride, dilation in zip(offset, *axes, strict=True)
        ]
        yield x[:, :, *where]


def _conv(
    x: Array, w: Array, b: Array | None = None, *, group: int = 1, **window: Ints
) -> Array:
    window = {"kernel_shape": w.shape[2:], **window}
    matrices = w.reshape(group, len(w) // group, -1)
    outputs = []
    # One by one: the columns are larger than a sample by the kernel's size.
    for sample in x if len(x) else np.zeros((1, *x.shape[1:]), x.dtype):
        columns = np.stack(list(_taps(sample[None], 0.0, **window)), axis=2)
        if not columns.size:
            raise ValueError(f"a kernel of {w.shape} is larger than its input")
        product = matrices @ columns.reshape(group, matrices.shape[2], -1)
        outputs.append(product.reshape(len(w), *columns.shape[3:]))
    y = np.stack(outputs)[: len(x)]
    return y if b is None else y + b.reshape(-1, *[1] * (y.ndim - 2))


def _average_pool(x: Array, *, count_include_pad: int = 0, **window: Ints) -> Array:
    wide = x.astype(np.float32) if x.dtype == np.float16 else x  # for the sums
    inside = _taps(np.ones((1, 1, *x.shape[2:])), float(count_include_pad), **window)
    total = reduce(np.add, _taps(wide, 0.0, **window))
    return (total / reduce(np.add, inside).astype(wide.dtype)).astype(x.dtype)


def _max_pool(x: Array, **window: Ints) -> Array:
    least = -np.inf if x.dtype.kind == "f" else float(np.iinfo(x.dtype).min)
    return reduce(np.maximum, _taps(x, least, **window))


def _batch_norm(x: Array, *tensors: Array, epsilon: float = 1e-5, **_: float) -> Any:
    shape = (-1, *[1] * (x.ndim - 2))
    scale, bias, mean, var = (tensor.reshape(shape) for tensor in tensors)
    factor = scale / np.sqrt(var + var.dtype.type(epsilon))
    return (x * factor + (bias - mean * factor)).astype(x.dtype, copy=False)


def _gemm(
    a: Array,
    b: Array,
    c: Array | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transa: int = 0,
    transb: int = 0,
) -> Any:
    y = (a.T if transa else a) @ (b.T if transb else b) * a.dtype.type(alpha)
    return y if c is None else y + c * c.dtype.type(beta)


def _softmax(x: Array, *, axis: int = -1) -> Any:
    wide = x.astype(np.float32) if x.dtype == np.float16 else x  # for the sums
    powers = np.exp(wide - wide.max(axis=axis, keepdims=True))
    return (powers / powers.sum(axis=axis, keepdims=True)).astype(x.dtype)


def _reshape(x: Array, shape: Array, *, allowzero: int = 0) -> Array:
    kept = [n if n or allowzero else x.shape[i] for i, n in enumerate(shape)]
    return x.reshape(kept)


def _slice(
    x: Array, starts: Array, ends: Array, axes: Any = None, steps: Any = None
) -> Array:
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    where = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        where[axis] = slice(start, end, step)
    return x[tuple(where)]


def _mean(
    x: Array, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Array:
    default = () if noop_with_empty_axes else range(x.ndim)
    where = tuple(default if axes is None or len(axes) == 0 else axes)
    if x.dtype.kind != "f":
        total = np.asarray(x.sum(axis=where, keepdims=bool(keepdims), dtype=x.dtype))
        count = int(np.prod([x.shape[axis] for axis in where]))
        return np.asarray(_divide(total, np.array(count, x.dtype)))
    return np.asarray(x.mean(axis=where, keepdims=bool(keepdims)))


def _sum(
    x: Array, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Array:
    default = () if noop_with_empty_axes else range(x.ndim)
    where = tuple(default if axes is None or len(axes) == 0 else axes)
    return np.asarray(x.sum(axis=where, keepdims=bool(keepdims), dtype=x.dtype))


def _quantize(
    x: Array, scale: Array, zero: Array | None = None, *, axis: int = 1
) -> Array:
    scale, zero = _along(x, axis, scale, np.uint8(0) if zero is None else zero)
    span = np.iinfo(zero.dtype)
    steps = np.rint(x / scale) + zero.astype(x.dtype)
    return np.asarray(np.clip(steps, span.min, span.max).astype(zero.dtype))


def _dequantize(
    x: Array, scale: Array, zero: Array | None = None, *, axis: int = 1
) -> Array:
    scale, zero = _along(x, axis, scale, x.dtype.type(0) if zero is None else zero)
    wide = x.astype(np.int64) - zero if zero.any() else x
    return np.asarray(wide.astype(scale.dtype) * scale)


def _along(x: Array, axis: int, *tensors: Any) -> list[Array]:
    """Return one number for all, or one for each place of an axis, to go with x."""
    shape = [-1 if n == axis % x.ndim else 1 for n in range(x.ndim)]
    return [np.reshape(t, shape) if np.ndim(t) else np.asarray(t) for t in tensors]


def _divide(a: Array, b: Array) -> Any:
    if a.dtype.kind == "f":
        return a / b
    rounded = a // b  # whole numbers are cut towards zero
    return (rounded + ((a % b != 0) & ((a < 0) != (b < 0)))).astype(a.dtype)


def _argmax(x: Array, *, axis: int = 0, keepdims: int = 1) -> Array:
    return np.asarray(x.argmax(axis=axis, keepdims=bool(keepdims)))


def _unsqueeze(x: Array, axes: Any) -> Array:
    return np.expand_dims(x, tuple(int(axis) for axis in axes))


OPERATORS: dict[str, Callable[..., Array]] = {
    "Abs": lambda x: np.abs(x),
    "Add": lambda a, b: a + b,
    "And": lambda a, b: a & b,
    "ArgMax": _argmax,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": lambda x, *, to: x.astype(TYPES[to]),
    "Clip": lambda x, low=None, high=None: np.clip(x, low, high),
    "Concat": lambda *xs, axis: np.concatenate(xs, axis),
    "Conv": _conv,
    "DequantizeLinear": _dequantize,
    "Div": _divide,
    "Equal": lambda a, b: a == b,
    "Exp": lambda x: np.exp(x),
    "Flatten": lambda x, *, axis=1: x.reshape(
        math.prod(x.shape[:axis]), math.prod(x.shape[axis:])
    ),
    "Gather": lambda x, where, *, axis=0: np.take(x, where, axis),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda x: _mean(x, range(2, x.ndim)),
    "Greater": lambda a, b: a > b,
    "Identity": lambda x: x,
    "Less": lambda a, b: a < b,
    "Log": lambda x: np.log(x),
    "MatMul": lambda a, b: a @ b,
    "MaxPool": _max_pool,
    "Mul": lambda a, b: a * b,
    "Neg": lambda x: -x,
    "Not": lambda x: ~x,
    "Or": lambda a, b: a | b,
    "Pad": _pad,
    "QuantizeLinear": _quantize,
    "ReduceMean": _mean,
    "ReduceSum": _sum,
    "Relu": lambda x: np.maximum(x, x.dtype.type(0)),
    "Reshape": _reshape,
    "Round": lambda x: np.rint(x),
    "Shape": lambda x, *, start=0, end=None: np.array(x.shape[start:end], np.int64),
    "Sigmoid": lambda x: np.exp(-np.logaddexp(x.dtype.type(0), -x)),
    "Slice": _slice,
    "Softmax": _softmax,
    "Sqrt": lambda x: np.sqrt(x),
    "Squeeze": lambda x, axes=None: np.squeeze(x, None if axes is None else (*axes,)),
    "Sub": lambda a, b: a - b,
    "Tanh": lambda x: np.tanh(x),
    "Transpose": lambda x, *, perm=None: x.transpose(perm),
    "Unsqueeze": _unsqueeze,
    "Where": lambda yes, a, b: np.asarray(np.where(yes, a, b)),
}
