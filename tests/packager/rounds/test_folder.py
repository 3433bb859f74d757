# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest

from edge_runtime.errors import RoundError, RoundNotFoundError
from edge_runtime.formats.model_folder import list_rounds
from edge_runtime.formats.weights import write_weights
from packager.rounds.folder import find_parent, read_round
from packager.rounds.names import find_round


def edit(folder, **fields):
    path = folder / "round.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_reads_what_the_trainer_wrote(run):
    round_ = read_round(run.path / "round_01")
    assert (round_.name, round_.record.round, round_.record.run) == (
        "round_01",
        1,
        "tiny",
    )
    assert round_.weights.fingerprint == run.deployed.fingerprint
    assert set(round_.selection) == {"fc1.weight", "fc2.weight"}


def test_ignores_fields_that_are_for_people(run):
    edit(run.path / "round_01", metrics={"val_accuracy": 0.9}, something_new=[1])
    assert read_round(run.path / "round_01").record.round == 1


@pytest.mark.parametrize("name", ["weights.safetensors", "selection.safetensors"])
def test_refuses_a_folder_with_a_missing_file_and_names_it(run, name):
    (run.path / "round_01" / name).unlink()
    with pytest.raises(RoundError, match=f"round_01/{name} is missing"):
        read_round(run.path / "round_01")


def test_refuses_a_run_without_its_graph(run):
    (run.path / "model" / "graph.onnx").unlink()
    with pytest.raises(RoundError, match=r"model/graph\.onnx is missing"):
        read_round(run.path / "round_01")


def test_refuses_a_folder_that_is_no_round(run):
    with pytest.raises(RoundError, match="is no round folder"):
        read_round(run.path)


def test_refuses_weights_that_changed_after_the_round_was_written(run):
    path = run.path / "round_01" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(RoundError, match="states target"):
        read_round(run.path / "round_01")


def test_refuses_a_truncated_weight_file_and_names_it(run):
    path = run.path / "round_01" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RoundError, match=r"round_01/weights\.safetensors: .*truncated"):
        read_round(run.path / "round_01")


def test_refuses_another_graph(run):
    (run.path / "model" / "graph.onnx").write_bytes(b"another network")
    with pytest.raises(RoundError, match="states model"):
        read_round(run.path / "round_01")


def test_refuses_a_round_that_is_not_to_be_packed(run):
    edit(run.path / "round_01", packable=False)
    with pytest.raises(RoundError, match="not packable"):
        read_round(run.path / "round_01")


def test_lists_every_problem_of_the_record_at_once(run):
    edit(run.path / "round_01", round="one", counter=None, packable=1)
    with pytest.raises(RoundError) as refused:
        read_round(run.path / "round_01")
    for problem in (
        "round: expected int",
        "counter: expected int",
        "packable: expected",
    ):
        assert problem in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"schema": 3}, "schema 3, this packager knows 1 and 2"),
        ({"round": 7}, "does not fit the folder's name round_01"),
        ({"counter": -1}, "counter: expected 0 to"),
        ({"counter": True}, "counter: expected int, found True"),
        ({"target": "ABC"}, "target: expected 64 hexadecimal digits"),
        ({"outcome": "better"}, "outcome: expected updated or kept_base"),
        ({"outcome": "kept_base"}, "parent and target must be equal"),
    ],
)
def test_refuses_a_record_that_cannot_be(run, fields, words):
    edit(run.path / "round_01", **fields)
    with pytest.raises(RoundError, match=words):
        read_round(run.path / "round_01")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": [1]}'])
def test_refuses_a_record_that_is_not_json(run, text):
    (run.path / "round_01" / "round.json").write_text(text)
    with pytest.raises(RoundError, match=r"round\.json"):
        read_round(run.path / "round_01")


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ({"fc9.weight": np.zeros(2, "u1")}, "which weights.safetensors lacks"),
        ({"fc1.weight": np.zeros(23, "u1")}, r"expected uint8 \[24\] for 192"),
        ({"fc1.weight": np.zeros(24, "i1")}, "is int8"),
    ],
)
def test_refuses_a_selection_that_does_not_fit(run, masks, words):
    write_weights(masks, run.path / "round_01" / "selection.safetensors")
    with pytest.raises(RoundError, match=words):
        read_round(run.path / "round_01")


