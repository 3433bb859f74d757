# SPDX-License-Identifier: Apache-2.0
import io
import json
import os
import re
import struct
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.numpy
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.errors import (
    BudgetError,
    BundleError,
    ContractError,
    RoundError,
    TrialError,
    TrustError,
    WeightsError,
    WrongModelError,
)
from edge_runtime.formats.apply import apply_patch
from edge_runtime.formats.bundle import read_bundle
from edge_runtime.formats.contract import Contract, InputSpec
from edge_runtime.formats.contract_file import parse_contract
from edge_runtime.formats.identity import network_id
from edge_runtime.formats.patch import open_patch
from edge_runtime.formats.signing import trust_keys
from edge_runtime.formats.weights import fingerprint_file, read_weights
from edge_runtime.limits import VARIABLE, limits
from edge_runtime.update.device import Device
from packager.bundles.derived_contract import make_contract
from packager.bundles.from_model import adopt_model
from packager.bundles.golden_inputs import candidates
from packager.cli.pack import pack, patch
from packager.keys import encode_private, generate_key
from packager.models.onnx_check import check_graph
from packager.models.onnx_split import split_onnx
from packager.models.read import pack_models, read_model


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


@pytest.fixture
def old(tmp_path):
    """``old.onnx``."""
    onnx.save(make_model(), tmp_path / "old.onnx")
    return tmp_path / "old.onnx"


@pytest.fixture
def new(tmp_path):
    """``new.onnx``: two elements differ, written on another day, weights beside it."""
    arrays = arrays_of()
    arrays["w1"][2, 3] += 1
    arrays["slope"] = np.array(0.2, "f4")
    onnx.save(
        make_model(arrays, remark="another day"),
        tmp_path / "new.onnx",
        save_as_external_data=True,
        location="new.bin",
        size_threshold=60,  # the shape stays inside
    )
    return tmp_path / "new.onnx"


def outputs(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


# ONNX files --------------------------------------------------------------------------


def test_a_graph_and_its_weight_file_compute_what_the_file_did(old, tmp_path):
    model = read_model(old)
    (tmp_path / "graph.onnx").write_bytes(model.graph)
    (tmp_path / "weights.safetensors").write_bytes(model.weights.data)
    x = np.random.default_rng(1).normal(size=(5, 6)).astype("f4")
    assert np.array_equal(outputs(tmp_path / "graph.onnx", x), outputs(old, x))
    check_graph(model.graph, model.weights.layout)
    assert model.model == network_id(model.weights.layout.header, model.graph)


def test_weights_are_what_networks_learn_and_shapes_stay_in_the_graph(old):
    graph, weights = split_onnx(old)
    assert set(weights) == {"w1", "b1", "w2", "slope"}
    inside = [
        t.name
        for t in onnx.load_from_string(graph).graph.initializer
        if t.data_location != TensorProto.EXTERNAL
    ]
    assert inside == ["shape"]


def test_embedded_and_external_weights_and_remarks_make_no_difference(old, new):
    assert split_onnx(old)[0] == split_onnx(new)[0]


def with_words():
    """A model with a constant of text too."""
    model = make_model()
    words = helper.make_tensor("words", TensorProto.STRING, [1], [b"a"])
    model.graph.node.append(helper.make_node("Constant", [], ["said"], value=words))
    return model


def test_what_registries_stamp_on_a_file_is_no_part_of_its_network(tmp_path):
    model = with_words()
    onnx.save(model, tmp_path / "plain.onnx")
    model.model_version, model.domain = 2, "com.example"
    model.training_info.add().initialization.name = "initial"
    graph = model.graph
    parts = *graph.node, *graph.initializer, *graph.input, *graph.output
    for part in (model, graph, *parts, graph.node[-1].attribute[0].t):
        part.metadata_props.add(key="trained", value="today")
    onnx.save(model, tmp_path / "stamped.onnx")
    plain, stamped = (read_model(tmp_path / f"{n}.onnx") for n in ("plain", "stamped"))
    assert plain.graph == stamped.graph


def test_weights_in_constant_nodes_are_weights(tmp_path, old):
    model = make_model()
    (w1,) = [t for t in model.graph.initializer if t.name == "w1"]
    model.graph.initializer.remove(w1)
    node = helper.make_node("Constant", [], ["w1"], value=w1)
    model.graph.node.insert(0, node)
    onnx.save(model, tmp_path / "constants.onnx")
    graph, weights = split_onnx(tmp_path / "constants.onnx")
    assert weights.data == split_onnx(old)[1].data
    assert not [n for n in onnx.load_from_string(graph).graph.node if not n.input]


def test_floats_that_decide_a_shape_stay_in_the_graph(tmp_path):
    scales = numpy_helper.from_array(np.array([1, 1, 2, 2], "f4"), "scales")
    weight = numpy_helper.from_array(np.ones((1, 1, 2, 2), "f4"), "w")
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["x", "w"], ["a"]),
            helper.make_node("Resize", ["a", "", "scales"], ["y"], mode="nearest"),
        ],
        "resize",
        [value("x", TensorProto.FLOAT, [1, 1, 2, 2])],
        [value("y", TensorProto.FLOAT, [1, 1, 4, 4])],
        [scales, weight],
    )
    opset = [helper.make_opsetid("", 17)]
    path = tmp_path / "resize.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    assert set(read_model(path).weights) == {"w"}
    assert adopt_model(read_model(path)).data  # ONNX Runtime has loaded it


