# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest

from edge_runtime.errors import RoundError
from edge_runtime.formats.model_folder import list_rounds
from packager.build import pack_round
from packager.cli.pack import patch
from packager.report.document import to_text
from packager.report.run_document import run_document
from packager.report.run_record import overlap_record, run_record
from packager.rounds.folder import read_round


def stated(accuracy, **more):
    return {
        "method": "dpu",
        "ratio": 0.04,
        "samples": 100,
        "reinitialised": False,
        "metrics": {"val_accuracy": accuracy, "test_accuracy": accuracy - 0.02},
    } | more


@pytest.fixture
def history(new_run):
    """Five rounds: updated, updated, kept, re-initialised, not packable."""
    run = new_run("mine")
    run.add(0, **stated(0.5))
    run.add(1, **stated(0.6))
    run.add(2, run.deployed, **stated(0.6))
    run.add(3, base=run.init, **stated(0.7, reinitialised=True))
    run.add(4, packable=False, **stated(0.8))
    return run


@pytest.fixture
def full(new_run):
    """A run of full updating beside it."""
    run = new_run("full", seed=3)
    for number in range(5):
        arrays = {n: a + np.float32(1 + number) for n, a in run.deployed.items()}
        run.add(number, arrays, **stated(0.9, method="fu", ratio=None))
    return run


def test_each_round_has_its_accuracy_and_the_bytes_of_its_patch(history):
    record = run_record(history.path)
    sizes = [
        len(pack_round(read_round(history.path / f"round_{n:02d}")).data)
        for n in (0, 1, 3)
    ]
    found = [entry["bytes"] for entry in record["rounds"]]
    assert found == [sizes[0], sizes[1], 0, sizes[2], None]
    assert (record["bytes"], record["patches"]) == (sum(sizes), 3)
    assert [e["test_accuracy"] for e in record["rounds"]] == pytest.approx(
        [0.48, 0.58, 0.58, 0.68, 0.78]
    )
    assert [e["cumulative_bytes"] for e in record["rounds"]] == [
        sizes[0],
        sum(sizes[:2]),
        sum(sizes[:2]),
        sum(sizes),
        None,
    ]


def test_a_patch_file_beside_its_round_is_counted_as_it_is(history):
    data = pack_round(read_round(history.path / "round_01"), level=1).data
    (history.path / "round_01.dpu").write_bytes(data)
    (history.path / "round_00.dpu").write_bytes(data)  # of another round
    (history.path / "round_03.dpu").write_bytes(b"not a patch")
    rounds = run_record(history.path)["rounds"]
    assert [e["bytes_from"] for e in rounds] == [
        "packed now",
        "patch file",
        "nothing",
        "packed now",
        "not packable",
    ]
    assert rounds[1]["bytes"] == len(data)


def test_changes_are_counted_tensor_by_tensor(history):
    tensors = run_record(history.path)["rounds"][1]["tensors"]
    assert {t["name"]: (t["changed"], t["dense"]) for t in tensors} == {
        "fc1.weight": (5, False),
        "fc2.weight": (5, False),
        "fc1.bias": (16, True),
        "fc2.bias": (4, True),
    }


def test_full_updating_counts_as_its_weight_file(history, full):
    record = run_record(history.path, [full.path])
    (other,) = record["beside"]
    size = len(full.deployed.data)
    assert (other["run"], other["method"]) == ("full", "fu")
    assert [e["cumulative_bytes"] for e in other["rounds"]] == [
        size * n for n in range(1, 6)
    ]


def test_a_patch_of_full_updating_that_lies_there_is_counted_as_it_is(full):
    round_ = read_round(full.path / "round_01")
    (full.path / "round_01.dpu").write_bytes(data := pack_round(round_).data)
    rounds = run_record(full.path)["rounds"]
    assert [(e["bytes"], e["bytes_from"]) for e in rounds[:2]] == [
        (round_.weights.layout.file_size, "weight file"),
        (len(data), "patch file"),
    ]


