# SPDX-License-Identifier: Apache-2.0
"""NumPy alone gives ONNX Runtime's answers, or names what it cannot do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edge_runtime.errors import BackendError, StoreError
from edge_runtime.formats.model_folder import WEIGHTS_NAME
from edge_runtime.formats.weights import write_weights
from edge_runtime.inference.numpy_backend import NumpySession
from edge_runtime.inference.predictor import Predictor
from edge_runtime.inference.session import Backend, RunOptions, choose_backend
from packager.build import pack_round
from packager.bundles.from_round import build_bundle
from packager.rounds.folder import read_round

ROOT = Path(__file__).parents[3]
GRAPHS = Path(__file__).with_name("graphs")
SHAPES = {
    "mlp": (1, 28, 28),
    "small_cnn": (1, 8, 8),
    "vgg": (3, 32, 32),
    "resnet56": (3, 32, 32),
}


def difference(found, wanted):
    """Largest difference, relative to the largest value: ONNX Runtime's is 1e-6."""
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    found, wanted = found.astype("f8"), wanted.astype("f8")
    return np.abs(found - wanted).max(initial=0) / (np.abs(wanted).max(initial=0) or 1)


def both(folder, feed):
    path = folder / "graph.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return NumpySession(folder).run(None, feed), session.run(None, feed)


