# SPDX-License-Identifier: Apache-2.0
"""Inference with NumPy alone: for boards without ONNX Runtime, and a second opinion.

It reads ``graph.onnx`` with the few lines of protobuf that this takes and maps the
weights from ``weights.safetensors``. What operators do is in
:mod:`edge_runtime.inference.numpy_operators`; a graph that needs anything else is
refused when it is loaded, by name.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edge_runtime.errors import BackendError
from edge_runtime.formats.model_folder import GRAPH_NAME, WEIGHTS_NAME
from edge_runtime.inference.numpy_operators import OPERATORS, OPSETS, TYPES, Array

Step = tuple[Callable[..., Array], tuple[str, ...], str, set[str]]
Message = Mapping[int, list[Any]]  # protobuf: the values of each field, by its number
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
        # Not before: what is done once may stand behind what every call does.
        needed = {*self._outputs}.union(*(inputs for _, inputs, _, _ in self._steps))
        self._known = {name: self._known[name] for name in needed & set(self._known)}

    def _done_once(self, step: Step) -> bool:
        """Do what depends on no input now: int8 weights become floats only once."""
        operator, inputs, output, _ = step
        if not set(inputs) <= self._known.keys():
            return False
        self._known[output] = operator(*[self._known[name] for name in inputs])
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
    unknown = sorted(operators - {*OPERATORS, "Constant"})
    unknown += ["sparse initializers"] if graph[15] else []
    unknown += [] if opsets.get("") in OPSETS else [f"opset {opsets.get('')}"]
    if unknown:
        raise _refusal(", ".join(unknown))


def _plan(nodes: list[Message], kept: set[str]) -> list[Step]:
    """Return operator, inputs, output and values not needed any more, step by step."""
    steps: list[Step] = []
    for node in reversed(nodes):
        operator, output, attributes = _text(node[4]), _text(node[2]), _attributes(node)
        run, inputs = OPERATORS[operator], tuple(str(n, "utf-8") for n in node[1])
        switches = {name: attributes.pop(name) for name in _OFF & attributes.keys()}
        odd = [n for n, v in switches.items() if v not in (0, b"NOTSET", b"constant")]
        if operator == "Cast":
            attributes.pop("saturate", None)  # asks something of 8-bit floats only
            if attributes.get("to") not in TYPES:
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
    if kind not in TYPES:
        raise _refusal(f"tensor {name!r} (type {kind})")
    dtype = np.dtype(TYPES[kind])
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
