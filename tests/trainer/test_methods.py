import pytest
import torch

from edge_runtime.errors import TrainingError
from edge_runtime.weights import Weights
from trainer.config import as_dict, make_config
from trainer.data import split_source
from trainer.methods import RoundTraining, train_round
from trainer.models import build_model
from trainer.sources import load_source
from trainer.tensors import load_weights, weights_of

torch.set_num_threads(1)

METHODS = ("dpu", "gcpu", "lcpu", "rpu", "fu", "pruning")
EPOCHS = 3


def config_of(method="dpu", model="mlp", ratio=0.05, **train):
    options = {"hidden": [24]} if model == "mlp" else {"channels": [4], "hidden": 8}
    return make_config(
        {
            "run": {"name": "t", "rounds": 1},
            "data": {"set": "digits", "initial": 120, "growth": 0, "validation": 100},
            "model": {"name": model} | options,
            "update": {"method": method, "ratio": ratio},
            "train": {"epochs": EPOCHS, "batch": 16} | train,
        }
    )


def prepare(config, model=None):
    source = load_source(config.data)
    split = split_source(source, config.data, seed=0, rounds=1)
    if model is None:
        torch.manual_seed(0)
        model = build_model(config.model, source.input_shape, 10)
    samples = source.prepared(split.pool[:120]), source.prepared(split.validation)
    return RoundTraining(model, config, 0, samples)


def trained(config):
    """Train a round: its training, its start weights and its masks."""
    training = prepare(config)
    start = weights_of(training.model)
    return training, start, train_round(training, config)


def changed(start, best, name):
    return torch.from_numpy(start[name].view("u4") != best[name].view("u4"))


@pytest.mark.parametrize("method", ["dpu", "gcpu", "lcpu", "rpu"])
def test_partial_methods_change_what_they_select_and_the_dense_part(method):
    training, start, masks = trained(config_of(method))
    assert sorted(masks) == ["1.weight", "3.weight"]
    selected = sum(int(mask.sum()) for mask in masks.values())
    assert selected == (89 if method == "rpu" else int(0.05 * 1776))
    assert isinstance(training.best, Weights)
    for name, mask in masks.items():
        assert not (changed(start, training.best, name) & ~mask).any()
    assert changed(start, training.best, "1.bias").any()
    assert len(training.epochs) == 2 * EPOCHS


def test_methods_select_different_weights():
    masks = [trained(config_of(m))[2] for m in ("dpu", "gcpu", "lcpu", "rpu")]
    assert len({m["1.weight"].numpy().tobytes() for m in masks}) == 4


def test_lambda_of_1_is_the_global_contribution_alone():
    tables = as_dict(config_of("dpu"))
    tables["update"]["lambda"] = 1.0
    found, expected = trained(make_config(tables))[2], trained(config_of("gcpu"))[2]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_full_updating_selects_everything_and_keeps_the_best_epoch():
    training, start, masks = trained(config_of("fu"))
    assert all(bool(mask.all()) for mask in masks.values())
    assert [e["phase"] for e in training.epochs] == ["full"] * 2 * EPOCHS
    assert training.accuracy["best"] == max(e["val_accuracy"] for e in training.epochs)
    assert changed(start, training.best, "1.weight").float().mean() > 0.5


def test_pruning_leaves_the_ratio_of_the_weights_and_zeroes_the_rest():
    training, _, masks = trained(config_of("pruning", ratio=0.3))
    assert all(bool(mask.all()) for mask in masks.values())
    left = sum(int((training.best[name] != 0).sum()) for name in masks)
    assert left == int(0.3 * 1776)


@pytest.mark.parametrize("method", METHODS)
def test_an_epoch_is_kept_where_it_is_strictly_better(method):
    training, _, _ = trained(config_of(method))
    best = training.accuracy["start"]
    best = max(best, training.accuracy.get("rewound", best))
    judged = [epoch for epoch in training.epochs if epoch["phase"] == "sparse"]
    for epoch in judged or training.epochs:
        assert epoch["kept"] == (epoch["val_accuracy"] > best)
        best = max(best, epoch["val_accuracy"])
    assert training.accuracy["best"] == best


def test_methods_of_one_seed_see_the_same_samples():
    losses = [
        [epoch["loss"] for epoch in trained(config_of(method))[0].epochs[:EPOCHS]]
        for method in ("dpu", "gcpu", "pruning")
    ]
    assert losses[0] == losses[1] == losses[2]


def test_the_schedule_restarts_with_the_second_phase():
    training, _, _ = trained(config_of("dpu", lr=1e-2, factor=0.5))
    rates = [epoch["lr"] for epoch in training.epochs]
    assert rates == pytest.approx([1e-2, 5e-3, 2.5e-3] * 2)


def test_training_is_deterministic():
    first, second = (trained(config_of("dpu", model="small_cnn"))[0] for _ in range(2))
    assert first.best.fingerprint == second.best.fingerprint
    assert first.epochs == second.epochs


def test_the_rewound_network_is_judged_with_its_own_batchnorm_statistics():
    training = prepare(config_of(model="small_cnn", lr=1e-2))
    training.run_phase("full", 10, keep=False)
    good = training.accuracy["full"]
    for name, buffer in training.model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(5.0)
    training.consider_rewound()
    assert training.accuracy["rewound"] > good - 0.1
    assert training.best is not None


def test_a_rewound_network_that_ties_with_the_start_is_kept():
    training = prepare(config_of())
    training.consider_rewound()  # untrained: the very start
    assert training.best.fingerprint == weights_of(training.model).fingerprint


def test_nothing_is_kept_when_nothing_is_better():
    first = prepare(config_of("fu"))
    first.run_phase("full", 30, keep=True)
    load_weights(first.model, first.best)
    config = config_of("fu", lr=1e-9)
    again = prepare(config, first.model)
    train_round(again, config)
    assert again.best is None
    assert again.accuracy["best"] == first.accuracy["best"]


def test_a_loss_that_is_not_finite_stops_the_run():
    config = config_of("dpu", optimizer="sgd", lr=1e30)
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf).*lower train\.lr"):
        train_round(prepare(config), config)