def test_finds_a_round_by_path_by_qualified_name_and_by_bare_name(run, monkeypatch):
    runs, folder = run.path.parent, run.path / "round_01"
    assert find_round(folder, runs) == folder
    assert find_round("tiny/round_01", runs) == folder
    assert find_round("round_01", runs) == folder
    monkeypatch.chdir(folder)
    assert find_round(".", "nowhere") == folder


def test_an_ambiguous_name_lists_the_candidates(run, new_run):
    new_run("other").add(1)
    with pytest.raises(RoundNotFoundError, match="other/round_01, tiny/round_01"):
        find_round("round_01", run.path.parent)
    assert find_round("round_00", run.path.parent) == run.path / "round_00"


def test_an_unknown_name_lists_the_nearest(run):
    for name in ("round_1", "tiny/rond_01", "tinny/round_01"):
        with pytest.raises(RoundNotFoundError, match=r"nearest: .*tiny/round_01"):
            find_round(name, run.path.parent)


def test_an_unknown_name_without_any_runs_says_what_to_give(tmp_path):
    with pytest.raises(RoundNotFoundError, match=r"no such folder.*another --runs"):
        find_round("round_01", tmp_path / "nowhere")


def test_unfinished_folders_are_not_rounds(run):
    (run.path / "round_02.part").mkdir()
    (run.path / ".round_03").mkdir()
    assert [folder.name for folder in list_rounds(run.path)] == ["round_00", "round_01"]


def test_rounds_are_listed_by_number_beyond_99(run):
    for number in (100, 99):
        (run.path / f"round_{number}").mkdir()
    assert [folder.name for folder in list_rounds(run.path)][-2:] == [
        "round_99",
        "round_100",
    ]


def test_the_parent_of_the_first_round_is_the_init(run):
    parent = find_parent(read_round(run.path / "round_00"))
    assert (parent.name, parent.weights.fingerprint) == ("init", run.init.fingerprint)


def test_the_parent_is_found_by_fingerprint_not_by_number(run):
    deployed = run.deployed
    run.add(2, dict(deployed))  # kept its base: same weights as round_01
    run.add(3)
    assert find_parent(read_round(run.path / "round_03")).name == "round_01"


def test_the_parent_of_a_reinitialised_round_is_the_init(run):
    run.add(2, base=run.init, reinitialised=True)
    assert find_parent(read_round(run.path / "round_02")).name == "init"


def test_a_record_that_cannot_be_read_does_not_hide_the_parent(run):
    run.add(2)
    record = run.path / "round_00" / "round.json"
    record.unlink()
    record.symlink_to(record)  # nobody reads a link to itself
    assert find_parent(read_round(run.path / "round_02")).name == "round_01"


def test_a_linked_run_counts_once(run):
    link = run.path.with_name("latest")
    link.symlink_to(run.path)
    assert find_round("round_01", run.path.parent) == run.path / "round_01"
    assert find_round("latest/round_01", run.path.parent) == link / "round_01"


def test_a_lost_parent_is_named_with_what_to_do(run):
    for path in sorted((run.path / "round_00").iterdir()):
        path.unlink()
    with pytest.raises(RoundError, match="put that round's folder back") as refused:
        find_parent(read_round(run.path / "round_01"))
    assert json.loads((run.path / "round_01" / "round.json").read_text())[
        "parent"
    ] in str(refused.value)
    assert "round_00 is no round folder" in str(refused.value)


def test_a_broken_folder_elsewhere_does_not_hide_the_parent(run):
    run.add(2)
    (run.path / "round_00" / "round.json").write_text("{")
    assert find_parent(read_round(run.path / "round_02")).name == "round_01"
