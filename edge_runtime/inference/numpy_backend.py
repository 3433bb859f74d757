# SPDX-License-Identifier: Apache-2.0
"""Inference with NumPy alone: for boards without ONNX Runtime, and a second opinion.

It reads ``graph.onnx`` with the few lines of protobuf that this takes and maps the
weights from ``weights.safetensors``. Each operator is a plain transcription of its
ONNX definition, so agreement with ONNX Runtime says something. They are what multilayer
perceptrons, convolutional networks and masked embeddings need, in int8 (QDQ) too; a
graph that needs anything else is refused when it is loaded, by name. A function's
signature is its operator's table: positional are inputs, keyword-only (in lower case)
attributes.
"""

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import BackendError
from edge_runtime.formats.model_folder import GRAPH_NAME, WEIGHTS_NAME

Array = NDArray[Any]
Ints = Sequence[int]
Step = tuple[Callable[..., Array], tuple[str, ...], str, set[str]]
Message = Mapping[int, list[Any]]  # protobuf: the values of each field, by its number
OPSETS = range(13, 25)  # between them these operators mean the same
# NumPy's types by ONNX's numbers.
_TYPES = {
    1: "<f4", 2: "u1", 3: "i1", 4: "<u2", 5: "<i2", 6: "<i4", 7: "<i8", 9: "?",
    10: "<f2", 11: "<f8", 12: "<u4", 13: "<u8",
}  # fmt: skip
# As which numbers fields hold them, where it is another type: as bits.
_KEPT_AS = {10: "<u2", 13: "<i8"}
# Attributes that must ask for nothing.
_OFF = {
    *("auto_pad", "ceil_mode", "mode", "select_last_index", "storage_order"),
    "training_mode",
}


class Output(NamedTuple):
    """An output of a graph; all that are computed here are tensors of numbers."""

    name: str
    type: str = "tensor(float)"


class NumpySession:
    """A loaded graph; ``run`` is that of ``onnxruntime.InferenceSession``."""

    def __init__(self, folder: Path) -> None:
        """Load ``graph.onnx`` and ``weights.safetensors``.

        Raises:
            OSError: A file cannot be read.
            BackendError: The graph needs what is not here; the message names it.
            LookupError, ValueError: The graph is malformed.
        """
        model = _message(memoryview((folder / GRAPH_NAME).read_bytes()))
        weights = np.asarray(np.memmap(folder / WEIGHTS_NAME, mode="r"))
        graph = _message(model[7][0])
        nodes = [_message(node) for node in graph[1]]
        _check_operators(model, graph, nodes)
        tensors = (_tensor(_message(entry), weights) for entry in graph[5])
        self._known: dict[str, Any] = dict(tensors)
        self._outputs = [_text(_message(entry)[1]) for entry in graph[12]]
        for node in nodes:
            if _text(node[4]) == "Constant":
                self._known[_text(node[2])] = np.asarray(*_attributes(node).values())
        others = [node for node in nodes if _text(node[4]) != "Constant"]
        steps = _plan(others, {"", *self._outputs, *self._known})
        self._known[""] = None
        self._steps = [step for step in steps if not self._done_once(step)]

    def _done_once(self, step: Step) -> bool:
        """Do what depends on no input now: int8 weights become floats only once."""
        operator, inputs, output, spent = step
        if not set(inputs) <= self._known.keys():
            return False
        self._known[output] = operator(*[self._known[name] for name in inputs])
        for name in spent:
            del self._known[name]
        return True

    def get_outputs(self) -> list[Output]:
        """Return the outputs, in the graph's order."""
        return [Output(name) for name in self._outputs]

    def run(self, names: Sequence[str] | None, feed: Mapping[str, Array]) -> list[Any]:
        """Return the outputs of these names, or all."""
        values: dict[str, Any] = {**self._known, **feed}
        for operator, inputs, output, spent in self._steps:
            values[output] = operator(*[values[name] for name in inputs])
            for name in spent:
                del values[name]
        return [np.asarray(values[name]) for name in names or self._outputs]


def _refusal(what: str) -> BackendError:
    return BackendError(f"the NumPy backend lacks {what}; install onnxruntime")


def _check_operators(model: Message, graph: Message, nodes: list[Message]) -> None:
    opsets = {_text(e[1]): int(e[2][0]) for e in map(_message, model[8])}
    operators = {"::".join(filter(None, map(_text, (n[7], n[4])))) for n in nodes}
    unknown = sorted(operators - {*_OPERATORS, "Constant"})
    unknown += ["sparse initializers"] if graph[15] else []
    unknown += [] if opsets.get("") in OPSETS else [f"opset {opsets.get('')}"]
    if unknown:
        raise _refusal(", ".join(unknown))


