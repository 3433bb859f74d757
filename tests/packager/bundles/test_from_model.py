# SPDX-License-Identifier: Apache-2.0
import io
import os
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.errors import BundleError, TrialError, TrustError, WrongModelError
from edge_runtime.formats.bundle import read_bundle
from edge_runtime.formats.identity import network_id
from edge_runtime.formats.patch import open_patch
from edge_runtime.limits import limits
from edge_runtime.update.device import Device
from packager.bundles.from_model import adopt_model
from packager.cli.pack import pack, patch
from packager.keys import encode_private, generate_key
from packager.models.read import read_model
from tests.packager.anybody import arrays_of, make_model, outputs


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