@pytest.mark.parametrize("method", ["subspace", "own", None])
def test_a_round_without_a_ratio_counts_as_its_patch_unless_it_is_of_full_updating(
    new_run, method
):
    run = new_run()
    nothing = {name: np.zeros(run.init[name].shape, bool) for name in ("fc1.weight",)}
    arrays = {n: a.copy() for n, a in run.init.items()}
    arrays["fc1.bias"] += 1
    run.add(0, arrays, masks=nothing, **stated(0.5, method=method, ratio=None))
    (entry,) = run_record(run.path)["rounds"]
    patch = pack_round(read_round(run.path / "round_00"))
    assert (entry["bytes"], entry["bytes_from"]) == (len(patch.data), "packed now")
    assert {t["name"]: t["changed"] for t in entry["tensors"]}["fc1.bias"] == 16


def test_a_run_that_is_given_twice_counts_once(history, full):
    again = full.path / ".." / full.path.name
    record = run_record(history.path, [full.path, again, history.path])
    assert [other["path"] for other in record["beside"]] == [str(full.path)]


def test_runs_of_one_name_and_other_recipes_are_not_taken_for_seeds(new_run):
    lean = []
    for seed, share in ((1, 0.01), (2, 0.2)):
        run = new_run(f"lean_seed{seed}")
        config = {"run": {"seed": seed}, "update": {"ratio": share}}
        run.add(0, **stated(0.5, seeds={"run": seed}, config=config))
        other = new_run(f"fu_seed{seed}")
        other.add(0, **stated(0.6, method="fu", ratio=None, seeds={"run": seed}))
        lean += [run.path, other.path]
    record = run_record(lean[0], lean[1:])
    assert [point["name"] for point in record["frontier"]] == [
        str(lean[0]),
        str(lean[2]),
    ]


def test_seeds_that_were_trained_on_two_machines_are_one_point(new_run):
    runs = []
    for seed, root in ((1, "/data"), (2, "D:/mnist")):
        run, full = new_run(f"lean_seed{seed}"), new_run(f"fu_seed{seed}")
        config = {"run": {"seed": seed}, "data": {"set": "mnist", "root": root}}
        run.add(0, **stated(0.5, seeds={"run": seed}, config=config))
        full.add(0, **stated(0.6, method="fu", ratio=None, seeds={"run": seed}))
        runs += [run.path, full.path]
    (point,) = run_record(runs[0], runs[1:])["frontier"]
    assert (point["name"], point["runs"]) == ("lean", 2)


def test_selections_overlap_as_far_as_they_do(new_run):
    run = new_run()
    size = {"fc1.weight": 192, "fc2.weight": 64}

    def masks(*positions):
        flat = np.zeros(256, bool)
        flat[list(positions)] = True
        return {
            "fc1.weight": flat[:192].reshape(16, 12),
            "fc2.weight": flat[192:].reshape(4, 16),
        }

    for number, chosen in enumerate([(0, 1, 200, 201), (1, 200), (5,)]):
        arrays = {n: a.copy() for n, a in run.deployed.items()}
        for name, mask in masks(*chosen).items():
            arrays[name][mask] += 1
        run.add(number, arrays, masks=masks(*chosen))
    everything = {n: np.ones(run.init[n].shape, bool) for n in size}
    run.add(3, masks=everything)
    overlap = overlap_record(list_rounds(run.path))
    assert overlap["rounds"] == [0, 1, 2]  # the last one selects everything
    assert overlap["shares"] == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert overlap["by_chance"][0][1] == 4 / 256


def test_selections_overlap_in_the_tensors_that_both_rounds_select_from(new_run):
    run = new_run()
    run.add(0)  # the biases train freely
    others = ("fc1.bias", "fc2.bias", "fc2.weight")
    rest = {n: np.zeros(run.init[n].shape, bool) for n in others}
    arrays = {n: a.copy() for n, a in run.deployed.items()}
    mask = np.zeros(run.init["fc1.weight"].shape, bool)
    mask[0] = True
    arrays["fc1.weight"][mask] += 1
    run.add(1, arrays, masks=rest | {"fc1.weight": mask})  # the biases are frozen
    overlap = overlap_record(list_rounds(run.path))
    layers = next(
        s.table
        for s in run_document(run_record(run.path)).sections
        if s.title == "What changes, layer by layer"
    )
    assert [row[0] for row in layers.rows] == ["fc1.weight", "fc2.weight", "dense part"]
    assert overlap["rounds"] == [0, 1]
    assert 0 <= overlap["shares"][0][1] == overlap["shares"][1][0] <= 1


