# SPDX-License-Identifier: Apache-2.0
"""dpu-edge: data on stdout, messages on stderr, documented exit codes."""

import errno
import io
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import click
import numpy as np
import onnx
import pytest

from edge_runtime.cli import infer as cli_infer
from edge_runtime.cli.infer import usual_batch
from edge_runtime.cli.main import main
from edge_runtime.commandline import CONTEXT, emit
from edge_runtime.formats.contract import Contract, InputSpec
from edge_runtime.store.state import decode_state, encode_state
from edge_runtime.update.device import Device
from packager.build import write_file
from packager.cli.pack import pack
from tests.crash import world


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


@pytest.mark.parametrize("asked", ["status", "doctor", "service"])
def test_the_command_that_installs_is_named_as_it_can_be_typed(
    command, tmp_path, asked
):
    store = tmp_path / "my store"
    rest = [tmp_path / "patches"] if asked == "service" else []
    _, out, err = command(main, "--store", store, asked, *rest)
    (typed,) = re.findall(r"'(dpu-edge --store .* init) BUNDLE", out + err)
    assert shlex.split(typed) == ["dpu-edge", "--store", str(store), "init"]


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
    assert "within reach   1" in edge("status")[1].splitlines()
    assert "rolled back to round 1" in edge("rollback", "--to", 1)[1]
    assert "rolled back to round 2" in edge("rollback", "--to", "round_02")[1]
    assert "rolled back to round 1" in edge("rollback", "--to", "round_1")[1]
    for unknown in (7, "round_07", "one", "-1"):
        code, _, err = edge("rollback", "--to", unknown)
        assert (code, "rounds within reach: 2" in err) == (2, True)


def test_a_pinned_device_holds_updates_back(edge, installed):
    assert "held back" in edge("pin")[1]
    assert "pinned  " in edge("status")[1]
    code, _, err = edge("apply", installed / "round_01.dpu")
    assert (code, "pin --off" in err) == (12, True)
    assert "allowed" in edge("pin", "--off")[1]
    assert edge("apply", installed / "round_01.dpu")[0] == 0


def test_no_line_of_status_comes_from_inside_a_history(edge, installed, tmp_path):
    path = tmp_path / "store" / "state.json"
    state = decode_state(path.read_bytes())
    forged = replace(state.history[0], at="\nround 9", event="\nround 9", target="\nr")
    path.write_bytes(encode_state(replace(state, history=(forged,))))
    lines = edge("status")[1].splitlines()
    assert lines[-2] == "history"
    assert "round 9" in lines[-1]


def test_a_number_that_is_not_finite_is_null_in_json(capsys):
    record = {"a": [math.nan, {"b": -math.inf}], "c": (1.5, "x", None)}
    emit(record, as_json=True, text="")
    found = json.loads(capsys.readouterr().out)
    assert found == {"schema": 1, "a": [None, {"b": None}], "c": [1.5, "x", None]}


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
    assert [line["sample"] for line in lines] == [0, 1, 2]
    assert {line["input"] for line in lines} == {str(tmp_path / "in.npy")}
    assert {line["round"] for line in lines} == {0}


def test_answers_that_were_printed_are_not_kept(edge, installed, tmp_path, monkeypatch):
    np.save(tmp_path / "in.npy", np.ones((5, 12), np.uint8))
    given, alive, ask = [], [], cli_infer._answers

    def watched(*args):
        alive.append(sum(answer() is not None for answer in given))
        found = ask(*args)
        given.append(weakref.ref(*found.values()))
        return found

    monkeypatch.setattr(cli_infer, "_answers", watched)
    assert edge("infer", tmp_path / "in.npy")[0] == 0
    assert (len(alive), max(alive)) == (5, 1)  # the last one, until the next comes