def plausible(name, shape, rng):
    """Weights with which values neither vanish nor explode on the way."""
    if "running_var" in name or (len(shape) == 1 and name.endswith("weight")):
        return rng.uniform(0.5, 1.5, shape).astype("f4")
    spread = (2 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.1
    return (spread * rng.standard_normal(shape)).astype("f4")


@pytest.mark.parametrize("name", SHAPES)
def test_every_built_in_network_answers_as_onnx_runtime_does(name, tmp_path):
    graph = (GRAPHS / f"{name}.onnx").read_bytes()
    (tmp_path / "graph.onnx").write_bytes(graph)
    rng = np.random.default_rng(3)
    tensors = {
        init.name: plausible(init.name, tuple(init.dims), rng)
        for init in onnx.load_model_from_string(graph).graph.initializer
        if init.external_data
    }
    write_weights(tensors, tmp_path / WEIGHTS_NAME)
    x = rng.standard_normal((2, *SHAPES[name]), dtype="f4")
    (found,), (wanted,) = both(tmp_path, {"input": x})
    assert difference(found, wanted) < 1e-5


# One operator at a time --------------------------------------------------------------


@pytest.fixture(scope="module")
def compare(tmp_path_factory):
    """Run one operator with both backends."""
    folder = tmp_path_factory.mktemp("operator")
    write_weights({"unused": np.zeros(1, "f4")}, folder / WEIGHTS_NAME)

    def run(operator, *inputs, constants=(), opset=20, left_out=0, **attributes):
        names = [f"x{i}" for i in range(len(inputs))]
        stored = [f"c{i}" for i in range(len(constants))]
        given = [*names, *stored, *[""] * left_out]
        node = helper.make_node(operator, given, ["y"], **attributes)
        kind = helper.np_dtype_to_tensor_dtype
        graph = helper.make_graph(
            [node],
            "one",
            [
                helper.make_tensor_value_info(n, kind(x.dtype), x.shape)
                for n, x in zip(names, inputs, strict=True)
            ],
            [helper.make_empty_tensor_value_info("y")],
            [
                onnx.numpy_helper.from_array(np.asarray(c), n)
                for n, c in zip(stored, constants, strict=True)
            ],
        )
        opsets = [helper.make_opsetid("", opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        (folder / "graph.onnx").write_bytes(model.SerializeToString())
        feed = dict(zip(names, inputs, strict=True))
        (found,), (wanted,) = both(folder, feed)
        assert difference(found, wanted) < 1e-5

    return run


WHOLE = np.array([-7, 7, 5, -2, 1], "i8")
ROW = np.array([3, -5, 0, 127], "i1")
BYTES = np.arange(3, 255, 21, dtype="u1").reshape(3, 4)


def values(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype="f4")


small = st.integers(1, 3)
pad = st.integers(0, 2)


@settings(max_examples=50)
@given(
    st.integers(1, 2),
    small,
    small,
    st.tuples(small, small),
    st.tuples(small, small),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(pad, pad, pad, pad),
    st.booleans(),
)
def test_convolutions_are_those_of_onnxruntime(
    compare, n, group, width, kernel, strides, dilations, pads, bias
):
    x = values(n, 2 * group, 7, 9)
    w = values(group * width, 2, *kernel, seed=1)
    compare(
        "Conv",
        x,
        w,
        *([values(group * width, seed=2)] if bias else []),
        group=group,
        kernel_shape=kernel,
        strides=strides,
        dilations=dilations,
        pads=pads,
    )


@settings(max_examples=50)
@given(
    st.sampled_from(["MaxPool", "AveragePool"]),
    st.tuples(st.integers(2, 3), st.integers(2, 3)),
    st.tuples(small, small),
    st.tuples(*[st.integers(0, 1)] * 4),
    st.booleans(),
)
def test_pooling_is_that_of_onnxruntime(
    compare, operator, kernel, strides, pads, include
):
    extra = {"count_include_pad": int(include)} if operator == "AveragePool" else {}
    geometry = {"kernel_shape": kernel, "strides": strides, "pads": pads}
    compare(operator, values(2, 3, 6, 7), **geometry, **extra)


@pytest.mark.parametrize(
    ("operator", "inputs", "constants", "attributes"),
    [
        ("Gemm", [values(2, 3), values(3, 4)], [], {}),
        ("Gemm", [values(3, 2), values(4, 3), values(4)], [],
         {"transA": 1, "transB": 1}),
        ("Gemm", [values(2, 3), values(3, 4), values(2, 1)], [],
         {"alpha": 0.5, "beta": 3.0}),
        ("MatMul", [values(5, 2, 3), values(3, 4)], [], {}),
        ("BatchNormalization", [values(2, 3, 4, 4), *abs(values(4, 3))], [],
         {"epsilon": 0.01}),
        ("Softmax", [values(2, 3, 4) * 50], [], {"axis": 1}),
        ("Relu", [values(3, 3)], [], {}),
        ("Clip", [values(9)], [np.float32(-0.5), np.float32(0.5)], {}),
        ("Clip", [values(9)], [np.float32(0)], {}),
        ("Add", [values(2, 3), values(3)], [], {}),
        ("Sub", [values(2, 3), values(2, 1)], [], {}),
        ("Mul", [values(2, 3), values(1)], [], {}),
        ("GlobalAveragePool", [values(2, 3, 4, 5)], [], {}),
        ("ReduceMean", [values(2, 3, 4)], [[-1, 1]], {"keepdims": 0}),
        ("ReduceMean", [values(2, 3, 4)], [], {}),
        ("ReduceMean", [values(2, 3, 4)], [], {"noop_with_empty_axes": 1}),
        ("ReduceMean", [values(2, 3, 4)], [], {"axes": [1], "opset": 13}),
        ("Flatten", [values(2, 3, 4)], [], {}),
        ("Flatten", [values(2, 3, 4)], [], {"axis": 0}),
        ("Reshape", [values(2, 3, 4)], [[0, -1]], {}),
        ("Reshape", [values(0, 3)], [[3, 0]], {"allowzero": 1}),
        ("Transpose", [values(2, 3, 4)], [], {"perm": [2, 0, 1]}),
        ("Transpose", [values(2, 3, 4)], [], {}),
        ("Concat", [values(2, 3), values(2, 1)], [], {"axis": -1}),
        ("Squeeze", [values(1, 3, 1)], [], {}),
        ("Squeeze", [values(1, 3, 1)], [[-1]], {}),
        ("Shape", [values(2, 3, 4)], [], {"start": 1, "end": -1}),
        ("Identity", [values(2)], [], {}),
        ("Pad", [values(2, 3)], [[1, 0, 2, 1]], {}),
        ("Pad", [values(2, 3)], [[1, 0, 2, 1], np.float32(7)], {"mode": "constant"}),
        ("Slice", [values(5, 6)], [[1, -3], [4, 99]], {}),
        ("Slice", [values(5, 6)], [[-1], [-(2**63)], [1], [-2]], {}),
        ("Slice", [values(5, 6)], [[0], [2**63 - 1], [1], [2]], {}),
        ("Cast", [values(5) * 9], [], {"to": TensorProto.INT32}),
        ("Cast", [np.array([0.0, 2.0], "f4")], [], {"to": TensorProto.BOOL}),
        ("Cast", [values(5)], [], {"to": TensorProto.FLOAT16}),
        ("Gather", [values(5, 3)], [[[0, -1], [4, 2]]], {}),
        ("Gather", [values(5, 3)], [[0, 2]], {"axis": -1}),
        ("Div", [values(2, 3), values(3, seed=1)], [], {}),
        ("Div", [WHOLE, WHOLE[::-1].copy()], [], {}),
        ("Unsqueeze", [values(2, 3)], [[0, -1]], {}),
        ("ReduceSum", [values(2, 3, 4)], [[1]], {"keepdims": 0}),
        ("ReduceSum", [WHOLE], [], {}),
        ("ArgMax", [values(3, 4)], [], {"axis": 1, "keepdims": 0}),
        ("ArgMax", [values(3, 4)], [], {}),
        ("Where", [values(3, 4) > 0, values(3, 4), values(1, 4, seed=1)], [], {}),
        *((operator, [values(3, 4) * 50], [], {}) for operator in ("Neg", "Abs")),
        *((operator, [values(3, 4) * 50], [], {}) for operator in ("Sigmoid", "Tanh")),
        *((operator, [abs(values(3, 4))], [], {})
          for operator in ("Sqrt", "Log", "Exp")),
        *((operator, [WHOLE, WHOLE[::-1].copy()], [], {})
          for operator in ("Equal", "Greater", "Less")),
        ("Round", [np.arange(-3, 3.5, 0.5, dtype="f4")], [], {}),
        *(("QuantizeLinear", [values(3, 4) * 50], [np.float32(0.3), zero],
           {"opset": 21})
          for zero in (np.uint8(7), np.int8(-128), np.int16(5), np.uint16(9))),
        ("QuantizeLinear", [values(3, 4)], [np.float32(0.25)], {}),
        *(("QuantizeLinear", [values(3, 4), abs(values(size)), ROW[:size]], [],
           {"axis": axis}) for size, axis in ((3, 0), (4, 1), (4, -1))),
        *(("DequantizeLinear", [x], [np.float32(0.3), x.flat[0]], {"opset": 21})
          for x in (BYTES, BYTES.view("i1"), WHOLE.astype("i2"))),
        ("DequantizeLinear", [WHOLE.astype("i4") * 2**28], [np.float32(0.3)], {}),
        *(("DequantizeLinear", [BYTES.view("i1"), abs(values(size)), ROW[:size]], [],
           {"axis": axis}) for size, axis in ((3, 0), (4, 1))),
        ("Pad", [values(3, 4)], [[-1, 2, 0, -2]], {}),
        *(("MaxPool", [-abs(x)], [], {"kernel_shape": [2, 2], "pads": [1, 1, 1, 1]})
          for x in (values(1, 1, 4, 4), BYTES.view("i1").reshape(1, 1, 3, 4) // 2)),
        ("ReduceMean", [WHOLE.astype("i4").reshape(1, 5) - 3], [[1]], {}),
        ("BatchNormalization", [values(2, 3, 4, 4).astype("f2"), *abs(values(4, 3))],
         [], {}),
        ("AveragePool", [values(1, 1, 64).astype("f2") + 30], [],
         {"kernel_shape": [64]}),
        ("Softmax", [values(2, 300).astype("f2") * 3], [], {}),
        ("Conv", [values(0, 2, 5, 5), values(3, 2, 3, 3)], [], {}),
        ("Flatten", [values(0, 2, 5)], [], {}),
        *((operator, [values(0, 2, 4, 4)], [], {"kernel_shape": [2, 2]})
          for operator in ("MaxPool", "AveragePool")),
        ("Not", [WHOLE > 0], [], {}),
        *((operator, [WHOLE > 0, WHOLE > 3], [], {}) for operator in ("And", "Or")),
    ],
)  # fmt: skip
def test_operators_are_those_of_onnxruntime(
    compare, operator, inputs, constants, attributes
):
    constants = [np.array(c, np.int64) if isinstance(c, list) else c for c in constants]
    compare(operator, *inputs, constants=constants, **attributes)


def test_an_optional_value_that_is_not_given_is_the_default(compare):
    compare("Pad", values(2, 3), constants=[np.array([0, 1, 1, 0])], left_out=1)


def test_a_kernel_larger_than_its_input_gives_no_answer(tmp_path):
    for operator, inputs in (("Conv", 2), ("MaxPool", 1)):
        extra = {"kernel_shape": [3, 3]}
        node = helper.make_node(operator, ["x", "w"][:inputs], ["y"], **extra)
        graph = helper.make_graph(
            [node],
            "one",
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
                for name in ("x", "w")[:inputs]
            ],
            [helper.make_empty_tensor_value_info("y")],
        )
        opsets = [helper.make_opsetid("", 20)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        (tmp_path / "graph.onnx").write_bytes(model.SerializeToString())
        write_weights({"unused": np.zeros(1, "f4")}, tmp_path / WEIGHTS_NAME)
        feed = {"x": values(1, 1, 5, 1), "w": values(1, 1, 3, 3)}
        with pytest.raises(ValueError, match="larger than its input"):
            NumpySession(tmp_path).run(None, dict(list(feed.items())[:inputs]))


def test_numbers_are_read_however_a_tool_wrote_them(tmp_path):
    """As raw bytes, as packed and as single fields, and in constants of any kind."""
    nodes = [
        helper.make_node("Constant", [], ["a"], value=helper.make_tensor(
            "a", TensorProto.INT64, [2], [-1, 3])),
        helper.make_node("Constant", [], ["b"], value_floats=[0.5, -2.0, 8.0]),
        helper.make_node("Constant", [], ["c"], value_float=4.0),
        helper.make_node("Constant", [], ["d"], value=helper.make_tensor(
            "d", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])),
        helper.make_node("Reshape", ["x", "a"], ["r"]),
        helper.make_node("Mul", ["r", "b"], ["m"]),
        helper.make_node("Add", ["m", "c"], ["s"]),
        helper.make_node("Sub", ["s", "d"], ["y"]),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "numbers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
    )
    opsets = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    (tmp_path / "graph.onnx").write_bytes(model.SerializeToString())
    write_weights({"unused": np.zeros(1, "f4")}, tmp_path / WEIGHTS_NAME)
    (found,), (wanted,) = both(tmp_path, {"x": values(6)})
    assert difference(found, wanted) < 1e-6


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        (TensorProto.FLOAT16, [0.5, -3.0]),
        (TensorProto.DOUBLE, [0.1, -3.0]),
        (TensorProto.BOOL, [True, False]),
        (TensorProto.INT8, [-3, 5]),
        (TensorProto.UINT16, [3, 65535]),
        (TensorProto.UINT64, [3, 2**64 - 1]),
        (TensorProto.INT32, [3, -(2**31)]),
    ],
)
def test_every_type_is_read_from_fields_and_from_bytes(tmp_path, kind, numbers):
    nodes, outputs = [], []
    for name, raw in (("fields", False), ("bytes", True)):
        vals = np.array(numbers, helper.tensor_dtype_to_np_dtype(kind))
        tensor = helper.make_tensor(
            name, kind, [2], vals.tobytes() if raw else numbers, raw=raw
        )
        nodes.append(helper.make_node("Constant", [], [f"{name}_c"], value=tensor))
        nodes.append(helper.make_node("Identity", [f"{name}_c"], [name]))
        outputs.append(helper.make_tensor_value_info(name, kind, [2]))
    graph = helper.make_graph(nodes, "types", [], outputs)
    opsets = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    (tmp_path / "graph.onnx").write_bytes(model.SerializeToString())
    write_weights({"unused": np.zeros(1, "f4")}, tmp_path / WEIGHTS_NAME)
    found, wanted = both(tmp_path, {})
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.dtype, ours.tolist()) == (theirs.dtype, theirs.tolist())


# What it cannot do -------------------------------------------------------------------


BFLOAT = helper.make_tensor("t", TensorProto.BFLOAT16, [1], [1.0])


@pytest.mark.parametrize(
    ("operator", "inputs", "outputs", "attributes", "named"),
    [
        ("Erf", "x", "y", {}, "Erf"),
        ("Gelu", "x", "y", {"domain": "com.microsoft"}, "com.microsoft::Gelu"),
        ("Pad", "xx", "y", {"mode": "edge"}, r"Pad with mode \(for 'y'\)"),
        ("MaxPool", "x", "y", {"kernel_shape": [2], "ceil_mode": 1}, "ceil_mode"),
        ("MaxPool", "x", "yz", {"kernel_shape": [2]}, "more than one output"),
        ("Shape", "x", "y", {"invented": 1}, "Shape with .*'invented'"),
        ("Relu", "xx", "y", {}, "Relu with too many"),
        ("Constant", "", "y", {"value_strings": ["a"]}, "attribute value_strings"),
        ("Constant", "", "y", {"value": BFLOAT}, "tensor 't'"),
        ("Cast", "x", "y", {"to": TensorProto.BFLOAT16}, "Cast with type 16"),
        ("ArgMax", "x", "y", {"select_last_index": 1}, "ArgMax with select_last_index"),
        ("DequantizeLinear", "xx", "y", {"block_size": 2}, "Dequ.* with .*block_size"),
        ("DynamicQuantizeLinear", "x", "yzw", {}, "DynamicQuantizeLinear"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    run, reload_graph, operator, inputs, outputs, attributes, named
):
    node = helper.make_node(operator, list(inputs), list(outputs), **attributes)

    def edit(model):
        del model.graph.node[:]
        model.graph.node.append(node)

    reload_graph(run, edit)
    (run.path / "model" / WEIGHTS_NAME).write_bytes(run.init.data)
    with pytest.raises(BackendError, match=rf"lacks .*{named}.*install onnxruntime"):
        NumpySession(run.path / "model")


def test_operators_of_another_age_are_refused(run, reload_graph):
    def edit(model):
        model.opset_import[0].version = 9

    reload_graph(run, edit)
    (run.path / "model" / WEIGHTS_NAME).write_bytes(run.init.data)
    with pytest.raises(BackendError, match="opset 9"):
        NumpySession(run.path / "model")


def test_a_malformed_graph_is_refused(run, device_contract, tmp_path):
    graph = (run.path / "model" / "graph.onnx").read_bytes()
    (tmp_path / WEIGHTS_NAME).write_bytes(run.init.data)
    numpy = RunOptions(backend=Backend.NUMPY)
    for length in range(0, len(graph) - 1, 7):
        (tmp_path / "graph.onnx").write_bytes(graph[:length])
        with pytest.raises((StoreError, BackendError)):
            Predictor(tmp_path, device_contract, numpy)


@pytest.fixture
def device_contract(run):
    from edge_runtime.formats.contract_file import parse_contract

    return parse_contract((run.path / "model" / "contract.json").read_text())


# A device without ONNX Runtime -------------------------------------------------------


@pytest.fixture
def bare(tmp_path):
    """Run dpu-edge in a process that cannot import onnxruntime."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "onnxruntime.py").write_text("raise ImportError('no wheel')")
    path = os.pathsep.join([str(blocked), str(ROOT)])
    command = [sys.executable, "-m", "edge_runtime", "--store", tmp_path / "store"]

    def start(*args):
        return subprocess.run(
            [*command, *args],
            env=os.environ | {"PYTHONPATH": path},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    return start


def test_a_device_without_onnx_runtime_installs_updates_and_infers(bare, run, tmp_path):
    bundle = tmp_path / "bundle.zip"
    bundle.write_bytes(build_bundle(read_round(run.path / "round_00")).data)
    assert bare("init", bundle).returncode == 0
    patch = tmp_path / "round_01.dpu"
    patch.write_bytes(pack_round(read_round(run.path / "round_01")).data)
    assert bare("apply", patch).returncode == 0
    done = bare("infer", "--golden", "--json")
    assert "onnxruntime cannot be imported: NumPy computes" in done.stderr
    answer = json.loads(done.stdout)
    assert (answer["backend"], len(answer["samples"])) == ("numpy", 8)


def test_asking_for_onnx_runtime_where_there_is_none_is_refused(
    run, device_contract, monkeypatch
):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match="pip install onnxruntime"):
        Predictor(
            run.path / "model",
            device_contract,
            RunOptions(backend=Backend.ONNXRUNTIME),
        )


def test_onnx_runtime_is_chosen_where_it_is_installed():
    assert choose_backend(Backend.AUTO) is Backend.ONNXRUNTIME
