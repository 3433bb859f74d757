# SPDX-License-Identifier: Apache-2.0
"""What goes into a network and what comes out of it, made and taken from people."""

import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from edge_runtime.errors import ContractError, TrainingError
from edge_runtime.formats.contract import (
    LAYOUTS,
    METRICS,
    TASKS,
    Contract,
    InputSpec,
    OutputSpec,
)
from edge_runtime.formats.contract_file import (
    WIDE_SCHEMA,
    encode_contract,
    parse_contract,
)
from edge_runtime.formats.json_file import read_record
from trainer.export.graph_check import OUTPUT_TOLERANCE

GivenContract = Contract | Mapping[str, Any] | str | PathLike[str]


def as_contract(given: GivenContract) -> Contract:
    """Return a contract, however it is given.

    Args:
        given: A contract; its fields as ``contract.json`` has them, of which only
            ``inputs`` are needed; or the path of a JSON file with such fields.

    Raises:
        OSError: The file cannot be read.
        ContractError: The fields are malformed.
    """
    if isinstance(given, Contract):
        return given
    if isinstance(given, Mapping):
        fields: Mapping[str, Any] = given
    else:
        what = f"the contract {given}"
        fields = read_record(given, "contract_bytes", what, ContractError).values
    try:
        text = json.dumps({"schema": WIDE_SCHEMA} | dict(fields))
    except (TypeError, ValueError) as err:
        raise ContractError(
            f"the contract holds what JSON has no word for ({err}); give texts, "
            "numbers, lists and None"
        ) from err
    return parse_contract(text)


def make_contract(  # noqa: PLR0913 - all but two by name
    input_shape: Sequence[int | None] | Mapping[str, Sequence[int | None]],
    classes: Iterable[str] = (),
    *,
    scale: float = 1.0,
    mean: ArrayLike = (),
    std: ArrayLike = (),
    layout: str = "NCHW",
    dtype: str | Mapping[str, str] = "float32",
    accuracy_floor: float = 0.0,
    task: str = "classification",
    metric: str = "",
    bound: float | None = None,
    threshold: float = 0.0,
    output_tolerance: float = OUTPUT_TOLERANCE,
) -> Contract:
    """Return what goes into a network, and what comes out of it.

    The network gets ``(raw * scale - mean) / std``.

    Args:
        input_shape: Of one sample, without the batch axis; None for a size that is
            open. Of several inputs a mapping from their names, in the order of forward.
        classes: Names, by label, or of the values that the network gives.
        scale: Factor of a raw value, for example 1/255 for 8-bit images.
        mean: Per channel, or one value, of scaled values; empty for none.
        std: Likewise.
        layout: "NCHW" where the channels are on axis 1, "NHWC": on the last.
        dtype: What the network takes; int64 for tokens. Of several inputs a mapping
            from names too, or one type for all; ``scale`` and the like are for floats.
        accuracy_floor: Share of golden labels that a classifier must get right in a
            device's trial, 0 to 1.
        task: classification, multilabel, regression, segmentation, or free.
        metric: How golden labels are compared: top1, element_accuracy, iou, cosine or
            mae; the task's by default. A free task has none.
        bound: What devices ask of the metric: at least, or at most for mae.
        threshold: Above it, an answer that is yes or no means yes: 0 for logits, 0.5
            for probabilities.
        output_tolerance: By how much outputs may differ from CPU to CPU, as a share
            of the largest: 0.02 for weights of half precision.

    Raises:
        TrainingError: There is no such task, metric or layout, or classes or sizes are
            none.
        ContractError: A number is outside of its range, no device knows the type, or
            ``mean`` or ``std`` has not a value for each channel.
    """
    name = metric or TASKS.get(task, "")
    if task not in TASKS or name not in ("", *METRICS):
        raise TrainingError(
            f"task is {task!r} and metric {metric!r}, expected one of "
            f"{', '.join(TASKS)}, and of {', '.join(METRICS)}"
        )
    if layout not in LAYOUTS:
        raise TrainingError(f"layout is {layout!r}, expected {' or '.join(LAYOUTS)}")
    if isinstance(classes, int | np.integer):
        raise TrainingError(
            f"classes is {classes}, expected the name of each, by label: "
            f"[str(n) for n in range({classes})] where they have none"
        )
    names = tuple(map(str, classes))
    several = isinstance(input_shape, Mapping)
    shapes = input_shape if isinstance(input_shape, Mapping) else {"input": input_shape}
    scaling = (float(scale), _numbers(mean), _numbers(std), layout)
    given = tuple(
        _input(name, _sizes(shape), dtype, scaling, several)
        for name, shape in shapes.items()
    )
    one_row = task in ("classification", "multilabel")
    output = OutputSpec("output", "float32", (None, len(names)))
    made = Contract(
        given,
        names if task not in ("regression", "free") else (),
        float(accuracy_floor),
        float(output_tolerance),
        (output,) if one_row and names else (),
        task,
        metric,
        None if bound is None else float(bound),
        float(threshold),
    )
    parse_contract(encode_contract(made))  # as devices will; here it costs no training
    return made


def _numbers(given: ArrayLike) -> tuple[float, ...]:
    return tuple(map(float, np.ravel(given)))


def _sizes(shape: Iterable[int | None]) -> tuple[int | None, ...]:
    try:
        return tuple(None if n is None else operator.index(n) for n in shape)
    except TypeError as err:
        raise TrainingError(
            f"the shape of an input is {shape!r}, expected the sizes of one sample, "
            "such as (3, 32, 32), or (64,) of one axis"
        ) from err


def _input(
    name: str,
    shape: tuple[int | None, ...],
    dtype: str | Mapping[str, str],
    scaling: tuple[Any, ...],
    several: bool,
) -> InputSpec:
    kind = dtype.get(name, "float32") if isinstance(dtype, Mapping) else dtype
    kind = str(kind).removeprefix("torch.")
    if several and not kind.startswith("float"):
        return InputSpec(name, kind, (None, *shape))
    return InputSpec(name, kind, (None, *shape), *scaling)
