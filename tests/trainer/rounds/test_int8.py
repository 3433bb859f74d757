# SPDX-License-Identifier: Apache-2.0
"""Runs whose devices compute in int8: from the samples to a device, on real digits."""

import shutil

import numpy as np
import pytest
import torch

from edge_runtime import Device
from edge_runtime.errors import ConfigError
from edge_runtime.formats.init_weights import InitSpec, TensorInit, read_init_spec
from edge_runtime.formats.model_folder import Outcome, round_name
from edge_runtime.formats.weights import pack_weights, read_weights
from packager import pack_round, read_round
from packager.bundles.from_round import build_bundle
from packager.size import patch_size
from trainer.config import as_dict, make_config
from trainer.data.samples import split_source
from trainer.data.sources import load_source
from trainer.export.init_recipe import make_init_spec
from trainer.export.int8 import DeviceForm, quantised_init, weight_scales
from trainer.export.int8_graph import graph_scales
from trainer.export.tensors import load_weights, weights_of
from trainer.networks.models import build_model
from trainer.recipe.schema import METHODS, PARTIAL_METHODS
from trainer.rounds.methods import train_round
from trainer.rounds.rounding import Rounding
from trainer.rounds.schedule import run_rounds
from trainer.rounds.training import RoundTraining

torch.set_num_threads(1)

# Every second round tries a fresh start; what it comes to goes on unseen.
TABLES = {
    "run": {"name": "tiny", "rounds": 4, "seed": 1, "id": "int8"},
    "data": {"set": "digits", "initial": 100, "growth": 150, "validation": 200},
    "model": {"name": "small_cnn", "channels": [4], "hidden": 16, "deploy": "int8"},
    "update": {
        "ratio": 0.1,
        "grid": "auto",
        "dense_grid": 0.03125,
        "narrow": True,
        "reinit": 2,
    },
    "train": {"epochs": 4, "batch": 16, "lr": 1e-2, "teacher": "self"},
}


def config_of(**sections):
    names = TABLES.keys() | sections.keys()
    return make_config({n: TABLES.get(n, {}) | sections.get(n, {}) for n in names})


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    return runs, run_rounds(config_of(), runs)


SUBSPACE = {
    "update": {
        "method": "subspace",
        "budget": "380",
        "first_budget": "440",
        "dense": "freeze",
        "reinit": 2,
    }
}


