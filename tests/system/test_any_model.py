# SPDX-License-Identifier: Apache-2.0
"""Models as people have them: any inputs and outputs, around the whole circle.

Each model is bundled, changed, packed, installed, updated, asked and rolled back by the
commands; what the device answers is what ONNX Runtime answers on the file itself.
"""

import io
import json
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from edge_runtime.cli.main import main
from packager.cli.pack import pack

TYPES = {"f4": T.FLOAT, "f2": T.FLOAT16, "i8": T.INT64, "?": T.BOOL, "s": T.STRING}


def node(words, **attributes):
    """A node from ``"Add a b -> c"``."""
    left, _, right = words.partition("->")
    operator, *inputs = left.split()
    return helper.make_node(operator, inputs, right.split(), **attributes)


def value(words):
    """A value from ``"x f4 n 3"``: name, type, and sizes."""
    name, kind, *sizes = words.split()
    shape = [int(size) if size.isdecimal() else size for size in sizes]
    return helper.make_tensor_value_info(name, TYPES[kind], shape)


@dataclass
class Kind:
    """A kind of model, what it is asked, and what its contract has to say."""

    nodes: list
    inputs: list
    outputs: list
    constants: dict
    feed: dict
    dtype: str = "f4"
    contract: dict = field(default_factory=dict)

    def save(self, path, seed):
        """Write the model; another seed changes some of its weights."""
        weights = np.random.default_rng(0).normal(size=(8, 12))
        weights[:2, :3] += seed
        arrays = {"w": weights.astype(self.dtype)} | self.constants
        graph = helper.make_graph(
            [node(n) if isinstance(n, str) else n for n in self.nodes],
            "g",
            [value(v) for v in self.inputs],
            [value(v) if isinstance(v, str) else v for v in self.outputs],
            [numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items()],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
        return path


def random(*shape):
    return np.random.default_rng(1).normal(size=shape).astype("f4")


def probabilities(name):
    """The output of scikit-learn's classifiers: a sequence of maps."""
    number = helper.make_tensor_type_proto(T.FLOAT, None)
    kind = helper.make_sequence_type_proto(helper.make_map_type_proto(T.INT64, number))
    return helper.make_value_info(name, kind)


ZIPMAP = helper.make_node(
    "ZipMap", ["p"], ["chances"], domain="ai.onnx.ml", classlabels_int64s=range(12)
)
KINDS = {
    "floats and a mask of whole numbers": Kind(
        [
            node("Cast mask -> m", to=T.FLOAT),
            "Unsqueeze m last -> column",
            "MatMul x w -> h",
            "Mul h column -> kept",
            node("ReduceSum kept axis -> y", keepdims=0),
        ],
        ["x f4 n 5 8", "mask i8 n 5"],
        ["y f4 n 12"],
        {"last": np.array([2]), "axis": np.array([1])},
        {"x": random(3, 5, 8), "mask": np.array([[1, 1, 0, 0, 1]] * 3)},
    ),
    "three inputs of open sizes": Kind(
        [
            node("Gather w ids -> embedded", axis=0),
            "Unsqueeze keep last -> column",
            "Where column embedded zero -> kept",
            node("ReduceMean kept -> mean", axes=[1], keepdims=0),
            "Div mean heat -> y",
        ],
        ["ids i8 n t", "keep ? n t", "heat f4"],
        ["y f4 n 12"],
        {"last": np.array([2]), "zero": np.zeros((), "f4")},
        {
            "ids": np.array([[1, 7, 3, 0], [2, 2, 2, 6]]),
            "keep": np.array([[True] * 4, [True, True, False, False]]),
            "heat": np.float32(0.25),
        },
    ),
    "one number for all": Kind(
        ["MatMul x w -> h", node("ReduceMean h -> y", keepdims=0)],
        ["x f4 n 8"],
        ["y f4"],
        {},
        {"x": random(3, 8)},
    ),
    "a detector": Kind(
        [
            "MatMul x w -> h",
            "Reshape h boxes -> found",
            "Abs found -> positive",
            node("ReduceMean positive -> score", axes=[2], keepdims=0),
            "Unsqueeze score one -> scores",
            "NonMaxSuppression positive scores most overlap -> chosen",
            "Gather chosen two -> which",
            node("Gather positive which -> rows", axis=1),
            "Squeeze rows zero -> detections",
        ],
        ["x f4 1 4 8"],
        ["detections f4 k 4", "chosen i8 k 3"],
        {
            "boxes": np.array([1, 12, 4]),
            "one": np.array([1]),
            "most": np.array([5]),
            "overlap": np.array([0.1], "f4"),
            "two": np.array([2]),
            "zero": np.array([0]),
        },
        {"x": random(1, 4, 8)},
    ),
    "truth values and half precision": Kind(
        [
            "Where on x nothing -> kept",
            "MatMul kept w -> y",
            "Greater y nothing -> positive",
        ],
        ["x f2 n 8", "on ? n 8"],
        ["positive ? n 12", "y f2 n 12"],
        {"nothing": np.zeros((), "f2")},
        {"x": random(2, 8).astype("f2"), "on": random(2, 8) > 0},
        dtype="f2",
    ),
    "maps beside tensors": Kind(
        [
            "MatMul x w -> h",
            node("Softmax h -> p", axis=1),
            node("ArgMax p -> label", axis=1, keepdims=0),
            ZIPMAP,
        ],
        ["x f4 n 8"],
        ["label i8 n", probabilities("chances")],
        {},
        {"x": random(4, 8)},
    ),
    "a random output": Kind(
        ["MatMul x w -> y", "RandomNormalLike y -> noise", "Add y noise -> drawn"],
        ["x f4 n 8"],
        ["drawn f4 n 12", "y f4 n 12"],
        {},
        {"x": random(3, 8)},
        contract={"random_outputs": ["drawn"]},
    ),
    "a fixed number of samples": Kind(
        ["MatMul x w -> y"],
        ["x f4 3 8"],
        ["y f4 3 12"],
        {},
        {"x": random(3, 8)},
    ),
    "as many numbers as made-up samples": Kind(
        [
            "MatMul x w -> h",
            node("ReduceMax h -> top", axes=[0], keepdims=0),
            "Gather top four -> y",
        ],
        ["x f4 n 8"],
        ["y f4 4"],
        {"four": np.arange(4)},
        {"x": random(5, 8)},
    ),
    "more rows than samples": Kind(
        ["MatMul x w -> h", "Reshape h pairs -> y"],
        ["x f4 n 8"],
        ["y f4 rows 2"],
        {"pairs": np.array([-1, 2])},
        {"x": random(2, 8)},
    ),
}


BY_NUMPY = list(KINDS)[:3]  # also runs without ONNX Runtime


def answers(path, feed):
    """What ONNX Runtime gives for a file, by name; None for what is no tensor."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {name: np.asarray(v) for name, v in feed.items()})
    names = [output.name for output in session.get_outputs()]
    return {
        name: v if isinstance(v, np.ndarray) else None
        for name, v in zip(names, outputs, strict=True)
    }


@pytest.mark.parametrize("name", KINDS)
def test_any_model_goes_around_the_whole_circle(name, tmp_path, command):
    kind, store = KINDS[name], tmp_path / "store"
    output = "-o", tmp_path / "out.npz"

    def edge(*words):
        code, out, err = command(main, "--store", store, *words)
        assert code == 0, err
        return out, err

    def check(path, *inputs):
        """The device answers what the file does, printed and written."""
        if name in BY_NUMPY:
            compare(path, *edge("infer", *inputs, "--backend", "numpy", *output))
        compare(path, *edge("infer", *inputs, *output))

    def compare(path, out, err):
        wanted = answers(path, kind.feed)
        printed = [json.loads(line) for line in out.splitlines()]
        with np.load(tmp_path / "out.npz") as archive:
            written = dict(archive)
        assert set(written) == {n for n, v in wanted.items() if v is not None}
        for key, values in wanted.items():
            if values is None:
                assert f"output '{key}' is seq(map(int64,tensor(float)))" in err
            elif key not in kind.contract.get("random_outputs", ()):
                np.testing.assert_allclose(written[key], values, rtol=2e-3, atol=1e-4)
                assert written[key].dtype == values.dtype
                if "outputs" in printed[0]:
                    shown = [row["outputs"][key] for row in printed]
                    joined = np.concatenate(shown) if values.ndim else shown[0]
                    np.testing.assert_allclose(joined, written[key], rtol=1e-6)

    old = kind.save(tmp_path / "old.onnx", 0)
    new = kind.save(tmp_path / "new.onnx", 1)
    np.savez(tmp_path / "in.npz", **kind.feed)
    stated = tmp_path / "contract.json"
    stated.write_text(json.dumps(kind.contract))
    contract = ["--contract", stated] if kind.contract else []
    code, _, err = command(pack, "--base", old, "--bundle", *contract)
    assert code == 0, err
    code, _, err = command(pack, "--base", old, "--target", new)
    assert code == 0, err
    edge("init", tmp_path / "old.bundle.zip")
    check(old, tmp_path / "in.npz")
    edge("apply", tmp_path / "new.dpu")
    edge("verify")
    check(new, tmp_path / "in.npz")
    edge("infer", "--golden")
    assert json.loads(edge("bench", "--seconds", "0.01", "--json")[0])["raw"]
    edge("rollback")
    check(old, tmp_path / "in.npz")


@pytest.mark.parametrize(
    ("inputs", "nodes", "words"),
    [
        (["t s n"], ["Identity t -> u"], "input 't' takes text"),
        ([], [node("Constant -> u", value_float=1.0)], "takes no inputs"),
    ],
)
def test_what_a_device_cannot_feed_is_refused_by_its_name(
    inputs, nodes, words, tmp_path, command
):
    kind = Kind(
        ["MatMul x w -> y", *nodes], ["x f4 n 8", *inputs], ["y f4 n 12"], {}, {}
    )
    if not inputs:
        kind.inputs, kind.nodes = [], ["Identity w -> y"]
    code, _, err = command(
        pack, "--base", kind.save(tmp_path / "m.onnx", 0), "--bundle"
    )
    assert (code, words in " ".join(err.split())) == (2, True), err


def test_an_output_that_draws_at_random_is_named_with_the_way_out(tmp_path, command):
    kind = KINDS["a random output"]
    code, _, err = command(
        pack, "--base", kind.save(tmp_path / "m.onnx", 0), "--bundle"
    )
    text = " ".join(err.split())
    assert (code, "output 1 'drawn' differs" in text) == (5, True)
    assert "random_outputs" in text


def test_labels_of_a_model_of_several_inputs_are_counted(
    tmp_path, command, monkeypatch
):
    kind, store = KINDS["floats and a mask of whole numbers"], tmp_path / "store"
    path = kind.save(tmp_path / "m.onnx", 0)
    right = answers(path, kind.feed)["y"].argmax(axis=1)
    np.savez(tmp_path / "golden.npz", **kind.feed, labels=right)
    names = [f"class {number}" for number in range(12)]
    stated = tmp_path / "contract.json"
    stated.write_text(json.dumps({"classes": names, "accuracy_floor": 1.0}))
    golden = ["--golden", tmp_path / "golden.npz", "--contract", stated]
    assert command(pack, "--base", path, "--bundle", *golden)[0] == 0
    edge = [main, "--store", store]
    assert command(*edge, "init", tmp_path / "m.bundle.zip")[0] == 0
    _, _, err = command(*edge, "infer", "--golden", "--batch", 2)
    assert err == "3 of 3 right\n"
    rows = [
        dict(zip(kind.feed, row, strict=True))
        for row in zip(*kind.feed.values(), strict=True)
    ]
    lines = "\n".join(
        json.dumps({name: row.tolist() for name, row in each.items()}) for each in rows
    )
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    code, out, _ = command(*edge, "infer", "-")
    found = [json.loads(line)["top"][0]["class"] for line in out.splitlines()]
    assert (code, found) == (0, [names[label] for label in right])
