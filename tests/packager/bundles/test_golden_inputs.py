# SPDX-License-Identifier: Apache-2.0
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.errors import BlockedError, ContractError
from edge_runtime.formats.bundle import read_bundle
from edge_runtime.formats.contract import Contract, InputSpec
from edge_runtime.limits import VARIABLE, limits
from edge_runtime.update.golden import read_golden
from packager.bundles.from_model import adopt_model
from packager.bundles.golden_inputs import candidates
from packager.models.read import read_model
from tests.packager.anybody import make_model


@pytest.fixture(autouse=True)
def _limits():
    yield
    limits.cache_clear()


@pytest.mark.parametrize(
    "arrays",
    [
        {"image": np.zeros((2, 6))},
        {"inputs": np.zeros((2, 6)), "lables": np.zeros(2, "i8")},
        {"inputs": np.zeros((2, 6)), "labels": np.zeros(3, "i8")},
        {"inputs": np.zeros((0, 6))},
        {"inputs": np.zeros((1, 6)), "labels": np.int64(0)},
    ],
)
def test_golden_files_that_say_something_else_are_refused(old, tmp_path, arrays):
    np.savez(tmp_path / "golden.npz", **arrays)
    with pytest.raises(ContractError):
        adopt_model(read_model(old), golden=tmp_path / "golden.npz")


@pytest.mark.parametrize("label", [-1, 3])
def test_golden_labels_that_no_output_stands_for_are_refused(old, tmp_path, label):
    labels = np.array([0, label])
    np.savez(tmp_path / "golden.npz", inputs=np.zeros((2, 6)), labels=labels)
    with pytest.raises(ContractError, match=rf"label is {label}, .*labels are 0 to 2"):
        adopt_model(read_model(old), golden=tmp_path / "golden.npz")


@pytest.mark.parametrize("data", [None, b"", b"PK\x03\x04cut", "array"])
def test_a_golden_file_that_is_none_is_refused(old, tmp_path, data):
    golden = tmp_path / "golden"
    if data == "array":
        np.save(golden.with_suffix(".npy"), np.zeros((2, 6)))
        golden = golden.with_suffix(".npy")
    else:
        golden.write_bytes(old.read_bytes() if data is None else data)
    with pytest.raises(ContractError, match=r"no \.npz file"):
        adopt_model(read_model(old), golden=golden)


def inputs_for(*specs, **names):
    """The first inputs that are tried, with the names that a graph gives to sizes."""
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [],
        "g",
        [info(s.name, TensorProto.FLOAT, names.get(s.name, s.shape)) for s in specs],
        [],
    )
    return next(candidates(Contract(specs), graph))


def test_made_up_whole_numbers_are_valid_as_an_index_and_floats_are_raw():
    ids = inputs_for(InputSpec("ids", "int64", (2, 5)))["ids"]
    assert ids.dtype == np.int64
    assert set(np.unique(ids)) <= {0, 1}
    raw = inputs_for(InputSpec("x", "float32", (None, 3), scale=1 / 255))["x"]
    assert raw.max() > 1


def test_sizes_of_one_name_are_one_size_and_sums_are_sums():
    ids, mask, past = (
        InputSpec(name, "int64", (None, None)) for name in ("ids", "mask", "past")
    )
    names = {
        "ids": ["n", "tokens"],
        "mask": ["n", "past + tokens"],
        "past": ["n", "past"],
    }
    found = inputs_for(ids, mask, past, **names)
    (n, tokens), (_, past_size) = found["ids"].shape, found["past"].shape
    assert found["mask"].shape == (n, tokens + past_size)


def test_a_size_of_more_digits_than_any_has_is_an_open_one():
    spec = InputSpec("ids", "int64", (None, None))
    assert inputs_for(spec, ids=["n", "9" * 5000])["ids"].shape == (4, 8)


def test_made_up_inputs_keep_to_what_devices_unpack(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "golden_bytes=100")
    limits.cache_clear()
    assert inputs_for(InputSpec("x", "float32", (None, 12)))["x"].shape == (1, 12)
    onnx.save(make_model(), tmp_path / "m.onnx")
    monkeypatch.setenv(VARIABLE, "golden_bytes=20")
    limits.cache_clear()
    with pytest.raises(ContractError, match=f"20 bytes .* {VARIABLE}=golden_bytes=N"):
        adopt_model(read_model(tmp_path / "m.onnx"))


def test_a_size_that_the_contract_states_holds_wherever_it_is_named():
    fixed = InputSpec("a", "float32", (None, 12))
    free = InputSpec("b", "float32", (None, None))
    found = inputs_for(fixed, free, a=["n", "width"], b=["n", "width"])
    assert found["b"].shape == found["a"].shape == (4, 12)


def test_golden_inputs_that_devices_would_not_unpack_are_refused(old, tmp_path):
    np.savez_compressed(tmp_path / "g.npz", inputs=np.zeros((3 << 20, 6), "f4"))
    with pytest.raises(ContractError, match="fewer samples"):
        adopt_model(read_model(old), golden=tmp_path / "g.npz")


def greedy(path, shape):
    """From the second value on, each takes more than a processor can address."""
    node, value = helper.make_node, helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            node("Size", ["x"], ["values"]),
            node("Sub", ["values", "one"], ["others"]),
            node("Mul", ["others", "far"], ["room"]),
            node("ConstantOfShape", ["room"], ["nothing"]),
            node("ReduceSum", ["nothing"], ["zero"], keepdims=0),
            node("Mul", ["x", "w"], ["scaled"]),
            node("Add", ["scaled", "zero"], ["y"]),
        ],
        "greedy",
        [value("x", TensorProto.FLOAT, shape)],
        [value("y", TensorProto.FLOAT, shape)],
        [
            numpy_helper.from_array(np.ones(1, "f4"), "w"),
            numpy_helper.from_array(np.array(1, "i8"), "one"),
            numpy_helper.from_array(np.array([1 << 50], "i8"), "far"),
        ],
    )
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.save(model, path)
    return read_model(path)


def test_of_made_up_inputs_that_ask_for_too_much_memory_smaller_ones_are_tried(
    tmp_path,
):
    bundle = adopt_model(greedy(tmp_path / "m.onnx", ["n", "length"]))
    golden = read_golden(read_bundle(bundle.data).files["golden.npz"])
    assert [array.shape for array in golden.inputs] == [(1, 1)]


def test_a_graph_that_asks_for_too_much_memory_is_named(tmp_path):
    with pytest.raises(BlockedError, match=r"m\.onnx: .*that is the system's fault"):
        adopt_model(greedy(tmp_path / "m.onnx", [1, 2]))
