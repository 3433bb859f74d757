# SPDX-License-Identifier: Apache-2.0
import gc
import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from edge_runtime.errors import ConfigError, RoundError
from edge_runtime.formats.identity import network_id, read_run, run_id
from edge_runtime.formats.init_weights import read_init_spec
from edge_runtime.formats.model_folder import Outcome
from edge_runtime.formats.weights import read_weights
from packager.rounds.folder import read_round
from packager.size import patch_size
from trainer.config import as_dict, make_config
from trainer.data.samples import Samples, split_source
from trainer.data.sources import load_source
from trainer.export.tensors import load_weights, weights_of
from trainer.folder.once import run_lock
from trainer.networks.models import build_model
from trainer.progress import round_line
from trainer.rounds.deployment import check_golden
from trainer.rounds.loop import evaluate
from trainer.rounds.round import Run
from trainer.rounds.schedule import as_reported, run_rounds
from trainer.rounds.setup import Setup
from trainer.rounds.training import RoundTraining

torch.set_num_threads(1)

HELD = (Samples, Setup, Run, RoundTraining, torch.optim.Adam)

TABLES = {
    "run": {"name": "tiny", "rounds": 3, "seed": 1},
    "data": {"set": "digits", "initial": 60, "growth": 70, "validation": 100},
    "model": {"name": "mlp", "hidden": [24]},
    "update": {"ratio": 0.05, "chain": "deployed"},
    "train": {"epochs": 6, "batch": 16, "lr": 1e-2},
}


def config_of(**sections):
    names = TABLES.keys() | sections.keys()
    return make_config({n: TABLES.get(n, {}) | sections.get(n, {}) for n in names})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three rounds: folder of the runs, records, what progress reported."""
    runs, reports = tmp_path_factory.mktemp("runs"), []
    records = run_rounds(config_of(), runs, progress=reports.append)
    return runs, records, reports


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, to be changed."""
    shutil.copytree(finished[0], tmp_path / "runs")
    return tmp_path / "runs"


def held():
    """Count what holds samples or networks."""
    return Counter(type(o) for o in gc.get_objects() if type(o) in HELD)


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_writes_the_model_once_and_a_folder_a_round(finished):
    names = sorted(path.name for path in (finished[0] / "tiny").iterdir())
    assert names == ["model", "round_00", "round_01", "round_02"]


@pytest.mark.parametrize("deploy", ["float32", "int8"])
def test_samples_and_networks_of_a_run_are_freed_when_it_ends(tmp_path, deploy):
    """Cycles of references would keep them, on a GPU too, until Python looks for them.

    A notebook that calls run_rounds again would hold every data set that it had.
    """
    gc.collect()
    before = held()
    gc.disable()
    try:
        model = {"name": "mlp", "hidden": [24], "deploy": deploy}
        config = config_of(run={"rounds": 2}, model=model)
        run_rounds(config, tmp_path, pack=patch_size)
        assert held() == before
    finally:
        gc.enable()


def test_of_the_trainings_of_a_round_one_is_in_memory(tmp_path):
    most = []

    def report(_progress):
        most.append(sum(type(o) is RoundTraining for o in gc.get_objects()))

    options = {"update": {"reinit": 1}, "train": {"epochs": 2}}
    run_rounds(config_of(run={"rounds": 1}, **options), tmp_path)
    path = tmp_path / "tiny" / "round_00" / "round.json"
    record = json.loads(path.read_text())
    record["metrics"]["val_accuracy"] = 1.0  # nothing can be better
    path.write_text(json.dumps(record))
    gc.collect()
    gc.disable()
    try:
        config = config_of(run={"rounds": 2}, **options)
        _, record = run_rounds(config, tmp_path, progress=report)
    finally:
        gc.enable()
    assert "val_reinit" in record.metrics  # a second training followed
    assert max(most) - most[-1] == 1