@pytest.mark.parametrize(
    ("dtype", "row", "best"),
    [
        ("uint8", [0, 10, 7], ["b", "c", "a"]),
        ("int8", [-128, 127, 0], ["b", "c", "a"]),
        ("bool", [False, False, True], ["c", "a", "b"]),
        ("float16", [1.0, 3.0, 2.0], ["b", "c", "a"]),
    ],
)
def test_infer_names_the_likeliest_classes_whatever_type_answers_have(dtype, row, best):
    contract = Contract((), classes=("a", "b", "c"))
    found = cli_infer._answer(np.array(row, dtype), contract, 3)["top"]
    assert [entry["class"] for entry in found] == best
    assert sum(entry["probability"] for entry in found) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("place", ["missing/x.npy", "file/x.npy"])
def test_infer_asks_nothing_where_its_output_cannot_be_written(
    edge, installed, tmp_path, monkeypatch, place
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(cli_infer, "_answers", None)  # whoever calls it fails
    code, _, err = edge("infer", "--golden", "--json", "-o", tmp_path / place)
    assert (code, "no folder that this user may write to" in err) == (2, True)


def test_infer_takes_probabilities_as_they_are_where_the_contract_says_so():
    contract = Contract((), classes=("a", "b"), probabilities=True)
    (best,) = cli_infer._answer(np.array([0.1, 0.9], "f4"), contract, 1)["top"]
    assert best == {"class": "b", "probability": 0.9}


def test_infer_names_a_model_that_does_not_answer_sample_by_sample(
    edge, new_run, reload_graph, command, tmp_path
):
    def one_row(model):
        (end,) = model.graph.output
        total = onnx.helper.make_node("ReduceSum", [end.name], ["total"], keepdims=1)
        model.graph.node.append(total)
        info = onnx.helper.make_tensor_value_info
        end.CopyFrom(info("total", onnx.TensorProto.FLOAT, [1, 1]))

    run = new_run("totals")
    run.graph = reload_graph(run, one_row)
    run.add(0)
    bundle = tmp_path / "bundle.zip"
    done = command(pack, run.path / "round_00", "--bundle", "-o", bundle)
    assert done[0] == 0, done
    assert edge("init", bundle)[0] == 0
    code, _, err = edge("infer", "--golden", "--batch", 4)
    assert (code, "[1, 1] for 4 samples" in err) == (2, True)


def test_infer_on_the_golden_inputs(edge, installed):
    record = json.loads(edge("infer", "--golden", "--json")[1])
    assert (len(record["samples"]), record["backend"]) == (8, "onnxruntime")


def test_infer_says_how_many_golden_labels_are_right(edge, installed):
    _, out, err = edge("infer", "--golden", "--json")
    record = json.loads(out)
    with np.load(installed / "model" / "golden.npz") as golden:
        labels = golden["labels"]
    answers = ["abcd".index(s["top"][0]["class"]) for s in record["samples"]]
    right = int(np.sum(np.equal(answers, labels)))
    assert (record["right"], record["labels"]) == (right, 8)
    assert err == f"{right} of 8 right\n"
    assert edge("infer", "--golden", "--batch", 3)[2] == err


@pytest.mark.parametrize(
    ("shapes", "batch"),
    [
        ([(None, 3)], 1),
        ([(8, 3)], 8),
        ([(4, 2), (None, 3)], 1),
        ([(None, 3), (4, 2)], 1),
        ([(4, 2), (5, 2)], 1),
        ([()], 1),
    ],
)
def test_a_call_has_one_sample_unless_the_model_takes_several(shapes, batch):
    inputs = (InputSpec(f"x{n}", "float32", s) for n, s in enumerate(shapes))
    assert usual_batch(Contract(tuple(inputs))) == batch


@pytest.mark.parametrize("shape", [(), (3,), (8, 1)], ids=str)
def test_golden_labels_that_do_not_fit_the_answers_are_not_counted(
    edge, installed, shape, tmp_path
):
    path = tmp_path / "store" / "model" / "golden.npz"
    with np.load(path) as golden:
        arrays = dict(golden)
    np.savez(path, **arrays | {"labels": np.ones(shape, int)})
    code, out, err = edge("infer", "--golden")
    assert (code, len(out.splitlines())) == (2, 8)
    assert "golden.npz: top1 cannot hold an output" in err
    assert "right" not in err


@pytest.mark.parametrize(
    "options", [["--batch", 3], ["--threads", 2, "--spin"], ["--backend", "numpy"]]
)
def test_how_a_model_runs_does_not_change_what_it_answers(edge, installed, options):
    wanted = json.loads(edge("infer", "--golden", "--json")[1])["samples"]
    found = json.loads(edge("infer", "--golden", "--json", *options)[1])["samples"]
    assert [s["top"][0]["class"] for s in found] == [
        s["top"][0]["class"] for s in wanted
    ]
    assert [s["top"][0]["probability"] for s in found] == pytest.approx(
        [s["top"][0]["probability"] for s in wanted], abs=1e-5
    )


@pytest.mark.parametrize("threads", [-1, 10**8])
def test_threads_that_no_board_has_are_a_usage_error(edge, installed, threads):
    assert edge("infer", "--golden", "--threads", threads)[0] == 2


def test_infer_takes_folders_and_standard_input(edge, installed, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for name in ("b", "a"):
        np.save(tmp_path / "in" / name, np.ones((2, 12), np.uint8))
    out = edge("infer", tmp_path / "in")[1]
    names = [json.loads(line)["input"].rsplit("/", 1)[1] for line in out.splitlines()]
    assert names == ["a.npy", "a.npy", "b.npy", "b.npy"]
    stream = io.BytesIO((tmp_path / "in" / "a.npy").read_bytes())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(stream))
    code, out, _ = edge("infer", "-")
    assert (code, [json.loads(line)["input"] for line in out.splitlines()]) == (
        0,
        ["-", "-"],
    )


def test_without_class_names_infer_prints_the_plain_output(edge, installed, tmp_path):
    world.edit_contract(tmp_path / "store", classes=[])
    record = json.loads(edge("infer", "--golden", "--json")[1])["samples"][0]
    assert (len(record["output"]), "top" in record) == (4, False)


def test_bench_names_what_it_measured(edge, installed):
    code, out, _ = edge("bench", "--seconds", "0.05", "--batch", 2)
    assert code == 0
    assert "calls of 2 sample(s): onnxruntime\n" in out
    assert "beside it" in out
    record = json.loads(edge("bench", "--seconds", "0.05", "--json")[1])
    assert record["schema"] == 1
    assert record["raw"]["latency_s"]["p50"] > 0


def test_exit_2_for_wrong_use(edge, installed, command, tmp_path, monkeypatch):
    assert edge("infer")[0] == 2
    np.save(tmp_path / "wrong.npy", np.ones((3, 5)))
    assert edge("infer", tmp_path / "wrong.npy")[0] == 2
    (tmp_path / "text.npy").write_text("no array")
    assert edge("infer", tmp_path / "text.npy")[0] == 2
    for odd in ("abc", "a" * 300, "z" * 64, str(tmp_path)):
        assert edge("verify", "--expect", odd)[0] == 2
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


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("init.json", ["status"]),
        ("init.json", ["verify"]),
        ("contract.json", ["infer", "--golden"]),
        ("golden.npz", ["infer", "--golden"]),
    ],
)
def test_exit_7_for_a_damaged_model_and_what_mends_it(edge, tmp_path, name, words):
    world.install(tmp_path / "store")
    path = tmp_path / "store" / "model" / name
    path.write_bytes(bytes(path.stat().st_size))
    code, _, err = edge(*words)
    assert (code, "'dpu-edge repair BUNDLE'" in err) == (7, True)


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


