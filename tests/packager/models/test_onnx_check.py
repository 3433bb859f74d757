# SPDX-License-Identifier: Apache-2.0
"""What the ONNX checker calls invalid is no model here either."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.errors import RoundError, WrongModelError
from packager.cli.pack import pack, patch
from packager.models.onnx_check import check_valid
from packager.models.read import check_same_network, read_model

FLOATS = TensorProto.FLOAT


def weight(name, value):
    return numpy_helper.from_array(np.full((4, 3), value, np.float32), name)


def model(nodes=None, weights=None, outputs=("y",), ir=10):
    values = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes or [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "graph",
        [values("x", FLOATS, [None, 4])],
        [values(name, FLOATS, [None, 3]) for name in outputs],
        weights if weights is not None else [weight("w", 1)],
    )
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir)


def inner(name):
    """A branch that writes a name that the graph around it has already."""
    values = [helper.make_tensor_value_info(name, FLOATS, [4, 3])]
    node = helper.make_node("Identity", ["w"], [name])
    return helper.make_graph([node], "branch", [], values)


def with_functions(*bodies):
    """A model that calls ``F``, a function of these nodes, each time it is given."""
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("F", ["h"], ["y"], domain="own"),
    ]
    made = model(nodes)
    made.opset_import.append(opsets[1])
    learned = helper.make_node("Constant", [], ["c"], value=weight("c", 1))
    for body in bodies:
        names = "own", "F", ["a"], ["b"]
        made.functions.append(helper.make_function(*names, [learned, *body], opsets))
    return made


MATMUL = helper.make_node("MatMul", ["h", "w"], ["y"])
ADD = helper.make_node("Add", ["a", "c"], ["b"])
BROKEN = {
    "a constant that gives nothing": model(
        [
            helper.make_node("MatMul", ["x", "w"], ["y"]),
            helper.make_node("Constant", [], [], value=weight("c", 1)),
        ]
    ),
    "a function that calls itself": with_functions(
        [helper.make_node("F", ["a"], ["b"], domain="own")]
    ),
    "a function that is there twice": with_functions([ADD], [ADD]),
    "two initializers of one name": model(weights=[weight("w", 1), weight("w", 2)]),
    "an initializer that a node writes too": model(
        weights=[weight("w", 1), weight("y", 2)]
    ),
    "two nodes that write one value": model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])] * 2
    ),
    "a value that nobody writes": model(
        [helper.make_node("MatMul", ["x", "v"], ["y"])]
    ),
    "an operator that its version has not": model(
        [helper.make_node("Nothing", ["x"], ["y"])]
    ),
    "a node before what it reads": model(
        [
            helper.make_node("Relu", ["h"], ["y"]),
            helper.make_node("MatMul", ["x", "w"], ["h"]),
        ]
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_model_that_is_not_valid_is_refused(case, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(BROKEN[case].SerializeToString())
    with pytest.raises(RoundError, match=r"model\.onnx is not valid ONNX"):
        read_model(path)


@pytest.mark.parametrize("which", ["input", "output"])
@pytest.mark.parametrize("number", [0, -1, 99])
def test_a_type_that_onnx_does_not_know_is_named(which, number, tmp_path, command):
    good, bad = model(), model(weights=[weight("w", 2)])
    for made in (good, bad):
        getattr(made.graph, which)[0].type.tensor_type.elem_type = number
    for name, made in (("good", good), ("bad", bad)):
        (tmp_path / f"{name}.onnx").write_bytes(made.SerializeToString())
    code, _, err = command(pack, "--base", tmp_path / "bad.onnx", "--bundle")
    assert (code, f"({number})" in err or "UNDEFINED" in err) == (2, True), err
    files = "--base", tmp_path / "bad.onnx", "--target", tmp_path / "good.onnx"
    code, _, err = command(pack, *files)
    assert (code, "its answers were not looked at" in err) == (0, True), err


def test_a_given_graph_of_unknown_types_is_refused_by_name(tmp_path, command):
    (tmp_path / "m.onnx").write_bytes(model().SerializeToString())
    assert command(patch, "extract", tmp_path / "m.onnx", "-o", tmp_path)[0] == 0
    graph = onnx.load(tmp_path / "graph.onnx", load_external_data=False)
    graph.graph.initializer[0].data_type = 99
    (tmp_path / "graph.onnx").write_bytes(graph.SerializeToString())
    files = tmp_path / "weights.safetensors", "--graph", tmp_path / "graph.onnx"
    code, _, err = command(pack, "--base", *files, "--bundle")
    assert (code, "reads 'w' with type unknown (99)" in err) == (3, True), err


@pytest.mark.parametrize("field", ["name", "op_type", "dim_param"])
def test_a_name_that_is_no_text_is_refused_by_its_field(field, tmp_path, command):
    made = model()
    part = {
        "name": made.graph.initializer[0],
        "op_type": made.graph.node[0],
        "dim_param": made.graph.input[0].type.tensor_type.shape.dim[0],
    }[field]
    setattr(part, field, "#word#")
    made.doc_string = made.graph.node[0].doc_string = "#word#"  # may be anything
    data = made.SerializeToString().replace(b"#word#", b"\xe2word\xa4")
    (tmp_path / "m.onnx").write_bytes(data)
    code, _, err = command(pack, "--base", tmp_path / "m.onnx", "--bundle")
    assert (code, f".{field}, expected text in UTF-8" in err) == (3, True), err


def test_a_sparse_constant_that_differs_is_named(tmp_path, command):
    for name, value in (("a", 1), ("b", 2)):
        made = model([helper.make_node("Add", ["x", "s"], ["h"]), MATMUL])
        values = numpy_helper.from_array(np.full(1, value, "f4"), "s")
        indices = numpy_helper.from_array(np.zeros(1, "i8"), "s_at")
        sparse = helper.make_sparse_tensor(values, indices, [4])
        made.graph.sparse_initializer.append(sparse)
        (tmp_path / f"{name}.onnx").write_bytes(made.SerializeToString())
    words = "--base", tmp_path / "a.onnx", "--bundle", "--dry-run"
    assert "stay in the graph (1 sparse of type FLOAT)" in command(pack, *words)[2]
    a, b = (read_model(tmp_path / f"{name}.onnx") for name in "ab")
    with pytest.raises(WrongModelError, match=r"sparse constant 0 differs \('s'\)"):
        check_same_network(a, b)


def test_a_valid_model_passes_with_weights_as_inputs_of_old():
    whole = model(ir=3)
    whole.graph.input.append(helper.make_tensor_value_info("w", FLOATS, [4, 3]))
    for valid in (model(), whole):
        onnx.checker.check_model(valid)
        check_valid(valid, "m")


def test_a_model_whose_branch_reads_a_weight_passes():
    branches = {"then_branch": inner("a"), "else_branch": inner("b")}
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Cast", ["s"], ["c"], to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["v"], **branches),
        helper.make_node("MatMul", ["x", "v"], ["y"]),
    ]
    check_valid(model(nodes), "m")
