# SPDX-License-Identifier: Apache-2.0
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from click.shell_completion import ShellComplete

from edge_runtime.errors import TrustError
from edge_runtime.formats.apply import apply_patch
from edge_runtime.formats.bundle import read_bundle
from edge_runtime.formats.patch import open_patch
from edge_runtime.formats.weights import read_weights
from edge_runtime.update.device import Device
from packager.cli.pack import pack, patch
from packager.rounds.folder import read_round


@pytest.fixture
def runs(run, monkeypatch):
    """``DPU_RUNS`` with the run ``tiny``: round_00 and round_01."""
    monkeypatch.setenv("DPU_RUNS", str(run.path.parent))
    return run.path.parent


@pytest.fixture
def packed(runs, command):
    """A patch from round_00 to round_01, and the two weight files."""
    command(pack, "round_01", "-q")
    folder = runs / "tiny"
    return (
        folder / "round_01.dpu",
        folder / "round_00" / "weights.safetensors",
        folder / "round_01" / "weights.safetensors",
    )


def files_of(run):
    return sorted(path.name for path in run.path.iterdir() if path.is_file())


# dpu-pack ----------------------------------------------------------------------------


def test_writes_the_patch_beside_the_round_folder(run, runs, command):
    code, out, err = command(pack, "round_01")
    assert code == 0
    assert files_of(run) == ["releases.jsonl", "round_01.dpu"]
    assert err == f"wrote {run.path / 'round_01.dpu'}\n"
    size = (run.path / "round_01.dpu").stat().st_size
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0].startswith("round_01 parent round_00 ")
    assert lines[1] == "changed 10 of 256 weights (3.91 %) in 2 tensors"
    assert lines[2] == "dense 20 values (biases, normalisation)"
    assert lines[3].startswith(f"patch {size} bytes ")
    assert lines[4] == "checked applied to round_00, result identical"


def test_takes_a_path_a_qualified_name_and_the_option_runs(run, command, monkeypatch):
    monkeypatch.chdir(run.path)
    for arguments in (["round_01"], ["tiny/round_01", "--runs", run.path.parent]):
        assert command(pack, *arguments)[0] == 0
        (run.path / "round_01.dpu").unlink()