def test_the_patch_between_two_files_carries_what_differs(old, new):
    base, target = read_model(old), read_model(new)
    packed = pack_models(base, target, counter=3)
    assert packed.counts == {"w1": 1, "b1": 0, "w2": 0, "slope": 1}
    with open_patch(packed.data) as opened:
        header = opened.header
        assert apply_patch(base.weights, opened).data == target.weights.data
    assert (header.round, header.counter) == (3, 3)
    assert header.model == base.model == target.model


def other_shape(model):
    model.graph.initializer[0].dims[:] = [8, 6]


def other_operator(model):
    model.graph.node[3].op_type = "Mul"


def other_constant(model):
    constant = numpy_helper.from_array(np.array([0, 8], "i8"), "shape")
    model.graph.initializer[-1].CopyFrom(constant)


def one_more(model):
    model.graph.node.add(op_type="Relu", input=["y"], output=["z"])


def renamed(model):
    model.graph.initializer[1].name = model.graph.node[2].input[1] = "bias"


def other_input(model):
    model.graph.input[0].name = model.graph.node[0].input[0] = "image"


def other_version(model):
    model.opset_import[0].version = 18


def other_operator_domain(model):
    model.opset_import.add(domain="com.example", version=1)


def other_value(model):
    value = helper.make_tensor_value_info("a", TensorProto.FLOAT, [None, 8])
    model.graph.value_info.append(value)


def other_quantization(model):
    model.graph.quantization_annotation.add(tensor_name="a")


def other_order(model):
    first = model.graph.initializer.pop(0)
    model.graph.initializer.append(first)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (other_operator_domain, "different ONNX versions"),
        (other_value, r"they differ in model\.graph\.value_info"),
        (other_quantization, r"in model\.graph\.quantization_annotation"),
        (other_order, "the constants are the same ones in another order"),
        (other_shape, r"'w1' is F32 \[6, 8\] in the base, F32 \[8, 6\]"),
        (renamed, "'b1' is F32 .* missing in the target"),
        (other_operator, "operator 3 differs"),
        (other_constant, "constant 4 differs"),
        (one_more, "one has 5 operators, the other 6"),
        (other_input, "input 0 differs"),
        (other_version, "different ONNX versions"),
    ],
)
def test_files_of_different_networks_are_refused_with_the_difference(
    old, tmp_path, edit, words
):
    model = make_model()
    edit(model)
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(WrongModelError, match=words):
        pack_models(read_model(old), read_model(tmp_path / "other.onnx"))


@pytest.mark.parametrize("data", [b"", b"\xff\xff\xff", b"PK\x03\x04 a pickle", b"[1]"])
def test_what_is_neither_onnx_nor_safetensors_is_refused(tmp_path, data):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(WeightsError):
        read_model(tmp_path / "file")


def test_a_pipe_is_no_model_and_not_waited_for(tmp_path, command):
    os.mkfifo(tmp_path / "pipe")
    code, _, err = command(pack, "--base", tmp_path / "pipe", "--bundle")
    assert (code, "is no ordinary file" in err) == (3, True)