def test_a_run_of_another_trainer_without_metrics_has_no_accuracy(run):
    record = run_record(run.path)
    assert [e["test_accuracy"] for e in record["rounds"]] == [None, None]
    titles = [section.title for section in run_document(record).sections]
    assert "Accuracy" not in titles
    assert "Bytes per round" in titles


def test_a_folder_without_rounds_is_refused(tmp_path):
    with pytest.raises(RoundError, match="no run with rounds"):
        run_record(tmp_path)


def test_the_report_tells_all_of_it(history, full):
    document = run_document(run_record(history.path, [full.path]))
    sections = {section.title: section for section in document.sections}
    assert list(sections) == [
        "Accuracy",
        "Points of accuracy by bytes",
        "Bytes per round",
        "Bytes so far",
        "What changes, layer by layer",
        "Weights that are selected again",
        "Time on thin links",
    ]
    accuracy = sections["Accuracy"].table
    assert accuracy.headings[-1] == "test, full"
    assert [row[2] for row in accuracy.rows] == [
        "updated",
        "updated",
        "no update",
        "began anew",
        "updated",
    ]
    layers = sections["What changes, layer by layer"].table
    assert [row[0] for row in layers.rows] == ["fc1.weight", "fc2.weight", "dense part"]
    assert layers.rows[2][1:] == ["100 %"] * 3
    assert all(section.picture for section in document.sections)


def test_full_weights_are_counted_as_often_as_patches_were_sent(history, full):
    record = run_record(history.path, [full.path])
    document = run_document(record)
    three = 3 * record["full_bytes"]  # of five: one kept its base, one is not packable
    assert f"{three / record['bytes']:.0f}\u00d7" in dict(document.figures)
    table = next(s.table for s in document.sections if s.title == "Bytes so far")
    found = {row[0]: row[2] for row in table.rows}
    assert found["mine"] == f"{three / record['bytes']:.1f}"
    assert found["full weights instead"] == "1.0"


def test_a_run_that_sent_nothing_still_has_a_report(new_run):
    run = new_run()
    run.add(0, run.init, metrics={"test_accuracy": 0.5})
    document = run_document(run_record(run.path))
    assert [section.title for section in document.sections] == [
        "Accuracy",
        "Bytes per round",
        "Time on thin links",
    ]


def test_the_record_is_plain_data(history, full):
    json.dumps(run_record(history.path, [full.path]), allow_nan=False)


def test_a_report_says_what_it_means_in_plain_words(history):
    document = run_document(run_record(history.path))
    assert "compared with" not in dict(document.facts)  # there is nothing to compare
    text = to_text(document)
    for riddle in ("beside", "packed now", "kept its base", "re-init"):
        assert riddle not in text
    assert "a patch packed for this report" in text


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize(
    "wrong",
    [
        {"metrics": {"test_accuracy": float("nan"), "val_accuracy": float("inf")}},
        {"metrics": {"test_accuracy": 10**400, "val_accuracy": True}},
        {"metrics": {"test_accuracy": 1e308, "val_accuracy": -1e308}},
        {"metrics": {"test_accuracy": 5e-324, "val_accuracy": 0}},
        {"ratio": "4 %", "method": 7, "samples": "many", "reinitialised": {}},
        {"ratio": float("nan"), "samples": [1], "seeds": {"run": 1.5}},
        {"metric": "", "better": None},
        {"metric": ["loss"], "metrics": [0.5]},
    ],
)
def test_what_a_trainer_states_wrongly_is_not_shown_and_breaks_nothing(
    run, command, wrong, number
):
    run.add(2)
    path = run.path / f"round_{number:02d}" / "round.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | stated(0.5) | wrong))

    def refuse(name):
        raise AssertionError(name)

    code, out, err = command(patch, "report", run.path, "--json")
    assert code == 0, err
    json.loads(out, parse_constant=refuse)
    for words in (["--md"], ["-o", run.path / "report.html"]):
        code, _, err = command(patch, "report", run.path, *words)
        assert code == 0, err
