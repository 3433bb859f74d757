# SPDX-License-Identifier: Apache-2.0
"""Losses and metrics of every task; what does not fit is refused before training."""

import copy
import json
import math
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from edge_runtime import Device
from edge_runtime.errors import ConfigError, TrainingError, TrialError
from edge_runtime.formats.contract_file import parse_contract
from edge_runtime.update.metrics import METRICS
from packager.build import pack_round
from packager.bundles.from_round import build_bundle
from packager.report.document import to_text
from packager.report.run_document import run_document
from packager.report.run_record import run_record
from packager.rounds.folder import read_round
from packager.rounds.golden import try_round
from tests.crash.world import edit_contract
from trainer import make_contract, publish_round, start_run
from trainer.config import load_config
from trainer.data.samples import split_source
from trainer.data.sources import load_source
from trainer.method.scores import fisher_scores
from trainer.method.selection import select_top_k
from trainer.progress import round_table
from trainer.recipe.factory import call_factory
from trainer.rounds.deployment import constant_value, default_bound
from trainer.rounds.methods import train_round
from trainer.rounds.objective import Judge
from trainer.rounds.schedule import run_rounds
from trainer.rounds.training import RoundTraining

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)

TABLES = {
    "run": {"rounds": 2},
    "data": {"initial": 80, "growth": 60, "validation": 60},
    "update": {"ratio": 0.2},
    "train": {"epochs": 4, "batch": 16, "lr": 2e-2},
}


def config_of(data, task, *overrides, model="network"):
    return load_config(
        TABLES,
        [f"data.task={task}", *overrides],
        model=f"own_tasks:{model}",
        data=f"own_tasks:{data}",
        name="own",
    )


def epochs_of(folder, number=0):
    lines = (folder / "own" / f"round_0{number}" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in lines.splitlines()]


@pytest.fixture(scope="module")
def regression(tmp_path_factory):
    folder = tmp_path_factory.mktemp("regression")
    return folder, run_rounds(config_of("values", "regression"), folder)


# The direction ------------------------------------------------------------------------


def test_the_best_epoch_is_the_one_with_the_least_error(regression):
    folder, records = regression
    for number, record in enumerate(records):
        best = record.metrics["val_start"]
        if record.metrics["val_rewound"] <= best:
            best = record.metrics["val_rewound"]
        for epoch in epochs_of(folder, number):
            if epoch["phase"] == "sparse":
                assert epoch["kept"] == (epoch["val_mae"] < best)
                best = min(best, epoch["val_mae"])
        assert record.metrics["val_best"] == best
    first, last = (record.metrics["val_mae"] for record in records)
    assert last < first < records[0].metrics["val_start"]


def test_a_round_00_that_was_interrupted_goes_on_to_the_same_bytes(
    regression, tmp_path
):
    folder, _ = regression
    shutil.copytree(folder / "own" / "model", tmp_path / "own" / "model")
    again = config_of("values", "regression", "run.rounds=1")
    run_rounds(again, tmp_path)
    for name in ("round_00/weights.safetensors", "model/contract.json"):
        first, second = (run / "own" / name for run in (folder, tmp_path))
        assert second.read_bytes() == first.read_bytes()


def test_a_metric_that_has_no_value_yet_is_left_out_of_the_record(tmp_path):
    config = config_of(
        "values",
        "regression",
        "train.metric=own_tasks:once_it_is_good",
        "train.better=lower",
        "run.rounds=1",
        "train.epochs=8",
    )
    (record,) = run_rounds(config, tmp_path)
    assert record.outcome == "updated"
    assert "val_start" not in record.metrics
    assert record.metrics["val_once_it_is_good"] < 1
    epochs = [e for e in epochs_of(tmp_path) if e["phase"] == "sparse"]
    measured = ["val_once_it_is_good" in epoch for epoch in epochs]
    assert any(measured)