def test_a_network_without_weights_is_refused(tmp_path):
    model = make_model()
    del model.graph.initializer[:-1]
    onnx.save(model, tmp_path / "empty.onnx")
    with pytest.raises(WeightsError, match="holds no weights"):
        read_model(tmp_path / "empty.onnx")


def test_missing_external_data_is_refused(new):
    new.with_name("new.bin").unlink()
    with pytest.raises(WeightsError, match="its weights are missing"):
        read_model(new)


# safetensors files -------------------------------------------------------------------


def by_hand(path, arrays, metadata=None):
    """A valid safetensors file in the order of ``arrays``, which is not canonical."""
    entries, body = {}, b""
    for name, array in arrays.items():
        start = len(body)
        body += array.tobytes()
        entries[name] = {
            "dtype": {"f4": "F32", "f2": "F16"}[array.dtype.str[1:]],
            "shape": list(array.shape),
            "data_offsets": [start, len(body)],
        }
    if metadata:
        entries["__metadata__"] = metadata
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def test_a_safetensors_file_in_any_order_becomes_canonical(tmp_path):
    arrays = arrays_of(extra=np.ones(3, "f2"))
    odd = by_hand(tmp_path / "odd", arrays, {"format": "pt"})
    safetensors.numpy.load_file(odd)  # it is a valid file
    model = read_model(odd)
    assert not model.canonical
    assert model.weights.data == read_weights(bytes(model.weights.data)).data
    for name, array in arrays.items():
        assert np.array_equal(model.weights[name], array)


def test_a_canonical_file_stays_as_it_is(tmp_path):
    safetensors.numpy.save_file(arrays_of(), tmp_path / "a.safetensors")
    model = read_model(tmp_path / "a.safetensors")
    assert model.canonical
    assert model.weights.fingerprint == fingerprint_file(tmp_path / "a.safetensors")


def test_safetensors_and_onnx_of_the_same_weights_are_the_same(tmp_path, old):
    odd = by_hand(tmp_path / "odd", arrays_of(), {"format": "pt"})
    assert read_model(odd).weights.data == read_model(old).weights.data


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 80]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F6", "shape": [8], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        [],
    ],
)
def test_a_malformed_safetensors_file_is_refused(tmp_path, entry):
    text = json.dumps({"w": entry}).encode()
    path = tmp_path / "bad"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(WeightsError):
        read_model(path)


def test_a_graph_makes_a_safetensors_file_a_network(tmp_path, old):
    model = read_model(old)
    (tmp_path / "graph.onnx").write_bytes(model.graph)
    odd = by_hand(tmp_path / "odd", arrays_of(), {"format": "pt"})
    assert read_model(odd, tmp_path / "graph.onnx").model == model.model
    assert read_model(odd).model != model.model
    with pytest.raises(WeightsError, match="needs no other graph"):
        read_model(old, tmp_path / "graph.onnx")
    with pytest.raises(RoundError, match="does not read"):
        read_model(by_hand(tmp_path / "x", {"w": np.ones(2, "f4")}), old)


# First installation ------------------------------------------------------------------


def test_a_device_is_installed_from_an_onnx_file_and_follows_its_releases(
    old, new, tmp_path, command
):
    assert command(pack, "--base", old, "--bundle")[0] == 0
    device = Device.install(tmp_path / "store", tmp_path / "old.bundle.zip")
    x = np.random.default_rng(1).normal(size=(5, 6)).astype("f4")
    assert np.array_equal(device.predictor().predict(x), outputs(old, x))

    assert command(pack, "--base", old, "--target", new)[0] == 0
    device.update(tmp_path / "new.dpu")
    assert np.array_equal(device.predictor().predict(x), outputs(new, x))
    assert device.status()["release_counter"] == 1

    def release(counter, base, target):
        path = tmp_path / f"{counter}.dpu"
        arguments = ("--base", base, "--target", target, "--counter", counter)
        assert command(pack, *arguments, "-o", path)[0] == 0
        device.update(path)

    third = tmp_path / "third.onnx"
    onnx.save(make_model(arrays_of(b1=np.ones(8, "f4"))), third)
    release(2, new, third)
    release(3, third, new)
    # No slot holds the first file any more; a patch from it applies all the same.
    release(4, old, third)
    assert np.array_equal(device.predictor().predict(x), outputs(third, x))
    release(5, third, old)  # and back to it, as a newer release
    assert np.array_equal(device.predictor().predict(x), outputs(old, x))
    with pytest.raises(TrustError):
        device.update(tmp_path / "4.dpu")


