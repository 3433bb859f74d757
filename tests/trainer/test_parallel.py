# SPDX-License-Identifier: Apache-2.0
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edge_runtime.errors import TrainingError
from edge_runtime.formats.model_folder import list_rounds
from edge_runtime.formats.weights import read_weights
from packager.build import pack_round
from packager.rounds.folder import read_round
from trainer import parallel
from trainer.folder.record import read_round_record

torch.set_num_threads(1)

ROOT = Path(__file__).parents[2]
TABLES = {
    "run": {"name": "tiny", "rounds": 2, "seed": 1},
    "data": {"set": "digits", "initial": 60, "growth": 70, "validation": 100},
    "model": {"name": "mlp", "hidden": [16]},
    "update": {"ratio": 0.05},
    "train": {"epochs": 4, "batch": 16, "lr": 1e-2},
}


def run_worker(out):
    """Run parallel_worker.py and return what it printed."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("parallel_worker.py"), out],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def toml(tables):
    for section, table in tables.items():
        yield f"[{section}]"
        yield from (f"{key} = {json.dumps(value)}" for key, value in table.items())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes of parallel_worker.py saw and printed, and their folder."""
    out = tmp_path_factory.mktemp("ranks")
    (out / "tiny.toml").write_text("\n".join(toml(TABLES)))
    printed = run_worker(out)
    seen = [
        torch.load(out / f"rank_{rank}.pt", weights_only=False) for rank in range(2)
    ]
    return *seen, printed, out


def test_two_processes_select_and_deploy_what_one_does(ranks):
    *_, out = ranks
    rounds = list_rounds(out / "one" / "tiny")
    assert len(rounds) == 2
    for one in rounds:
        two, record = out / "tiny" / one.name, read_round_record(one)
        name = "selection.safetensors"
        assert (two / name).read_bytes() == (one / name).read_bytes()
        weights, expected = (
            read_weights(folder / "weights.safetensors") for folder in (two, one)
        )
        for tensor in expected.layout.by_name:
            np.testing.assert_allclose(weights[tensor], expected[tensor], atol=1e-4)
        assert record.metrics["selected"] == int(0.05 * 1184)


def test_the_first_process_alone_prints(ranks):
    *_, printed, _ = ranks
    assert len(json.loads(printed)["rounds"]) == 2


def test_processes_agree_on_every_accuracy_and_byte_with_all_options(ranks):
    first, second, *_ = ranks
    assert first["records"] == second["records"]
    assert len(first["records"]) == 2


def test_processes_keep_a_budget_after_a_discarded_reinitialisation(ranks):
    first, *_, out = ranks
    (_, metrics) = first["records"][1]
    assert metrics["val_reinit"] < metrics["val_accuracy"]
    patch = pack_round(read_round(out / "all" / "round_01"))
    assert metrics["patch_bytes"] == len(patch.data)
    assert 0.95 * 500 <= metrics["patch_bytes"] <= 500


def test_processes_move_weights_in_one_subspace(ranks):
    first, second, *_, out = ranks
    assert first["moved"] == second["moved"]
    for folder in list_rounds(out / "moved"):
        round_ = read_round(folder)
        assert round_.record.target in first["moved"]
        if round_.terms:
            assert len(pack_round(round_).data) < 300


def test_processes_train_a_tensor_that_is_named_alone(ranks):
    first, second, *_ = ranks
    assert first["named"] == second["named"]
    assert len(set(first["named"])) == 2


def test_the_first_process_alone_writes(ranks):
    first, second, _, out = ranks
    assert first["first"] == second["first"] == 0
    names = sorted(path.name for path in (out / "all").iterdir())
    assert names == ["model", "round_00", "round_01"]
    # Nobody else draws an id: every round fits the one in the model folder.
    rounds = [read_round(folder) for folder in list_rounds(out / "all")]
    assert len({round_.record.model for round_ in rounds}) == 1


@pytest.mark.parametrize("way", ["together", "alone"])
def test_a_loop_of_ones_own_publishes_round_after_round_from_the_first_process(
    ranks, way
):
    first, second, _, out = ranks
    rounds = [read_round(folder) for folder in list_rounds(out / way)]
    assert [r.record.round for r in rounds] == [0, 1, 2]
    for before, after in itertools.pairwise(rounds):
        assert after.record.parent == before.record.target != after.record.target
        assert pack_round(after) is not None
    (records, weights), (others, same) = first[way], second[way]
    assert records == others
    assert [record.round for record in records] == ([0, 1, 2] if records else [])
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    last = read_weights(out / way / "round_02" / "weights.safetensors")
    np.testing.assert_array_equal(last["0.weight"], weights["0.weight"].numpy())


def test_processes_with_folded_batchnorm_and_their_own_samples_train_one_network(
    ranks,
):
    first, second, *_ = ranks
    for mine, theirs in zip(first["folded"], second["folded"], strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_before_there_is_a_group_only_the_first_process_writes(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(TrainingError, match=r"init_process_group\(\) before"):
        parallel.told_by_first("anything", lambda: "done")


def test_all_processes_take_the_masks_of_the_first(ranks):
    first, second, *_ = ranks
    torch.manual_seed(0)
    nn.Linear(8, 8)
    torch.manual_seed(0)
    best = torch.rand(8, 8).flatten().topk(16).indices.sort().values
    for seen in (first, second):
        assert torch.equal(seen["mask"].flatten().nonzero().squeeze(1), best)
    assert torch.equal(first["weight"], second["weight"])


def test_shares_of_a_batch_are_disjoint_and_weigh_what_they_hold(ranks):
    first, second, *_ = ranks
    for size in range(1, 10):
        (mine, weight), (theirs, other) = first["shares"][size], second["shares"][size]
        if size < 4:  # too small to part: everybody trains on all of it
            assert mine == theirs == list(range(size))
            assert weight == other == 1
        else:
            assert sorted(mine + theirs) == list(range(size))
            assert weight * len(theirs) == pytest.approx(other * len(mine))
            assert weight + other == pytest.approx(2)


def test_a_single_process_trains_on_whole_batches():
    inputs, labels = torch.arange(3), torch.zeros(3)
    assert parallel.share(inputs, labels) == (inputs, labels, 1.0)
    model = nn.Linear(1, 1)
    assert parallel.data_parallel(model) is model