def test_every_round_leads_from_what_is_deployed_or_from_init(finished):
    runs, records, _ = finished
    init = read_init_spec(runs / "tiny" / "model").generate().fingerprint
    deployed = init
    for record in records:
        assert record.parent == (init if record.reinitialised else deployed)
        weights = read_weights(
            runs / "tiny" / f"round_{record.round:02d}" / "weights.safetensors"
        )
        assert record.target == weights.fingerprint
        deployed = record.target
    assert records[0].reinitialised is False
    assert records[0].outcome == Outcome.UPDATED


def test_changes_stay_within_selection_and_dense_part(finished):
    runs, records, _ = finished
    run = runs / "tiny"
    known = {record.target: run / f"round_{record.round:02d}" for record in records}
    init = read_init_spec(run / "model").generate()
    for record in records:
        base = init
        if record.parent in known:
            base = read_weights(known[record.parent] / "weights.safetensors")
        folder = run / f"round_{record.round:02d}"
        new = read_weights(folder / "weights.safetensors")
        masks = read_weights(folder / "selection.safetensors")
        total = 0
        for name, packed in masks.items():
            size = base[name].size
            mask = np.unpackbits(packed, count=size, bitorder="little").astype(bool)
            changed = base[name].view("u4").ravel() != new[name].view("u4").ravel()
            assert not (changed & ~mask).any()
            total += int(changed.sum())
        assert total == record.metrics["changed"]


def test_re_initialises_when_the_data_grew_more_than_twofold(finished):
    _, records, _ = finished
    assert [record.samples for record in records] == [60, 130, 200]
    assert [record.tried_reinit for record in records] == [False, True, False]


def test_data_that_grew_exactly_twofold_is_not_yet_a_reason_to_begin_again(tmp_path):
    records = run_rounds(config_of(data={"growth": 60}, train={"epochs": 1}), tmp_path)
    assert [record.samples for record in records] == [60, 120, 180]
    assert [record.tried_reinit for record in records] == [False, False, True]


def test_the_contract_says_how_raw_samples_become_inputs(finished):
    model = finished[0] / "tiny" / "model"
    contract = json.loads((model / "contract.json").read_text())
    (inputs,) = contract["inputs"]
    assert inputs["shape"] == [None, 1, 8, 8]
    assert inputs["scale"] == 0.0625
    assert contract["classes"] == list("0123456789")
    with np.load(model / "golden.npz") as golden:
        assert golden["inputs"].shape == (64, 1, 8, 8)
        assert golden["inputs"].dtype == np.uint8


def test_the_accuracy_floor_is_halfway_between_chance_and_round_00(finished):
    model = finished[0] / "tiny" / "model"
    floor = json.loads((model / "contract.json").read_text())["accuracy_floor"]
    right = round((2 * floor - 0.1) * 64, 6)
    assert right == int(right)
    assert 0.1 < floor < 1


def test_the_record_holds_the_whole_recipe(finished):
    assert finished[1][2].config == as_dict(config_of())


def test_progress_counts_every_epoch_and_ends_each_round_with_its_record(finished):
    _, records, reports = finished
    first = [report for report in reports if report.round == 0]
    assert [report.epoch for report in first] == [*range(1, 13), 12]
    assert {report.epochs for report in first} == {12}
    assert first[0].phase == "full"
    assert first[-2].phase == "sparse"
    assert [report.record for report in reports if report.record] == records


def test_a_finished_run_is_read_and_not_trained_again(finished):
    runs, records, _ = finished
    reports = []
    assert run_rounds(config_of(), runs, progress=reports.append) == records
    assert reports == []


def test_resuming_gives_the_same_bytes(finished, copied):
    shutil.rmtree(copied / "tiny" / "round_01")
    shutil.rmtree(copied / "tiny" / "round_02")
    run_rounds(config_of(), copied)
    assert contents(copied) == contents(finished[0])


def test_resuming_after_a_stop_within_round_00_gives_the_same_bytes(finished, copied):
    for number in range(3):
        shutil.rmtree(copied / "tiny" / f"round_{number:02d}")
    run_rounds(config_of(), copied)
    assert contents(copied) == contents(finished[0])


