# SPDX-License-Identifier: Apache-2.0
"""Weights that are no float32, from two ONNX files to a device's answers."""

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.errors import WeightsError, WrongModelError
from edge_runtime.formats.contract import COARSE_TOLERANCE
from edge_runtime.formats.patch import open_patch
from edge_runtime.update.device import Device
from packager.bundles.derived_contract import make_contract
from packager.bundles.from_model import adopt_model
from packager.models.onnx_words import what_stays
from packager.models.read import pack_models, read_model
from packager.report.patch_record import patch_parts

IN, OUT = 12, 5


def network(name, nodes, weights, element=TensorProto.FLOAT):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        name,
        [value("x", element, ["n", IN])],
        [value("y", element, ["n", OUT])],
        [numpy_helper.from_array(array, key) for key, array in weights.items()],
    )
    opset = [helper.make_opsetid("", 19)]
    return helper.make_model(graph, opset_imports=opset, ir_version=9)


def plain(dtype, element):
    def make(rng):
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Add", ["h", "b"], ["y"]),
        ]
        weights = {
            "w": rng.normal(size=(IN, OUT)).astype(dtype),
            "b": rng.normal(size=OUT).astype(dtype),
        }
        return network(np.dtype(dtype).name, nodes, weights, element)

    return make


def brain_float(rng):
    """ONNX Runtime has few bfloat16 kernels: weights are stored in it, then cast."""
    nodes = [
        helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "wide"], ["y"]),
    ]
    weights = {"w": rng.normal(size=(IN, OUT)).astype(ml_dtypes.bfloat16)}
    return network("bfloat16", nodes, weights)