def commands(group, path=()):
    """Every command of a group and of the groups in it, by its whole name."""
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


@pytest.mark.parametrize(("name", "command"), list(commands(main)))
def test_every_command_takes_the_store_after_its_name_and_answers_in_json(
    name, command
):
    options = {opt for param in command.params for opt in param.opts}
    # What service prints is a unit file; its other options are the agent's.
    assert options >= ({"--store"} if name == "service" else {"--store", "--json"})


def test_the_store_may_stand_before_or_after_the_command(
    command, installed, tmp_path, monkeypatch
):
    store = tmp_path / "store"
    monkeypatch.setenv("DPU_STORE", str(tmp_path / "elsewhere"))
    before = command(main, "--store", store, "status", "--json")
    assert before[0] == 0
    assert command(main, "status", "--json", "--store", store) == before
    both = command(main, "--store", tmp_path, "status", "--json", "--store", store)
    assert both == before
    code, _, err = command(main, "status")
    assert (code, "elsewhere" in err) == (7, True)


def test_json_may_stand_before_the_command_too(edge, installed):
    for words in (("status",), ("trust", "show"), ("proof", "--nonce", "n")):
        code, out, _ = edge("--json", *words)
        assert (code, json.loads(out).keys()) == (
            0,
            json.loads(edge(*words, "--json")[1]).keys(),
        )
    assert json.loads(edge("--json", "rollback", "--to", "7")[2])["exit_code"] == 2
    code, _, err = edge("--json", "service", "/srv/patches")
    assert (code, json.loads(err)["message"]) == (2, "no such option '--json'")