@pytest.fixture(scope="module")
def in_subspaces(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    return runs, run_rounds(make_config(TABLES | SUBSPACE), runs, pack=patch_size)


@pytest.fixture(scope="module")
def with_biases(tmp_path_factory):
    """A run in subspaces in which biases, which stay floats, move as well."""
    runs, update = tmp_path_factory.mktemp("runs"), SUBSPACE["update"]
    moves = {"dense": "budget", "dense_grid": 0.03125, "budget": "400"}
    tables = TABLES | {"update": update | moves}
    return runs, run_rounds(make_config(tables), runs, pack=patch_size)


def test_scales_are_settled_with_the_room_that_rounds_from_init_have(tmp_path):
    """There statistics of BatchNorm travel, which a later round's budget is below."""
    model = {"name": "mlp", "hidden": [96], "batch_norm": True, "deploy": "int8"}
    update = {"method": "subspace", "dense": "budget", "budget": "800"}
    tables = {
        "run": TABLES["run"] | {"rounds": 2},
        "model": model,
        "update": update | {"first_budget": "2KB"},
        "train": {"epochs": 1, "batch": 16, "lr": 1e-2},
    }
    records = run_rounds(make_config(TABLES | tables), tmp_path, pack=patch_size)
    assert records[0].outcome is Outcome.UPDATED
    assert 800 < records[0].metrics["patch_bytes"] <= 2000


def updated(records):
    return [r for r in records if r.outcome is Outcome.UPDATED]


def test_a_round_deploys_int8_weights_and_floats_for_the_rest(finished):
    runs, records = finished
    assert len(updated(records)) > 2
    weights = read_weights(runs / "tiny" / "round_01" / "weights.safetensors")
    types = weights.layout.types
    assert {n for n, t in types.items() if t == "I8"} == {
        n for n in types if n.endswith("weight") and weights[n].ndim > 1
    }
    # The ranges of what is computed between layers lie beside them.
    ranges = {n: t for n, t in types.items() if "/" in n}
    assert set(ranges.values()) == {"F32", "U8"}
    assert {types[n] for n in types.keys() - ranges.keys()} == {"I8", "F32"}


@pytest.mark.parametrize("run", ["finished", "in_subspaces", "with_biases"])
def test_a_device_runs_the_server_s_weights_and_answers_as_the_record_says(
    run, request, tmp_path
):
    runs, records = request.getfixturevalue(run)
    assert len(updated(records)) > 1
    source = load_source(config_of().data)
    test = split_source(source, config_of().data, seed=1, rounds=4).test
    device = None
    for record in updated(records):
        folder = read_round(runs / "tiny" / round_name(record.round))
        if device is None:
            (tmp_path / "bundle.zip").write_bytes(build_bundle(folder).data)
            device = Device.install(tmp_path / "store", tmp_path / "bundle.zip")
        else:
            patch = tmp_path / "round.dpu"
            patch.write_bytes(pack_round(folder).data)
            device.update(patch)
        assert device.verify() == record.target
        scores = device.predictor().predict(test.read().numpy())
        right = (scores.argmax(1) == test.labels.numpy()).mean()
        assert right == pytest.approx(record.metrics["test_accuracy"], abs=1e-6)
        far = record.metrics["float_test_accuracy"] - record.metrics["test_accuracy"]
        assert abs(far) < 0.05


def test_a_subspace_of_int8_steps_has_the_size_that_was_asked_for(in_subspaces):
    runs, records = in_subspaces
    for record in updated(records):
        packed = pack_round(read_round(runs / "tiny" / round_name(record.round)))
        assert len(packed.terms) == 1
        assert packed.counts["0.weight"] == 0
        from_init = record.round == 0 or record.reinitialised
        most = 440 if from_init else 380
        # The ranges of activations are counted at their full size, and pack smaller.
        assert most - 140 < len(packed.data) <= most
        assert len(packed.data) == record.metrics["patch_bytes"]


@pytest.mark.fleet
def test_patches_are_no_larger_than_in_float32_but_for_the_ranges(finished, tmp_path):
    runs, records = finished
    tables = as_dict(config_of())
    tables["model"]["deploy"] = "float32"
    plain = run_rounds(make_config(tables), tmp_path)

    def sizes(root, records):
        folders = (root / "tiny" / round_name(r.round) for r in updated(records))
        return [len(pack_round(read_round(folder)).data) for folder in folders]

    names = read_weights(runs / "tiny" / "round_01" / "weights.safetensors")
    ranges = 4 * sum(name.endswith("/step") for name in names)
    assert np.mean(sizes(runs, records)) <= np.mean(sizes(tmp_path, plain)) + ranges


def test_the_init_weights_are_those_of_the_float_run_on_the_grid(finished):
    model, config = finished[0] / "tiny" / "model", config_of()
    recipe = read_init_spec(model)
    drawn = make_init_spec(lambda: build_model(config.model, (1, 8, 8), 10), 1)
    scales = graph_scales((model / "graph.onnx").read_bytes())
    expected, found = DeviceForm(scales).encode(drawn.generate()), recipe.generate()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert sum(init.kind == "quantised" for init in recipe.tensors.values()) == 2


def test_a_run_that_was_interrupted_gives_the_same_bytes(finished, tmp_path):
    whole = contents(finished[0] / "tiny")
    shutil.copytree(finished[0], tmp_path / "runs")
    for number in (2, 3):
        shutil.rmtree(tmp_path / "runs" / "tiny" / round_name(number))
    run_rounds(config_of(), tmp_path / "runs")
    assert contents(tmp_path / "runs" / "tiny") == whole


@pytest.mark.fleet
def test_a_budget_counts_the_int8_patch(tmp_path):
    config = config_of(
        run={"rounds": 2},
        update={"budget": "400", "first_budget": "1KB", "narrow": False},
        train={"epochs": 2},
    )
    sizes = []

    def pack(base, target, *terms):
        assert base.layout.by_name["0.weight"].dtype == "I8"
        sizes.append(patch_size(base, target, *terms))
        return sizes[-1]

    for record in updated(run_rounds(config, tmp_path, pack=pack)):
        packed = pack_round(read_round(tmp_path / "tiny" / round_name(record.round)))
        assert len(packed.data) == record.metrics["patch_bytes"] in sizes


# One round by each method -------------------------------------------------------------


NAMES = ["1.weight", "3.weight"]


def one_round(method, **update):
    tables = {
        **TABLES,
        "model": {"name": "mlp", "hidden": [24], "deploy": "int8"},
        "update": {"method": method, "ratio": 0.05} | update,
        "train": {"epochs": 3, "batch": 16, "lr": 1e-2},
    }
    config = make_config(tables)
    source = load_source(config.data)
    split = split_source(source, config.data, seed=0, rounds=1)
    torch.manual_seed(0)
    model = build_model(config.model, source.input_shape, 10)
    start = weights_of(model)
    far = pack_weights({name: array + 0.5 for name, array in start.items()})
    form = DeviceForm(weight_scales(NAMES, start, far))
    load_weights(model, form.decode(form.encode(weights_of(model))))
    samples = source.prepared(split.pool[:120]), source.prepared(split.validation)
    training = RoundTraining(model, config, 0, samples, scales=form.scales)
    return training, form, train_round(training, config)


OPTIONS = {"named": {"tensors": "*.weight"}, "subspace": {"coefficients": 128}}


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_keeps_is_on_the_grid_and_the_rest_keeps_its_steps(method):
    options = OPTIONS.get(method, {})
    training, form, masks = one_round(method, **options)
    best, start = form.encode(training.best), form.encode(training.start)
    assert form.decode(best).data == training.best.data
    moved = [best[name] != start[name] for name in NAMES]
    assert all(m.any() for m in moved)
    if method in PARTIAL_METHODS and method != "subspace":
        for name, changed in zip(NAMES, moved, strict=True):
            assert not (changed & ~masks[name].numpy()).any()


def test_a_grid_counts_int8_steps_and_other_tensors_have_the_dense_grid():
    options = {"grid": 4, "dense_grid": 0.125, "dense": "budget"}
    training, form, masks = one_round("dpu", **options)
    best, start = form.encode(training.best), form.encode(training.start)
    for name in NAMES:
        new = best[name][best[name] != start[name]]
        assert len(new)
        assert (new % 4 == 0).all()
    for name in ("1.bias", "3.bias"):
        new = training.best[name][masks[name].numpy()]
        new = new[new != training.start[name][masks[name].numpy()]]
        assert (new % 0.125 == 0).all()


def test_an_automatic_grid_counts_whole_int8_steps():
    training, *_ = one_round("dpu", grid="auto")
    steps = training.form.rounding.steps
    assert steps.keys() == set(NAMES)
    assert all(1 <= step <= 64 and step == int(step) for step in steps.values())
    for form in training.form.finer():
        assert all(step >= 1 for step in form.steps.values())


def test_values_beyond_the_last_step_become_the_last_one():
    scales = {"w": np.array([0.5, 1.0], np.float32)}
    base = pack_weights({"w": np.zeros((2, 2), np.float32)})
    new = pack_weights({"w": np.array([[63.6, -1e9], [0, np.nan]], np.float32)})
    found = Rounding(scales=scales).round(new, base)["w"]
    assert found[0].tolist() == [63.5, -63.5]
    assert np.isnan(found[1, 1])  # for others to refuse


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"grid": 0.5}, "grid counts int8 steps with deploy int8"),
        ({"grid": 128}, "found 128"),
    ],
)
def test_what_int8_cannot_have_is_refused_by_name(section, words):
    with pytest.raises(ConfigError) as caught:
        config_of(update=section)
    assert any(words in problem for problem in caught.value.problems)