def test_a_named_model_is_one_of_its_own_whatever_its_weights(
    old, new, tmp_path, command
):
    packed = {}
    for name in ("blue", "red", ""):
        named = ["--name", name] if name else []
        folder = tmp_path / (name or "none")
        files = ["--base", old, *named, "-q", "-o", f"{folder}/"]
        assert command(pack, *files, "--bundle")[0] == 0
        assert command(pack, *files, "--target", new)[0] == 0
        packed[name] = folder / "old.bundle.zip", folder / "new.dpu"
    for name, (bundle, patch_file) in packed.items():
        device = Device.install(tmp_path / f"store {name}", bundle)
        for other, (_, foreign) in packed.items():
            if other != name:
                with pytest.raises(WrongModelError, match="of this network"):
                    device.update(foreign)
        device.update(patch_file)
        assert (device.store.run.name if device.store.run else "") == name
    # Without a name, graph and tensor table alone decide: as for stores of old.
    unnamed = read_model(old)
    with open_patch(packed[""][1]) as opened:
        network = network_id(unnamed.weights.layout.header, unnamed.graph)
        assert opened.header.model == network


@pytest.mark.parametrize("signed", [False, True])
def test_a_bundle_of_a_name_that_is_no_text_can_be_read(old, tmp_path, command, signed):
    odd = Path(os.fsdecode(bytes(tmp_path) + b"/m\xff.onnx"))
    odd.write_bytes(old.read_bytes())
    key = tmp_path / "key.pem"
    key.write_bytes(encode_private(generate_key()))
    sign = ["--sign", key] if signed else []
    for words in (["--base", odd], ["--base", old, "--name", "a\udcff"]):
        path = tmp_path / "b.zip"
        made = command(pack, *words, *sign, "--bundle", "-o", path, "--force")
        assert made[0] == 0, made
        assert command(patch, "verify", path)[0] == 0


def test_a_bundle_that_no_device_could_read_is_not_written(old, tmp_path, monkeypatch):
    monkeypatch.setenv("DPU_LIMITS", "manifest_bytes=64")
    limits.cache_clear()
    with pytest.raises(BundleError, match="manifest_bytes"):
        adopt_model(read_model(old))
    monkeypatch.undo()
    limits.cache_clear()


def test_the_contract_is_derived_from_the_graph(old):
    contract = parse_contract(make_contract(read_model(old)))
    assert contract.inputs == (InputSpec("x", "float32", (None, 6)),)
    assert contract.outputs[0].shape == (None, 3)
    assert (contract.classes, contract.accuracy_floor) == ((), 0.0)


def test_what_is_stated_replaces_what_is_derived(old, tmp_path):
    stated = {"classes": ["a", "b", "c"], "inputs": [{"scale": 0.5}]}
    (tmp_path / "c.json").write_text(json.dumps(stated))
    contract = parse_contract(make_contract(read_model(old), tmp_path / "c.json"))
    assert contract.classes == ("a", "b", "c")
    assert contract.inputs == (InputSpec("x", "float32", (None, 6), 0.5),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "no JSON object"),
        ('{"inputs": [{"name": "image"}]}', "an input 'image', the graph takes x"),
        ('{"inputs": [{"scale": "a"}]}', "malformed"),
        ('{"inputs": [{"scale": 0}]}', "'scale' is .*other than 0"),
        ('{"inputs": [{"std": [1, 1e-50, 1, 1, 1, 1]}]}', "a std of 0, by which"),
        ('{"output_tolerance": -1}', "'output_tolerance' is -1"),
        ('{"inputs": [{}, {"name": "x"}]}', "the input 'x' twice"),
        ('{"outputs": [{"name": "z"}]}', "the outputs z; the graph .* y"),
        ('{"inputs": [{"shape": [0, 6]}]}', "'shape' is .* whole numbers from 1 on"),
        ('{"schema": 9}', "c.json: .*schema 9"),
        ('{"clases": []}', "c.json: 'clases' is no field; there are .*classes"),
        ('{"inputs": [{"sclae": 1}]}', "'sclae' is no field; there are .*scale"),
        ('{"inputs": [5]}', "c.json is malformed: 'inputs' .* a list of objects"),
        ('{"inputs": [{}, null]}', "a list of objects"),
        ('{"inputs": [""]}', "a list of objects"),
        ('{"inputs": {"name": "x"}}', "a list of objects"),
        ('{"inputs": [{"name": []}]}', r"an input \[\], the graph takes x"),
    ],
)
def test_a_contract_that_does_not_fit_is_refused(old, tmp_path, text, words):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ContractError, match=words):
        make_contract(read_model(old), tmp_path / "c.json")


