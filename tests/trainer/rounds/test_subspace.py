# SPDX-License-Identifier: Apache-2.0
"""Recipes whose method is subspace: rounds as the packager and devices want them."""

import json

import pytest
import torch

from edge_runtime.errors import ConfigError, TrainingError
from edge_runtime.formats import subspace
from edge_runtime.formats.model_folder import (
    METRICS_NAME,
    SHADOW_SUBSPACES_NAME,
    list_rounds,
)
from packager.build import pack_round
from packager.rounds.folder import read_init, read_round
from packager.size import patch_size
from trainer.config import make_config
from trainer.folder.record import read_round_record
from trainer.rounds.schedule import run_rounds

torch.set_num_threads(1)


def config_of(update, model=None, **tables):
    return make_config(
        {
            "run": {"name": "t", "rounds": 3, "seed": 1, "id": "same"},
            "data": {"set": "digits", "initial": 100, "growth": 60, "validation": 100},
            "model": model or {"name": "mlp", "hidden": [24]},
            "update": {"method": "subspace", "coefficients": 256} | update,
            "train": {"epochs": 4, "batch": 16, "lr": 1e-2},
        }
        | tables
    )


def rounds_of(folder, config):
    run_rounds(config, folder, pack=patch_size)
    return [read_round(path) for path in list_rounds(folder / "t")]


BATCHNORM = {"name": "mlp", "hidden": [24], "batch_norm": True}
ONE_EPOCH = {
    "run": {"name": "t", "rounds": 2, "seed": 1, "id": "same"},
    "train": {"epochs": 1, "batch": 16, "lr": 1e-2},
}


@pytest.mark.parametrize(
    ("update", "model"),
    [
        ({"dense": "freeze"}, None),
        ({"bits": 3, "taps": 1}, None),
        ({"dense": "budget"}, BATCHNORM),
    ],
)
def test_every_round_packs_and_its_weights_are_those_of_the_subspace(
    tmp_path, update, model
):
    rounds = rounds_of(tmp_path, config_of(update, model))
    assert not any(read_round_record(r.path).tried_reinit for r in rounds)
    for round_ in rounds:
        if round_.record.outcome == "kept_base":
            assert not round_.terms
            continue
        packed = pack_round(round_)
        moved = [n for n in packed.counts if n in round_.selection]
        assert len(packed.terms) == 1
        assert all(packed.counts[name] == 0 for name in moved)
        assert len(packed.data) < patch_size(read_init(round_).weights, round_.weights)
        record = read_round_record(round_.path)
        assert record.method == "subspace"
        assert record.ratio is None
        assert record.metrics["coefficients"] == 256


def test_a_budget_is_kept_and_its_coefficients_are_known_before(tmp_path):
    config = config_of({"dense": "freeze", "budget": "300"})
    for round_ in rounds_of(tmp_path, config):
        if round_.record.outcome == "updated":
            packed = pack_round(round_)
            assert 290 < len(packed.data) <= 300
            metrics = read_round_record(round_.path).metrics
            assert metrics["patch_bytes"] == len(packed.data)


def test_a_larger_budget_from_init_has_room_for_more_coefficients(tmp_path):
    config = config_of({"dense": "freeze", "budget": "260", "first_budget": "300"})
    first, *later = rounds_of(tmp_path, config)
    assert 290 < len(pack_round(first).data) <= 300
    for round_ in later:
        if round_.record.outcome == "updated":
            assert 250 < len(pack_round(round_).data) <= 260


def test_a_round_that_begins_anew_has_the_first_rounds_room_or_leaves_no_trace(
    tmp_path,
):
    update = {"dense": "freeze", "budget": "260", "anew_budget": "300"}
    config = config_of(
        update | {"first_budget": "330", "reinit": 1},
        run={"name": "t", "rounds": 6, "seed": 1, "id": "same"},
        data={"set": "digits", "initial": 200, "growth": 60, "validation": 100},
        train={"epochs": 2, "batch": 16, "lr": 1e-2},
    )
    found = set()
    first, *later = rounds_of(tmp_path, config)
    assert 320 < len(pack_round(first).data) <= 330
    for round_ in later:
        record = read_round_record(round_.path)
        assert record.tried_reinit
        assert not (round_.path / SHADOW_SUBSPACES_NAME).exists()
        found.add("anew" if record.reinitialised else str(record.outcome))
        if record.outcome == "updated":
            init = read_init(round_).weights.fingerprint
            assert (record.parent == init) is record.reinitialised
            size = len(pack_round(round_).data)
            least, most = (290, 300) if record.reinitialised else (250, 260)
            assert least < size <= most
    assert "anew" in found
    assert len(found) > 1  # and one that validated worse went on from what is deployed


@pytest.mark.parametrize(
    ("update", "tried"),
    [
        ({"coefficients": 256}, []),
        ({"budget": "260"}, []),
        ({"budget": "260", "first_budget": "300"}, [2]),
        ({"budget": "260", "first_budget": "300", "reinit_growth": 3.5}, [4]),
        ({"budget": "260", "anew_budget": "300"}, [2]),
        ({"budget": "260", "first_budget": "300", "reinit": "never"}, []),
    ],
)
def test_a_subspace_begins_anew_when_the_data_grew_and_a_larger_patch_is_allowed(
    tmp_path, update, tried
):
    config = config_of(
        update | {"dense": "freeze", "chain": "paper"},  # each attempt counts
        run={"name": "t", "rounds": 6, "seed": 1, "id": "same"},
        data={"set": "digits", "initial": 100, "growth": 70, "validation": 100},
        train={"epochs": 1, "batch": 64, "lr": 1e-2},
    )
    records = run_rounds(config, tmp_path, pack=patch_size)
    assert [r.round for r in records if r.tried_reinit] == tried


