# SPDX-License-Identifier: Apache-2.0
"""Models of one open axis: samples of their own, or rows that depend on each other."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.cli.main import main as edge
from edge_runtime.formats.bundle import read_bundle
from edge_runtime.formats.contract_file import parse_contract
from packager.bundles.from_model import adopt_model
from packager.cli.pack import pack
from packager.models.read import read_model

RANDOM = np.random.default_rng(0)


def node(*words, **attributes):
    operator, *inputs, output = words
    return helper.make_node(operator, inputs, [output], **attributes)


def weight(*shape):
    return RANDOM.normal(size=shape).astype("f4")


def branches():
    """Other weights where the sum of all that is asked is positive."""
    bodies = {
        f"{name}_branch": helper.make_graph(
            [node("MatMul", "x", f"w_{name}", f"y_{name}")],
            name,
            [],
            [helper.make_tensor_value_info(f"y_{name}", TensorProto.FLOAT, ["n", 3])],
            [numpy_helper.from_array(weight(6, 3), f"w_{name}")],
        )
        for name in ("then", "else")
    }
    return node("If", "positive", "y", **bodies)


# Nodes from x to y, the shape of a row, the weights.
DEPENDING = {
    "time": (
        [
            helper.make_node("LSTM", ["x", "w", "r"], ["o"], hidden_size=4),
            node("Squeeze", "o", "one", "y"),
        ],
        (1, 6),
        {"w": weight(1, 16, 6), "r": weight(1, 16, 4), "one": np.array([1])},
    ),
    "sum": (
        [node("Mul", "x", "w", "h"), node("CumSum", "h", "zero", "y")],
        (),
        {"w": weight(1), "zero": np.array(0)},
    ),
    "scene": (
        [
            node("MatMul", "x", "w", "h"),
            node("Transpose", "h", "t"),
            node("MatMul", "h", "t", "s"),
            node("Softmax", "s", "a"),
            node("MatMul", "a", "h", "y"),
        ],
        (6,),
        {"w": weight(6, 3)},
    ),
    "branch": (
        [
            node("ReduceSum", "x", "total", keepdims=0),
            node("Greater", "total", "zero", "positive"),
            branches(),
        ],
        (6,),
        {"zero": np.array(0, "f4")},
    ),
}
INT8 = RANDOM.integers(-127, 128, (6, 3)).astype("i1")
APART = {
    "layer": ([node("MatMul", "x", "w", "y")], (6,), {"w": weight(6, 3)}),
    "no negative numbers": (
        [node("Log", "x", "h"), node("MatMul", "h", "w", "y")],
        (6,),
        {"w": weight(6, 3)},
    ),
    "range of the call": (
        [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
            node("MatMulInteger", "q", "w", "z", "i"),
            node("Cast", "i", "f", to=TensorProto.FLOAT),
            node("Mul", "f", "s", "y"),
        ],
        (6,),
        {"w": INT8},
    ),
}


def save(path, nodes, row, weights, *more):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "anybody",
        [value("x", TensorProto.FLOAT, ["n", *row])],
        [helper.make_empty_tensor_value_info("y"), *more],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path


def task_of(bundle):
    return parse_contract(read_bundle(bundle.data).files["contract.json"]).task


@pytest.mark.parametrize("name", DEPENDING)
def test_rows_that_depend_on_each_other_are_asked_together(name, tmp_path, command):
    path = save(tmp_path / "m.onnx", *DEPENDING[name])
    code, out, err = command(pack, "--base", path, "--bundle", "--json")
    (packed,) = json.loads(out)["packed"]
    assert (code, packed["task"]) == (0, "free")
    assert "depends on the samples beside it" in packed["remarks"][0]
    assert packed["remarks"][0] in err

    store, x = ("--store", tmp_path / "s"), weight(5, *DEPENDING[name][1])
    assert command(edge, *store, "init", tmp_path / "m.bundle.zip")[0] == 0
    np.save(tmp_path / "x.npy", x)
    answer = tmp_path / "y.npy"
    assert command(edge, *store, "infer", tmp_path / "x.npy", "-o", answer)[0] == 0
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    wanted = session.run(None, {"x": x})[0]
    np.testing.assert_allclose(np.load(answer), wanted, atol=1e-5)


@pytest.mark.parametrize("name", APART)
def test_samples_that_are_answered_apart_stay_samples(name, tmp_path):
    bundle = adopt_model(read_model(save(tmp_path / "m.onnx", *APART[name])))
    assert (task_of(bundle), bundle.task) == ("classification", "classification")
    assert bundle.remarks == ()


def test_a_second_output_that_mixes_samples_is_seen(tmp_path):
    nodes, row, weights = APART["layer"]
    mean = helper.make_tensor_value_info("m", TensorProto.FLOAT, [1, 3])
    nodes = [*nodes, node("ReduceMean", "y", "m", axes=[0])]
    path = save(tmp_path / "mean.onnx", nodes, row, weights, mean)
    assert task_of(adopt_model(read_model(path))) == "free"
    held = helper.make_tensor_value_info("w", TensorProto.FLOAT, [6, 3])
    path = save(tmp_path / "held.onnx", *APART["layer"], held)
    assert task_of(adopt_model(read_model(path))) == "classification"


def test_states_with_their_samples_on_another_axis_leave_them_samples(tmp_path):
    nodes, row, weights = APART["layer"]
    state = helper.make_tensor_value_info("h", TensorProto.FLOAT, [1, "n", 3])
    more = [node("Tanh", "y", "t"), node("Unsqueeze", "t", "zero", "h")]
    weights = weights | {"zero": np.array([0])}
    path = save(tmp_path / "states.onnx", [*nodes, *more], row, weights, state)
    assert task_of(adopt_model(read_model(path))) == "classification"


def test_what_squeezes_its_answer_to_one_sample_is_asked_for_all(tmp_path):
    weights = {"w": weight(6, 1)}
    nodes = [node("MatMul", "x", "w", "h"), node("Squeeze", "h", "y")]
    bundle = adopt_model(read_model(save(tmp_path / "m.onnx", nodes, (6,), weights)))
    assert task_of(bundle) == "free"


def test_what_answers_only_several_rows_is_asked_for_all(tmp_path):
    nodes = [
        helper.make_node("TopK", ["x", "two"], ["top", "which"], axis=0),
        node("ReduceMean", "top", "m", axes=[0]),
        node("Sub", "x", "m", "h"),
        node("Mul", "h", "w", "y"),
    ]
    weights = {"w": weight(1), "two": np.array([2])}
    bundle = adopt_model(read_model(save(tmp_path / "m.onnx", nodes, ("m",), weights)))
    assert task_of(bundle) == "free"


def test_one_golden_sample_tells_too(tmp_path):
    for name, (cases, task) in {
        "time": (DEPENDING, "free"),
        "layer": (APART, "classification"),
    }.items():
        path = save(tmp_path / f"{name}.onnx", *cases[name])
        np.savez(tmp_path / "one.npz", inputs=weight(1, *cases[name][1]))
        bundle = adopt_model(read_model(path), golden=tmp_path / "one.npz")
        assert task_of(bundle) == task


def test_who_states_the_task_is_told_that_rows_depend_on_each_other(tmp_path):
    model = read_model(save(tmp_path / "m.onnx", *DEPENDING["scene"]))
    (tmp_path / "c.json").write_text('{"task": "regression"}')
    bundle = adopt_model(model, contract=tmp_path / "c.json")
    assert task_of(bundle) == "regression"
    assert "beside it, and `dpu-edge infer` asks for one at a time" in bundle.remarks[0]
