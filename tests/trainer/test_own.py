# SPDX-License-Identifier: Apache-2.0
"""Your own network, your own data."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from edge_runtime import Device
from edge_runtime.errors import ConfigError, ExportError
from edge_runtime.update.golden import relative_difference
from packager.build import pack_round
from packager.bundles.from_round import build_bundle
from packager.rounds.folder import read_round
from trainer.config import load_config
from trainer.data.samples import DataSource, LazyInputs, Samples
from trainer.data.sources import as_source, load_source
from trainer.data.vision import torchvision
from trainer.export.tensors import load_weights
from trainer.recipe.factory import call_factory, load_factory
from trainer.rounds.schedule import run_rounds

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)

TABLES = {
    "run": {"name": "own", "rounds": 2},
    "data": {"initial": 100, "growth": 50, "validation": 60},
    "update": {"ratio": 0.2},
    "train": {"epochs": 3, "batch": 16, "lr": 2e-2},
}


def run_own(folder, model="own:small", data="own:tensors", *overrides):
    config = load_config(TABLES, overrides, model=model, data=data, name="own")
    return run_rounds(config, folder)


@pytest.mark.parametrize(
    ("model", "data"), [("own:small", "own:dataset"), ("own:tied", "own:tensors")]
)
def test_own_networks_and_data_become_rounds_that_can_be_packed(tmp_path, model, data):
    records = run_own(tmp_path, model, data)
    assert records[0].outcome == "updated"
    rounds = [read_round(tmp_path / "own" / f"round_0{r.round}") for r in records]
    device = Device.install(tmp_path / "device", build_bundle(rounds[0]).data)
    if patch := pack_round(rounds[1]):
        device.update(patch.data)
    source = load_source(load_config(TABLES, model=model, data=data).data)
    own = call_factory(model, (6,), 3)
    load_weights(own, rounds[1].weights)
    expected = own.eval()(source.normalise(source.test.read()))
    found = device.predictor().predict(source.test.read().numpy())
    assert relative_difference(found, expected.detach().numpy()) < 1e-5
    assert "second.weight" not in rounds[1].weights


@pytest.mark.parametrize("network", ["drifting", "drawn"])
def test_a_network_with_more_to_it_than_its_weights_is_refused(tmp_path, network):
    with pytest.raises(ExportError, match="outside of its state dict"):
        run_own(tmp_path, f"own:{network}")
    assert not list(tmp_path.rglob("own/*"))


def test_tied_weights_are_selected_once_and_counted_once(tmp_path):
    (record, *_) = run_own(tmp_path, "own:tied")
    assert record.metrics["weights"] == 6 * 6 + 3 * 6
    assert record.metrics["selected"] == int(0.2 * 54)


def test_frozen_weights_never_change(tmp_path):
    run_own(tmp_path, "own:frozen")
    round_ = read_round(tmp_path / "own" / "round_00")
    patch = pack_round(round_)
    assert patch.counts.get("0.weight", 0) == 0
    assert "0.weight" not in round_.selection


def test_options_reach_the_function(tmp_path):
    records = run_own(tmp_path, "own:small", "own:tensors", "model.width=5")
    assert records[0].metrics["weights"] == 5 * 6 + 3 * 5


def test_what_is_larger_than_memory_is_read_batch_by_batch(tmp_path):
    def rounds(name, *overrides):
        records = run_own(tmp_path / name, "own:small", "own:dataset", *overrides)
        return [record.target for record in records]

    assert rounds("large", "data.memory=1KB") == rounds("small")
    config = load_config(
        TABLES, ["data.memory=1KB"], model="own:small", data="own:dataset"
    )
    source = load_source(config.data)
    assert isinstance(source.train.inputs, LazyInputs)
    rows = call_factory("own:dataset")[0]
    picked = source.prepared(source.train[torch.tensor([5, 2])])
    expected = (rows.inputs[[5, 2]] - 0.1) / 2
    assert torch.equal(picked.prepare(picked.inputs), expected)


@pytest.mark.parametrize(
    ("model", "data", "problem"),
    [
        ("own:wrong_head", "own:tensors", r"\(2, 5\) for two inputs.*one logit"),
        ("own:needs_more", "own:tensors", r"takes \(a, b, c\); expected to call it"),
        ("own:nothing", "own:tensors", "returned NoneType, expected a module"),
        ("own:absent", "own:tensors", "own has no function 'absent'"),
        ("no_such_module:f", "own:tensors", "cannot import 'no_such_module'"),
        ("own:small", "own:nothing", r"returns \(train, test, class names\)"),
        ("own:small", "own:wrong_labels", "labels must be 0 to 1"),
    ],
)
def test_says_what_is_wrong_with_a_function(tmp_path, model, data, problem):
    with pytest.raises(ConfigError, match=problem):
        run_own(tmp_path, model, data)


def test_refuses_to_crop_what_is_no_image(tmp_path):
    with pytest.raises(ConfigError, match=r"augment is for images"):
        run_own(tmp_path, "own:small", "own:tensors", "data.augment=crop_flip")


def test_refuses_samples_that_do_not_fit_each_other():
    inputs, labels = torch.zeros(4, 2), torch.zeros(4)
    with pytest.raises(ConfigError, match="4 inputs have 3 labels"):
        as_source(((inputs, labels[:3]), (inputs, labels), ["a"]), 0)
    with pytest.raises(ConfigError, match=r"training inputs are \(2,\), test inputs"):
        as_source(((inputs, labels), (inputs[:, :1], labels), ["a"]), 0)


@pytest.mark.parametrize("lazy", [False, True])
def test_inputs_that_numpy_cannot_hold_are_taken_with_their_values(lazy):
    inputs = torch.randn(4, 2).bfloat16().requires_grad_()
    labels = torch.randn(4, 2).requires_grad_()
    half = TensorDataset(inputs, labels) if lazy else (inputs, labels)
    found = as_source((half, half, ["a", "b"]), 0, "regression").train
    assert found.read().numpy().dtype == np.float32
    assert torch.equal(found.read(), inputs.detach().float())
    assert torch.equal(torch.from_numpy(found.labels.numpy()), labels.detach())


class Renamed(torchvision.datasets.FakeData):
    """Images whose labels count the other way than those of its ``targets``."""

    targets = (0, 1, 2, 0)

    def __getitem__(self, index):
        return super().__getitem__(index)[0], 2 - self.targets[index]


@pytest.mark.parametrize("by", ["class", "transform", "both"])
def test_labels_are_those_that_come_with_the_samples(by, tmp_path):
    def about(label):
        return 2 - label

    for number in range(3):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        Image.new("RGB", (4, 4)).save(folder / "a.png")
    to_tensor = torchvision.transforms.PILToTensor()
    folders = torchvision.datasets.ImageFolder
    half = {
        "class": lambda: Renamed(4, (3, 4, 4), 3, to_tensor),
        "transform": lambda: folders(tmp_path, to_tensor, about),
        "both": lambda: folders(tmp_path, to_tensor),
    }[by]()
    if by == "both":
        half.target_transform = about
    found = as_source((half, half, ["a", "b", "c"]), 1 << 20).train
    expected = [half[index][1] for index in range(len(half))]
    assert found.labels.tolist() == expected != sorted(expected)


def test_labels_of_a_data_source_are_taken_and_refused_as_those_of_pairs():
    def source(labels, task="classification"):
        halves = (Samples(np.zeros((4, 2), np.float32), labels),) * 2
        return as_source(DataSource(*halves, ("a", "b"), 1.0, (), ()), 0, task)

    for labels in (np.zeros(4, np.int32), torch.ones(4), [0, 1, 1, 0]):
        found = source(labels)
        assert found.train.labels.dtype == found.test.labels.dtype == torch.int64
        assert isinstance(found.train.inputs, torch.Tensor)
    with pytest.raises(ConfigError, match="4 inputs have 3 labels"):
        source(torch.zeros(3))
    with pytest.raises(ConfigError, match="with fractions"):
        source(torch.full((4,), 0.5))
    values = source(np.zeros((4, 2)), "regression").train.labels
    assert values.dtype == torch.float32


def test_functions_are_called_with_what_they_take():
    assert load_factory("math:sqrt")(4.0) == 2.0
    assert len(call_factory("own:small", (6,), 3, width=4)) == 3
    assert type(call_factory("own:tied", (6,), 3)).__name__ == "Tied"
