# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from edge_runtime.errors import ConfigError, FrozenWeightChangedError, TrainingError
from edge_runtime.formats.weights import Weights
from trainer.config import as_dict, make_config
from trainer.data.samples import split_source
from trainer.data.sources import load_source
from trainer.export.tensors import load_weights, weights_of
from trainer.method.scores import fisher_scores, magnitude_scores
from trainer.method.selection import select_top_k
from trainer.networks.models import build_model
from trainer.rounds.automatic_grid import MAX_COST, costs_too_much
from trainer.rounds.loop import evaluate
from trainer.rounds.methods import train_round
from trainer.rounds.objective import ACCURACY
from trainer.rounds.training import RoundTraining

torch.set_num_threads(1)

METHODS = ("dpu", "gcpu", "lcpu", "magnitude", "fisher", "rpu", "fu", "pruning")
EPOCHS = 3


def config_of(method="dpu", model="mlp", ratio=0.05, update=None, **train):
    options = {"hidden": [24]} if model == "mlp" else {"channels": [4], "hidden": 8}
    return make_config(
        {
            "run": {"name": "t", "rounds": 1},
            "data": {"set": "digits", "initial": 120, "growth": 0, "validation": 100},
            "model": {"name": model} | options,
            "update": {"method": method, "ratio": ratio} | (update or {}),
            "train": {"epochs": EPOCHS, "batch": 16} | train,
        }
    )


def prepare(config, model=None, *, from_init=True, fresh=True):
    source = load_source(config.data)
    split = split_source(source, config.data, seed=0, rounds=1)
    if model is None:
        torch.manual_seed(0)
        model = build_model(config.model, source.input_shape, 10)
    samples = source.prepared(split.pool[:120]), source.prepared(split.validation)
    return RoundTraining(model, config, 0, samples, from_init=from_init, fresh=fresh)


def trained(config, *, from_init=True):
    """Train a round: its training, its start weights and its masks."""
    training = prepare(config, from_init=from_init)
    start = weights_of(training.model)
    return training, start, train_round(training, config)


def changed(start, best, name):
    return torch.from_numpy(start[name].view("u4") != best[name].view("u4"))


@pytest.mark.parametrize("method", METHODS[:6])
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
    masks = [trained(config_of(m))[2] for m in METHODS[:6]]
    assert len({m["1.weight"].numpy().tobytes() for m in masks}) == 6


def test_magnitude_selects_the_largest_trained_weights():
    config = config_of("magnitude", "mlp")
    masks = trained(config)[2]
    training = prepare(config)
    training.run_phase("full", EPOCHS, keep=False)
    largest = select_top_k(
        magnitude_scores(
            (name, p) for name, p in training.model.named_parameters() if name in masks
        ),
        int(0.05 * 1776),
    )
    assert all(torch.equal(masks[name], largest[name]) for name in masks)


def test_fisher_scores_are_sums_of_squared_gradients():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    samples = [(torch.randn(5, 4), torch.randint(3, (5,))) for _ in range(2)]
    expected = torch.zeros(3, 4)
    model.eval()
    for inputs, labels in samples:
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        expected += model[0].weight.grad ** 2
    model.zero_grad(set_to_none=True)
    before = weights_of(model)
    (found,) = fisher_scores(model, samples, ["0.weight"]).values()
    torch.testing.assert_close(found, expected)
    assert model[0].weight.grad is None
    assert weights_of(model).fingerprint == before.fingerprint


def test_tensors_train_whole_by_their_names_and_alone():
    update = {"tensors": "*.2.*, 7.bias", "dense": "budget"}
    layers = {"tensors": "7.weight, 7.bias", "dense": "budget"}
    with pytest.raises(ConfigError, match=r"'\*\.2\.\*' is none of the tensors"):
        trained(config_of("named", "small_cnn", update=update), from_init=False)
    config = config_of("named", "small_cnn", update=layers, lr=1e-2)
    training, start, masks = trained(config, from_init=False)
    assert {n for n, mask in masks.items() if mask.all()} == {"7.weight", "7.bias"}
    assert training.best is not None
    moved = {n for n in start if changed(start, training.best, n).any()}
    assert moved == {"7.weight", "7.bias"}


def test_without_a_name_the_dense_part_trains_alone():
    config = config_of("named", "small_cnn", update={"fold_batchnorm": True}, lr=1e-2)
    training, start, masks = trained(config, from_init=False)
    assert training.best is not None
    moved = {n for n in start if changed(start, training.best, n).any()}
    assert moved == {n for n in start if n not in masks and "running" not in n}


def test_a_full_first_round_trains_every_weight_whatever_the_method():
    training, _, masks = trained(config_of("dpu", update={"first": "full"}))
    assert all(bool(mask.all()) for mask in masks.values())
    assert {epoch["phase"] for epoch in training.epochs} == {"full"}


