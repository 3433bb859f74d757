# SPDX-License-Identifier: Apache-2.0
"""Golden inputs for a model from anybody: read from a file, or made up.

Made-up inputs are random, the same everywhere. They tell a broken runtime, not a bad
model. Sizes that a graph leaves open, and whole numbers that it takes for indices,
masks or lengths, are found by trying: the first that a model answers are taken.
"""

import io
import itertools
import math
import re
import zipfile
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edge_runtime.errors import (
    BlockedError,
    ContractError,
    StoreError,
    TrialError,
    prefix_errors,
)
from edge_runtime.formats.arrays import read_npz
from edge_runtime.formats.contract import Contract, InputSpec
from edge_runtime.formats.init_weights import philox, uniform
from edge_runtime.inference.predictor import Predictor
from edge_runtime.limits import VARIABLE, limits
from edge_runtime.reading import read_bounded
from edge_runtime.update.golden import Golden, check_outputs, input_name
from packager.rounds.golden import answers

SAMPLES = 4  # golden inputs that are made up where none are given
# What is tried: samples in a batch, sizes of the other open axes, values of integers.
BATCHES = (SAMPLES, 1)
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 1)
INTEGERS = ("bits", "ones", "lengths", "zeros")
MAX_VALUES = 1 << 22  # of all inputs together, while sizes are tried
Inputs = dict[str, NDArray[Any]]
Axes = dict[str, list[int | str]]  # of each input: sizes, and names of open ones


def made_up(predictor: Predictor, contract: Contract, graph: onnx.GraphProto) -> Inputs:
    """Return random inputs that a model answers with finite numbers.

    Args:
        predictor: The model.
        contract: What goes in; the graph gets values in [0, 1).
        graph: Its names of open sizes say which are equal.

    Raises:
        ContractError: Of what was tried nothing fits.
        TrialError: The answers are not finite.
        StoreError: The model does not run on the only inputs that there are.
        BlockedError: There is not the memory for them.
    """
    problems: list[TrialError | StoreError | BlockedError] = []
    tries = candidates(contract, graph)
    for inputs in tries:
        problem = problem_with(predictor, contract, inputs)
        if problem is None:
            return inputs
        problems.append(problem)
    for problem in problems:
        if isinstance(problem, TrialError):
            raise problem
    if not problems:
        raise ContractError(
            f"{shapes_of(contract)}: a single made-up sample has more than the "
            f"{limits().golden_bytes} bytes that golden inputs may have; devices and "
            f"packager take larger ones with {VARIABLE}=golden_bytes=N"
        )
    if not is_open(contract):
        raise problems[0]
    raise ContractError(
        f"{shapes_of(contract)}: its sizes or values are open, and none of "
        f"{len(problems)} made-up inputs was right (of the first: {problems[0]}); give "
        f"some with --golden, made by {how_to_save(contract)}"
    ) from problems[0]


def problem_with(
    predictor: Predictor, contract: Contract, inputs: Inputs
) -> TrialError | StoreError | BlockedError | None:
    """Say what is wrong with the answers to inputs; None for nothing."""
    try:
        check_outputs(answers(predictor, contract.prepare(inputs)), None, contract)
    except (TrialError, StoreError, BlockedError) as err:
        return err
    return None


def is_open(contract: Contract) -> bool:
    """Return whether there is more than one way to make inputs up."""
    return any(
        None in spec.shape[1:] or np.dtype(spec.dtype).kind != "f"
        for spec in contract.inputs
    )


def candidates(contract: Contract, graph: onnx.GraphProto) -> Iterator[Inputs]:
    """Yield inputs to be tried, the likeliest first."""
    axes, batches = _axes(contract, graph)
    names = {size for sizes in axes.values() for size in sizes}
    is_sized = any(isinstance(n, str) and n not in batches for n in names)
    sizes = SIZES if is_sized else SIZES[:1]
    has_integers = any(np.dtype(s.dtype).kind != "f" for s in contract.inputs)
    kinds = INTEGERS if has_integers else INTEGERS[:1]
    seen: set[Any] = set()
    for kind, batch, size in itertools.product(kinds, BATCHES, sizes):
        shapes = {
            name: tuple(_size(n, batches, batch, size) for n in wanted)
            for name, wanted in axes.items()
        }
        values = sum(math.prod(shape) for shape in shapes.values())
        key = kind, *shapes.values()
        if key in seen or (is_sized and values > MAX_VALUES and seen):
            continue
        size_in_bytes = sum(
            math.prod(shapes[spec.name]) * np.dtype(spec.dtype).itemsize
            for spec in contract.inputs
        )
        if size_in_bytes > limits().golden_bytes:
            continue  # no device would read it
        seen.add(key)
        yield {
            spec.name: _values(spec, shapes[spec.name], kind, size)
            for spec in contract.inputs
        }


