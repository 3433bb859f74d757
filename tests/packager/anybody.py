# SPDX-License-Identifier: Apache-2.0
"""Networks of anybody, as an exporter writes them."""

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper


def arrays_of(seed=0, **changes):
    """Weights of a small network of anybody's."""
    rng = np.random.default_rng(seed)
    arrays = {
        "w1": rng.normal(size=(6, 8)).astype("f4"),
        "b1": rng.normal(size=8).astype("f4"),
        "w2": rng.normal(size=(8, 3)).astype("f4"),
        "slope": np.array(0.1, "f4"),
    }
    return arrays | changes


def make_model(arrays=None, *, remark="", shape=(-1, 8), batch="n"):
    """An exporter's file: weights inside, a shape constant, remarks."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], name="first"),
        helper.make_node("Reshape", ["a", "shape"], ["r"]),
        helper.make_node("Add", ["r", "b1"], ["s"]),
        helper.make_node("PRelu", ["s", "slope"], ["t"]),
        helper.make_node("MatMul", ["t", "w2"], ["y"], doc_string=remark),
    ]
    tensors = [
        numpy_helper.from_array(a, n) for n, a in (arrays or arrays_of()).items()
    ]
    tensors.append(numpy_helper.from_array(np.array(shape, "i8"), "shape"))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "anybody" + remark,
        [value("x", TensorProto.FLOAT, [batch, 6])],
        [value("y", TensorProto.FLOAT, [batch, 3])],
        tensors,
    )
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    model.producer_version = remark
    return model


def outputs(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]