def test_json_is_one_object_with_sizes_in_bytes(run, runs, command):
    code, out, err = command(pack, "round_00", "round_01", "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    first, second = result["packed"]
    assert result["schema"] == 1
    assert second["parent"] == first["target"]
    assert second["target"] == run.deployed.fingerprint
    assert second["bytes"] == Path(second["path"]).stat().st_size
    assert second["full_bytes"] == len(run.deployed.data)
    assert (second["weights_changed"], second["weights"]) == (10, 256)
    assert (second["dense_changed"], second["dense"]) == (20, 20)
    assert second["written"] is True


def test_a_round_that_kept_its_base_writes_nothing_and_is_no_failure(
    run, runs, command
):
    run.add(2, run.deployed)
    code, out, err = command(pack, "round_02")
    assert (code, err, files_of(run)) == (0, "", [])
    assert "round_02  kept its base" in out
    assert "nothing to send" in out
    (result,) = json.loads(command(pack, "round_02", "--json")[1])["packed"]
    assert (result["outcome"], result["path"], result["written"]) == (
        "kept_base",
        None,
        False,
    )


def test_a_dry_run_writes_nothing_and_tells_the_size(run, runs, command):
    code, out, _ = command(pack, "round_01", "--dry-run", "--json")
    assert (code, files_of(run)) == (0, [])
    (result,) = json.loads(out)["packed"]
    assert result["written"] is False
    command(pack, "round_01")
    assert (run.path / "round_01.dpu").stat().st_size == result["bytes"]


def test_a_patch_over_its_limit_leaves_no_file(run, runs, command):
    code, out, err = command(pack, "round_01", "--max-size", "0.1KB", "--json")
    assert (code, out, files_of(run)) == (6, "", [])
    error = json.loads(err)
    assert (error["error"], error["limit"], error["exit_code"]) == (
        "BudgetError",
        100,
        6,
    )
    assert command(pack, "round_01", "--max-size", "1KiB")[0] == 0


def test_a_size_that_is_none_is_a_usage_error(runs, command):
    code, _, err = command(pack, "round_01", "--max-size", "200 bananas")
    assert code == 2
    assert "such as 64KB" in err


def test_an_ambiguous_name_is_a_usage_error_with_the_candidates(runs, new_run, command):
    new_run("other").add(1)
    code, _, err = command(pack, "round_01")
    assert code == 2
    assert "other/round_01, tiny/round_01" in err


def test_a_parents_bare_name_is_of_the_rounds_own_run(
    runs, new_run, command, monkeypatch, tmp_path
):
    other = new_run("other")
    other.add(1)
    other.add(2)
    code, _, err = command(pack, "other/round_02", "--from", "round_01")
    assert (code, err.count("wrote")) == (0, 1), err
    with open_patch(other.path / "round_02_from_round_01.dpu") as made:
        parent = read_round(other.path / "round_01").weights
        assert made.header.parent == parent.fingerprint
    # A folder of that name where the command is typed is another run's too.
    shutil.copytree(runs / "tiny", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    (other.path / "round_02_from_round_01.dpu").unlink()
    assert command(pack, "other/round_02", "--from", "round_01")[0] == 0
    with open_patch(other.path / "round_02_from_round_01.dpu") as made:
        assert made.header.parent == parent.fingerprint


def test_a_parent_that_the_rounds_run_lacks_is_not_looked_for_in_others(
    runs, new_run, command
):
    new_run("other").add(2)
    code, _, err = command(pack, "tiny/round_01", "--from", "round_02")
    assert code == 2
    assert "no round_02 in tiny, the run of round_01; it has round_00, round_01" in err
    assert "RUN/round_02" in err


def test_a_damaged_round_is_refused_and_writes_nothing(run, runs, command):
    (run.path / "round_01" / "weights.safetensors").write_bytes(b"")
    code, _, err = command(pack, "round_01")
    assert (code, files_of(run)) == (3, [])
    assert err.startswith("error: ")


def test_a_round_that_is_not_packable_is_refused(run, runs, command):
    run.add(2, packable=False)
    code, _, err = command(pack, "round_02")
    assert (code, files_of(run)) == (3, [])
    assert "not packable" in err


def test_a_patch_from_another_parent_does_not_replace_the_rounds_own(
    run, runs, command
):
    run.add(2)
    for options in ((), ("--from", "round_00"), ("--from", "init")):
        assert command(pack, "round_02", *options)[0] == 0
    assert files_of(run) == [
        "releases.jsonl",
        "round_02.dpu",
        "round_02_from_init.dpu",
        "round_02_from_round_00.dpu",
    ]


def test_every_round_is_packed_though_nobody_reads_the_words(run):
    run.add(2)
    words = ["-m", "packager", "round_01", "round_02", "--runs", str(run.path.parent)]
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run([sys.executable, *words], stdout=writer, check=False)
    os.close(writer)
    assert (ended.returncode, files_of(run)) == (
        0,
        ["releases.jsonl", "round_01.dpu", "round_02.dpu"],
    )


@pytest.mark.parametrize(("value", "coloured"), [("1", False), ("", True)])
def test_no_color_is_heeded_on_a_terminal(tmp_path, value, coloured):
    words = [sys.executable, "-m", "packager", "nope", "--runs", str(tmp_path)]
    reader, terminal = os.openpty()
    env = os.environ | {"NO_COLOR": value}
    subprocess.run(words, stderr=terminal, env=env, check=False)
    os.close(terminal)
    assert (b"\x1b[31m" in os.read(reader, 1 << 16)) == coloured
    os.close(reader)


def test_a_closed_standard_stream_is_an_empty_one(run):
    words = f"{sys.executable} -m packager round_01 --runs {run.path.parent}"
    command = f"{words} <&- >&- 2>&-"
    assert subprocess.run(command, shell=True, check=False).returncode == 0
    assert files_of(run) == ["releases.jsonl", "round_01.dpu"]


def test_a_disk_without_room_to_try_the_weights_is_named(run, runs, command):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
    try:
        code, _, err = command(pack, "round_01")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (code, tempfile.gettempdir() in err) == (10, True)
    assert files_of(run) == []


def test_a_disk_without_room_is_named_by_the_file(run, runs, command):
    (run.path / "model" / "golden.npz").unlink()  # or it is run first, in /tmp
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
    try:
        code, _, err = command(pack, "round_01")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    path = run.path / "round_01.dpu"
    assert (code, err.splitlines()[-1]) == (10, f"error: {path}: File too large")
    assert files_of(run) == []


def test_a_file_where_a_folder_is_needed_is_called_one(run, runs, command, tmp_path):
    (tmp_path / "out").write_bytes(b"mine")
    code, _, err = command(pack, "round_01", "-o", tmp_path / "out" / "p.dpu")
    assert (code, "out: is a file, expected a folder" in err) == (10, True)


def test_a_folder_of_runs_that_is_not_there_is_said_so(run, command, tmp_path):
    code, _, err = command(pack, "round_01", "--runs", tmp_path / "none")
    assert (code, "none (no such folder)" in err) == (2, True)


def test_leads_from_another_parent_where_asked(run, runs, command, tmp_path):
    run.add(2)
    for parent, name in (("round_00", "round_00"), ("init", "init")):
        path = tmp_path / f"{name}.dpu"
        assert command(pack, "round_02", "--from", parent, "-o", path)[0] == 0
    with open_patch(tmp_path / "init.dpu") as opened:
        assert apply_patch(run.init, opened).data == run.deployed.data
    assert command(pack, "round_02", "--from", "round_02")[1].startswith(
        "round_02  is what the parent already is"
    )


def test_a_device_that_missed_rounds_catches_up_with_one_smaller_patch(
    run, runs, command, tmp_path
):
    arrays = {name: array.copy() for name, array in run.deployed.items()}
    for number in (2, 3, 4):  # the same weights change again, as they do in training
        arrays["fc1.weight"][:4] += np.float32(0.01 * number)
        arrays["fc1.bias"] -= np.float32(0.02)
        run.add(number, {name: array.copy() for name, array in arrays.items()})
    total = 0
    for number in (2, 3, 4):
        command(pack, f"round_{number:02d}", "-q")
        total += (run.path / f"round_{number:02d}.dpu").stat().st_size
    path = tmp_path / "catch_up.dpu"
    assert command(pack, "round_04", "--from", "round_01", "-o", path)[0] == 0
    assert path.stat().st_size < total / 2
    first = read_weights(run.path / "round_01" / "weights.safetensors")
    with open_patch(path) as opened:
        assert apply_patch(first, opened).data == run.deployed.data


def test_catching_up_passes_over_a_reinitialised_round(run, runs, command, tmp_path):
    run.add(2, base=run.init)
    run.add(3)
    path = tmp_path / "catch_up.dpu"
    assert command(pack, "round_03", "--from", "round_01", "-o", path)[0] == 0
    first = read_weights(run.path / "round_01" / "weights.safetensors")
    with open_patch(path) as opened:
        assert apply_patch(first, opened).data == run.deployed.data


def test_a_reverse_patch_needs_a_higher_release_counter(run, runs, command):
    code, _, err = command(pack, "round_00", "--from", "round_01")
    assert code == 3
    assert "release 0, but devices at round_01 have seen release 1" in err
    assert "--counter 2 or more" in err
    assert command(pack, "round_00", "--from", "round_01", "--counter", 1)[0] == 3
    assert files_of(run) == []


def test_a_device_takes_a_reverse_patch_and_then_only_newer_releases(
    run, runs, command, tmp_path
):
    run.add(2)
    command(pack, "round_01", "--bundle", "-q")
    device = Device.install(tmp_path / "store", run.path / "round_01.bundle.zip")
    command(pack, "round_02", "-q")
    device.update(run.path / "round_02.dpu")

    back = tmp_path / "back.dpu"
    _, out, _ = command(
        pack, "round_01", "--from", "round_02", "--counter", 3, "-o", back
    )
    assert "counter 3 instead of the round's 1: every later" in out
    device.update(back)
    target = read_round(run.path / "round_01").record.target
    assert device.status()["fingerprint"] == target

    with pytest.raises(TrustError):
        device.update(run.path / "round_02.dpu")  # a replay
    command(pack, "round_02", "--counter", 4, "-q")
    device.update(run.path / "round_02.dpu")
    assert device.status()["fingerprint"] == run.deployed.fingerprint


def test_a_counter_is_for_one_round(runs, command):
    code, _, err = command(pack, "round_00", "round_01", "--counter", 5)
    assert code == 2
    assert "one round at a time" in err


def test_a_bundle_can_be_a_newer_release_too(run, runs, command):
    command(pack, "round_00", "--bundle", "--counter", 9, "-q")
    content = read_bundle(run.path / "round_00.bundle.zip")
    with open_patch(content.patch) as opened:
        assert opened.header.counter == 9


def test_rounds_or_files_are_needed_and_not_both(run, runs, command):
    weights = run.path / "round_01" / "weights.safetensors"
    assert command(pack)[0] == 2
    assert command(pack, "round_01", "--base", weights)[0] == 2


def test_several_rounds_go_into_one_folder(runs, command, tmp_path):
    code, _, _ = command(pack, "round_00", "round_01", "-o", tmp_path / "out")
    assert code == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["round_00.dpu", "round_01.dpu"]


def test_an_output_that_ends_in_a_slash_is_a_folder(runs, command, tmp_path):
    assert command(pack, "round_00", "-o", f"{tmp_path}/out/")[0] == 0
    assert (tmp_path / "out" / "round_00.dpu").is_file()


def test_two_rounds_never_become_one_file(runs, new_run, command, tmp_path):
    new_run("other").add(1)
    names = ("tiny/round_01", "other/round_01")
    code, _, err = command(pack, *names, "-o", tmp_path / "out")
    assert code == 2
    assert "one by one" in err
    assert not (tmp_path / "out").exists()


def test_quiet_prints_nothing(runs, command):
    assert command(pack, "round_01", "-q") == (0, "", "")


def test_an_output_that_cannot_be_written_has_its_own_code(runs, command, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert command(pack, "round_01", "-o", tmp_path / "file" / "x.dpu")[0] == 10


def test_a_bundle_installs_any_updated_round(run, runs, command):
    code, out, err = command(pack, "round_01", "--bundle")
    path = run.path / "round_01.bundle.zip"
    assert (code, files_of(run)) == (0, ["releases.jsonl", "round_01.bundle.zip"])
    assert read_bundle(path).target == run.deployed.fingerprint
    assert "bundle" in out
    assert err == f"wrote {path}\n"
    first = path.read_bytes()
    command(pack, "round_01", "--bundle")
    assert path.read_bytes() == first


def test_a_bundle_takes_no_other_parent(runs, command):
    assert command(pack, "round_01", "--bundle", "--from", "round_00")[0] == 2


def test_names_of_rounds_are_completed(runs):
    complete = ShellComplete(pack, {}, "dpu-pack", "_DPU_PACK_COMPLETE")
    values = [item.value for item in complete.get_completions([], "ti")]
    assert values == ["tiny/round_00", "tiny/round_01"]
    values = [i.value for i in complete.get_completions(["--runs", "nowhere"], "r")]
    assert values == []


# dpu-patch ---------------------------------------------------------------------------


def test_verify_proves_the_target_where_it_has_the_base(packed, command):
    record = json.loads(
        command(patch, "verify", packed[0], "--base", packed[1], "--json")[1]
    )
    assert record["applied"] is True
    code, out, _ = command(patch, "verify", packed[0])
    assert code == 0
    assert "not applied" in out


def test_verify_refuses_another_base(packed, command):
    code, _, err = command(patch, "verify", packed[0], "--base", packed[2], "--json")
    assert code == 4
    assert json.loads(err)["error"] == "WrongParentError"


def test_verify_refuses_a_damaged_patch(packed, command):
    data = bytearray(packed[0].read_bytes())
    data[-1] ^= 1
    packed[0].write_bytes(data)
    assert command(patch, "verify", packed[0])[0] == 3


# Both --------------------------------------------------------------------------------


COMMANDS = [
    "apply",
    "check-proof",
    "compose",
    "diff",
    "extract",
    "info",
    "keygen",
    "provenance",
    "releases",
    "report",
    "sign",
    "trust",
    "verify",
]


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)])
def test_every_command_has_help(command, words):
    code, out, _ = command(patch, *words, "-h")
    assert code == 0
    assert "Usage: " in out