def test_a_worse_model_is_never_deployed_in_the_metrics_own_direction(tmp_path):
    keys = ("update.reinit=1", "train.epochs=1")
    config = config_of("values", "regression", "run.rounds=1", *keys)
    run_rounds(config, tmp_path)
    path = tmp_path / "own" / "round_00" / "round.json"
    found = json.loads(path.read_text())
    found["metrics"]["val_mae"] = 0.0  # nothing can be better
    path.write_text(json.dumps(found))
    _, record = run_rounds(config_of("values", "regression", *keys), tmp_path)
    assert record.outcome == "kept_base"
    assert record.metrics["val_reinit"] > 0


def test_what_is_worse_costs_something_whatever_the_sign_of_the_metric():
    lower = Judge("any", False, METRICS["mae"])
    assert lower.cost(-0.9, -0.8) > 0 > lower.cost(-0.8, -0.9)
    assert lower.cost(0.8, 0.9) > 0 > lower.cost(0.9, 0.8)


@pytest.mark.parametrize("higher", [True, False])
def test_a_value_that_is_nan_is_never_better(higher):
    judge = Judge("any", higher, METRICS["mae"])
    assert not judge.better(math.nan, 1.0)
    assert not judge.no_worse(math.nan, math.nan)
    assert judge.better(1.0, math.nan)
    assert judge.better(2.0, 1.0) == higher
    assert judge.no_worse(1.0, 1.0)
    assert judge.no_worse(1e9, judge.worst)


# Losses and metrics -------------------------------------------------------------------


def test_one_number_a_sample_trains_alike_with_an_axis_or_without(tmp_path):
    for model in ("network", "flat"):
        losses = []
        for data in ("values", "flat_values"):
            config = config_of(data, "regression", "run.rounds=1", model=model)
            run_rounds(config, tmp_path / data / model)
            epochs = epochs_of(tmp_path / data / model)
            losses.append([epoch["loss"] for epoch in epochs])
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        assert losses[0][-1] < losses[0][0] / 2


def test_the_loss_that_is_named_is_the_one_that_is_minimised(tmp_path):
    first = {}
    for loss in ("mse", "l1"):
        config = config_of("values", "regression", f"train.loss={loss}", "run.rounds=1")
        run_rounds(config, tmp_path / loss)
        first[loss] = epochs_of(tmp_path / loss)[0]["loss"]
    assert first["mse"] > 2 * first["l1"]  # of targets whose spread is 2.2


def test_a_loss_of_your_own_gets_what_the_network_returns_and_the_data_gives(tmp_path):
    import own_tasks

    config = config_of(
        "pairs",
        "free",
        "train.loss=own_tasks:pair_loss",
        "train.metric=own_tasks:pair_error",
        "train.better=lower",
        model="two",
    )
    records = run_rounds(config, tmp_path)
    assert own_tasks.SEEN[-1] == (tuple, ["sign", "sum"])
    assert (records[0].metric, records[0].better) == ("pair_error", "lower")
    assert records[-1].metrics["val_pair_error"] < records[0].metrics["val_start"]
    round_ = read_round(tmp_path / "own" / "round_00")
    device = Device.install(tmp_path / "device", build_bundle(round_).data)
    logits, sums = device.predictor().predict_all(np.zeros((4, 6), np.float32))
    assert (logits.shape, sums.shape) == ((4, 2), (4, 1))


def test_a_metric_of_your_own_leaves_devices_with_the_tasks(tmp_path):
    config = config_of(
        "values",
        "regression",
        "train.metric=own_tasks:worst_error",
        "train.better=lower",
        "run.rounds=1",
    )
    (record,) = run_rounds(config, tmp_path)
    assert record.metric == "worst_error"
    contract = parse_contract((tmp_path / "own/model/contract.json").read_bytes())
    assert contract.label_metric == "mae"
    assert contract.label_bound > 0


def test_several_labels_are_trained_at_once(tmp_path):
    records = run_rounds(config_of("bits", "multilabel", "train.epochs=8"), tmp_path)
    assert records[-1].metric == "element_accuracy"
    assert records[-1].metrics["test_element_accuracy"] > 0.8
    contract = parse_contract((tmp_path / "own/model/contract.json").read_bytes())
    assert contract.classes == ("a", "b", "c")


