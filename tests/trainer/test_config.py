# SPDX-License-Identifier: Apache-2.0
import json
import tomllib
from pathlib import Path

import pytest

from edge_runtime.errors import ConfigError
from trainer.config import as_dict, load_config, make_config

RECIPES = sorted(Path("trainer/recipes").glob("*.toml"))

MINIMAL = """
[run]
rounds = 2
[data]
set = "digits"
initial = 50
growth = 10
[model]
name = "mlp"
[train]
epochs = 1
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL)
    return path


def problems_of(tables):
    with pytest.raises(ConfigError) as caught:
        make_config(tables)
    return "\n".join(caught.value.problems)


def changed(section, **keys):
    tables = tomllib.loads(MINIMAL)
    tables["run"]["name"] = "mine"
    tables.setdefault(section, {}).update(keys)
    return tables


def test_fills_in_defaults_and_takes_the_name_from_the_file(recipe):
    config = load_config(recipe)
    assert config.run.name == "mine"
    assert (config.update.method, config.update.reinit) == ("dpu", "auto")
    assert config.model.options == {}


def test_a_given_name_beats_the_file_name(recipe):
    assert load_config(recipe, name="other").run.name == "other"


def test_reports_every_problem_at_once():
    tables = changed("train", lr=-1, epoch=3)
    tables["model"]["hiden"] = [3]
    tables["data"]["set"] = "digit"
    tables["trian"] = {}
    del tables["run"]["rounds"]
    found = problems_of(tables)
    assert "section [trian] is unknown; did you mean train?" in found
    assert "[train] epoch is unknown; did you mean epochs?" in found
    assert "[train] lr should be above 0, and finite, found -1" in found
    assert "[model] hiden is unknown; mlp has hidden, batch_norm" in found
    assert "[data] set should be one of digits" in found
    assert "[run] rounds is missing" in found


@pytest.mark.parametrize(
    ("section", "keys", "expected"),
    [
        ("train", {"lr": float("inf")}, "lr should be above 0, and finite, found inf"),
        ("train", {"lr": "high"}, "[train] lr should be float, found 'high'"),
        ("train", {"epochs": True}, "[train] epochs should be int, found True"),
        ("train", {"momentum": 0.9}, "for optimizer sgd only"),
        ("train", {"optimizer": "sgd", "nesterov": True}, "nesterov needs momentum"),
        ("update", {"ratio": 0.0}, "[update] ratio should be above 0, at most 1"),
        ("update", {"reinit": 0}, "[update] reinit should be auto, never"),
        ("update", {"lam": 0.5}, "[update] lam is unknown; did you mean lambda?"),
        ("run", {"name": "a/b"}, "[run] name should be a plain folder name"),
        ("run", {"accuracy_floor": 2.0}, "[run] accuracy_floor should be from 0 to 1"),
        ("data", {"size": 32}, "[data] size is for set folder only"),
        ("model", {"hidden": [0]}, "[model] hidden should be a list of integers"),
        ("model", {"name": "resnet"}, "name 'resnet' is unknown; did you mean resnet"),
        ("update", {"reinit_growth": float("inf")}, "[update] reinit_growth should be"),
        (
            "train",
            {"weight_decay": float("inf")},
            "[train] weight_decay should be",
        ),
        ("train", {"teacher_mix": float("inf")}, "[train] teacher_mix should be what"),
        ("run", {"bound": float("nan")}, "[run] bound should be what a round's record"),
    ],
)
def test_says_what_is_wrong(section, keys, expected):
    assert expected in problems_of(changed(section, **keys))


@pytest.mark.parametrize(
    ("section", "keys", "problem"),
    [
        ("update", {"budget": "64 kilo"}, "a size such as 64KB"),
        ("update", {"budget": "0KB"}, "a size such as 64KB"),
        ("update", {"budget": "9KB", "method": "rpu"}, "budget is for methods dpu, "),
        ("update", {"dense": "freeze", "method": "fu"}, "for methods that select only"),
        ("update", {"grid": 0.3}, "auto, or a power of two"),
        ("update", {"grid": "fine"}, "auto, or a power of two"),
        ("update", {"grid": 0.5, "method": "fu"}, "grid and first_ratio are for"),
        ("update", {"dense_grid": 0.25, "method": "fu"}, "methods other than fu"),
        ("update", {"grid": "auto", "method": "rpu"}, "grid auto is for methods dpu, "),
        ("update", {"narrow": True, "method": "fisher"}, "narrow is for methods dpu, "),
        (
            "update",
            {"first_budget": "9KB"},
            "first_budget is for recipes with a budget",
        ),
        ("update", {"fold_batchnorm": True, "dense": "freeze"}, "needs dense train"),
        ("update", {"tensors": "a.*"}, "tensors is for method named only"),
        ("update", {"gradual": True}, "gradual is for method pruning only"),
        ("update", {"method": "named", "dense": "freeze"}, "tensors names what trains"),
        ("train", {"teacher": "self", "loss": "mse"}, "teacher is for loss cross_ent"),
        ("train", {"teacher": "self", "teacher_mix": 1}, "mixtures have no labels"),
        ("train", {"teacher_mix": 1, "teacher_weight": 1}, "mixtures have no labels"),
        ("update", {"mantissa_bits": 8}, "should be 23, 10 or 7"),
        ("model", {"factory": "a:b"}, "[model] name, or factory"),
        ("model", {"name": ""}, "[model] name, or factory"),
        ("data", {"factory": "a:b"}, "[data] set, or factory"),
        ("data", {"set": "", "factory": "a.b"}, "should be package.module:function"),
        ("train", {"device": "tpu"}, "one of auto, cpu, cuda"),
    ],
)
def test_what_excludes_each_other_is_a_problem(section, keys, problem):
    assert problem in problems_of(changed(section, **keys))


@pytest.mark.parametrize(
    ("method", "teacher"), [("fu", "self"), ("rpu", "self"), ("pruning", "full")]
)
def test_a_teacher_needs_a_phase_to_learn_in(method, teacher):
    tables = changed("update", method=method)
    tables["train"] = {**tables["train"], "teacher": teacher}
    assert f"teacher {teacher} is for methods dpu" in problems_of(tables)


def test_your_own_functions_take_the_place_of_names(recipe):
    config = load_config(recipe, ["model.width=3"], model="a.b:net", data="c:load")
    assert (config.model.name, config.model.factory) == ("", "a.b:net")
    assert config.model.options == {"width": 3}
    assert (config.data.set, config.data.factory) == ("", "c:load")


def test_what_a_rounds_record_cannot_hold_is_a_problem_of_the_recipe(recipe):
    text = MINIMAL.replace('name = "mlp"', 'factory = "a:b"\nbegan = 2026-11-29')
    recipe.write_text(text.replace("[train]", "scales = [1.0, inf]\n[train]"))
    with pytest.raises(ConfigError) as caught:
        load_config(recipe)
    began, scales = caught.value.problems
    assert began.startswith("[model] began should be what a round's record (JSON) can")
    assert scales.endswith("found [1.0, inf]")


def test_a_section_that_is_no_table_is_a_problem(recipe):
    assert "[update] should be a section" in problems_of(changed("run") | {"update": 3})
    recipe.write_text("run = 3")
    with pytest.raises(ConfigError, match=r"\[run\] should be a section"):
        load_config(recipe)


def test_a_file_that_is_not_toml_is_refused(recipe):
    recipe.write_text("[run")
    with pytest.raises(ConfigError, match="not a TOML file"):
        load_config(recipe)


def test_overrides_are_toml_values_or_text(recipe):
    config = load_config(
        recipe,
        ["train.lr=1e-2", "update.method=rpu", "model.hidden=[8]", "update.lambda=1"],
    )
    assert config.train.lr == 0.01
    assert config.update.method == "rpu"
    assert config.update.lam == 1.0
    assert config.model.options == {"hidden": [8]}


def test_a_malformed_override_is_reported_with_the_other_problems(recipe):
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, ["epochs", "train.epohs=3"])
    assert len(caught.value.problems) == 2


def test_the_resolved_recipe_survives_json(recipe):
    config = load_config(recipe, ["model.hidden=[8]", "update.reinit=3"])
    again = make_config(json.loads(json.dumps(as_dict(config))))
    assert again == config
    assert as_dict(config)["update"]["lambda"] == 0.5
    model = {
        "name": "mlp",
        "factory": "",
        "weights": "",
        "deploy": "float32",
        "hidden": [8],
    }
    assert as_dict(config)["model"] == model


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_built_in_recipe_is_valid(path):
    assert load_config(path).run.name == path.stem
    assert path.read_text().startswith("# ")


def test_the_documentation_names_every_key(recipe):
    page = Path("docs/recipes.md").read_text()
    for section, table in as_dict(load_config(recipe)).items():
        assert f"`[{section}]`" in page
        for key in table:
            assert f"`{key}`" in page


@pytest.mark.parametrize("text", ["2024", "0012", "1e5", "true", "abc"])
def test_where_text_is_wanted_anything_is_text(recipe, text):
    config = load_config(recipe, [f"run.id={text}", f"run.name={text}"])
    assert (config.run.id, config.run.name) == (text, text)
