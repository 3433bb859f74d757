# SPDX-License-Identifier: Apache-2.0
"""NumPy alone gives ONNX Runtime's answers, or names what it cannot do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
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
from tests.edge_runtime.inference.both import both, difference

ROOT = Path(__file__).parents[3]
GRAPHS = Path(__file__).with_name("graphs")
SHAPES = {
    "mlp": (1, 28, 28),
    "small_cnn": (1, 8, 8),
    "vgg": (3, 32, 32),
    "resnet56": (3, 32, 32),
}


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
    (found,), (wanted,) = both(tmp_path, {"x": np.linspace(-1, 2, 6, dtype="f4")})
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


def test_what_is_computed_once_stays_for_the_calls_that_come_before_it(tmp_path):
    """Weights that are tied, and computed: used as they are, and then turned."""
    node, value = helper.make_node, helper.make_tensor_value_info
    weights = np.random.default_rng(1).standard_normal((4, 6)).astype("f2")
    graph = helper.make_graph(
        [
            node("Cast", ["stored"], ["w"], to=TensorProto.FLOAT),
            node("MatMul", ["x", "w"], ["hidden"]),
            node("Transpose", ["w"], ["turned"]),
            node("MatMul", ["hidden", "turned"], ["y"]),
        ],
        "tied",
        [value("x", TensorProto.FLOAT, [2, 4])],
        [value("y", TensorProto.FLOAT, [2, 4])],
        [onnx.numpy_helper.from_array(weights, "stored")],
    )
    opsets = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    (tmp_path / "graph.onnx").write_bytes(model.SerializeToString())
    write_weights({"unused": np.zeros(1, "f4")}, tmp_path / WEIGHTS_NAME)
    (found,), (wanted,) = both(tmp_path, {"x": np.eye(2, 4, dtype="f4")})
    assert difference(found, wanted) < 1e-6


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