def test_fisher_scores_are_of_the_recipes_loss():
    config = config_of("values", "regression", "update.method=fisher", "run.rounds=1")
    source = load_source(config.data)
    split = split_source(source, config.data, seed=0, rounds=1)
    samples = source.prepared(split.pool[:80]), source.prepared(split.validation)
    torch.manual_seed(0)
    start = call_factory("own_tasks:network", (6,), 1)
    training = RoundTraining(copy.deepcopy(start), config, 0, samples)
    batches = list(training.train_batches())
    masks = train_round(training, config)
    scores = fisher_scores(start, batches, masks, loss=functional.mse_loss)
    total = sum(mask.numel() for mask in masks.values())
    expected = select_top_k(scores, int(0.2 * total))
    assert all(torch.equal(masks[name], expected[name]) for name in expected)


# The bound ----------------------------------------------------------------------------


def test_weights_short_of_the_bound_are_not_deployed_and_the_record_says_so(tmp_path):
    config = config_of("values", "regression", "run.bound=1e-6", "run.rounds=1")
    (record,) = run_rounds(config, tmp_path)
    assert record.outcome == "kept_base"
    assert record.metrics["golden"] > 1e-6
    assert record.metrics["val_best"] < record.metrics["val_start"]


def test_a_device_and_the_packager_refuse_what_is_short_of_the_bound(
    regression, tmp_path
):
    run, records = regression
    rounds = [read_round(run / "own" / f"round_0{n}") for n in range(2)]
    data = build_bundle(rounds[0]).data
    device = Device.install(tmp_path / "device", data)
    contract = tmp_path / "device" / "model" / "contract.json"
    found = json.loads(contract.read_text())
    assert found["schema"] == 2
    edit_contract(tmp_path / "device", bound=1e-3)
    with pytest.raises(
        TrialError, match=r"mae 0\.\d+ on golden labels.*at most 0\.001"
    ):
        Device.open(tmp_path / "device").update(pack_round(rounds[1]).data)
    device = Device.open(tmp_path / "device")
    assert device.verify() == records[0].target
    edit_contract(tmp_path / "device", bound=found["bound"])
    device = Device.open(tmp_path / "device")
    device.update(pack_round(rounds[1]).data, force=True)
    assert device.verify() == records[1].target
    stated = run / "own" / "model" / "contract.json"
    text = stated.read_text()
    stated.write_text(json.dumps(json.loads(text) | {"bound": 1e-3}))
    try:
        with pytest.raises(TrialError, match="at most"):
            try_round(read_round(run / "own" / "round_01"))
    finally:
        stated.write_text(text)


@pytest.mark.parametrize("name", ["mae", "cosine", "element_accuracy", "iou"])
def test_the_default_bound_lies_between_a_constant_answer_and_the_first_round(name):
    random = np.random.default_rng(0)
    labels = random.normal(size=(50, 3)).astype("f4")
    if name == "element_accuracy":
        labels = (labels > 0.5).astype("f4")
    if name == "iou":
        labels = random.integers(0, 3, (50, 4, 4))
    metric = METRICS[name]
    constant = constant_value(metric, labels, 3)
    good = 0.1 if name == "mae" else 0.95
    assert metric.reaches(good, constant)
    bound = default_bound(metric, good, constant)
    assert min(good, constant) < bound < max(good, constant)
    # A first round that is no better than a constant can be installed too.
    bad = 9.0 if name == "mae" else 0.01
    assert metric.reaches(bad, default_bound(metric, bad, constant))