def test_a_run_can_be_carried_on_for_more_rounds(copied):
    records = run_rounds(config_of(run={"rounds": 4}), copied)
    assert len(records) == 4
    assert records[3].samples == 270


def test_a_worse_re_initialised_model_is_discarded_and_tried_again(copied):
    path = copied / "tiny" / "round_02" / "round.json"
    record = json.loads(path.read_text())
    record["metrics"]["val_accuracy"] = 1.0  # nothing can be better
    path.write_text(json.dumps(record))
    third, fourth = run_rounds(config_of(run={"rounds": 5}), copied)[3:]
    assert third.outcome == Outcome.KEPT_BASE
    assert third.reinitialised is False
    assert third.parent == third.target == record["target"]
    assert third.tried_reinit == 1
    assert third.metrics["changed"] == 0
    assert fourth.tried_reinit == 1


def test_a_discarded_re_initialisation_leaves_the_round_to_an_ordinary_update(copied):
    path = copied / "tiny" / "round_02" / "round.json"
    record = json.loads(path.read_text())
    deployed = record["metrics"]["val_accuracy"]
    # The next round is due, and from the init weights one epoch gets nowhere.
    (fourth,) = run_rounds(config_of(run={"rounds": 4}), copied)[3:]
    lines = (copied / "tiny" / "round_03" / "metrics.jsonl").read_text().splitlines()
    starts = [json.loads(line)["start"] for line in lines]
    assert fourth.tried_reinit == 1
    assert fourth.metrics["val_accuracy"] >= deployed
    if fourth.reinitialised:
        assert starts == ["init"] * 12
    else:
        assert starts == ["init"] * 12 + ["deployed"] * 12
        assert fourth.metrics["val_reinit"] < deployed
        assert fourth.parent == record["target"]


SHADOWED = config_of(run={"rounds": 6}, update={"chain": "shadow", "reinit": 3})


@pytest.fixture(scope="module")
def shadowed(tmp_path_factory):
    """A run that re-initialises, falls short, and trains on unseen: runs, records."""
    runs = tmp_path_factory.mktemp("shadowed")
    return runs, run_rounds(SHADOWED, runs)


def starts_of(runs, number):
    lines = (runs / "tiny" / f"round_{number:02d}" / "metrics.jsonl").read_text()
    return list(dict.fromkeys(json.loads(row)["start"] for row in lines.splitlines()))


def shadow_of(runs, number):
    return runs / "tiny" / f"round_{number:02d}" / "shadow.safetensors"


def test_a_re_initialised_model_that_falls_short_is_trained_on_unseen(shadowed):
    runs, records = shadowed
    shares = [record.metrics["val_accuracy"] for record in records]
    assert shares == sorted(shares)
    seen = set()
    for number, record in enumerate(records[1:], 1):
        fresh = "shadow" if shadow_of(runs, number - 1).exists() else None
        if record.tried_reinit:
            fresh = "init"
        starts = starts_of(runs, number)
        if record.reinitialised:
            assert starts == [fresh]
            assert record.parent == records[0].parent
        elif fresh:
            assert starts == [fresh, "deployed"]
            assert record.metrics["val_reinit"] < shares[number - 1]
        else:
            assert starts == ["deployed"]
        kept = fresh is not None and not record.reinitialised
        assert shadow_of(runs, number).exists() == kept
        seen.add((fresh, record.reinitialised))
    assert {("init", False), ("shadow", True)} <= seen


def test_what_was_trained_unseen_is_packed_from_the_init_weights(shadowed):
    runs, records = shadowed
    (deployed,) = [r for r in records[1:] if starts_of(runs, r.round) == ["shadow"]]
    found = read_round(runs / "tiny" / f"round_{deployed.round:02d}")
    assert found.record.parent == records[0].parent
    counts = deployed.metrics
    assert counts["changed"] <= counts["selected"]
    assert deployed.ratio == counts["selected"] / counts["weights"]
    assert deployed.ratio > SHADOWED.update.ratio


