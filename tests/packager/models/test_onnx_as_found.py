# SPDX-License-Identifier: Apache-2.0
"""ONNX files as people have them: constants, links, bodies, attributes, versions."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.errors import (
    BackendError,
    RoundError,
    WeightsError,
    WrongModelError,
)
from edge_runtime.formats.contract_file import parse_contract
from edge_runtime.formats.identity import network_id
from edge_runtime.update.device import Device
from packager.bundles import from_model
from packager.bundles.derived_contract import make_contract
from packager.bundles.from_model import adopt_model
from packager.cli.pack import pack
from packager.models.onnx_split import SMALL
from packager.models.read import check_same_network, pack_models, read_model

FLOATS, INTS = TensorProto.FLOAT, TensorProto.INT64
node = helper.make_node


def made(nodes, tensors, shape=("n", 6), *, opset=20, ir=9, **more):
    """A model from ``x`` to ``y``; weights by name."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "graph",
        [value("x", FLOATS, list(shape))],
        [value("y", FLOATS, None)],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in tensors.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir, **more)


def saved(model, path, **how):
    onnx.save(model, path, **how)
    return path


def weight(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("f4")


def constants(path):
    """Names of the initializers whose values stay in the graph."""
    graph = onnx.load_model_from_string(read_model(path).graph).graph
    return {t.name for t in graph.initializer if t.data_location != 1}


def answers(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def follows(tmp_path, command, old, new, x):
    """Install ``old``, move to ``new`` by a patch, roll back; compare the answers."""
    assert command(pack, "--base", old, "--bundle", "-q")[0] == 0
    assert command(pack, "--base", old, "--target", new, "-q")[0] == 0
    device = Device.install(tmp_path / "store", old.with_suffix(".bundle.zip"))
    assert np.array_equal(device.predictor().predict(x), answers(old, x))
    device.update(new.with_suffix(".dpu"))
    assert np.array_equal(device.predictor().predict(x), answers(new, x))
    assert not np.array_equal(answers(old, x), answers(new, x))
    device.rollback()
    assert np.array_equal(device.predictor().predict(x), answers(old, x))


# Numbers that ONNX Runtime needs while it loads --------------------------------------


def i4(*numbers):
    return np.array(numbers, "i4")


MULTIPLIED = node("MatMul", ["x", "w"], ["h"])
AS_TIME = node("Unsqueeze", ["h", "last"], ["t"])
ONE, LAST = np.array(1, "i4"), np.array([2], "i8")
# What follows a layer: nodes from h to y, and their constants.
NEEDS = {
    "slice": ([node("Slice", ["h", "a", "b", "c"], ["y"])], {"b": i4(2), "c": i4(1)}),
    "range": (
        [node("Range", ["a", "b", "c"], ["r"]), node("Add", ["h", "r"], ["y"])],
        {"a": np.float32(0), "b": np.float32(6), "c": np.float32(1)},
    ),
    "one hot": (
        [node("ArgMax", ["h"], ["i"]), node("OneHot", ["i", "a", "v"], ["y"])],
        {"a": np.float32(6), "v": np.array([0, 1], "f4")},
    ),
    "window": (
        [node("HannWindow", ["a"], ["r"]), node("Add", ["h", "r"], ["y"])],
        {"a": np.array(6, "i4")},
    ),
    "mel": (
        [
            node("MelWeightMatrix", ["a", "b", "c", "d", "e"], ["r"]),
            node("MatMul", ["h", "r"], ["y"]),
        ],
        {"a": np.array(8, "i4"), "b": np.array(10, "i4"), "c": np.array(8000, "i4")}
        | {"d": np.float32(0), "e": np.float32(4000)},
    ),
    "fourier": (
        [AS_TIME, node("DFT", ["t", "a"], ["y"])],
        {"a": np.array(6, "i4"), "last": LAST},
    ),
    "short fourier": (
        [AS_TIME, node("STFT", ["t", "a", "v", "b"], ["y"])],
        {"a": np.array(2, "i4"), "b": np.array(4, "i4"), "last": LAST}
        | {"v": np.ones(4, "f4")},
    ),
    "sequence": (
        [
            node("SplitToSequence", ["h", "a"], ["s"], axis=1),
            node("SequenceAt", ["s", "b"], ["y"]),
        ],
        {"a": np.array(2, "i4"), "b": np.array(0, "i4")},
    ),
    "behind a name": (
        [node("Identity", ["a"], ["i"]), node("Resize", ["h", "", "i"], ["y"])],
        {"a": np.array([1, 2], "f4")},
    ),
}


@pytest.mark.parametrize("case", NEEDS)
def test_numbers_that_the_runtime_needs_at_once_stay_in_the_graph(case, tmp_path):
    nodes, tensors = NEEDS[case]
    tensors = {"a": i4(0)} | tensors | {"w": weight(6, 6)}
    path = saved(made([MULTIPLIED, *nodes], tensors), tmp_path / "model.onnx")
    model = read_model(path)
    assert "a" in constants(path)
    assert "w" in model.weights
    assert adopt_model(model).data  # it loads, and answers
    assert ("v" in tensors) == ("v" in model.weights)


def test_what_stays_is_found_by_trying_and_is_no_more_than_needed(tmp_path):
    nodes, tensors = NEEDS["behind a name"]
    nodes = [MULTIPLIED, node("Mul", ["h", "few"], ["k"]), *nodes]
    nodes[-1].input[0] = "k"
    tensors |= {"w": weight(6, 6), "few": np.array([2], "f4")}
    old = saved(made(nodes, tensors), tmp_path / "old.onnx")
    new = saved(
        made(nodes, tensors | {"w": weight(6, 6, seed=1)}), tmp_path / "new.onnx"
    )
    assert constants(old) == {"a"}
    packed = pack_models(read_model(old), read_model(new))
    assert packed.counts == {"few": 0, "w": 36}
    other = tensors | {"a": np.array([1, 3], "f4")}
    with pytest.raises(WrongModelError, match="constant 0 differs"):
        pack_models(
            read_model(old), read_model(saved(made(nodes, other), tmp_path / "o.onnx"))
        )


def test_large_tensors_never_move_into_the_graph(tmp_path):
    sizes = np.ones(SMALL // 4 + 1, "f4")
    nodes = [node("Identity", ["a"], ["i"]), node("Resize", ["x", "", "i"], ["y"])]
    path = saved(made(nodes, {"a": sizes}), tmp_path / "model.onnx")
    assert not constants(path)  # ONNX Runtime refuses it either way


def test_the_identity_of_a_network_is_what_it_was(tmp_path):
    nodes = [
        node("Gemm", ["x", "w", "b"], ["h"]),
        node("Reshape", ["h", "shape"], ["r"]),
        node("Constant", [], ["c"], value=numpy_helper.from_array(np.ones(6, "f4"))),
        node("Add", ["r", "c"], ["y"]),
    ]
    tensors = {"w": np.ones((6, 6), "f4"), "b": np.ones(6, "f4"), "shape": i4(-1, 6)}
    tensors["shape"] = tensors["shape"].astype("i8")
    whole = made(nodes, tensors)
    whole.graph.output[0].type.tensor_type.shape.SetInParent()
    model = read_model(saved(whole, tmp_path / "model.onnx"))
    assert network_id(model.weights.layout.header, model.graph) == IDENTITY


# Of an earlier packager: devices hold it.
IDENTITY = "9fbdbef34598e3b3b2b8dee1fce0fdce3408caff1f156ab695933560289b9ddd"


# Where the values lie ----------------------------------------------------------------


def beside(folder, seed=0):
    """A model whose weight lies in ``model.onnx_data``."""
    folder.mkdir(parents=True, exist_ok=True)
    nodes, tensors = [node("MatMul", ["x", "w"], ["y"])], {"w": weight(6, 3, seed=seed)}
    return saved(
        made(nodes, tensors),
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=0,
    )


@pytest.fixture
def plain(tmp_path):
    return beside(tmp_path / "plain")


def test_a_cache_of_links_is_read_like_plain_files(plain, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, name in enumerate(("model.onnx", "model.onnx_data")):
        (blobs / str(number)).write_bytes(plain.with_name(name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    model = read_model(snapshot / "model.onnx")
    assert model.weights.fingerprint == read_model(plain).weights.fingerprint
    assert adopt_model(model).data


def test_a_weight_file_with_a_second_name_is_read(plain, tmp_path):
    os.link(plain.with_name("model.onnx_data"), tmp_path / "second name")
    assert read_model(plain).weights["w"].shape == (6, 3)


def test_a_link_to_a_model_finds_the_weights_beside_the_model(plain, tmp_path):
    (tmp_path / "link.onnx").symlink_to(plain)
    assert read_model(tmp_path / "link.onnx").graph == read_model(plain).graph


def moved(entries):
    """Change what the model says of where its weight lies."""

    def edit(model):
        (tensor,) = model.graph.initializer
        there = {entry.key: entry.value for entry in tensor.external_data} | entries
        del tensor.external_data[:]
        for key, value in there.items():
            if value is not None:
                tensor.external_data.add(key=key, value=value)

    return edit


def longer(model):
    model.graph.initializer[0].dims[:] = [6, 300]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (moved({"length": "40"}), "needs 72 bytes .* 40 of 'model.onnx_data'"),
        (moved({"length": "720"}), "needs 72 bytes .* 72 are"),
        (moved({"offset": "64"}), "from byte 64 on, where 8 are"),
        (moved({"offset": "-4"}), "does not say where"),
        (moved({"offset": "four"}), "does not say where"),
        (moved({"location": None}), "does not say where"),
        (moved({"location": "/etc/passwd"}), "outside of the model's folder"),
        (moved({"location": "../plain/model.onnx_data"}), "outside of the model's"),
        (moved({"location": "nothing"}), "weights are missing: .* no such file"),
        (moved({"location": "."}), "is no file"),
        (longer, "needs 7200 bytes for its shape"),
    ],
)
def test_values_that_are_not_where_the_model_says_are_refused_by_name(
    plain, edit, words, command
):
    model = onnx.load(plain, load_external_data=False)
    edit(model)
    plain.write_bytes(model.SerializeToString())
    with pytest.raises(WeightsError, match=words):
        read_model(plain)
    assert command(pack, "--base", plain, "--bundle")[0] == 3


def test_bytes_that_many_tensors_share_are_refused(plain):
    model = onnx.load(plain, load_external_data=False)
    tensors = model.graph.initializer
    for number in range(15):
        tensors.add().CopyFrom(tensors[0])
        tensors[-1].name = f"w{number}"
    plain.write_bytes(model.SerializeToString())
    assert len(read_model(plain).weights.layout.tensors) == 16
    tensors.add().CopyFrom(tensors[0])
    tensors[-1].name = "one more"
    plain.write_bytes(model.SerializeToString())
    with pytest.raises(WeightsError, match=r"17 tensors .* more than 16 times"):
        read_model(plain)


def test_no_length_means_as_much_as_the_shape_needs(plain):
    model = onnx.load(plain, load_external_data=False)
    moved({"length": None, "offset": None})(model)
    plain.write_bytes(model.SerializeToString())
    assert np.array_equal(read_model(plain).weights["w"], weight(6, 3))


def test_a_tensor_with_too_few_values_in_the_file_is_refused_by_name(tmp_path):
    model = made([node("MatMul", ["x", "w"], ["y"])], {"w": weight(6, 3)})
    model.graph.initializer[0].dims[:] = [6, 4]
    with pytest.raises(WeightsError, match="'w' does not hold the values of its shape"):
        read_model(saved(model, tmp_path / "model.onnx"))


def test_a_cut_off_weight_file_is_refused(plain):
    data = plain.with_name("model.onnx_data")
    data.write_bytes(data.read_bytes()[:-8])
    with pytest.raises(WeightsError, match=r"where 64 are; .*fetch the whole file"):
        read_model(plain)


# Bodies and functions ----------------------------------------------------------------


def body(nodes, out, tensors=(), inputs=()):
    value = helper.make_tensor_value_info
    kept = [numpy_helper.from_array(np.asarray(a), n) for n, a in dict(tensors).items()]
    ins = [value(name, kind, shape) for name, kind, shape in inputs]
    outs = [value(name, kind, shape) for name, kind, shape in out]
    return helper.make_graph(nodes, "body", ins, outs, kept)


def constant(name, array):
    return node("Constant", [], [name], value=numpy_helper.from_array(array))


def branches(seed):
    """Weights of one name in both branches: an initializer, a node, and the answer."""
    first = body(
        [node("MatMul", ["x", "w"], ["p"])],
        [("p", FLOATS, None)],
        {"w": weight(6, 3, seed=seed)},
    )
    second = body(
        [
            constant("w", weight(6, 3, seed=seed + 10)),
            node("MatMul", ["x", "w"], ["q"]),
        ],
        [("q", FLOATS, None)],
    )
    direct = [
        body([], [(n, FLOATS, [3])], {n: weight(3, seed=seed + k)})
        for k, n in enumerate("uv")
    ]
    return [
        node("ReduceMax", ["x"], ["top"], keepdims=0),
        node("Greater", ["top", "one"], ["c"]),
        node("If", ["c"], ["a"], then_branch=first, else_branch=second),
        node("If", ["c"], ["b"], then_branch=direct[0], else_branch=direct[1]),
        node("Add", ["a", "b"], ["y"]),
    ]


def loop(seed):
    inside = body(
        [
            node("MatMul", ["h", "w"], ["g"]),
            node("Tanh", ["g"], ["h_out"]),
            node("Identity", ["cond"], ["cond_out"]),
        ],
        [("cond_out", TensorProto.BOOL, []), ("h_out", FLOATS, None)],
        {"w": weight(6, 6, seed=seed)},
        [("i", INTS, []), ("cond", TensorProto.BOOL, []), ("h", FLOATS, None)],
    )
    return [node("Loop", ["three", "", "x"], ["y"], body=inside)]


def scan(seed):
    inside = body(
        [
            constant("w", weight(6, seed=seed)),
            node("Mul", ["e", "w"], ["g"]),
            node("Add", ["s", "g"], ["s_out"]),
            node("Identity", ["s_out"], ["row"]),
        ],
        [("s_out", FLOATS, [6]), ("row", FLOATS, [6])],
        (),
        [("s", FLOATS, [6]), ("e", FLOATS, [6])],
    )
    return [node("Scan", ["zero", "x"], ["end", "y"], body=inside, num_scan_inputs=1)]


BODIES = {
    "if": (branches, {"one": np.float32(1)}, 5),
    "loop": (loop, {"three": np.int64(3)}, 1),
    "scan": (scan, {"zero": np.zeros(6, "f4")}, 2),
}


@pytest.mark.parametrize("case", BODIES)
def test_weights_in_bodies_travel_like_any(case, tmp_path, command):
    nodes, tensors, count = BODIES[case]
    old = saved(made(nodes(0), tensors, (4, 6)), tmp_path / "old.onnx")
    new = saved(made(nodes(1), tensors, (4, 6)), tmp_path / "new.onnx")
    assert len(read_model(old).weights) == count
    for x in (np.full((4, 6), 0.5, "f4"), np.full((4, 6), 1.5, "f4")):
        folder = tmp_path / str(x[0, 0])
        folder.mkdir()
        follows(folder, command, old, new, x)


def test_weights_in_functions_are_weights(tmp_path, command):
    def calling(seed):
        model = made([node("Layer", ["x"], ["y"], domain="own")], {}, (4, 6))
        model.functions.append(
            helper.make_function(
                "own",
                "Layer",
                ["a"],
                ["b"],
                [
                    constant("w", weight(6, 3, seed=seed)),
                    node("MatMul", ["a", "w"], ["b"]),
                ],
                [helper.make_opsetid("", 20)],
            )
        )
        model.opset_import.append(helper.make_opsetid("own", 1))
        return model

    old = saved(calling(0), tmp_path / "old.onnx")
    new = saved(calling(1), tmp_path / "new.onnx")
    follows(tmp_path, command, old, new, weight(4, 6))


# Attributes --------------------------------------------------------------------------


def linear(coefficients):
    return node(
        "LinearRegressor",
        ["x"],
        ["y"],
        domain="ai.onnx.ml",
        coefficients=coefficients,
        intercepts=[1.0],
    )


def trees(values):
    return node(
        "TreeEnsembleRegressor",
        ["x"],
        ["y"],
        domain="ai.onnx.ml",
        n_targets=1,
        nodes_falsenodeids=[2, 0, 0],
        nodes_featureids=[0, 0, 0],
        nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"],
        nodes_nodeids=[0, 1, 2],
        nodes_treeids=[0, 0, 0],
        nodes_truenodeids=[1, 0, 0],
        nodes_values=[0.5, 0.0, 0.0],
        target_ids=[0, 0],
        target_nodeids=[1, 2],
        target_treeids=[0, 0],
        target_weights=values,
    )


@pytest.mark.parametrize(
    ("learned", "words"),
    [
        (linear([1.0] * 6), r"LinearRegressor \(coefficients: 6 .*black_op"),
        (
            trees([1.0, 2.0]),
            r"TreeEnsembleRegressor \(nodes_values: 3 .*whole new file",
        ),
    ],
)
def test_a_model_that_learned_attributes_is_refused_in_true_words(
    learned, words, tmp_path, command
):
    path = saved(made([learned], {}), tmp_path / "model.onnx")
    with pytest.raises(WeightsError, match=words):
        read_model(path)
    assert command(pack, "--base", path, "--bundle")[0] == 3


def test_a_difference_in_learned_attributes_is_told_as_such(tmp_path, command):
    def scaled(offset):
        scaler = node(
            "Scaler",
            ["x"],
            ["h"],
            domain="ai.onnx.ml",
            offset=[offset] * 6,
            scale=[1.0] * 6,
        )
        return made([scaler, node("MatMul", ["h", "w"], ["y"])], {"w": weight(6, 3)})

    old = saved(scaled(0.5), tmp_path / "old.onnx")
    new = saved(scaled(0.25), tmp_path / "new.onnx")
    with pytest.raises(WrongModelError, match=r"attributes of Scaler \(offset: 6"):
        pack_models(read_model(old), read_model(new))
    code, _, err = command(pack, "--base", old, "--bundle")
    assert code == 0
    assert "Scaler (offset: 6 numbers, scale: 6 numbers)" in " ".join(err.split())


@pytest.mark.parametrize(("last", "are"), [("Softmax", True), ("LogSoftmax", False)])
def test_the_contract_says_whether_outputs_are_probabilities(tmp_path, last, are):
    nodes = [
        node("MatMul", ["x", "w"], ["h"]),
        node(last, ["h"], ["s"]),
        node("Identity", ["s"], ["y"]),
    ]
    path = saved(made(nodes, {"w": weight(6, 3)}), tmp_path / "model.onnx")
    text = make_contract(read_model(path))
    assert parse_contract(text).probabilities is are


# Shapes and versions -----------------------------------------------------------------


def test_minus_one_and_no_shape_at_all_are_open_sizes(tmp_path):
    model = made([node("MatMul", ["x", "w"], ["y"])], {"w": weight(6, 3)}, (-1, 6))
    contract = parse_contract(
        make_contract(read_model(saved(model, tmp_path / "model.onnx")))
    )
    assert contract.inputs[0].shape == (None, 6)
    assert contract.outputs[0].shape is None
    assert adopt_model(read_model(tmp_path / "model.onnx")).data


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ({"opset": 99}, "opset 99, .*knows up to"),
        ({"ir": 99}, "IR version 99, .*up to"),
    ],
)
def test_a_model_newer_than_the_packager_is_no_damage(
    version, words, tmp_path, command
):
    model = made([node("MatMul", ["x", "w"], ["y"])], {"w": weight(6, 3)}, **version)
    path = saved(model, tmp_path / "model.onnx")
    code, _, err = command(pack, "--base", path, "--bundle")
    assert code == 11
    assert onnx.__version__ in err
    with pytest.raises(BackendError, match=words):
        read_model(path)


def versions(graph, opset, ir):
    model = onnx.load_model_from_string(graph)
    model.opset_import[0].version = opset or model.opset_import[0].version
    model.ir_version = ir or model.ir_version
    return model.SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    ("opset", "ir", "words"),
    [
        (99, 0, r"of opset 99 of ai\.onnx, the runtime knows up to \d+"),
        (0, 99, r"IR version 99, the runtime reads up to \d+"),
    ],
)
def test_a_device_with_an_older_runtime_says_so_with_code_11(
    opset, ir, words, plain, tmp_path, command, monkeypatch
):
    # As a packager with a newer runtime would make it: the outputs are the same.
    model = read_model(plain)
    newer = replace(model, graph=versions(model.graph, opset, ir))
    monkeypatch.setattr(
        from_model,
        "loaded",
        lambda _, *others, load=from_model.loaded: load(model.graph, *others),
    )
    (tmp_path / "new.zip").write_bytes(adopt_model(newer).data)
    from edge_runtime.cli.main import main

    store = tmp_path / "store"
    code, _, err = command(main, "--store", store, "init", tmp_path / "new.zip")
    text = " ".join(err.split())
    assert code == 11
    assert f"ONNX Runtime {onnxruntime.__version__}" in text
    assert "damaged" not in text
    with pytest.raises(BackendError, match=words):
        Device.install(store, tmp_path / "new.zip")


def test_an_operator_that_the_runtime_lacks_is_named_with_code_11(tmp_path, command):
    model = made([node("Fancy", ["x", "w"], ["y"], domain="my.own")], {"w": weight(6)})
    model.opset_import.append(helper.make_opsetid("my.own", 1))
    old = saved(model, tmp_path / "m.onnx")
    code, _, err = command(pack, "--base", old, "--bundle")
    assert code == 11
    assert "my.own:Fancy, which the runtime lacks" in " ".join(err.split())
    # Nor is it said where a copy of the graph lay when a patch was looked at.
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight(6) + 1, "w"))
    code, _, err = command(
        pack, "--base", old, "--target", saved(model, tmp_path / "n.onnx")
    )
    words = "its answers were not looked at: cannot load the graph: it needs"
    assert (code, words in err) == (0, True)


