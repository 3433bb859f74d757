# SPDX-License-Identifier: Apache-2.0
"""Advice for a link holds: the lines are a recipe, and its patches are small enough."""

import json
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge_runtime.errors import ConfigError
from packager import pack_round, read_round
from packager.report.links import link_records
from packager.size import patch_size
from trainer.advice_text import advice_text
from trainer.cli import main
from trainer.config import as_dict, load_config, make_config
from trainer.networks.models import build_model
from trainer.rounds.advice import advise, block
from trainer.rounds.patch_estimate import ERROR, NetworkSizes, patch_bytes
from trainer.rounds.schedule import run_rounds

ROOT = Path(__file__).parents[3]
RECIPES, RESULTS = ROOT / "tools" / "recipes", ROOT / "tools/results/reproduction"
BUILT_IN = ROOT / "trainer" / "recipes"
DIGITS, MNIST, CIFAR = (1, 8, 8), (1, 28, 28), (3, 16, 16)


def invoke(*arguments):
    return CliRunner().invoke(main, ["advise", *arguments])


def advice_for(recipe, shape, budget, *overrides):
    config = load_config(recipe, overrides)
    network = build_model(config.model, shape, 10)
    return config, advise(config, network, budget, link_records)


@pytest.mark.parametrize(
    ("network", "run", "shape"),
    [
        ("mnist_mlp", "dpu_seed1", MNIST),
        ("cifar10_vgg_small", "dpu_seed1", CIFAR),
        ("cifar10_resnet_small", "dpu_seed1", CIFAR),
        ("mnist_mlp", "dpu_lean_seed1", MNIST),
        ("mnist_mlp", "dpu_lean_seed2", MNIST),
    ],
)
def test_estimates_are_as_near_as_they_say_to_committed_patches(network, run, shape):
    method = run.rpartition("_")[0]
    config = load_config(RECIPES / network / f"{method}.toml")
    size = NetworkSizes.of(build_model(config.model, shape, 10))
    lean, share = method == "dpu_lean", config.update.ratio
    rounds = json.loads((RESULTS / network / f"{run}.json").read_text())["rounds"]
    usual = 1.2 * share * size.weights  # others lead from the init weights
    sent = [r["bytes"] for r in rounds if r["bytes"] and r["changed"] < usual]
    assert len(sent) > 2
    estimate = patch_bytes(size, share, lean=lean)
    assert estimate == pytest.approx(sum(sent) / len(sent), rel=ERROR)


@pytest.mark.parametrize("recipe", ["digits", "digits_cnn", "mnist_mlp"])
def test_every_candidate_is_a_recipe_by_its_block_and_by_its_options(recipe):
    shape = MNIST if recipe == "mnist_mlp" else DIGITS
    config, advice = advice_for(BUILT_IN / f"{recipe}.toml", shape, 20_000)
    assert len(advice.candidates) == 3
    for candidate in advice.candidates:
        given = load_config(BUILT_IN / f"{recipe}.toml", candidate.sets)
        pasted = tomllib.loads("\n".join(block(candidate)))
        tables = as_dict(config)
        train = tables["train"] | pasted.get("train", {})
        whole = make_config(tables | {"update": pasted["update"], "train": train})
        assert as_dict(given)["train"] == as_dict(whole)["train"]
        same = as_dict(given)["update"] | {"ratio": whole.update.ratio}
        assert same == as_dict(whole)["update"]


def test_options_undo_what_the_recipe_has_and_a_candidate_does_not():
    recipe = RECIPES / "mnist_mlp" / "dpu_lean.toml"
    _, advice = advice_for(recipe, MNIST, 4000)
    subspace = next(c for c in advice.candidates if c.name == "subspace")
    update = load_config(recipe, subspace.sets).update
    assert (update.method, update.narrow, update.grid) == ("subspace", False, "")


@pytest.mark.parametrize("teacher", ["self", "full"])
def test_a_recipe_that_mixes_samples_is_given_the_same_methods(teacher):
    mixed = [f'train.teacher="{teacher}"', "train.teacher_weight=1.0"]
    mixed += ["train.teacher_mix=1.0"]
    recipe = BUILT_IN / "digits.toml"
    found, plain = (advice_for(recipe, DIGITS, 5000, *o)[1] for o in (mixed, []))
    assert found.refused == plain.refused
    for one, other in zip(found.candidates, plain.candidates, strict=True):
        trained = load_config(recipe, [*mixed, *one.sets]).train
        assert trained == load_config(recipe, other.sets).train


@pytest.mark.parametrize("name", ["lean", "subspace"])
def test_a_digits_run_by_the_advice_packs_to_no_more_than_the_budget(name, tmp_path):
    overrides = ["run.rounds=3", "train.epochs=4", 'update.reinit="never"']
    recipe = BUILT_IN / "digits.toml"
    _, advice = advice_for(recipe, DIGITS, 2000, *overrides)
    candidate = next(c for c in advice.candidates if c.name == name)
    config = load_config(recipe, [*overrides, *candidate.sets])
    records = run_rounds(config, tmp_path, pack=patch_size)
    later = []
    for record in records:
        packed = pack_round(
            read_round(tmp_path / "digits" / f"round_{record.round:02d}")
        )
        size = len(packed.data) if packed else 0
        anew = not record.round or record.reinitialised  # as the advice says
        assert size <= (candidate.first if anew else candidate.patch)
        later += [] if anew else [size]
    assert any(later)


