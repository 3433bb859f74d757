# SPDX-License-Identifier: Apache-2.0
"""Own loops around networks of several inputs, whole numbers and open sizes."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from edge_runtime import Device
from edge_runtime.errors import ContractError, TrainingError
from packager.build import pack_round
from packager.bundles.from_round import build_bundle
from packager.rounds.folder import read_round
from trainer import PartialUpdater, make_contract, publish_round, start_run

RANDOM = np.random.default_rng(0)
LABELS = RANDOM.integers(0, 3, 8)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(4, 16)
        self.end = nn.Linear(16, 3)

    def forward(self, x, z):
        return self.end(torch.relu(self.a(x) + self.b(z)))


class Words(nn.Module):
    """The mean of the words that a mask keeps, at some temperature."""

    def __init__(self):
        super().__init__()
        self.words, self.end = nn.Embedding(20, 6), nn.Linear(6, 3)

    def forward(self, ids, keep, heat):
        kept = self.words(ids) * keep.unsqueeze(2)
        return self.end(kept.sum(1) / ids.shape[1]) / heat


class Drawing(Two):
    """Gives its answer, and one that is drawn around it."""

    def forward(self, x, z):
        y = super().forward(x, z)
        return y, y + torch.randn_like(y)


X, Z = RANDOM.normal(size=(8, 8)).astype("f4"), RANDOM.normal(size=(8, 4)).astype("f4")
TWO = make_contract({"x": (8,), "z": (4,)}, "abc")
WORDS = {
    "inputs": [
        {"name": "ids", "dtype": "int64", "shape": [None, None]},
        {"name": "keep", "dtype": "bool", "shape": [None, None]},
        {"name": "heat", "dtype": "float32", "shape": []},
    ],
    "classes": ["a", "b", "c"],
}


def sentences(count, length):
    return {
        "ids": RANDOM.integers(0, 20, (count, length)),
        "keep": RANDOM.random((count, length)) > 0.3,
        "heat": np.array(0.5, "f4"),
    }


def one_round(run, network, feed):
    """Train a little and publish; return what the network then answers."""
    given = [torch.tensor(value) for value in feed.values()]
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    updater = PartialUpdater(network.named_parameters(), ratio=0.1).attach(optimizer)
    for phase in range(2):
        for _ in range(2):
            optimizer.zero_grad()
            answer = network(*given)
            answer = answer[0] if isinstance(answer, tuple) else answer
            nn.functional.cross_entropy(answer, torch.tensor(LABELS)).backward()
            optimizer.step()
        if not phase:
            updater.select()
    publish_round(run, network, updater.finish())


def on_a_device(run, tmp_path):
    """The predictor of a device that was installed with round 0 and took round 1."""
    bundle = build_bundle(read_round(run / "round_00")).data
    device = Device.install(tmp_path / "store", bundle)
    device.update(pack_round(read_round(run / "round_01")).data)
    return device.predictor()


def as_file(fields, path):
    path.write_text(json.dumps({"schema": 2} | fields))
    return path


@pytest.mark.parametrize(
    ("build", "contract", "golden", "asked"),
    [
        (Two, TWO, {"x": X, "z": Z}, {"x": X[:2], "z": Z[:2]}),
        (Words, WORDS, sentences(8, 5), sentences(2, 9)),
    ],
    ids=["named", "open sizes"],
)
def test_a_device_answers_as_the_network_of_several_inputs(
    tmp_path, build, contract, golden, asked
):
    run = tmp_path / "run"
    network = start_run(
        run, build, contract=contract, golden_inputs=golden, golden_labels=LABELS
    )
    for _ in range(2):
        one_round(run, network, golden)
    predictor = on_a_device(run, tmp_path)
    with torch.no_grad():
        wanted = network.eval()(*(torch.tensor(v) for v in asked.values())).numpy()
    np.testing.assert_allclose(predictor.predict(asked), wanted, atol=1e-5)
    np.testing.assert_allclose(
        predictor.predict_named(asked)["output"], wanted, atol=1e-5
    )


def test_a_contract_may_be_an_object_its_fields_or_a_file(tmp_path):
    golden = sentences(8, 5)
    bytes_of = set()
    for number, contract in enumerate([WORDS, as_file(WORDS, tmp_path / "c.json")]):
        run = tmp_path / f"run{number}"
        start_run(
            run, Words, contract=contract, golden_inputs=golden, golden_labels=LABELS
        )
        bytes_of.add((run / "model" / "contract.json").read_bytes())
        bytes_of.add((run / "model" / "graph.onnx").read_bytes())
    assert len(bytes_of) == 2


def test_outputs_that_are_random_by_design_are_declared_and_skipped(tmp_path):
    run, golden = tmp_path / "run", {"x": X, "z": Z}
    fields = {
        "inputs": [
            {"name": "x", "dtype": "float32", "shape": [None, 8]},
            {"name": "z", "dtype": "float32", "shape": [None, 4]},
        ],
        "classes": ["a", "b", "c"],
        "random_outputs": ["output_1"],
        "outputs": [{"name": "output_0"}, {"name": "output_1"}],
    }
    network = start_run(
        run, Drawing, contract=fields, golden_inputs=golden, golden_labels=LABELS
    )
    for _ in range(2):
        one_round(run, network, golden)
    found = on_a_device(run, tmp_path).predict_named(golden)
    with torch.no_grad():
        wanted, _ = network.eval()(torch.tensor(X), torch.tensor(Z))
    np.testing.assert_allclose(found["output_0"], wanted.numpy(), atol=1e-5)
    assert found["output_1"].shape == (8, 3)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"random_outputs": ["noise"]}, ContractError, "'random_outputs' is .*noise"),
        ({"inputs": [{"name": "x"}]}, ContractError, "'dtype' is nothing"),
        ({"classes": {1, 2}}, ContractError, "JSON has no word for"),
        ({"inputs": WORDS["inputs"][:1]}, TrainingError, "by name, ids; got"),
    ],
)
def test_a_contract_that_does_not_fit_writes_nothing(tmp_path, fields, error, words):
    with pytest.raises(error, match=words):
        start_run(
            tmp_path / "run",
            Words,
            contract=WORDS | fields,
            golden_inputs=sentences(8, 5),
            golden_labels=LABELS,
        )
    assert not (tmp_path / "run").exists()