# Scales -------------------------------------------------------------------------------


def scales_of(start, trained):
    packed = (pack_weights({"w": np.array(a, np.float32)}) for a in (start, trained))
    return weight_scales(["w"], *packed)["w"]


def test_scales_have_room_for_twice_the_way_of_what_trained():
    rng = np.random.default_rng(0)
    start, moved = rng.normal(0, 1, (2, 50, 7, 3))
    reach = np.abs(start).max((1, 2)) + 2 * np.abs(moved).max()
    found = scales_of(start, start + moved)
    assert (127 * found >= reach * (1 - 1e-6)).all()
    assert (127 * found <= reach * (1 + 2**-7)).all()
    assert not (found.view("u4") & 0xFFFF).any()  # 8 significant bits


def test_zeros_that_did_not_move_have_a_scale_as_well():
    assert (scales_of(np.zeros((2, 2)), np.zeros((2, 2))) > 0).all()


def test_init_weights_of_every_kind_are_put_on_the_grid():
    rng = np.random.default_rng(0)
    stored = rng.normal(size=(3, 4)).astype(np.float32)
    tensors = {
        "drawn": TensorInit("F32", (3, 200), "uniform", 0.3),
        "zero": TensorInit("F32", (2, 2), "constant", 0.0),
        "one": TensorInit("F32", (2, 2), "constant", 1.0),
        "known": TensorInit("F32", (3, 4), "file"),
        "b": TensorInit("F32", (3,), "constant", 0.5),
    }
    spec = InitSpec(3, tensors, {"known": stored})
    scales = {
        name: np.arange(1, shape[0] + 1).astype(np.float32) / 64
        for name, shape in ((n, tensors[n].shape) for n in tensors if n != "b")
    }
    form = DeviceForm(scales)
    found = quantised_init(spec, form)
    assert found.generate().data == form.encode(spec.generate()).data
    kinds = {name: init.kind for name, init in found.tensors.items()}
    assert kinds == {
        "drawn": "quantised",
        "zero": "constant",
        "one": "file",
        "known": "file",
        "b": "constant",
    }