def _plan(nodes: list[Message], kept: set[str]) -> list[Step]:
    """Return operator, inputs, output and values not needed any more, step by step."""
    steps: list[Step] = []
    for node in reversed(nodes):
        operator, output, attributes = _text(node[4]), _text(node[2]), _attributes(node)
        run, inputs = _OPERATORS[operator], tuple(str(n, "utf-8") for n in node[1])
        switches = {name: attributes.pop(name) for name in _OFF & attributes.keys()}
        odd = [n for n, v in switches.items() if v not in (0, b"NOTSET", b"constant")]
        if operator == "Cast":
            attributes.pop("saturate", None)  # asks something of 8-bit floats only
            if attributes.get("to") not in _TYPES:
                odd.append(f"type {attributes.get('to')}")
        try:
            inspect.signature(run).bind(*inputs, **attributes)
        except TypeError as err:
            odd.append(str(err))
        if odd or any(node[2][1:]):
            what = ", ".join(odd) or "more than one output"
            raise _refusal(f"{operator} with {what} (for {output!r})")
        spent = set(inputs) - kept
        steps.append((partial(run, **attributes), inputs, output, spent))
        kept |= spent
    return steps[::-1]


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


_OPERATORS: dict[str, Callable[..., Array]] = {
    "Abs": lambda x: np.abs(x),
    "Add": lambda a, b: a + b,
    "And": lambda a, b: a & b,
    "ArgMax": _argmax,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": lambda x, *, to: x.astype(_TYPES[to]),
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


def _message(data: memoryview) -> Message:
    """Split a protobuf message into fields; numbers stay numbers, the rest bytes."""
    fields: defaultdict[int, list[Any]] = defaultdict(list)
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
            fields[key >> 3].append(value)
            continue
        size, at = _varint(data, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
        if not 0 <= size <= len(data) - at:
            raise ValueError("a protobuf message is truncated")
        fields[key >> 3].append(data[at : at + size])
        at += size
    return fields


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return (value - (1 << 64) if value >> 63 else value), at


def _text(values: list[Any]) -> str:
    return str(values[0], "utf-8") if values else ""


def _unpacked(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _ints(values: list[Any]) -> list[int]:
    return [n for v in values for n in ([v] if isinstance(v, int) else _unpacked(v))]


def _floats(values: list[Any]) -> Array:
    return np.frombuffer(b"".join(values), "<f4")


_ATTRIBUTES: dict[int, tuple[int, Callable[[list[Any]], Any]]] = {
    1: (2, lambda values: _floats(values)[0]),
    2: (3, lambda values: values[0]),
    3: (4, lambda values: bytes(values[0])),
    4: (5, lambda values: _tensor(_message(values[0]))[1]),
    6: (7, _floats),
    7: (8, _ints),
}


def _attributes(node: Message) -> dict[str, Any]:
    found = {}
    for fields in map(_message, node[5]):
        name, kind = _text(fields[1]).lower(), fields[20][0]
        if kind not in _ATTRIBUTES:
            raise _refusal(f"attribute {name} (type {kind})")
        field, read = _ATTRIBUTES[kind]
        found[name] = read(fields[field])
    return found


def _tensor(fields: Message, weights: Array | None = None) -> tuple[str, Array]:
    """Return a tensor's name and its values, which may lie in the weight file."""
    name, shape, kind = _text(fields[8]), _ints(fields[1]), fields[2][0]
    if kind not in _TYPES:
        raise _refusal(f"tensor {name!r} (type {kind})")
    dtype = np.dtype(_TYPES[kind])
    if fields[14] == [1] and weights is not None:
        place = {_text(e[1]): _text(e[2]) for e in map(_message, fields[13])}
        if place["location"] != WEIGHTS_NAME:
            raise ValueError(f"tensor {name!r} lies in {place['location']!r}")
        start = int(place["offset"])
        values = weights[start : start + int(place["length"])].view(dtype)
    elif fields[9]:
        values = np.frombuffer(fields[9][0], dtype)
    elif fields[4] or fields[10]:
        values = np.frombuffer(b"".join(fields[4] or fields[10]), dtype)
    else:
        numbers = _ints(fields[5] or fields[7] or fields[11])
        values = np.array(numbers, _KEPT_AS.get(kind, dtype)).view(dtype)
    return name, values.reshape(shape)