def test_commands_are_these(command):
    assert sorted(patch.commands) == COMMANDS
    assert "Exit codes" in command(pack, "--help")[1]


def imported(program):
    """Run a program; return its output and which heavy modules it has loaded."""
    heavy = {"onnx", "onnxruntime", "torch", "trainer"}
    program += f"\nimport sys\nprint(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_help_comes_without_heavy_imports_and_runs_as_a_module():
    out = imported(
        "import runpy, sys\n"
        "sys.argv = ['packager', '--help']\n"
        "try:\n    runpy.run_module('packager', run_name='__main__')\n"
        "except SystemExit as done:\n    print(done.code)"
    )
    assert out.startswith("Usage: dpu-pack ")
    assert out.splitlines()[-2:] == ["0", "[]"]


def test_packing_imports_neither_onnx_nor_onnxruntime(run):
    path = str(run.path / "round_01")
    out = imported(
        "from packager import pack_round, read_round\n"
        f"assert pack_round(read_round({path!r})).data"
    )
    assert out == "[]\n"


def test_a_moved_run_still_packs(run, command, tmp_path):
    moved = shutil.move(run.path, tmp_path / "elsewhere")
    assert command(pack, Path(moved) / "round_01")[0] == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_every_device_would_refuse_are_not_packed(
    run, runs, command, value
):
    arrays = run.changed(number=7)
    arrays[next(iter(arrays))].reshape(-1)[0] = value
    (last,) = sorted(run.path.glob("round_*"))[-1:]
    folder = run.add(int(last.name[6:]) + 1, arrays)
    before = files_of(run)
    code, out, err = command(pack, folder.name)
    assert (code, out) == (5, "")
    assert "finite" in err
    assert files_of(run) == before


def test_a_run_without_golden_inputs_is_packed_and_it_is_said(run, runs, command):
    (run.path / "model" / "golden.npz").unlink()
    code, _, err = command(pack, "round_01")
    assert (code, "round_01: not run here, the run lacks golden.npz" in err) == (
        0,
        True,
    )