def test_a_full_disk_behind_standard_output_is_not_the_stores(installed, tmp_path):
    words = ["--store", str(tmp_path / "store"), "status"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "edge_runtime", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 10
    assert done.stderr.startswith("error: standard output: No space left on device")


def test_a_folder_of_other_things_is_not_told_to_be_installed_into(edge, tmp_path):
    (tmp_path / "store").mkdir()
    assert "run 'dpu-edge --store" in edge("status")[2]
    (tmp_path / "store" / "digits").mkdir()
    code, _, err = edge("status")
    assert (code, "holds no store: found digits" in err) == (7, True)


@pytest.mark.parametrize("given", ["3600", "3600s", "60m", "1h", "3600.0"])
def test_a_span_of_time_may_have_a_unit(given):
    for name, option in (("sync", "--every"), ("agent", "--interval")):
        words = ["x"] * (1 + (name == "sync"))
        words += [option, given]
        context = main.commands[name].make_context(name, words, **CONTEXT)
        assert 3600 in context.params.values()


def test_wrong_use_is_told_as_json_too(command, monkeypatch):
    monkeypatch.delenv("DPU_STORE", raising=False)
    code, out, err = command(main, "status", "--json")
    record = json.loads(err)
    assert (out, record["error"], record["exit_code"]) == ("", "MissingParameter", code)
    assert "--store" in record["message"]


def test_a_bug_says_so_and_keeps_its_traceback(edge, installed, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("unforeseen")

    monkeypatch.setattr("edge_runtime.update.device.Device.status", broken)
    code, _, err = edge("status")
    assert (code, "unforeseen" in err, "this is a bug" in err) == (1, True, True)
    record = json.loads(edge("status", "--json")[2])
    assert "unforeseen" in "".join(record["traceback"])


def test_a_refusal_names_the_patch_and_keeps_those_before_it(edge, installed, tmp_path):
    (tmp_path / "bad").write_bytes(b"nonsense")
    code, out, err = edge("apply", installed / "round_01.dpu", tmp_path / "bad")
    assert (code, "round_01.dpu: applied" in out) == (3, True)
    assert "error: bad: not a patch" in err
    assert json.loads(edge("status", "--json")[1])["round"] == 1


def test_a_refusal_as_json_says_what_was_applied_before_it(edge, installed, tmp_path):
    (tmp_path / "bad").write_bytes(b"nonsense")
    good = installed / "round_01.dpu"
    code, out, err = edge("apply", "--json", good, tmp_path / "bad")
    record = json.loads(err)
    assert (code, out, record["error"]) == (3, "", "PatchFormatError")
    assert record["patches"] == [{"patch": str(good), "result": "applied", "round": 1}]


def test_a_patch_that_went_away_as_json_says_what_was_applied_before_it(
    edge, installed, tmp_path
):
    first, second = (installed / f"round_0{number}.dpu" for number in (1, 2))
    hook = tmp_path / "store" / "hooks" / "after-apply.d" / "10-tidy"
    hook.parent.mkdir(parents=True, exist_ok=True)
    hook.write_text(f"#!/bin/sh\nrm {second}\n")
    hook.chmod(0o755)
    code, out, err = edge("apply", "--json", first, second)
    assert (code, out, json.loads(err)["error"]) == (10, "", "FileNotFoundError")
    assert [done["round"] for done in json.loads(err)["patches"]] == [1]


@pytest.mark.parametrize(
    ("number", "hint"),
    [(errno.EACCES, "run this as a user who"), (errno.EROFS, "mount it for writing")],
)
def test_a_folder_that_may_not_be_written_is_named(
    edge, installed, monkeypatch, number, hint
):
    def denied(_, path):
        raise OSError(number, "Denied", str(path))

    monkeypatch.setattr("edge_runtime.files.Files.open_lock", denied)
    code, _, err = edge("rollback")
    assert (code, f"lock: Denied; {hint}" in err) == (10, True)


def test_a_reader_that_goes_away_is_no_failure(installed, edge):
    store = json.loads(edge("status", "--json")[1])["store"]
    infer = f"{sys.executable} -m edge_runtime infer --golden --store {store}"
    done = subprocess.run(
        ["bash", "-c", f"{infer} | true; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", [None, *main.commands])
def test_every_command_has_help(command, name):
    code, out, _ = command(main, *([name] if name else []), "--help")
    assert (code, "Usage:" in out) == (0, True)
    options = (main.commands[name] if name else main).params
    variables = {p.envvar for p in options if isinstance(p, click.Option) and p.envvar}
    assert {v for v in variables if not re.search(rf"\b{v}\b", out)} == set()


def test_a_patch_is_readable_from_a_read_only_folder(edge, installed, tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    write_file((installed / "round_01.dpu").read_bytes(), folder / "p.dpu")
    folder.chmod(0o555)
    assert edge("apply", folder / "p.dpu")[0] == 0


@pytest.mark.parametrize("words", [["--store", ""], ["--store="]])
def test_an_empty_word_is_no_folder(command, installed, monkeypatch, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    bundle = installed / "round_00.bundle.zip"
    code, _, err = command(main, *words, "init", bundle)
    assert (code, "is a variable not set?" in err) == (2, True)
    assert not (tmp_path / "state.json").exists()


def test_a_message_that_cannot_be_written_keeps_the_exit_code(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    (tmp_path / "bad").write_bytes(b"")
    words = ["infer", "--store", str(tmp_path), "--golden"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "edge_runtime", *words], stderr=full, check=False
        )
    assert done.returncode == 7


@pytest.mark.parametrize(
    ("words", "unbuffered", "code"),
    [
        ("status >/dev/full", "", 10),
        ("status >&-", "", 0),
        ("device-key --json 2>/dev/full", "", 0),
        ("device-key --json 2>&{gone}", "", 0),
        ("device-key --json 2>&{gone}", "1", 0),
        ("nothing 2>&{gone}", "", 2),
        ("--help >&{gone}", "", 0),
    ],
)
def test_what_a_stream_does_not_take_changes_no_documented_exit_code(
    tmp_path, monkeypatch, words, unbuffered, code
):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    store = tmp_path / "store"
    world.install(store)
    reader, gone = os.pipe()
    os.close(reader)
    program = f"{sys.executable} -m edge_runtime --store {store}"
    done = subprocess.run(
        ["bash", "-c", f"{program} {words.format(gone=gone)}"],
        capture_output=True,
        pass_fds=[gone],
        check=False,
    )
    os.close(gone)
    assert done.returncode == code, done.stderr
    assert b"Exception ignored" not in done.stderr
    if "2>" in words and not code:
        assert json.loads(done.stdout)["key_id"]


@pytest.mark.parametrize(
    "words",
    [
        ["agent", "folder", "--interval"],
        ["sync", "folder", "folder", "--every"],
        ["bench", "--seconds"],
    ],
)
@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e300", "0"])
def test_seconds_are_a_number_within_bounds(edge, words, number):
    code, _, err = edge(*words, number)
    assert (code, words[-1] in err) == (2, True)


def test_commands_run_in_threads_too(edge, installed):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(edge, "status").result()[0] == 0


def test_too_little_memory_is_no_bug(edge, installed, monkeypatch):
    def greedy(*_, **__):
        raise MemoryError

    monkeypatch.setattr("edge_runtime.update.device.Device.status", greedy)
    code, _, err = edge("status")
    assert (code, "not enough memory" in err) == (10, True)


@pytest.mark.parametrize("megabytes", (60, 100, 140, 155, 180))
def test_a_limit_on_memory_is_no_bug_wherever_it_is_met(installed, tmp_path, megabytes):
    limit = megabytes << 20
    done = subprocess.run(
        [sys.executable, "-m", "edge_runtime", "apply", installed / "round_01.dpu"],
        env=os.environ | {"DPU_STORE": str(tmp_path / "store")},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "this is a bug" not in done.stderr
    assert Device.open(tmp_path / "store").status()["skipped"] == []


def test_what_a_terminal_cannot_show_is_spelled_out(installed, tmp_path):
    patch = tmp_path / "ründe.dpu"
    shutil.copy(installed / "round_01.dpu", patch)
    done = subprocess.run(
        [sys.executable, "-m", "edge_runtime", "apply", patch],
        env=os.environ
        | {"DPU_STORE": str(tmp_path / "store"), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "r\\xfcnde.dpu: applied, now at round 1\n"


def test_a_patch_may_come_through_a_pipe(installed, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "edge_runtime", "apply", "/dev/stdin"],
        env=os.environ | {"DPU_STORE": str(tmp_path / "store")},
        input=(installed / "round_01.dpu").read_bytes(),
        capture_output=True,
        check=True,
    )
    assert b"applied, now at round 1" in done.stdout


@pytest.mark.parametrize("fill", [np.nan, np.inf])
def test_an_answer_that_is_not_finite_is_refused(edge, installed, tmp_path, fill):
    np.save(tmp_path / "bad.npy", np.full((2, 12), fill, np.float32))
    code, out, err = edge("infer", tmp_path / "bad.npy", "--json")
    record = json.loads(err)
    assert (code, out, record["error"]) == (2, "", "ContractError")
    assert "bad.npy: the model's answer is not finite" in record["message"]


def test_no_sample_is_no_answer(edge, installed, tmp_path):
    np.save(tmp_path / "none.npy", np.zeros((0, 12), np.uint8))
    code, _, err = edge("infer", tmp_path / "none.npy", "-o", tmp_path / "out.npy")
    assert (code, "hold no sample" in err) == (2, True)


def test_what_is_no_patch_is_told_what_one_begins_with(edge, installed, tmp_path):
    (tmp_path / "page").write_bytes(b"a page of the web")
    code, _, err = edge("apply", tmp_path / "page")
    assert (code, "begins with b'a pa" in err) == (3, True)
    assert "expected b'\\x89DPU" in err
    assert "fetch it again" in err


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("edge_runtime", "main"),
        ("packager", "pack"),
        ("packager", "patch"),
        ("trainer", "main"),
    ],
)
def test_ctrl_c_during_the_imports_is_an_interruption(tmp_path, module, command):
    # The first module that the command line imports is where Ctrl-C comes.
    (tmp_path / "click.py").write_text(
        "import importlib, os, signal, sys\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.path.remove(os.environ['HERE'])\n"
        "del sys.modules['click']\n"
        "sys.modules['click'] = importlib.import_module('click')\n"
    )
    code = (
        f"import os, sys; sys.path.insert(0, os.environ['HERE'])\n"
        f"from {module}.__main__ import {command}; {command}()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"],
        # A job in the background inherits that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env=os.environ | {"HERE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.strip()) == (130, "error: interrupted")