def test_a_full_first_round_learns_nothing_from_the_untrained_network():
    found = [
        trained(config_of("dpu", update={"first": "full"}, teacher=teacher))[0]
        for teacher in ("self", "none")
    ]
    assert found[0].best.fingerprint == found[1].best.fingerprint


@pytest.mark.parametrize("method", ["dpu", "rpu"])
def test_a_frozen_dense_part_stays_as_bits_and_says_so_in_its_masks(method):
    config = config_of(method, "small_cnn", 0.4, update={"dense": "freeze"}, lr=1e-2)
    training, start, masks = trained(config, from_init=False)
    dense = [name for name in start if name not in masks]
    assert any(name.endswith("running_mean") for name in dense)
    assert training.best is not None
    assert not any(changed(start, training.best, name).any() for name in dense)
    assert sorted(training.dense.masks()) == sorted(dense)
    assert not any(bool(mask.any()) for mask in training.dense.masks().values())


def test_frozen_statistics_are_what_the_network_trains_with():
    config = config_of("dpu", "small_cnn", update={"dense": "freeze"})
    training = prepare(config, from_init=False)
    training.model.train()
    inputs = torch.randn(16, 1, 8, 8)
    trained_with = training.model(inputs)
    assert torch.equal(trained_with, training.model.eval()(inputs))


def test_the_dense_part_trains_where_a_round_starts_from_the_init_weights():
    config = config_of("dpu", "small_cnn", update={"dense": "freeze"}, lr=1e-2)
    training, start, _ = trained(config, from_init=True)
    assert changed(start, training.best, "1.running_mean").all()
    assert training.dense.masks() == {}


def test_a_dense_part_under_the_budget_is_selected_like_any_other_weight():
    config = config_of("dpu", "small_cnn", update={"dense": "budget"}, lr=1e-2)
    training, start, masks = trained(config, from_init=False)
    assert "1.bias" in masks
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == int(0.05 * total)
    for name, mask in {**masks, **training.dense.masks()}.items():
        assert not (changed(start, training.best, name) & ~mask).any()
    assert set(masks) | set(training.dense.masks()) == set(start)


def test_a_buffer_that_a_module_changes_in_training_is_not_passed_over():
    config = config_of("dpu", update={"dense": "freeze"})
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    model.register_buffer("seen", torch.zeros(2))
    training = prepare(config, model, from_init=False)
    model.seen += 1
    with pytest.raises(FrozenWeightChangedError, match=r"'seen' changed in training"):
        training.consider_rewound()


@pytest.mark.parametrize("bits", [10, 7])
@pytest.mark.parametrize("method", ["dpu", "fu", "pruning"])
def test_what_is_deployed_is_rounded_before_it_is_judged(method, bits):
    config = config_of(method, update={"mantissa_bits": bits}, ratio=0.2)
    training, start, _ = trained(config)
    for name, array in training.best.items():
        word, base = array.view("u4"), start[name].view("u4")
        assert not (word[word != base] & ((1 << (23 - bits)) - 1)).any()
    accuracy = training.values["best"]
    training.load(training.best)
    samples = prepare(config).validation
    assert evaluate(training.model, samples) == accuracy


def test_training_goes_on_from_unrounded_weights():
    training = prepare(config_of("fu", update={"mantissa_bits": 7}))
    training.run_phase("full", 1, keep=True)
    words = weights_of(training.model)["1.weight"].view("u4")
    assert (words & 0xFFFF).any()


def test_lambda_of_1_is_the_global_contribution_alone():
    tables = as_dict(config_of("dpu"))
    tables["update"]["lambda"] = 1.0
    found, expected = trained(make_config(tables))[2], trained(config_of("gcpu"))[2]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_full_updating_selects_everything_and_keeps_the_best_epoch():
    training, start, masks = trained(config_of("fu"))
    assert all(bool(mask.all()) for mask in masks.values())
    assert [e["phase"] for e in training.epochs] == ["full"] * 2 * EPOCHS
    assert training.values["best"] == max(e["val_accuracy"] for e in training.epochs)
    assert changed(start, training.best, "1.weight").float().mean() > 0.5


def test_pruning_leaves_the_ratio_of_the_weights_and_zeroes_the_rest():
    training, _, masks = trained(config_of("pruning", ratio=0.3))
    assert all(bool(mask.all()) for mask in masks.values())
    left = sum(int((training.best[name] != 0).sum()) for name in masks)
    assert left == int(0.3 * 1776)