def test_resuming_goes_on_with_the_unseen_model(shadowed, tmp_path):
    runs, records = shadowed
    shutil.copytree(runs, tmp_path / "runs")
    first = next(r.round for r in records if shadow_of(runs, r.round).exists())
    for number in range(first + 1, len(records)):
        shutil.rmtree(tmp_path / "runs" / "tiny" / f"round_{number:02d}")
    run_rounds(SHADOWED, tmp_path / "runs")
    assert contents(tmp_path / "runs") == contents(runs)


def test_an_unseen_model_that_is_better_but_too_large_waits_or_goes_under_first_budget(
    tmp_path,
):
    """The same run twice: only what unseen changes may take together differs."""
    update = {"reinit": 2, "chain": "shadow", "budget": "2KB"}
    found = {}
    for first in ("2KB", "3KB"):
        config = config_of(
            run={"rounds": 6, "seed": 2}, update={**update, "first_budget": first}
        )
        found[first] = run_rounds(config, tmp_path / first, pack=patch_size)
    *_, record = found["2KB"]
    waiting = record.metrics["waiting_bytes"]
    assert 2000 < waiting < 3000
    assert record.metrics["val_reinit"] >= found["2KB"][4].metrics["val_accuracy"]
    assert not record.reinitialised
    assert shadow_of(tmp_path / "2KB", 5).exists()
    assert f"{waiting:,} bytes" in round_line(record)
    assert all(r.metrics.get("patch_bytes", 0) <= 2000 for r in found["2KB"])
    *_, record = found["3KB"]
    assert starts_of(tmp_path / "3KB", 5) == ["shadow"]
    assert record.reinitialised
    assert 2000 < record.metrics["patch_bytes"] <= 3000
    assert "waiting_bytes" not in record.metrics


def test_a_re_initialised_model_that_falls_short_goes_on_unseen_by_default():
    assert make_config(TABLES | {"update": {}}).update.chain == "shadow"


def test_full_updating_keeps_nothing_unseen(tmp_path):
    update = {"method": "fu", "chain": "shadow"}
    run_rounds(config_of(update=update, train={"epochs": 1}), tmp_path)
    assert not list(tmp_path.rglob("shadow.safetensors"))


def test_the_papers_chain_goes_on_from_a_worse_model_and_cannot_be_packed(tmp_path):
    config = config_of(
        run={"rounds": 4},
        data={"growth": 0},
        update={"chain": "paper", "reinit": 1},
        train={"epochs": 1},
    )
    records = run_rounds(config, tmp_path)
    assert not any(record.packable for record in records)
    init = records[0].parent
    assert [record.parent for record in records] == [init] * 4
    assert all(record.reinitialised for record in records[1:])
    shares = [record.metrics["val_accuracy"] for record in records]
    assert shares != sorted(shares)  # some re-initialised model was worse: it stays
    with pytest.raises(RoundError, match="not packable"):
        read_round(tmp_path / "tiny" / "round_01")


def test_reported_accuracy_is_held_where_validation_drops(finished):
    def records(*rows):
        return [
            replace(finished[1][0], metrics={"val_accuracy": v, "test_accuracy": t})
            for v, t in rows
        ]

    found = as_reported(records((0.5, 0.6), (0.4, 0.9), (0.45, 0.9), (0.5, 0.4)))
    assert found == [(0.5, 0.6)] * 3 + [(0.5, 0.4)]
    assert as_reported([]) == []


def test_refuses_a_run_folder_made_with_another_recipe(copied):
    with pytest.raises(ConfigError) as caught:
        run_rounds(config_of(train={"lr": 1e-3}, update={"ratio": 0.1}), copied)
    assert caught.value.problems == (
        "[train] lr was 0.01, is now 0.001",
        "[update] ratio was 0.05, is now 0.1",
    )


