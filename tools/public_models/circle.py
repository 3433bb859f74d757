# SPDX-License-Identifier: Apache-2.0
"""One model around the circle: packed, installed, changed, applied, rolled back."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from packager.models.onnx_file import tensors_in
from tools.public_models.models import Shapes, Values

SHARE = 0.01  # of the weights change
Feed = dict[str, NDArray[Any]]
FLOATING = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16}
WHOLE = {TensorProto.INT8, TensorProto.UINT8}
FULL = "full circle"


@dataclass(frozen=True, slots=True)
class Row:
    """What came of a model.

    Attributes:
        package: The package that it is from.
        model: Its file.
        opset: Of its operators.
        bytes: Of its file.
        patch_bytes: Of the patch to its changed weights; 0 where there is none.
        result: ``full circle``, or what was in the way.
        expected: Whether that is as it should be.
    """

    package: str
    model: str
    opset: int
    bytes: int
    patch_bytes: int
    result: str
    expected: bool


class ObstacleError(Exception):
    """Something is not as it should be."""


def go_round(path: Path, folder: Path, shapes: Shapes, values: Values) -> int:
    """Take a model around the circle.

    Args:
        path: The ONNX file.
        folder: An empty one, to work in.
        shapes: Of its inputs, where they are open.
        values: Of an input, by its name, over and over; random ones by default.

    Returns:
        The bytes of the patch.

    Raises:
        ObstacleError: A command fails, or an answer is not ONNX Runtime's on the same
            file.
    """
    old, new, golden = folder / "old.onnx", folder / "new.onnx", folder / "golden.npz"
    model = onnx.load(path)
    onnx.save(model, old)
    feed = made_feed(model, shapes, values)
    named = feed if len(feed) > 1 else {"inputs": next(iter(feed.values()))}
    np.savez(golden, allow_pickle=False, **named)
    _run("dpu-pack", "--base", old, "--bundle", "--golden", golden, "-o", "b.zip")
    change(model)
    onnx.save(model, new)
    before, after = _answers(old, feed), _answers(new, feed)
    # Classes alone need not change where a few weights do.
    if _equal(before, after) and any(np.asarray(a).dtype.kind == "f" for a in before):
        raise ObstacleError("the change of the weights does not show in the answers")
    _run("dpu-pack", "--base", old, "--target", new, "-o", "p.dpu")
    _run("dpu-edge", "init", "b.zip", folder=folder)
    _expect(folder, feed, before, "the installed weights")
    _run("dpu-edge", "apply", "p.dpu", folder=folder)
    _run("dpu-edge", "verify", folder=folder)
    _run("dpu-edge", "infer", "--golden", folder=folder)
    _expect(folder, feed, after, "the new weights")
    _run("dpu-edge", "rollback", folder=folder)
    _expect(folder, feed, before, "the old weights")
    return (folder / "p.dpu").stat().st_size


def made_feed(model: onnx.ModelProto, shapes: Shapes, values: Values) -> Feed:
    """Make up inputs: floating ones in [0, 1), whole ones 0 or 1."""
    random = np.random.default_rng(0)
    known = {tensor.name for tensor in model.graph.initializer}
    feed = {}
    for value in model.graph.input:
        if value.name in known:
            continue
        kind = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        open_size = {0: 2}
        shape = shapes.get(value.name) or tuple(
            dim.dim_value if dim.dim_value > 0 else open_size.get(axis, 16)
            for axis, dim in enumerate(kind.shape.dim)
        )
        made = random.random(shape)
        if value.name in values:
            made = np.resize(values[value.name], shape)
        elif dtype.kind == "b":
            made = np.ones(shape)
        elif dtype.kind != "f":
            made = np.rint(made)
        feed[value.name] = made.astype(dtype)
    return feed


def change(model: onnx.ModelProto) -> None:
    """Change a hundredth of every tensor of weights, wherever it is."""
    random = np.random.default_rng(1)
    for tensor in tensors_in(model):
        if tensor.data_type not in FLOATING | WHOLE:
            continue
        array = numpy_helper.to_array(tensor).copy()
        count = int(array.size * SHARE)
        if not count:  # no weight, but a number of a formula, or a size
            continue
        flat, at = array.reshape(-1), random.choice(array.size, count, replace=False)
        if tensor.data_type in FLOATING:
            spread = np.std(flat[np.isfinite(flat)], dtype="f8")
            flat[at] = flat[at] * 1.5 + array.dtype.type(0.1 * spread)
        else:
            flat[at] ^= 64
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _answers(path: Path, feed: Feed) -> list[Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, feed))


def _expect(folder: Path, feed: Feed, wanted: list[Any], what: str) -> None:
    from edge_runtime import Device

    device = Device.open(folder / "device")
    named = feed if len(feed) > 1 else next(iter(feed.values()))
    if not _equal(device.predictor().predict_all(named), wanted):
        raise ObstacleError(f"the answers of {what} are not ONNX Runtime's")


def _equal(found: list[Any], wanted: list[Any]) -> bool:
    return all(
        np.array_equal(a, b, equal_nan=np.asarray(a).dtype.kind == "f")
        for a, b in zip(found, wanted, strict=True)
    )


def _run(command: str, *args: object, folder: Path | None = None) -> None:
    at = folder or Path(str(args[1])).parent
    environment = os.environ | {"DPU_STORE": str(at / "device")}
    done = subprocess.run(
        [Path(sys.executable).with_name(command), *map(str, args)],
        cwd=at,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise ObstacleError(f"{command} {args[0]} ended with {done.returncode}: {said}")