def test_gradual_pruning_takes_weights_epoch_by_epoch_at_the_first_rate():
    config = config_of("pruning", ratio=0.3, update={"gradual": True}, epochs=6)
    training, left = prepare(config), []

    def count(_epoch):
        named = dict(training.model.named_parameters())
        left.append(
            sum(int(named[n].count_nonzero()) for n in ("1.weight", "3.weight"))
        )

    training._on_epoch = count
    masks = train_round(training, config)
    full = [e for e in training.epochs if e["phase"] == "full"]
    assert [e["lr"] for e in full] == [config.train.lr] * 6
    assert left == sorted(left, reverse=True)
    assert left[0] > left[2] > left[5] == left[-1] == int(0.3 * 1776)
    assert sum(int((training.best[n] != 0).sum()) for n in masks) == left[-1]


@pytest.mark.parametrize("method", METHODS)
def test_an_epoch_is_kept_where_it_is_strictly_better(method):
    training, _, _ = trained(config_of(method))
    best = training.values["start"]
    best = max(best, training.values.get("rewound", best))
    judged = [epoch for epoch in training.epochs if epoch["phase"] == "sparse"]
    for epoch in judged or training.epochs:
        assert epoch["kept"] == (epoch["val_accuracy"] > best)
        best = max(best, epoch["val_accuracy"])
    assert training.values["best"] == best


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
    good = training.values["full"]
    for name, buffer in training.model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(5.0)
    training.consider_rewound()
    assert training.values["rewound"] > good - 0.1
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
    assert again.values["best"] == first.values["best"]


def test_a_loss_that_is_not_finite_stops_the_run():
    config = config_of("dpu", optimizer="sgd", lr=1e30)
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf).*lower train\.lr"):
        train_round(prepare(config), config)


# Lean options -------------------------------------------------------------------------

LEAN = {"grid": "auto", "dense_grid": 0.03125, "mantissa_bits": 7, "narrow": True}


def on_grid(array, step):
    return np.array_equal(array, np.rint(array / step) * step)


def test_an_automatic_grid_has_a_step_for_each_tensor_and_is_judged_beside_none():
    config = config_of("dpu", "small_cnn", 0.1, LEAN, lr=1e-2)
    training, start, masks = trained(config)
    steps = training.form.rounding.steps
    assert {name for name, mask in masks.items() if mask.any()} <= steps.keys()
    for name, array in training.best.items():
        new = array[array.view("u4") != start[name].view("u4")]
        if name in steps:
            assert np.frexp(steps[name])[0] == 0.5
            assert on_grid(new, steps[name])
        else:  # statistics
            assert "running" in name
            assert not (new.view("u4") & 0xFFFF).any()
    assert steps["1.weight"] == steps["1.bias"] == 0.03125  # of BatchNorm: dense
    best, exact = training.values["best"], training.values["unrounded"]
    assert best >= exact - MAX_COST


def test_a_grid_that_costs_too_much_gives_way_to_mantissa_bits(monkeypatch):
    """Steps so wide that halving them does not help."""
    monkeypatch.setattr("trainer.rounds.rounding.step_for", lambda _moved: 64.0)
    config = config_of("dpu", ratio=0.2, update={"grid": "auto"})
    training, start, _ = trained(config)
    assert training.form.rounding.bits == 7
    assert training.form.rounding.steps == {}
    assert training.best is not None
    assert training.values["best"] >= training.values["unrounded"] - MAX_COST
    words = training.best["1.weight"].view("u4")
    assert not (words[words != start["1.weight"].view("u4")] & 0xFFFF).any()


def test_what_the_recipe_s_own_steps_cost_takes_no_automatic_grid_away():
    """BatchNorm's scales become 0 on whole 4s: no finer weights bring that back."""
    update = {"grid": "auto", "dense_grid": 4.0}
    config = config_of("dpu", "small_cnn", 0.2, update, lr=2e-2, epochs=8)
    training, start, _ = trained(config)
    training.load(training.best)
    assert training.values["unrounded"] - training.evaluate() > MAX_COST
    new = training.best["0.weight"][training.best["0.weight"] != start["0.weight"]]
    assert on_grid(new, training.form.rounding.steps["0.weight"])


def sums_of(right):
    """Top-1 of 100 samples in 20 batches, so many of them right."""
    hits = np.arange(100) * 37 % 100 < right
    return [np.array([batch.sum(), 5.0]) for batch in hits.reshape(20, 5)]


@pytest.mark.parametrize(("right", "too_much"), [(80, 0), (78, 0), (66, 1), (90, 0)])
def test_what_single_samples_give_by_chance_takes_no_grid_away(right, too_much):
    """On 100 samples each is a whole point: two are no sign, fourteen are."""
    fine, coarse = ((n / 100, sums_of(n)) for n in (80, right))
    assert costs_too_much(ACCURACY, fine, coarse) == bool(too_much)