def test_channels_on_the_last_axis_are_said_in_the_contract(tmp_path, command):
    nodes = [node("MatMul", ["x", "w"], ["y"])]
    path = saved(made(nodes, {"w": weight(3, 2)}, ("n", 4, 5, 3)), tmp_path / "m.onnx")
    stated = {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3], "scale": 1 / 255}
    (tmp_path / "c.json").write_text(json.dumps({"inputs": [stated]}))
    given = ("--base", path, "--bundle", "--contract", tmp_path / "c.json")
    code, _, err = command(pack, *given)
    assert (code, "the layout NHWC" in " ".join(err.split())) == (2, True)
    stated["layout"] = "NHWC"
    (tmp_path / "c.json").write_text(json.dumps({"inputs": [stated]}))
    assert command(pack, *given)[0] == 0
    device = Device.install(tmp_path / "store", tmp_path / "m.bundle.zip")
    raw = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3))
    mean, std = np.float32([0.1, 0.2, 0.3]), np.float32([1, 2, 3])
    fed = (raw * np.float32(1 / 255) - mean) / std
    np.testing.assert_allclose(
        device.predictor().predict(raw), answers(path, fed.astype("f4")), rtol=1e-5
    )


# Equal tensors -----------------------------------------------------------------------


def test_tensors_that_an_exporter_has_made_one_are_hinted_at(tmp_path):
    def network(first, second):
        nodes = [node("Add", ["x", first], ["h"]), node("Add", ["h", second], ["y"])]
        names = {"b1": np.zeros(6, "f4"), "b2": np.ones(6, "f4")}
        return made(nodes, {name: names[name] for name in {first, second}})

    merged = saved(network("b1", "b1"), tmp_path / "merged.onnx")
    apart = saved(network("b1", "b2"), tmp_path / "apart.onnx")
    for base, target, which in ((merged, apart, "base"), (apart, merged, "target")):
        with pytest.raises(
            WrongModelError, match=f"in the {which}, 2 operators read 'b1': some export"
        ):
            check_same_network(read_model(base), read_model(target))