def _axes(contract: Contract, graph: onnx.GraphProto) -> tuple[Axes, set[str]]:
    """Return what is known of every axis, and which open sizes are batches.

    Sizes of one name are one; a size without a name is one with those of the same axis
    that have none either.
    """
    dims = {value.name: value.type.tensor_type.shape.dim for value in graph.input}
    axes: Axes = {}
    known: dict[int | str, int] = {}
    for spec in contract.inputs:
        stated = dims.get(spec.name, ())
        axes[spec.name] = []
        for axis, size in enumerate(spec.shape):
            name = stated[axis].dim_param if axis < len(stated) else ""
            name = name or f"axis {axis}"
            if size is not None and not name.startswith("axis"):
                known[name] = size  # the contract fixes what the graph leaves open
            axes[spec.name].append(name if size is None else size)
    for sizes in axes.values():
        sizes[:] = [known.get(size, size) for size in sizes]
    return axes, {s[0] for s in axes.values() if s and isinstance(s[0], str)}


def _size(name: int | str, batches: set[str], batch: int, size: int) -> int:
    """Return the size of an axis; exporters also write sums, as ``past + 1``."""
    if isinstance(name, int):
        return name
    if name in batches:
        return batch
    terms = [term.strip() for term in name.split("+")]
    return sum(int(n) if re.fullmatch("[0-9]{1,18}", n) else size for n in terms)


def _values(
    spec: InputSpec, shape: tuple[int, ...], kind: str, size: int
) -> NDArray[Any]:
    if np.dtype(spec.dtype).kind != "f" and kind != INTEGERS[0]:
        is_length = kind == "lengths" and len(shape) <= 1
        fill = size if is_length else kind != "zeros"
        return np.full(shape, fill, spec.dtype)
    words = philox(0, spec.name)
    values = uniform(words, math.prod(shape), 0.5).reshape(shape) + np.float32(0.5)
    if np.dtype(spec.dtype).kind == "f":
        return np.asarray(values / np.float32(spec.scale))
    return np.asarray(np.rint(values), spec.dtype)  # 0 or 1: valid as an index, too


def shapes_of(contract: Contract) -> str:
    """Return the inputs with their types and shapes, in words."""
    return ", ".join(
        f"input {spec.name!r} ({spec.dtype} {list(spec.shape)})"
        for spec in contract.inputs
    )


def how_to_save(contract: Contract) -> str:
    """Return the line of Python that writes a file of golden inputs."""
    names = [spec.name for spec in contract.inputs]
    arrays = ", ".join(f"{name!r}: ..." for name in names)
    one = "inputs=..., labels=..."
    return f"numpy.savez(FILE, {one if len(names) == 1 else '**{' + arrays + '}'})"


def read_golden_file(path: str | PathLike[str], contract: Contract) -> Golden:
    """Read golden inputs, by the names of the inputs or ``inputs``, and ``labels``.

    Raises:
        OSError: The file cannot be read.
        ContractError: It is no such file, or lacks an input.
    """
    what = f"golden inputs {path}"
    data = read_bounded(Path(path), "golden_bytes", what, ContractError)
    names = [spec.name for spec in contract.inputs]
    counted = [input_name(number) for number in range(len(names))]
    try:
        known = dict.fromkeys([*names, *counted, "labels"])
        arrays = read_npz(data, known)
    except ContractError as err:
        raise ContractError(
            f"{path} is no .npz file of arrays ({err}); make one with "
            f"{how_to_save(contract)}"
        ) from err
    wanted = names if arrays.keys() >= set(names) else counted
    if not arrays.keys() >= set(wanted):
        found = ", ".join(_members(data)) or "nothing"
        raise ContractError(
            f"{path} holds {found}, expected an array for each input, "
            f"{', '.join(names)} (or {', '.join(counted)}); beside them there may be "
            f"'labels': {how_to_save(contract)}"
        )
    labels = arrays.get("labels") if "labels" not in wanted else None
    _check_names(path, _members(data), [*wanted, "labels"])
    golden = Golden(tuple(arrays[name] for name in wanted), labels)
    _check_rows(path, contract, golden)
    return golden


def _members(data: bytes) -> list[str]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def _check_names(path: str | PathLike[str], found: list[str], known: list[str]) -> None:
    """Insist on known names: labels with a slip of the pen would be no labels."""
    for name in found:
        if name not in known and not name.startswith("outputs"):
            raise ContractError(
                f"{path} holds an array {name!r}, which is no input; there are "
                f"{', '.join(known)}"
            )


def _check_rows(path: str | PathLike[str], contract: Contract, golden: Golden) -> None:
    with prefix_errors(path):
        inputs = golden.by_name(contract)
    if golden.labels is None:
        return
    if not golden.labels.ndim:
        raise ContractError(
            f"{path} has a single number as 'labels', expected one for each sample"
        )
    for spec in contract.inputs:
        if spec.has_batch and len(spec.batch(inputs[spec.name])) != len(golden.labels):
            raise ContractError(f"{path} has more inputs than labels, or fewer")