def test_a_run_from_before_a_key_existed_goes_on(finished, copied):
    for number in range(3):
        path = copied / "tiny" / f"round_{number:02d}" / "round.json"
        record = json.loads(path.read_text())
        del record["config"]["update"]["mantissa_bits"]
        path.write_text(json.dumps(record))
    assert len(run_rounds(config_of(), copied)) == 3
    with pytest.raises(ConfigError, match="mantissa_bits was 23, is now 7"):
        run_rounds(config_of(update={"mantissa_bits": 7}), copied)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, r"tiny was published by a loop of your own"),
        ({"newer": {}}, r"round_00/round\.json states a recipe .* written by another"),
    ],
)
def test_another_kind_of_run_is_named_and_the_recipe_is_not_blamed(
    copied, config, words
):
    path = copied / "tiny" / "round_00" / "round.json"
    record = json.loads(path.read_text())
    kept = record["config"] if config else {}
    path.write_text(json.dumps(record | {"config": kept | config}))
    with pytest.raises(ConfigError, match=words):
        run_rounds(config_of(), copied)


def test_a_round_whose_weights_are_not_those_of_its_record_is_named_before_training(
    copied,
):
    weights = copied / "tiny" / "round_02" / "weights.safetensors"
    damaged, reports = bytearray(weights.read_bytes()), []
    damaged[-1] ^= 1
    other = (copied / "tiny" / "round_00" / "weights.safetensors").read_bytes()
    for found in (damaged, damaged[:-4], other):
        weights.write_bytes(found)
        with pytest.raises(
            RoundError, match=r"round_02/weights\.safetensors is damage"
        ):
            run_rounds(config_of(run={"rounds": 4}), copied, progress=reports.append)
    assert not reports


def cut(source, count):
    """Return a data set without its last training samples."""
    return replace(source, train=source.train[:count])


def test_a_run_does_not_go_on_with_other_samples_than_it_was_started_with(
    copied, tmp_path
):
    source, reports = load_source(config_of().data), []
    for found in (cut(source, 900), replace(source, train=other_labels(source.train))):
        with pytest.raises(ConfigError, match=r"is not the one that .*tiny was"):
            run_rounds(
                config_of(run={"rounds": 4}),
                copied,
                source=found,
                progress=reports.append,
            )
    assert not reports
    # Nor one that was cut off in its first round, with a bound of its own.
    options = {"run": {"rounds": 1, "accuracy_floor": 0.2}, "train": {"epochs": 1}}
    run_rounds(config_of(**options), tmp_path / "one", source=source)
    shutil.rmtree(tmp_path / "one" / "tiny" / "round_00")
    with pytest.raises(ConfigError, match=r"is not the one that .*tiny was"):
        run_rounds(config_of(**options), tmp_path / "one", source=cut(source, 900))


def other_labels(samples):
    return replace(samples, labels=samples.labels.roll(1))


def test_what_another_decoder_makes_of_images_is_the_same_data(finished):
    source = load_source(config_of().data)
    model = finished[0] / "tiny" / "model"
    split = split_source(source, config_of().data, seed=1, rounds=3)
    golden = split.validation[:64]
    one_more = golden.inputs.clone()
    one_more[::3, :, 0, 0] += 1  # of 16
    check_golden(model, replace(golden, inputs=one_more))
    one_more[:3] = golden.inputs[3:6]
    with pytest.raises(ConfigError, match="is not the one"):
        check_golden(model, replace(golden, inputs=one_more))


def test_refuses_to_continue_when_told_not_to(copied):
    with pytest.raises(ConfigError, match="has 3 rounds already"):
        run_rounds(config_of(), copied, resume=False)