def losses(round_, phase):
    lines = (round_.path / METRICS_NAME).read_text().splitlines()
    return [r["loss"] for r in map(json.loads, lines) if r["phase"] == phase]


@pytest.mark.parametrize(
    ("teacher", "taught"),
    [
        # The round's own network knows nothing before the first phase is over.
        ({"teacher": "self"}, {(0, "sparse")}),
        # Full updating teaches what goes on from deployed weights, in both phases.
        ({"teacher": "full"}, {(1, "full"), (1, "sparse")}),
        (
            {"teacher": "full", "teacher_weight": 1, "teacher_mix": 0.5},
            {(1, "full"), (1, "sparse")},
        ),
    ],
)
def test_a_subspace_learns_from_a_teacher_where_there_is_one(tmp_path, teacher, taught):
    train = {"epochs": 4, "batch": 16, "lr": 1e-2}
    update = {"dense": "freeze"}
    with_one = rounds_of(tmp_path / "a", config_of(update, train=train | teacher))
    without = rounds_of(tmp_path / "b", config_of(update, train=train))
    last = max(number for number, _ in taught)
    assert taught == {
        (number, phase)
        for number in range(last + 1)
        for phase in ("full", "sparse")
        if losses(with_one[number], phase) != losses(without[number], phase)
    }


def test_a_budget_without_room_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="has no room for coefficients"):
        rounds_of(tmp_path, config_of({"budget": "250"}))


@pytest.mark.parametrize(
    ("update", "words"),
    [
        ({"budget": "250", "first_budget": "5KB"}, "budget, in later rounds: a patch"),
        (
            {"budget": "300", "anew_budget": "99", "dense": "freeze"},
            "anew_budget or .*, in later rounds: a patch of 99 bytes",
        ),
    ],
)
def test_what_a_later_round_has_no_room_for_is_refused_before_the_first(
    tmp_path, update, words
):
    epochs = []
    with pytest.raises(ConfigError, match=rf"\[update\] {words}"):
        run_rounds(config_of(update), tmp_path, pack=patch_size, on_epoch=epochs.append)
    assert epochs == []


def test_a_limit_that_no_round_has_is_not_held_against_a_recipe(tmp_path):
    """From init the budget has no room for statistics, but no round starts there."""
    update = {"first": "full", "dense": "budget", "budget": "700"}
    config = config_of(update, BATCHNORM | {"hidden": [96]}, **ONE_EPOCH)
    assert len(rounds_of(tmp_path, config)) == 2


def trained_unseen():
    return config_of(
        {"dense": "freeze", "chain": "shadow", "reinit": 3, "coefficients": 512},
        run={"name": "t", "rounds": 5, "seed": 6, "id": "same"},
        data={"set": "digits", "initial": 40, "growth": 150, "validation": 60},
        train={"epochs": 3, "batch": 16, "lr": 3e-3},
    )


def test_what_trains_unseen_is_sent_with_all_of_its_subspaces(tmp_path):
    config = trained_unseen()
    rounds = rounds_of(tmp_path, config)
    assert any((r.path / SHADOW_SUBSPACES_NAME).exists() for r in rounds)
    sent = [r for r in rounds if len(r.terms) > 1]
    assert sent
    for round_ in sent:
        assert round_.record.parent == read_init(round_).weights.fingerprint
        packed = pack_round(round_)
        assert len(packed.terms) == len(round_.terms) > 1
        assert sum(packed.counts.values()) == 0


def test_more_subspaces_unseen_than_a_patch_may_have_begin_again(tmp_path, monkeypatch):
    monkeypatch.setattr(subspace, "MAX_TERMS", 1)
    config = trained_unseen()
    rounds = rounds_of(tmp_path, config)
    assert len(rounds) == 5
    assert all(len(round_.terms) <= 1 for round_ in rounds)
    unseen = [(r.path / SHADOW_SUBSPACES_NAME).exists() for r in rounds]
    assert any(unseen)
    assert not all(unseen[unseen.index(True) :])


def test_a_packer_that_knows_no_subspaces_is_refused_before_training(tmp_path):
    config = config_of({"budget": "400", "dense": "freeze"})
    with pytest.raises(ConfigError, match=r"pack\(base, target, terms\)"):
        run_rounds(config, tmp_path, pack=lambda _base, _target: 0)
    assert not list(tmp_path.iterdir())


def test_a_run_repeats_to_the_bit(tmp_path):
    one, two = (
        rounds_of(tmp_path / name, config_of({"dense": "freeze"})) for name in "ab"
    )
    assert [r.record.target for r in one] == [r.record.target for r in two]
    assert pack_round(one[0]).data == pack_round(two[0]).data


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"coefficients": 100}, "a multiple of 64"),
        ({"bits": 9}, "from 1 to 8"),
        ({"taps": 0}, "from 1 to 4"),
        ({"mantissa_bits": 7}, "mantissa_bits"),
        ({"method": "dpu"}, "for method subspace only"),
        ({"anew_budget": "1KB"}, "for method subspace with a budget"),
    ],
)
def test_options_that_do_not_go_together_are_refused(update, message):
    with pytest.raises(ConfigError) as refusal:
        config_of(update)
    assert message in str(refusal.value.problems)