def test_golden_inputs_without_an_answer_are_refused(tmp_path):
    """Any weights would pass a trial by an output without elements."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"])]
    nodes.append(helper.make_node("Compress", ["m", "none"], ["y"], axis=0))
    value = helper.make_tensor_value_info
    arrays = {"w": np.ones((6, 3), "f4"), "none": np.zeros(1, "?")}
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, ["n", 6])],
        [value("y", TensorProto.FLOAT, ["m", 3])],
        [numpy_helper.from_array(a, n) for n, a in arrays.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(TrialError, match=r"output 1 'y' has no elements .*\[0, 3\]"):
        adopt_model(read_model(tmp_path / "m.onnx"))


def golden_of(bundle):
    return np.load(io.BytesIO(read_bundle(bundle.data).files["golden.npz"]))


def test_golden_inputs_are_made_up_where_none_are_given(old):
    first, again = (adopt_model(read_model(old)) for _ in range(2))
    golden = golden_of(first)
    assert golden["inputs"].shape == (4, 6)
    assert golden["inputs"].min() >= 0
    assert golden["inputs"].max() < 1
    assert np.array_equal(golden["labels"], golden["outputs"].argmax(-1))
    assert first.data == again.data


def test_given_golden_inputs_and_labels_hold_the_contracts_floor(old, tmp_path):
    x = np.random.default_rng(1).normal(size=(8, 6)).astype("f4")
    labels = outputs(old, x).argmax(-1)
    labels[:4] += 1
    np.savez(tmp_path / "golden.npz", inputs=x, labels=labels % 3)
    model = read_model(old)
    golden = golden_of(adopt_model(model, golden=tmp_path / "golden.npz"))
    assert np.array_equal(golden["labels"], labels % 3)
    (tmp_path / "c.json").write_text('{"accuracy_floor": 0.75}')
    with pytest.raises(TrialError, match=r"4 of 8 right\) on golden labels"):
        adopt_model(model, golden=tmp_path / "golden.npz", contract=tmp_path / "c.json")


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


@pytest.fixture(autouse=True)
def _limits():
    yield
    limits.cache_clear()


def test_a_size_that_the_contract_states_holds_wherever_it_is_named():
    fixed = InputSpec("a", "float32", (None, 12))
    free = InputSpec("b", "float32", (None, None))
    found = inputs_for(fixed, free, a=["n", "width"], b=["n", "width"])
    assert found["b"].shape == found["a"].shape == (4, 12)


def ending_with(path, *nodes, kind=TensorProto.FLOAT, shape=("n", 3)):
    """A file whose network goes on from ``y`` to an output ``z``."""
    model = make_model()
    model.graph.node.extend(nodes)
    value = helper.make_tensor_value_info("z", kind, list(shape))
    model.graph.output[0].CopyFrom(value)
    onnx.save(model, path)
    return path


def node(*words, **attributes):
    operator, *inputs, output = words
    return helper.make_node(operator, inputs, [output], **attributes)


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (
            {
                "nodes": [node("Cast", "y", "z", to=TensorProto.STRING)],
                "kind": TensorProto.STRING,
            },
            r"gives text of shape \[4, 3\], and devices take tensors of numbers",
        ),
        (
            {"nodes": [node("RandomNormalLike", "y", "q"), node("Add", "y", "q", "z")]},
            r"output 1 'z' differs .*random.*model\.eval",
        ),
        (
            {"nodes": [node("RandomUniformLike", "y", "z", seed=3.0)]},
            r"output 1 'z' differs .*random_outputs",
        ),
        ({"nodes": [node("Log", "y", "z")]}, "not finite"),
    ],
)
def test_a_network_that_every_device_would_refuse_is_not_packed(
    tmp_path, command, end, words
):
    nodes = end.pop("nodes")
    path = ending_with(tmp_path / "odd.onnx", *nodes, **end)
    code, out, err = command(pack, "--base", path, "--bundle")
    assert (code, out) == (5, "")
    assert re.search(words, " ".join(err.split()))
    assert not list(tmp_path.glob("*.zip"))


def with_second(path, *nodes, kind=TensorProto.FLOAT, shape=("n", 3)):
    model = make_model()
    model.graph.node.extend(nodes)
    value = helper.make_tensor_value_info("z", kind, list(shape))
    model.graph.output.append(value)
    onnx.save(model, path)
    return read_model(path)


def test_a_second_output_is_looked_at_before_a_bundle_leaves(tmp_path):
    model = with_second(tmp_path / "log.onnx", node("Log", "y", "z"))
    with pytest.raises(TrialError, match=r"not finite \(output 2 of 2\)"):
        adopt_model(model)
    model = with_second(tmp_path / "random.onnx", node("RandomNormalLike", "y", "z"))
    with pytest.raises(TrialError, match="output 2 'z' differs"):
        adopt_model(model)


@pytest.mark.parametrize(
    ("nodes", "options", "kept"),
    [
        ([node("Neg", "y", "z")], {}, (4, 3)),
        ([node("ReduceMean", "y", "z", keepdims=0)], {"shape": ()}, ()),
        ([node("Shape", "y", "z")], {"kind": TensorProto.INT64, "shape": (2,)}, (2,)),
        ([node("Greater", "y", "slope", "z")], {"kind": TensorProto.BOOL}, (4, 3)),
    ],
)
def test_a_device_takes_what_a_second_output_may_be(tmp_path, nodes, options, kept):
    bundle = adopt_model(with_second(tmp_path / "m.onnx", *nodes, **options))
    found = golden_of(bundle).get("outputs_1")
    assert (None if found is None else found.shape) == kept
    assert Device.install(tmp_path / "store", bundle.data).verify()


def test_a_patch_to_a_second_output_that_is_not_finite_does_not_leave(
    tmp_path, command
):
    def save(name, slope):
        model = make_model(arrays_of(slope=np.array(slope, "f4")))
        model.graph.node.append(node("Div", "slope", "slope", "z"))
        value = helper.make_tensor_value_info("z", TensorProto.FLOAT, [])
        model.graph.output.append(value)
        onnx.save(model, tmp_path / name)
        return tmp_path / name

    good, better, bad = (save(f"{n}.onnx", n / 4) for n in (2, 1, 0))
    assert command(pack, "--base", good, "--target", better)[0] == 0
    code, out, err = command(pack, "--base", good, "--target", bad)
    assert (code, out) == (5, "")
    assert "not finite (output 2 of 2)" in " ".join(err.split())
    assert not (tmp_path / "0.dpu").exists()
    assert command(pack, "--base", bad, "--target", good)[0] == 0


def test_golden_inputs_that_devices_would_not_unpack_are_refused(old, tmp_path):
    np.savez_compressed(tmp_path / "g.npz", inputs=np.zeros((3 << 20, 6), "f4"))
    with pytest.raises(ContractError, match="fewer samples"):
        adopt_model(read_model(old), golden=tmp_path / "g.npz")


def test_a_regression_network_needs_no_labels(tmp_path):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "regression",
        [value("x", TensorProto.FLOAT, ["n", 6])],
        [value("y", TensorProto.FLOAT, ["n"])],
        [numpy_helper.from_array(np.ones(6, "f4"), "w")],
    )
    opset = [helper.make_opsetid("", 17)]
    path = tmp_path / "regression.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    bundle = adopt_model(read_model(path))
    device = Device.install(tmp_path / "store", bundle.data)
    assert device.predictor().predict(np.ones((2, 6), "f4")).tolist() == [6, 6]


# The command -------------------------------------------------------------------------


def test_the_command_says_what_the_device_then_holds(old, new, command, tmp_path):
    code, out, err = command(pack, "--base", old, "--target", new)
    assert (code, err) == (0, f"wrote {tmp_path / 'new.dpu'}\n")
    target = read_model(new).weights.fingerprint
    assert f"weight file {target}; it holds the tensors of new.onnx" in out
    assert "changed            2 of 81 values (2.47 %) in 2 tensors" in out
    assert "the next release needs --counter 2 or more" in out
    command(patch, "extract", new, "-o", tmp_path / "slot")
    assert fingerprint_file(tmp_path / "slot" / "weights.safetensors") == target
    assert (tmp_path / "slot" / "graph.onnx").read_bytes() == read_model(new).graph


def test_the_command_packs_safetensors_files_and_says_that_the_graph_is_missing(
    command, tmp_path, old
):
    a = by_hand(tmp_path / "a.safetensors", arrays_of(), {"format": "pt"})
    b = tmp_path / "b.safetensors"
    safetensors.numpy.save_file(arrays_of(b1=np.ones(8, "f4")), b)
    code, out, _ = command(pack, "--base", a, "--target", b, "-o", f"{tmp_path}/out/")
    assert code == 0
    assert "it is b.safetensors" in out
    assert "--graph" in out
    record = json.loads(
        command(pack, "--base", a, "--target", b, "--dry-run", "--json")[1]
    )["packed"][0]
    assert (record["changed"], record["values"], record["canonical"]) == (8, 81, True)
    assert record["written"] is False
    (tmp_path / "graph.onnx").write_bytes(read_model(old).graph)
    graph = ("--graph", tmp_path / "graph.onnx")
    assert "--graph" not in command(pack, "--base", a, "--target", b, *graph)[1]
    assert command(pack, "--base", a, *graph, "--bundle", "-q")[0] == 0
    device = Device.install(tmp_path / "store", tmp_path / "a.bundle.zip")
    device.update(tmp_path / "b.dpu")


def test_patches_and_bundles_of_files_are_signed_too(old, new, command, tmp_path):
    key = tmp_path / "key.pem"
    command(patch, "keygen", key)
    signed = ("--sign", key)
    _, out, _ = command(pack, "--base", old, "--target", new, *signed)
    assert "signed   by " in out
    command(pack, "--base", old, "--bundle", *signed, "-q")
    trust = trust_keys({"": (tmp_path / "key.pub.pem").read_bytes()})
    bundle = tmp_path / "old.bundle.zip"
    device = Device.install(tmp_path / "store", bundle, trust=trust)
    device.update(tmp_path / "new.dpu")
    command(pack, "--base", new, "--target", old, "--counter", 2, "-q")
    with pytest.raises(TrustError):
        device.update(tmp_path / "old.dpu")  # unsigned


def test_a_file_patch_is_verified_with_the_onnx_file_itself(old, new, command):
    command(pack, "--base", old, "--target", new, "-q")
    path = new.with_name("new.dpu")
    assert command(patch, "verify", path, "--base", old)[0] == 0
    assert command(patch, "verify", path, "--base", new)[0] == 4


def test_equal_weights_are_nothing_to_send(old, new, command, tmp_path):
    onnx.save(make_model(remark="later"), tmp_path / "same.onnx")
    same = ("--target", tmp_path / "same.onnx")
    code, out, _ = command(pack, "--base", old, *same)
    assert code == 0
    assert "nothing to send" in out
    assert not (tmp_path / "same.dpu").exists()


def test_a_retrained_network_gets_a_hint(old, command, tmp_path):
    onnx.save(make_model(arrays_of(seed=5)), tmp_path / "retrained.onnx")
    out = command(pack, "--base", old, "--target", tmp_path / "retrained.onnx")[1]
    assert "did the exporter fold BatchNorm" in out


def test_a_file_patch_over_its_limit_is_refused(old, new, command, tmp_path):
    arguments = ("--base", old, "--target", new, "--max-size", "100")
    assert command(pack, *arguments)[0] == 6
    assert not (tmp_path / "new.dpu").exists()
    with pytest.raises(BudgetError):
        adopt_model(read_model(old), max_size=100)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--base", "old"],
        ["--target", "old"],
        ["--base", "old", "--target", "old", "--bundle"],
        ["--base", "old", "--target", "old", "--golden", "old"],
        ["--base", "old", "--target", "old", "--from", "init"],
    ],
)
def test_options_that_do_not_go_together_are_usage_errors(old, command, arguments):
    given = [str(old) if word == "old" else word for word in arguments]
    assert command(pack, *given)[0] == 2


def test_a_bundle_of_bare_tensors_is_a_usage_error(command, tmp_path):
    odd = by_hand(tmp_path / "a.safetensors", arrays_of())
    code, _, err = command(pack, "--base", odd, "--bundle")
    assert code == 2
    assert "--graph" in err
