# SPDX-License-Identifier: Apache-2.0
import json
import os
import struct

import numpy as np
import onnx
import pytest
import safetensors.numpy
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.errors import (
    BudgetError,
    RoundError,
    TrustError,
    WeightsError,
    WrongModelError,
)
from edge_runtime.formats.apply import apply_patch
from edge_runtime.formats.identity import network_id
from edge_runtime.formats.patch import open_patch
from edge_runtime.formats.signing import trust_keys
from edge_runtime.formats.weights import fingerprint_file, read_weights
from edge_runtime.update.device import Device
from packager.bundles.from_model import adopt_model
from packager.cli.pack import pack, patch
from packager.models.onnx_check import check_graph
from packager.models.onnx_split import split_onnx
from packager.models.read import pack_models, read_model
from tests.packager.anybody import arrays_of, make_model, outputs

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