def test_publish_refuses_what_devices_would_refuse_and_writes_nothing(tmp_path):
    contract = make_contract((6,), task="regression", bound=0.5)
    inputs = np.random.default_rng(0).normal(size=(32, 6)).astype("f4")
    model = start_run(
        tmp_path / "run",
        lambda: torch.nn.Linear(6, 1),
        contract=contract,
        golden_inputs=inputs,
        golden_labels=inputs[:, :1],
    )
    masks = {"weight": torch.ones(1, 6, dtype=torch.bool)}
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-3.0, 0, 0, 0, 0, 0]]))
    with pytest.raises(TrainingError, match=r"mae of the golden samples.*at most 0\.5"):
        publish_round(tmp_path / "run", model, masks)
    assert not (tmp_path / "run" / "round_00").exists()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0, 0, 0, 0, 0]]))
        model.bias.zero_()
    record = publish_round(tmp_path / "run", model, masks, metrics={"test_mae": 0.0})
    assert (record.metric, record.better) == ("mae", "lower")
    bundle = build_bundle(read_round(tmp_path / "run" / "round_00"))
    assert Device.install(tmp_path / "device", bundle.data).verify() == record.target


# What does not fit --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "task", "overrides", "model", "words"),
    [
        ("fractions", "classification", (), "network", "whole numbers.*regression"),
        ("one_hot", "classification", (), "network", "one class a sample.*multilabel"),
        ("half_bits", "multilabel", (), "network", "labels of multilabel are 0 and 1"),
        ("broken_values", "regression", (), "network", "NaN or infinite"),
        ("values", "multilabel", (), "network", "0 and 1"),
        ("bits", "regression", (), "wide", r"gives \(2, 4\).*one number for each"),
        ("classes", "classification", (), "wide", r"gives \(2, 4\).*one logit"),
        ("classes", "segmentation", (), "network", "one class an element"),
        (
            *("classes", "classification", ("train.loss=mse",), "network"),
            "loss mse takes floating-point numbers of shape",
        ),
        (
            *("bits", "multilabel", ("train.loss=cross_entropy",), "network"),
            "loss cross_entropy takes whole numbers of shape",
        ),
        (
            *("values", "regression", ("train.metric=top1",), "network"),
            r"\[train\] metric: top1 cannot hold",
        ),
        (
            *("values", "regression", ("train.loss=own_tasks:table_loss",), "network"),
            "returned 'shape.*one number",
        ),
        ("values", "regression", (), "two", "takes one output.*have 2 and 1"),
        (
            "pairs",
            "free",
            ("train.loss=own_tasks:pair_loss", "train.metric=mae"),
            "two",
            "metric mae takes one tensor of labels, these are 2",
        ),
        ("scaled_tokens", "classification", (), "network", "without scale"),
        ("values", "regression", (), "Crowd", "depends on the samples beside it"),
        (
            *("tokens", "classification"),
            ("train.teacher=self", "train.teacher_weight=1", "train.teacher_mix=1"),
            *("words", "teacher_mix mixes inputs of one floating-point tensor"),
        ),
    ],
)
def test_refused_before_the_first_epoch(tmp_path, data, task, overrides, model, words):
    config, epochs = config_of(data, task, *overrides, model=model), []
    with pytest.raises(ConfigError, match=words):
        run_rounds(config, tmp_path, on_epoch=epochs.append)
    assert epochs == []
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize(
    ("task", "overrides", "words"),
    [
        ("free", (), "loss is needed with .* task free"),
        ("free", ("train.loss=a:b",), "metric is needed with .* task free"),
        ("regression", ("train.metric=a:b",), "better is needed"),
        ("regression", ("train.better=lower",), "the others know theirs"),
        ("regression", ("run.accuracy_floor=0.5",), "floor is for metric top1.*bound"),
        ("regression", ("run.bound=-1",), "mae has values from 0 on; the bound is -1"),
        ("multilabel", ("run.bound=1.5",), "from 0 to 1; the bound is 1.5"),
        ("regression", ("train.metric=own_tasks:best", "train.better=lower"), "rename"),
        ("regression", ("train.loss=huber",), "loss should be auto, cross_entropy"),
        ("regresion", (), "task should be one of"),
        ("segmentation", ("data.augment=crop_flip",), "augment moves inputs alone"),
        (
            *("classification", ("run.bound=0.5", "run.accuracy_floor=0.5")),
            "bound, or accuracy_floor",
        ),
        (
            "free",
            (
                "train.loss=a:b",
                "train.metric=a:c",
                "train.better=lower",
                "run.bound=1",
            ),
            "bound needs a .* metric that devices know",
        ),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(task, overrides, words):
    with pytest.raises(ConfigError, match=words):
        config_of("values", task, *overrides)


def test_another_task_needs_data_of_your_own():
    tables = TABLES | {"data": TABLES["data"] | {"set": "digits", "task": "regression"}}
    with pytest.raises(ConfigError, match="task regression is for data of your own"):
        load_config(tables | {"model": {"name": "mlp"}})


@pytest.mark.parametrize(
    ("options", "labels", "words"),
    [
        ({"classes": [*"abcde"]}, np.zeros(8, int), "has 5 classes.*has 3 for each"),
        ({"classes": [*"abc"]}, np.full(8, 0.5), "whole numbers.*regression"),
        ({"classes": [*"abc"], "task": "multilabel"}, np.zeros((8, 2)), "cannot hold"),
        ({"task": "regression"}, np.zeros((8, 1)), "cannot hold an output"),
        ({"task": "regression"}, np.full((8, 3), np.nan), "finite numbers"),
        ({"task": "regression"}, np.full((8, 3), "a"), "finite numbers"),
        ({"task": "free"}, np.zeros((8, 3)), "free has none"),
        ({"task": "ranking"}, np.zeros((8, 3)), "expected one of classification"),
    ],
)
def test_start_run_refuses_labels_and_classes_that_do_not_fit(
    tmp_path, options, labels, words
):
    with pytest.raises(TrainingError, match=words):
        start_run(
            tmp_path / "run",
            lambda: torch.nn.Linear(6, 3),
            contract=make_contract((6,), **options),
            golden_inputs=np.zeros((8, 6), np.float32),
            golden_labels=labels,
        )
    assert not (tmp_path / "run").exists()


def test_start_run_refuses_rows_that_depend_on_each_other_unless_the_task_is_free(
    tmp_path,
):
    import own_tasks

    def start(name, build, **options):
        start_run(
            tmp_path / name,
            build,
            contract=make_contract((6,), **options),
            golden_inputs=own_tasks.inputs(8, 0),
        )
        return (tmp_path / name).exists()

    crowd = partial(own_tasks.Crowd, (6,), 3)
    with pytest.raises(TrainingError, match=r"depends on the samples .* batch_first"):
        start("rows", crowd, task="regression")
    assert not (tmp_path / "rows").exists()
    assert start("whole", crowd, task="free")
    assert start("apart", partial(own_tasks.network, (6,), 3), task="regression")


# What people see ----------------------------------------------------------------------


def test_tables_and_reports_name_the_metric(regression):
    folder, records = regression
    header, *lines = round_table(records)
    assert header.endswith("mae, lower is better")
    assert not any("%" in line for line in lines)
    found = run_record(folder / "own")
    assert [e["test_metric"] for e in found["rounds"]] == [
        record.metrics["test_mae"] for record in records
    ]
    assert {e["test_accuracy"] for e in found["rounds"]} == {None}
    text = to_text(run_document(found))
    assert f"{records[-1].metrics['test_mae']:.5g}" in text
    assert "\nMae\n" in text
    assert "accuracy" not in text.lower()


def test_a_record_names_the_metric_only_where_it_is_no_accuracy(regression, tmp_path):
    folder, _ = regression
    found = json.loads((folder / "own" / "round_00" / "round.json").read_text())
    assert (found["metric"], found["better"]) == ("mae", "lower")
    run_rounds(config_of("classes", "classification", "run.rounds=1"), tmp_path)
    found = json.loads((tmp_path / "own" / "round_00" / "round.json").read_text())
    assert found.keys().isdisjoint({"metric", "better"})
    contract = json.loads((tmp_path / "own" / "model" / "contract.json").read_text())
    assert contract["schema"] == 1
