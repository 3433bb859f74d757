# SPDX-License-Identifier: Apache-2.0
"""``contract.json``: both directions side by side. No I/O."""

import json
import re
from dataclasses import asdict
from typing import Any

import numpy as np

from edge_runtime.errors import ContractError
from edge_runtime.formats.contract import (
    EXACT_TOLERANCE,
    LAYOUTS,
    METRICS,
    NUMBER_TYPES,
    TASKS,
    ZERO,
    Contract,
    InputSpec,
    OutputSpec,
)
from edge_runtime.formats.json_file import parse_record
from edge_runtime.formats.json_record import Record

SCHEMA, WIDE_SCHEMA = 1, 2  # the second only where the first has no word for it


def encode_contract(contract: Contract) -> bytes:
    """Encode ``contract.json``; the same contract gives the same bytes."""
    wide = _wide_fields(contract)
    record = {
        "schema": WIDE_SCHEMA if wide else SCHEMA,
        "inputs": [_input_record(spec) for spec in contract.inputs],
        "outputs": [asdict(spec) for spec in contract.outputs],
        "classes": contract.classes,
        "accuracy_floor": contract.accuracy_floor,
        "output_tolerance": contract.output_tolerance,
    }
    if contract.probabilities:
        wide = wide | {"probabilities": True}
    return json.dumps(record | wide, indent=2).encode() + b"\n"


def _input_record(spec: InputSpec) -> dict[str, Any]:
    record = asdict(spec)
    if spec.channel_axis == 1:
        del record["layout"]  # the first schema has no word for it
    return record


def _wide_fields(contract: Contract) -> dict[str, Any]:
    """Return what the first schema has no word for; nothing where nothing is used."""
    fields = {
        "task": contract.task,
        "metric": contract.metric,
        "bound": contract.bound,
        "threshold": contract.threshold,
        "random_outputs": contract.random_outputs,
    }
    plain = {"task": "classification", "metric": "", "bound": None, "threshold": 0.0}
    is_plain = fields == plain | {"random_outputs": ()}
    first, *others = contract.inputs or (None,)
    one_plain = first and not others and first.shape and first.channel_axis == 1
    return {} if is_plain and one_plain else fields


def parse_contract(text: str | bytes) -> Contract:
    """Parse ``contract.json``. Unknown fields are ignored.

    Raises:
        ContractError: Malformed, or of a newer schema.
    """
    record = parse_record(text, "contract_bytes", "the contract", ContractError)
    schema = record.schema(SCHEMA, WIDE_SCHEMA)
    floor = record.number("accuracy_floor", 0.0)
    if not 0 <= floor <= 1:
        raise ContractError(
            f"the contract's accuracy_floor is {floor:g}, expected a share of the "
            "golden labels, from 0 to 1"
        )
    tolerance = record.number("output_tolerance", EXACT_TOLERANCE)
    if tolerance < 0:
        raise record.problem("output_tolerance", "a share of the largest output")
    outputs = tuple(map(_parse_output, record.records("outputs", ())))
    inputs = tuple(map(_parse_input, record.records("inputs")))
    if len({spec.name for spec in inputs}) < len(inputs):
        raise record.problem("inputs", "each input once")
    return Contract(
        inputs,
        tuple(map(str, record.items("classes", (str, int, float), ()))),
        floor,
        tolerance,
        outputs,
        probabilities=record.flag("probabilities", False),
        **(_parse_wide(record, outputs) if schema == WIDE_SCHEMA else {}),
    )


def _parse_wide(record: Record, outputs: tuple[OutputSpec, ...]) -> dict[str, Any]:
    """Read what came with the second schema."""
    found: dict[str, Any] = {}
    if "task" in record:
        found["task"] = record.one_of("task", TASKS)
    if record.values.get("metric"):
        found["metric"] = record.one_of("metric", METRICS)
    if record.values.get("bound") is not None:
        found["bound"] = record.number("bound")
    found["threshold"] = record.number("threshold", 0.0)
    names = tuple(record.texts("random_outputs", ()))
    known = [spec.name for spec in outputs]
    if not set(names) <= set(known):
        raise record.problem(
            "random_outputs", f"names of outputs ({', '.join(known) or 'none stated'})"
        )
    return found | {"random_outputs": names}


def _parse_input(entry: Record) -> InputSpec:
    dtype = _dtype(entry.text("dtype"))
    if dtype not in NUMBER_TYPES:
        raise entry.problem("dtype", f"one of {', '.join(NUMBER_TYPES)}")
    shape = entry.items("shape", (int, type(None)))
    if any(n is not None and not 0 < n < 1 << 62 for n in shape):
        raise entry.problem("shape", "whole numbers from 1 on, null for any size")
    scale = entry.number("scale", 1.0)
    if abs(scale) <= ZERO:
        raise entry.problem("scale", "a number other than 0, as float32 too")
    return InputSpec(
        entry.text("name"),
        dtype,
        tuple(shape),
        scale,
        tuple(entry.numbers("mean", ())),
        tuple(entry.numbers("std", ())),
        entry.one_of("layout", LAYOUTS) if "layout" in entry else "NCHW",
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