def quantised(rng):
    """8-bit weights a channel, 8-bit activations, a 32-bit bias: QDQ."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=1),
        helper.make_node("MatMul", ["xd", "wd"], ["h"]),
        helper.make_node("DequantizeLinear", ["b", "bs"], ["bd"]),
        helper.make_node("Add", ["h", "bd"], ["y"]),
    ]
    weights = {
        "xs": np.array(0.02, "f4"),
        "xz": np.array(3, "u1"),
        "w": rng.integers(-127, 128, (IN, OUT)).astype("i1"),
        "ws": rng.uniform(0.005, 0.02, OUT).astype("f4"),
        "wz": np.zeros(OUT, "i1"),
        "b": rng.integers(-99, 99, OUT).astype("i4"),
        "bs": np.array(0.001, "f4"),
    }
    return network("qdq", nodes, weights)


NETWORKS = {
    "F16": (plain(np.float16, TensorProto.FLOAT16), "float16"),
    "F64": (plain(np.float64, TensorProto.DOUBLE), "float64"),
    "BF16": (brain_float, "float32"),
    "I8": (quantised, "float32"),
}


def change(model):
    """Change two weights of the matrix and every element of the bias, if it has one."""
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor).copy()
        if tensor.name == "w":
            array.reshape(-1)[[7, 30]] += np.array(1, array.dtype)
        elif tensor.name == "b":
            array += np.array(1, array.dtype)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def answer(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("code", NETWORKS)
def test_a_device_follows_a_network_of_this_type(code, external, tmp_path):
    make, dtype = NETWORKS[code]
    model = make(np.random.default_rng(3))
    for name in ("old", "new"):
        onnx.save(
            model,
            tmp_path / f"{name}.onnx",
            save_as_external_data=external,
            location=f"{name}.bin",
            size_threshold=0,
        )
        model = onnx.load(tmp_path / "old.onnx")
        change(model)
    old, new = (read_model(tmp_path / f"{name}.onnx") for name in ("old", "new"))
    assert old.weights.layout.by_name["w"].dtype == code

    x = np.random.default_rng(4).normal(size=(7, IN)).astype(dtype)
    device = Device.install(tmp_path / "store", adopt_model(old).data)
    before = device.predictor().predict(x)
    assert np.array_equal(before, answer(tmp_path / "old.onnx", x))

    packed = pack_models(old, new)
    assert packed.counts["w"] == 2
    assert sum(packed.counts.values()) in (2, 2 + OUT)
    device.update(packed.data)
    after = device.predictor().predict(x)
    assert np.array_equal(after, answer(tmp_path / "new.onnx", x))
    assert not np.array_equal(after, before)
    assert device.verify() == new.weights.fingerprint


@pytest.mark.parametrize("code", NETWORKS)
def test_a_value_costs_no_more_than_its_own_size(code, tmp_path):
    rng = np.random.default_rng(5)
    onnx.save(NETWORKS[code][0](rng), tmp_path / "old.onnx")
    model = onnx.load(tmp_path / "old.onnx")
    change(model)
    onnx.save(model, tmp_path / "new.onnx")
    old, new = (read_model(tmp_path / f"{name}.onnx") for name in ("old", "new"))
    packed = pack_models(old, new)
    with open_patch(packed.data) as patch:
        parts = patch_parts(patch)
    sizes = {t.name: t.item_size for t in new.weights.layout.tensors}
    raw = sum(n * sizes[name] for name, n in packed.counts.items())
    assert 0 < parts["values"] + parts["dense"] <= raw


@pytest.mark.parametrize(
    ("code", "coarse"), [("F16", True), ("I8", True), ("F64", False)]
)
def test_coarse_types_get_a_wider_tolerance_between_cpus(code, coarse, tmp_path):
    onnx.save(NETWORKS[code][0](np.random.default_rng(6)), tmp_path / "a.onnx")
    contract = make_contract(read_model(tmp_path / "a.onnx")).decode()
    assert (f'"output_tolerance": {COARSE_TOLERANCE}' in contract) == coarse


def test_four_bit_weights_stay_in_the_graph_and_so_cannot_change(tmp_path):
    weight = TensorProto(
        name="w",
        data_type=TensorProto.INT4,
        dims=[IN, OUT],
        raw_data=bytes(IN * OUT // 2),
    )
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"]),
        helper.make_node("MatMul", ["x", "wd"], ["y"]),
    ]
    model = network("int4", nodes, {"ws": np.array(0.1, "f4")})
    model.graph.initializer.append(weight)
    onnx.save(model, tmp_path / "a.onnx")
    old = read_model(tmp_path / "a.onnx")
    assert set(old.weights) == {"ws"}
    assert what_stays(old.graph) == [
        "tensors stay in the graph (1 of type INT4), and no patch changes one"
    ]
    model.graph.initializer[1].raw_data = b"\1" + bytes(IN * OUT // 2 - 1)
    onnx.save(model, tmp_path / "b.onnx")
    with pytest.raises(WrongModelError, match="'w'; numbers of type INT4 stay in the"):
        pack_models(old, read_model(tmp_path / "b.onnx"))
    scale = model.graph.initializer.pop(0)
    model.graph.node.insert(0, helper.make_node("Constant", [], ["ws"], value=scale))
    onnx.save(model, tmp_path / "none.onnx")
    with pytest.raises(WeightsError, match=r"holds no weights.*1 of type INT4"):
        read_model(tmp_path / "none.onnx")


@pytest.mark.parametrize("kind", ["list", "map", "nothing"])
def test_an_output_that_is_no_tensor_goes_into_a_bundle(tmp_path, kind):
    rng = np.random.default_rng(0)
    model = plain("f4", TensorProto.FLOAT)(rng)
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    node, found = {
        "list": (
            helper.make_node("SplitToSequence", ["y"], ["more"], axis=0),
            helper.make_sequence_type_proto(tensor),
        ),
        "map": (
            helper.make_node(
                *("ZipMap", ["y"], ["more"]),
                domain="ai.onnx.ml",
                classlabels_int64s=range(OUT),
            ),
            helper.make_sequence_type_proto(helper.make_map_type_proto(7, tensor)),
        ),
        "nothing": (
            helper.make_node("Optional", [], ["more"], type=tensor),
            helper.make_optional_type_proto(tensor),
        ),
    }[kind]
    model.graph.node.append(node)
    model.graph.output.append(helper.make_value_info("more", found))
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    onnx.save(model, tmp_path / "model.onnx")
    np.savez(tmp_path / "golden.npz", inputs=rng.normal(size=(4, IN)).astype("f4"))
    adopted = adopt_model(
        read_model(tmp_path / "model.onnx"), golden=tmp_path / "golden.npz"
    )
    Device.install(tmp_path / "store", adopted.data)
