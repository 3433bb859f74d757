# SPDX-License-Identifier: Apache-2.0
"""One operator at a time: NumPy answers as ONNX Runtime does."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edge_runtime.formats.model_folder import WEIGHTS_NAME
from edge_runtime.formats.weights import write_weights
from edge_runtime.inference.numpy_backend import NumpySession
from tests.edge_runtime.inference.both import both, difference


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
