# SPDX-License-Identifier: Apache-2.0
"""What goes into a model and what comes out: ``contract.json``. No I/O.

Both directions stand side by side: :func:`encode_contract` and :func:`parse_contract`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_runtime.errors import ContractError
from edge_runtime.formats.json_file import parse_record
from edge_runtime.formats.json_record import Record

SCHEMA = 1
# What NumPy calls the types that a graph may take.
_DTYPES = (
    *("float16", "float32", "float64", "bool"),
    *(f"{sign}int{bits}" for bits in (8, 16, 32, 64) for sign in ("", "u")),
)


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input of the graph.

    Attributes:
        name: The graph's name for it.
        dtype: NumPy name of the type that the graph takes.
        shape: Its shape; None where any size goes (the batch).
        scale: Factor on the raw values, for example 1/255 for 8-bit images.
        mean: Per channel (axis 1), subtracted after scaling; empty for none.
        std: Per channel, divided by; empty for none.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    scale: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def batch(self, raw: ArrayLike) -> NDArray[Any]:
        """Return raw values with their batch axis, as they are.

        Args:
            raw: Values as the device gets them, any numeric type, shape as
                :attr:`shape`; a single sample without the batch axis is welcome.

        Raises:
            ContractError: The shape or type does not fit.
        """
        values = np.asarray(raw)
        if values.ndim == len(self.shape) - 1:
            values = values[np.newaxis]
        # A plain loop: after a large network's run all of this is cold in the caches.
        fits = values.ndim == len(self.shape)
        for want, found in zip(self.shape, values.shape, strict=False):
            if want is not None and want != found:
                fits = False
        if not fits or values.dtype.kind not in "biuf":
            raise ContractError(
                f"input {self.name!r} takes numbers of shape {_show(self.shape)}, "
                f"got {values.dtype} of shape {list(np.shape(raw))}"
            )
        return values

    def prepare(self, raw: ArrayLike) -> NDArray[Any]:
        """Turn raw values, as :meth:`batch` takes them, into what the graph takes.

        Raises:
            ContractError: The shape or type does not fit.
        """
        values = self.batch(raw)
        if self.scale == 1.0 and not self.mean and not self.std:
            return values.astype(self.dtype, copy=False)
        out = values.astype(np.float32)  # one copy, then in place
        out *= np.float32(self.scale)
        channels = (-1, *[1] * (out.ndim - 2))
        if self.mean:
            out -= np.asarray(self.mean, np.float32).reshape(channels)
        if self.std:
            out /= np.asarray(self.std, np.float32).reshape(channels)
        return out.astype(self.dtype, copy=False)


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """One output of the graph.

    Attributes:
        name: The graph's name for it.
        dtype: NumPy name of its type.
        shape: Its shape; None where any size comes (the batch), or for all of it where
            the graph does not say.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...] | None


@dataclass(frozen=True, slots=True)
class Contract:
    """What a model takes, what it gives, and how good it must be.

    Attributes:
        inputs: In the graph's order.
        classes: Names of the classes; empty if the model is no classifier.
        accuracy_floor: Share of golden labels that must be right in a trial.
        output_tolerance: Allowed difference to expected outputs, relative to the
            largest absolute output: CPUs differ by up to 1e-6 of it.
        outputs: In the graph's order; empty where the contract does not say.
    """

    inputs: tuple[InputSpec, ...]
    classes: tuple[str, ...] = ()
    accuracy_floor: float = 0.0
    output_tolerance: float = 1e-4
    outputs: tuple[OutputSpec, ...] = ()

    def prepare(self, raw: ArrayLike | Mapping[str, ArrayLike]) -> dict[str, Any]:
        """Turn raw values into the feed of a session.

        Args:
            raw: An array for the only input, or arrays by input name.

        Raises:
            ContractError: An input is missing, unknown, or does not fit.
        """
        if isinstance(raw, np.ndarray) and len(self.inputs) == 1:
            (spec,) = self.inputs  # the usual case, without a detour
            return {spec.name: spec.prepare(raw)}
        names = [spec.name for spec in self.inputs]
        if not isinstance(raw, Mapping):
            raw = {names[0] if len(names) == 1 else "one array": raw}
        if set(raw) != set(names):
            raise ContractError(
                f"the model takes its inputs by name, {', '.join(names)}; got "
                f"{', '.join(raw) or 'nothing'}"
            )
        return {spec.name: spec.prepare(raw[spec.name]) for spec in self.inputs}


def encode_contract(contract: Contract) -> bytes:
    """Encode ``contract.json``; the same contract gives the same bytes."""
    record = {
        "schema": SCHEMA,
        "inputs": [asdict(spec) for spec in contract.inputs],
        "outputs": [asdict(spec) for spec in contract.outputs],
        "classes": contract.classes,
        "accuracy_floor": contract.accuracy_floor,
        "output_tolerance": contract.output_tolerance,
    }
    return json.dumps(record, indent=2).encode() + b"\n"


def parse_contract(text: str | bytes) -> Contract:
    """Parse ``contract.json``. Unknown fields are ignored.

    Raises:
        ContractError: Malformed, or of a newer schema.
    """
    record = parse_record(text, "contract_bytes", "the contract", ContractError)
    record.schema(SCHEMA)
    floor = record.number("accuracy_floor", 0.0)
    if not 0 <= floor <= 1:
        raise ContractError(
            f"the contract's accuracy_floor is {floor:g}, expected a share of the "
            "golden labels, from 0 to 1"
        )
    return Contract(
        tuple(map(_parse_input, record.records("inputs"))),
        tuple(map(str, record.items("classes", (str, int, float), ()))),
        floor,
        record.number("output_tolerance", 1e-4),
        tuple(map(_parse_output, record.records("outputs", ()))),
    )


def _parse_input(entry: Record) -> InputSpec:
    dtype = _dtype(entry.text("dtype"))
    if dtype not in _DTYPES:
        raise entry.problem("dtype", f"one of {', '.join(_DTYPES)}")
    shape = entry.items("shape", (int, type(None)))
    if any(n is not None and not 0 <= n < 1 << 62 for n in shape):
        raise entry.problem("shape", "whole numbers, null for any size")
    return InputSpec(
        entry.text("name"),
        dtype,
        tuple(shape),
        entry.number("scale", 1.0),
        tuple(entry.numbers("mean", ())),
        tuple(entry.numbers("std", ())),
    )


def _parse_output(entry: Record) -> OutputSpec:
    shape = None
    if entry.values.get("shape") is not None:
        shape = tuple(entry.items("shape", (int, type(None))))
    return OutputSpec(entry.text("name"), entry.text("dtype", ""), shape)


def _dtype(text: str) -> str:
    """Return NumPy's name for a type, however it is spelled; empty for none."""
    try:
        # Anything longer would be a structure of several types.
        return np.dtype(text).name if re.fullmatch("[<>=]?[a-z]+[0-9]*", text) else ""
    except TypeError:
        return ""


def _show(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("batch" if n is None else str(n) for n in shape) + "]"
