"""What goes into a model and what comes out: ``contract.json``. No I/O.

Both directions stand side by side: :func:`encode_contract` and :func:`parse_contract`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_runtime.errors import MALFORMED, ContractError

SCHEMA = 1


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
    try:
        record = json.loads(text)
        if record["schema"] != SCHEMA:
            raise ContractError(
                f"contract of schema {record['schema']}, this runtime knows {SCHEMA}; "
                "install a newer dpu-edge"
            )
        floor = float(record.get("accuracy_floor", 0.0))
        if not 0 <= floor <= 1:
            raise ContractError(
                f"the contract's accuracy_floor is {floor:g}, expected a share of the "
                "golden labels, from 0 to 1"
            )
        return Contract(
            tuple(_parse_input(entry) for entry in record["inputs"]),
            tuple(str(name) for name in record.get("classes", ())),
            floor,
            float(record.get("output_tolerance", 1e-4)),
            tuple(_parse_output(entry) for entry in record.get("outputs", ())),
        )
    except MALFORMED as err:
        raise ContractError(f"the contract is malformed ({err!r})") from err


def _parse_input(entry: Mapping[str, Any]) -> InputSpec:
    return InputSpec(
        str(entry["name"]),
        np.dtype(entry["dtype"]).name,
        tuple(None if n is None else int(n) for n in entry["shape"]),
        float(entry.get("scale", 1.0)),
        tuple(float(v) for v in entry.get("mean", ())),
        tuple(float(v) for v in entry.get("std", ())),
    )


def _parse_output(entry: Mapping[str, Any]) -> OutputSpec:
    shape = entry.get("shape")
    return OutputSpec(
        str(entry["name"]),
        str(entry.get("dtype", "")),
        None if shape is None else tuple(None if n is None else int(n) for n in shape),
    )


def _show(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("batch" if n is None else str(n) for n in shape) + "]"
