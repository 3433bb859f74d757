"""dpu-edge: data on stdout, messages on stderr, documented exit codes."""

import json

import numpy as np
import pytest

from edge_runtime.cli import main
from packager.build import write_file
from packager.cli import pack


@pytest.fixture
def edge(command, tmp_path):
    """Run dpu-edge on the store in ``tmp_path``."""
    return lambda *args: command(main, "--store", tmp_path / "store", *args)


@pytest.fixture
def files(run, command):
    """A bundle of round_00 and the patches of two rounds."""
    run.add(2)
    runs = run.path.parent
    assert command(pack, "round_00", "--bundle", "--runs", runs)[0] == 0
    assert command(pack, "round_01", "round_02", "--runs", runs)[0] == 0
    return run.path


@pytest.fixture
def installed(edge, files):
    assert edge("init", files / "round_00.bundle.zip")[0] == 0
    return files


def test_the_whole_life_of_a_device(edge, installed):
    code, out, _ = edge("apply", installed / "round_01.dpu", installed / "round_02.dpu")
    assert code == 0
    assert "round_02.dpu: applied, now at round 2" in out
    assert edge("apply", installed / "round_02.dpu")[1].startswith(
        "round_02.dpu: already current"
    )
    code, out, _ = edge(
        "verify", "--expect", installed / "round_02/weights.safetensors"
    )
    assert (code, out.endswith("verified\n")) == (0, True)
    assert "rolled back to round 1" in edge("rollback")[1]
    assert "round          1\n" in edge("status")[1]


def test_a_device_goes_back_to_a_named_round(edge, installed):
    edge("apply", installed / "round_01.dpu", installed / "round_02.dpu")
    assert "within reach   1" in edge("status")[1]
    assert "rolled back to round 1" in edge("rollback", "--to", 1)[1]
    code, _, err = edge("rollback", "--to", 7)
    assert (code, "rounds within reach: 2" in err) == (7, True)


def test_a_pinned_device_holds_updates_back(edge, installed):
    assert "held back" in edge("pin")[1]
    assert "pinned  " in edge("status")[1]
    code, _, err = edge("apply", installed / "round_01.dpu")
    assert (code, "pin --off" in err) == (11, True)
    assert "allowed" in edge("pin", "--off")[1]
    assert edge("apply", installed / "round_01.dpu")[0] == 0


def test_status_as_json_is_one_object_with_a_schema(edge, installed):
    record = json.loads(edge("status", "--json")[1])
    assert record["schema"] == 1
    assert record["round"] == 0
    assert record["history"][0]["event"] == "installed"


def test_apply_as_json_names_every_patch(edge, installed):
    record = json.loads(edge("apply", installed / "round_01.dpu", "--json")[1])
    assert [p["result"] for p in record["patches"]] == ["applied"]
    assert record["round"] == 1


def test_infer_names_classes_with_probabilities(edge, installed, tmp_path):
    np.save(tmp_path / "in.npy", np.ones((3, 12), np.uint8))
    output = tmp_path / "out.npy"
    code, out, _ = edge("infer", tmp_path / "in.npy", "--top", "4", "-o", output)
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, len(lines)) == (0, 3)
    assert {entry["class"] for entry in lines[0]["top"]} == set("abcd")
    assert sum(entry["probability"] for entry in lines[0]["top"]) == pytest.approx(1)
    assert np.load(output).shape == (3, 4)


def test_infer_on_the_golden_inputs(edge, installed):
    record = json.loads(edge("infer", "--golden", "--json")[1])
    assert len(record["samples"]) == 8


def test_exit_2_for_wrong_use(edge, installed, command, tmp_path, monkeypatch):
    assert edge("infer")[0] == 2
    np.save(tmp_path / "wrong.npy", np.ones((3, 5)))
    assert edge("infer", tmp_path / "wrong.npy")[0] == 2
    (tmp_path / "text.npy").write_text("no array")
    assert edge("infer", tmp_path / "text.npy")[0] == 2
    assert edge("verify", "--expect", "abc")[0] == 2
    assert edge("unknown")[0] == 2
    monkeypatch.delenv("DPU_STORE", raising=False)
    code, _, err = command(main, "status")
    assert (code, "set DPU_STORE" in err) == (2, True)


def test_exit_3_for_what_is_no_patch_or_bundle(edge, installed, tmp_path):
    (tmp_path / "bad").write_bytes(b"nonsense")
    assert edge("apply", tmp_path / "bad")[0] == 3
    assert edge("init", tmp_path / "bad")[0] == 3


def test_exit_4_for_a_patch_from_other_weights(edge, installed):
    code, _, err = edge("apply", installed / "round_02.dpu")
    assert (code, "apply the rounds between them first" in err) == (4, True)


def test_exit_5_for_weights_that_are_not_the_servers(edge, installed):
    code, _, err = edge(
        "verify", "--expect", installed / "round_01/weights.safetensors"
    )
    assert (code, "expected" in err) == (5, True)


def test_exit_7_for_a_store_that_is_not_there_or_damaged(edge, installed, tmp_path):
    for name in ("state.json", "state.copy"):
        state = tmp_path / "store" / name
        state.write_text(state.read_text()[:50])
    assert edge("status")[0] == 7
    state.unlink()
    assert edge("status")[0] == 7


def test_exit_8_for_an_older_release(edge, installed):
    edge("apply", installed / "round_01.dpu", installed / "round_02.dpu")
    assert edge("apply", installed / "round_01.dpu")[0] == 8


def test_an_error_as_json_is_one_object_on_stderr(edge, installed):
    code, out, err = edge("apply", installed / "round_02.dpu", "--json")
    record = json.loads(err)
    assert (out, record["error"], record["exit_code"]) == ("", "WrongParentError", code)
    assert record["expected"] != record["actual"]


def test_the_store_may_come_from_the_environment(command, installed, edge, monkeypatch):
    store = json.loads(edge("status", "--json")[1])["store"]
    monkeypatch.setenv("DPU_STORE", store)
    assert command(main, "status")[0] == 0


@pytest.mark.parametrize("name", [None, *main.commands])
def test_every_command_has_help(command, name):
    code, out, _ = command(main, *([name] if name else []), "--help")
    assert (code, "Usage:" in out) == (0, True)


def test_a_patch_is_readable_from_a_read_only_folder(edge, installed, tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    write_file((installed / "round_01.dpu").read_bytes(), folder / "p.dpu")
    folder.chmod(0o555)
    assert edge("apply", folder / "p.dpu")[0] == 0