def test_the_error_of_a_cost_is_that_of_what_differs_sample_by_sample():
    """Of n paired samples that give d in -1, 0, 1: the deviation over the root of n."""
    random = np.random.default_rng(0)
    one, other = random.random((2, 3000)) < 0.5
    other = np.where(random.random(3000) < 0.1, other, one)
    parts = [
        [np.array([b.sum(), len(b)], float) for b in np.array_split(hits, 100)]
        for hits in (one, other)
    ]
    cost, error = ACCURACY.cost_of(*parts)
    differences = one.astype(float) - other
    assert cost == pytest.approx(differences.mean())
    assert error == pytest.approx(differences.std() / np.sqrt(3000), rel=0.25)


def test_a_given_grid_is_kept_and_full_rounds_have_none():
    config = config_of("rpu", ratio=0.2, update={"grid": 0.25}, lr=5e-2)
    training, start, masks = trained(config)
    changes = training.best["1.weight"][masks["1.weight"].numpy()]
    base = start["1.weight"][masks["1.weight"].numpy()]
    assert on_grid(changes[changes != base], 0.25)
    assert "unrounded" not in training.values
    whole = config_of("dpu", update={"grid": 0.25, "first": "full"})
    assert not on_grid(trained(whole)[0].best["1.weight"], 0.25)


def test_a_narrowed_round_trains_more_first_and_ends_with_the_ratio():
    config = config_of("dpu", update={"narrow": True})
    training, start, masks = trained(config)
    phases = [epoch["phase"] for epoch in training.epochs]
    assert phases == ["full"] * 3 + ["wide"] + ["sparse"] * 2
    assert sum(int(mask.sum()) for mask in masks.values()) == int(0.05 * 1776)
    for name, mask in masks.items():
        assert not (changed(start, training.best, name) & ~mask).any()


def test_only_the_second_phase_learns_from_the_rounds_own_network():
    plain = trained(config_of("dpu"))[0].epochs
    taught = trained(config_of("dpu", teacher="self"))[0].epochs
    assert plain[:EPOCHS] == taught[:EPOCHS]
    assert all(
        a["loss"] != b["loss"] for a, b in [*zip(plain, taught, strict=True)][3:]
    )


@pytest.mark.parametrize("method", ["dpu", "rpu", "fu"])
def test_full_updating_may_be_the_teacher(method):
    config = config_of(method, teacher="full")
    training = prepare(config)
    torch.manual_seed(5)
    source = load_source(config.data)
    training.teacher = build_model(config.model, source.input_shape, 10)
    train_round(training, config)
    before = trained(config_of(method))[0]
    first = EPOCHS if method == "dpu" else 0
    pairs = list(zip(training.epochs, before.epochs, strict=True))
    assert all(a["loss"] == b["loss"] for a, b in pairs[:first])
    assert all(a["loss"] != b["loss"] for a, b in pairs[first:])


def test_rounds_from_init_have_a_ratio_and_later_rounds_a_rate_of_their_own():
    config = config_of(update={"first_ratio": 0.2}, deployed_lr=1e-3)
    for fresh, ratio, rate in ((True, 0.2, 5e-3), (False, 0.05, 1e-3)):
        training = prepare(config, fresh=fresh)
        masks = train_round(training, config)
        assert sum(int(m.sum()) for m in masks.values()) == int(ratio * 1776)
        assert training.epochs[0]["lr"] == rate


@pytest.mark.parametrize("fresh", [True, False])
def test_folded_batchnorm_leaves_statistics_and_idle_biases_to_the_device(fresh):
    config = config_of("dpu", "small_cnn", 0.4, {"fold_batchnorm": True}, lr=1e-2)
    training = prepare(config, fresh=fresh)
    start = weights_of(training.model) if fresh else training.start
    train_round(training, config)
    names = {
        name for name in start if changed(training.start, training.best, name).any()
    }
    assert not any("running" in name or name in ("0.bias", "4.bias") for name in names)
    assert {"1.weight", "1.bias"} <= names
    value = training.values["best"]
    training.load(training.best)
    assert evaluate(training.model, training.validation) == value


def test_training_on_from_folded_weights_starts_with_the_same_function():
    config = config_of("dpu", "small_cnn", 0.4, {"fold_batchnorm": True}, lr=1e-2)
    first = prepare(config)
    train_round(first, config)
    source = load_source(config.data)
    model = build_model(config.model, source.input_shape, 10)
    load_weights(model, first.best)
    inputs = source.prepared(source.test[:50]).inputs
    expected = model.eval()(inputs).detach()
    second = prepare(config, model, fresh=False)
    found = second.model.eval()(inputs).detach()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        second.model.train()(inputs).detach(), expected, rtol=1, atol=2
    )
    assert second.start.fingerprint == first.best.fingerprint