# Bytes of a first patch after 5 epochs, packed: share of the weights, of the network.
PACKED = [
    ("digits_cnn", "float32", 0.1, 1697),
    ("digits_cnn", "float32", 0.4, 3858),
    ("digits_cnn", "int8", 0.4, 4134),
    ("digits", "float32", 0.4, 39029),
]
INT8_PACKED = [("digits_cnn", 0.1, 2904), ("digits", 0.4, 66779)]


@pytest.mark.parametrize(("recipe", "deploy", "share", "packed"), PACKED)
def test_a_large_share_on_a_grid_is_known_to_a_fifth(recipe, deploy, share, packed):
    _, advice = advice_for(
        BUILT_IN / f"{recipe}.toml", DIGITS, packed, f"model.deploy={deploy}"
    )
    assert patch_bytes(advice.network, share, lean=True) == pytest.approx(
        packed, rel=0.2
    )


@pytest.mark.parametrize(("recipe", "share", "packed"), INT8_PACKED)
def test_changes_of_int8_weights_take_fewer_bits_than_those_of_float32(
    recipe, share, packed
):
    _, advice = advice_for(
        BUILT_IN / f"{recipe}.toml", DIGITS, packed, "model.deploy=int8"
    )
    network = advice.network
    assert network.full == network.weights + network.dense
    assert patch_bytes(network, share, lean=False) == pytest.approx(packed, rel=0.2)


def test_how_far_a_share_is_known_is_said_only_where_it_was_measured():
    def lean(budget, *overrides):
        _, advice = advice_for(BUILT_IN / "digits.toml", DIGITS, budget, *overrides)
        return next(c for c in advice.candidates if c.name == "lean").how

    assert "by up to 15%" in lean(4000)
    assert "rough" in lean(40_000)
    assert "rough" in lean(4000, "model.deploy=int8")


@pytest.mark.parametrize("budget", [64_000, 10_000_000])
def test_above_what_a_method_can_send_sizes_are_what_it_can(budget):
    _, advice = advice_for(BUILT_IN / "digits.toml", DIGITS, budget)
    full = advice.network.full
    assert full == 4 * 166_400 + 3_112
    assert all(c.patch <= c.first <= full for c in advice.candidates)
    last = advice.candidates[-1]
    assert (last.name, last.untried) == ("subspace", True)  # a weight a coefficient
    assert 166_400 / 8 < last.patch < 166_400 / 8 + 300
    assert last.links[0] == link_records(last.patch, full)[0]
    fits = "full updating fits" in advice_text(advice)
    assert fits == (budget > full)


def test_only_what_the_trainer_keeps_to_is_called_a_limit():
    wide, narrow = (
        advice_for(BUILT_IN / "digits.toml", DIGITS, budget)[1]
        for budget in (10_000_000, 4000)
    )
    lean = next(c for c in wide.candidates if c.name == "lean")
    assert lean.update["budget"] != str(lean.patch)
    sizes = f"patch    about {lean.patch:,} bytes; from init about {lean.first:,}"
    assert sizes in advice_text(wide)
    assert "about" not in advice_text(narrow).partition("2. lean")[2].splitlines()[1]


def test_pasted_keys_say_which_of_the_recipe_s_own_stay():
    _, advice = advice_for(BUILT_IN / "digits.toml", DIGITS, 2000)
    lines = [line for candidate in advice.candidates for line in block(candidate)]
    assert "[update]  # in place of the recipe's own section" in lines
    assert "[train]  # set these keys in the recipe's own; its others stay" in lines


def test_a_budget_below_the_dense_part_names_what_each_method_needs():
    with pytest.raises(ConfigError, match="100 bytes") as caught:
        advice_for(BUILT_IN / "digits.toml", DIGITS, 100)
    text = str(caught.value.problems)
    assert "lean" in text
    assert "dense part alone has 3112 bytes" in text


def test_a_method_without_room_is_refused_beside_those_that_have_it():
    _, advice = advice_for(BUILT_IN / "digits.toml", DIGITS, 700)
    assert [c.name for c in advice.candidates] == ["subspace"]
    assert sorted(advice.refused) == ["dpu", "lean"]


def test_the_command_prints_text_and_json():
    text = invoke("digits", "--budget", "4KB").stdout
    assert "1. subspace" in text  # no BatchNorm
    assert "2. lean" in text
    assert "LoRa SF12" in text
    found = json.loads(invoke("digits", "--budget", "4KB", "--json").stdout)
    first = found["candidates"][0]
    assert first["patch"] == 4000
    assert {link["name"] for link in first["links"]} > {"LoRa SF12", "NB-IoT"}


@pytest.mark.parametrize("arguments", [("digits", "--budget", "much"), ("digit",)])
def test_a_size_or_recipe_that_is_none_ends_with_code_2(arguments):
    done = invoke(*arguments)
    assert done.exit_code == 2