def test_a_tensor_that_is_simply_missing_has_no_such_hint(tmp_path):
    one = made([node("Add", ["x", "b1"], ["y"])], {"b1": np.zeros(6, "f4")})
    two = made([node("Add", ["x", "b2"], ["y"])], {"b2": np.zeros(6, "f4")})
    with pytest.raises(WrongModelError) as caught:
        check_same_network(
            read_model(saved(one, tmp_path / "1.onnx")),
            read_model(saved(two, tmp_path / "2.onnx")),
        )
    assert "operators read" not in str(caught.value)


def test_a_model_that_is_not_valid_is_no_store(tmp_path, command):
    # The checker passes it; ONNX Runtime's own inference does not.
    wrong = made([node("MatMul", ["x", "w"], ["y"])], {"w": weight(5, 3)})
    path = saved(wrong, tmp_path / "m.onnx")
    code, _, err = command(pack, "--base", path, "--bundle")
    assert code == 3
    assert "m.onnx" in err
    with pytest.raises(RoundError, match="ONNX Runtime cannot"):
        adopt_model(read_model(path))


def test_large_values_beside_the_graph_are_never_all_in_memory(tmp_path):
    # 256 MiB that take no room on the disk, and half of that as the limit.
    size, count = 4096, 4
    nodes = [node("Constant", [], ["zero"], value_float=0.0)]
    model = made(nodes, {}, ("n", size))
    last = "x"
    for number in range(count):
        tensor = model.graph.initializer.add(name=f"w{number}", data_type=FLOATS)
        tensor.dims.extend([size, size])
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="data")
        where = str(number * size * size * 4)
        tensor.external_data.add(key="offset", value=where)
        model.graph.node.append(node("MatMul", [last, tensor.name], [f"h{number}"]))
        last = f"h{number}"
    model.graph.node.append(node("Add", [last, "zero"], ["y"]))
    for name, value in (("old", 0.5), ("new", 0.75)):
        (tmp_path / name).mkdir()
        saved(model, tmp_path / name / "model.onnx")
        with (tmp_path / name / "data").open("wb") as file:
            file.truncate(count * size * size * 4)
            file.seek(4 * size * size)
            file.write(np.float32(value).tobytes())
    paths = [str(tmp_path / name / "model.onnx") for name in ("old", "new")]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *paths, str(tmp_path / "p.dpu")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "p.dpu").stat().st_size < 10_000


LIMITED = """
import resource, sys
from packager.cli.pack import pack
import numpy, onnx, onnxruntime  # noqa
sizes = dict(line.split(":", 1) for line in open("/proc/self/status"))
limit = (int(sizes["VmData"].split()[0]) << 10) + (128 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
base, target, out = sys.argv[1:]
sys.argv = ["dpu-pack", "--base", base, "--target", target, "-o", out]
pack()
"""
