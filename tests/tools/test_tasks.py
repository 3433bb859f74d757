# SPDX-License-Identifier: Apache-2.0
"""Every kind of task reaches a device, and is as good there as on the server."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from edge_runtime import Device
from edge_runtime.cli.main import main as edge
from edge_runtime.formats.contract_file import parse_contract
from tools import tasks

RECIPES = sorted(path.stem for path in tasks.RECIPES.glob("*.toml"))
QUICK = ("run.rounds=2", "train.epochs=4")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a function that runs a recipe, once."""
    rows = {}

    def run(name):
        folder = tmp_path_factory.mktemp(name)
        if name not in rows:
            row = tasks.run_task(tasks.RECIPES / f"{name}.toml", folder, QUICK)
            rows[name] = row, folder
        return rows[name]

    return run


@pytest.mark.parametrize("name", RECIPES)
def test_the_device_is_as_good_as_the_server(runs, name):
    row, folder = runs(name)
    assert row.device == pytest.approx(row.server, rel=1e-5)
    improved = row.server - row.first
    assert (improved if row.better == "higher" else -improved) >= 0
    contract = Device.open(folder / "device").store.contract
    assert contract.task == row.task
    assert (row.bound is None) == (row.task == "free")
    assert all(0 < size < row.full_bytes / 2 for size in row.patch_bytes)


def test_tokens_reach_the_network_as_whole_numbers(runs):
    _, folder = runs("moods")
    device = Device.open(folder / "device")
    (spec,) = device.store.contract.inputs
    assert (spec.dtype, spec.scale, spec.mean) == ("int64", 1.0, ())
    (answer,) = device.predictor().predict_all(np.zeros((3, 8), np.int64))
    assert answer.shape == (3, 2)


def test_infer_names_the_labels_that_are_true_and_no_likeliest_class(runs, tmp_path):
    _, folder = runs("traits")
    np.save(tmp_path / "one.npy", np.full((1, 8, 8), 8, np.uint8))
    command = ("--store", folder / "device", "infer", tmp_path / "one.npy")
    done = CliRunner().invoke(edge, [*map(str, command)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    names = ["even", "five or more", "has a loop", "prime"]
    true = [n for n, v in zip(names, found["output"], strict=True) if v > 0]
    assert found["labels"] == true


def test_every_output_of_a_network_reaches_the_device(runs):
    _, folder = runs("boxes")
    found = json.loads((folder / "device" / "model" / "contract.json").read_text())
    assert [output["name"] for output in found["outputs"]] == ["output_0", "output_1"]
    logits, boxes = (
        Device.open(folder / "device")
        .predictor()
        .predict_all(np.zeros((2, 1, 16, 16), np.uint8))
    )
    assert (logits.shape, boxes.shape) == ((2, 2), (2, 4))


def test_a_regression_asks_devices_for_an_error_below_a_constants(runs):
    row, folder = runs("diabetes")
    contract = parse_contract((folder / "device/model/contract.json").read_bytes())
    assert (contract.label_metric, contract.classes) == ("mae", ())
    labels = np.load(folder / "device" / "model" / "golden.npz")["labels"]
    assert row.bound < np.abs(labels - np.median(labels)).mean()


def test_the_table_says_whether_both_sides_are_equal(monkeypatch):
    def row(_recipe, _folder):
        sides = {"first": 60.0, "server": 50.0, "device": 51.0, "bound": 70.0}
        sizes = {"full_bytes": 9000, "bundle_bytes": 5000, "patch_bytes": (100, 300)}
        names = ("wells", "regression", "mae", "lower")
        return tasks.Row(*names, **sides, **sizes, seconds=1.0)

    monkeypatch.setattr(tasks, "run_task", row)
    done = CliRunner().invoke(tasks.main, [])
    assert done.exit_code == 1
    assert "mae (lower)" in done.stdout
    assert "200  NO" in done.stdout
    found = json.loads(CliRunner().invoke(tasks.main, ["--json"]).stdout)
    assert len(found["tasks"]) == len(RECIPES)
    assert not found["tasks"][0]["equal"]