def test_refuses_a_run_that_another_process_is_training(copied, tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from trainer.folder.once import run_lock\n"
        "with run_lock(Path(sys.argv[1])): print('here', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(copied / "tiny")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:
        other.stdout.readline()
        with pytest.raises(ConfigError, match="another process is training"):
            run_rounds(config_of(run={"rounds": 4}), copied)
        other.kill()
    assert len(run_rounds(config_of(run={"rounds": 4}), copied)) == 4


def test_who_is_refused_leaves_the_others_empty_folder_alone(tmp_path):
    with run_lock(tmp_path / "run"):  # in its first round: nothing is written yet
        for _ in range(2):
            refused = pytest.raises(ConfigError, match="another process")
            with refused, run_lock(tmp_path / "run"):
                pytest.fail("two train one run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["thesis.txt", ".film.part/film", "round_one/x"])
def test_somebodys_folder_becomes_no_run(tmp_path, name):
    mine = tmp_path / "tiny" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(ConfigError, match="not empty") as refused:
        run_rounds(config_of(), tmp_path)
    assert name.partition("/")[0] in str(refused.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]


def test_a_run_removes_nothing_but_its_own_unfinished_folders(copied):
    run = copied / "tiny"
    for name in (".film.part", ".round_03.part"):
        (run / name).mkdir()
    (run / "notes.part").write_text("mine")
    assert len(run_rounds(config_of(run={"rounds": 4}), copied)) == 4
    assert (run / ".film.part").is_dir()
    assert not (run / ".round_03.part").exists()


@pytest.mark.parametrize(
    ("update", "words"),
    [
        ({"first_ratio": 0.1, "ratio": 1e-4}, "ratio, in later rounds: .* none"),
        ({"first_ratio": 1e-4}, "first_ratio, in round_00: .* none"),
        ({"method": "pruning", "ratio": 1e-4}, "ratio, in round_00: .* none"),
    ],
)
def test_a_share_that_selects_nothing_is_refused_by_its_key_before_training(
    tmp_path, update, words
):
    epochs, config = [], config_of(update=update)
    with pytest.raises(ConfigError, match=rf"\[update\] {words}"):
        run_rounds(config, tmp_path, on_epoch=epochs.append)
    assert epochs == []


def test_a_run_that_is_refused_leaves_no_folder(tmp_path):
    with pytest.raises(ConfigError, match="samples"):
        run_rounds(config_of(data={"initial": 5000}), tmp_path)
    assert not (tmp_path / "tiny").exists()


def test_refuses_a_run_with_a_missing_round(copied):
    shutil.rmtree(copied / "tiny" / "round_01")
    with pytest.raises(ConfigError, match=r"has the rounds \[0, 2\]"):
        run_rounds(config_of(), copied)


def test_refuses_a_model_folder_of_another_recipe(copied):
    for number in range(3):
        shutil.rmtree(copied / "tiny" / f"round_{number:02d}")
    with pytest.raises(ConfigError, match="written for another recipe"):
        run_rounds(config_of(run={"rounds": 1, "seed": 2}), copied)


def test_full_updating_starts_from_init_in_every_round(tmp_path):
    config = config_of(
        run={"rounds": 2, "accuracy_floor": 0.3},
        update={"method": "fu"},
        train={"epochs": 2},
    )
    first, second = run_rounds(config, tmp_path)
    assert second.reinitialised
    assert second.parent == first.parent
    assert second.ratio is None
    contract = json.loads((tmp_path / "tiny" / "model" / "contract.json").read_text())
    assert contract["accuracy_floor"] == 0.3


def test_the_same_weights_are_never_evaluated_twice_on_the_same_samples(
    tmp_path, monkeypatch
):
    seen = []

    def seeing(model, samples, judge):
        seen.append((weights_of(model).fingerprint, samples.labels.numpy().tobytes()))
        return evaluate(model, samples, judge)

    for module in ("values", "training"):
        monkeypatch.setattr(f"trainer.rounds.{module}.evaluate", seeing)
    update = {"reinit": 2, "chain": "shadow"}
    config = config_of(run={"rounds": 5}, update=update, train={"epochs": 2})
    records = run_rounds(config, tmp_path)
    assert any("val_reinit" in record.metrics for record in records)
    assert len(seen) == len(set(seen))
    again = build_model(config.model, (1, 8, 8), 10)
    load_weights(again, read_weights(tmp_path / "tiny/round_04/weights.safetensors"))
    source = load_source(config.data)
    split = split_source(source, config.data, seed=1, rounds=5)
    for name, samples in (("val", split.validation), ("test", split.test)):
        found = evaluate(again, source.prepared(samples))
        assert records[-1].metrics[f"{name}_accuracy"] == found


def test_every_so_many_rounds_is_a_rule_too(tmp_path):
    config = config_of(run={"rounds": 4}, update={"reinit": 2}, train={"epochs": 1})
    tried = [r.tried_reinit for r in run_rounds(config, tmp_path)]
    assert tried[:3] == [0, 0, 1]


# The run's id -------------------------------------------------------------------------


def test_two_runs_of_one_recipe_are_two_models(finished, tmp_path):
    first = read_round(finished[0] / "tiny" / "round_00")
    run_rounds(config_of(run={"rounds": 1}), tmp_path)
    second = read_round(tmp_path / "tiny" / "round_00")
    assert first.record.target == second.record.target  # the same weights, even
    assert first.record.model != second.record.model


def test_a_run_keeps_its_id_when_it_goes_on(copied):
    before = (copied / "tiny" / "model" / "run.json").read_bytes()
    records = run_rounds(config_of(run={"rounds": 4}), copied)
    assert (copied / "tiny" / "model" / "run.json").read_bytes() == before
    assert len({record.model for record in records}) == 1


def test_a_run_that_was_cut_off_in_its_first_round_keeps_its_id(copied, tmp_path):
    for number in range(3):
        shutil.rmtree(copied / "tiny" / f"round_{number:02d}")
    before = (copied / "tiny" / "model" / "run.json").read_bytes()
    run_rounds(config_of(run={"rounds": 1}), copied)
    assert (copied / "tiny" / "model" / "run.json").read_bytes() == before


def test_a_given_id_is_the_runs_and_cannot_change_later(tmp_path):
    config = config_of(run={"rounds": 1, "id": "mine"})
    (record,) = run_rounds(config, tmp_path)
    assert read_run(tmp_path / "tiny" / "model").id == run_id("mine")
    assert run_rounds(config, tmp_path) == [record]
    with pytest.raises(ConfigError, match=r"recipe gives run\.id 'other'"):
        run_rounds(config_of(run={"rounds": 1, "id": "other"}), tmp_path)


def test_a_run_from_before_there_were_ids_goes_on_without_one(copied):
    run = copied / "tiny"
    for number in (1, 2):
        shutil.rmtree(run / f"round_{number:02d}")
    (run / "model" / "run.json").unlink()
    path = run / "round_00" / "round.json"
    raw = json.loads(path.read_text())
    del raw["config"]["run"]["id"]
    layout = read_init_spec(run / "model").layout()
    graph = (run / "model" / "graph.onnx").read_bytes()
    raw |= {"schema": 1, "model": network_id(layout.header, graph)}
    path.write_text(json.dumps(raw))
    records = run_rounds(config_of(run={"rounds": 2}), copied)
    assert {record.model for record in records} == {raw["model"]}
    assert read_round(run / "round_01").record.model == raw["model"]
    with pytest.raises(ConfigError, match="older runs: none"):
        run_rounds(config_of(run={"rounds": 3, "id": "new"}), copied)


def test_callbacks_hear_of_every_epoch_and_of_every_round_that_is_complete(tmp_path):
    epochs, rounds = [], []

    def on_round(record):
        folder = tmp_path / "tiny" / f"round_{record.round:02d}"
        rounds.append((record, (folder / "round.json").is_file()))

    records = run_rounds(
        config_of(run={"rounds": 1}),
        tmp_path,
        on_epoch=epochs.append,
        on_round=on_round,
    )
    assert rounds == [(records[0], True)]
    assert [e.phase for e in epochs] == ["full"] * 6 + ["sparse"] * 6
    text = (tmp_path / "tiny" / "round_00" / "metrics.jsonl").read_text()
    written = [json.loads(line) for line in text.splitlines()]
    assert [e.metrics["loss"] for e in epochs] == [line["loss"] for line in written]
    assert all(e.record is None for e in epochs)
