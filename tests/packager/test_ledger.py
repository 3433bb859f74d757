# SPDX-License-Identifier: Apache-2.0
"""The ledger knows which release counters are given out, whatever happened to it."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from edge_runtime.errors import RoundError
from edge_runtime.files import Files
from edge_runtime.formats.header import MAX_JUMP, RESERVED_COUNTER
from edge_runtime.formats.patch import open_patch
from edge_runtime.live.proof import encode_public
from edge_runtime.update.device import Device
from packager.build import pack_round
from packager.cli.fleet import fleet
from packager.cli.pack import pack, patch
from packager.keys import encode_private, generate_key, load_private
from packager.ledger import open_ledger, read_ledger
from packager.rounds.folder import parent_from, read_round
from tests.users import somebody_else


@pytest.fixture
def runs(run, monkeypatch):
    """``DPU_RUNS`` with the run ``tiny``: rounds 0 to 4."""
    for number in (2, 3, 4):
        run.add(number)
    monkeypatch.setenv("DPU_RUNS", str(run.path.parent))
    return run.path.parent


@pytest.fixture
def key(tmp_path):
    path = tmp_path / "key.pem"
    path.write_bytes(encode_private(generate_key()))
    return path


def counter_of(path):
    with open_patch(path) as opened:
        return opened.header.counter


def lines_of(run):
    text = (run.path / "releases.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


# The next counter ---------------------------------------------------------------------


def test_rounds_in_any_order_have_their_own_numbers(run, runs, command):
    for name in ("round_04", "round_02", "round_03", "round_02"):
        assert command(pack, name)[0] == 0
    numbers = {n: counter_of(run.path / f"round_{n:02d}.dpu") for n in (2, 3, 4)}
    assert numbers == {2: 2, 3: 3, 4: 4}


def test_after_going_back_the_next_release_is_newer_by_itself(
    run, runs, command, tmp_path
):
    command(pack, "round_00", "--bundle", "-q")
    device = Device.install(tmp_path / "store", run.path / "round_00.bundle.zip")
    for number in (1, 2, 3):
        command(pack, f"round_{number:02d}", "-q")
        device.update(run.path / f"round_{number:02d}.dpu")
    back = ("round_02", "--from", "round_03")
    assert command(pack, *back, "--counter", 9)[0] == 0
    device.update(run.path / "round_02_from_round_03.dpu")

    code, out, _ = command(pack, "round_03")  # once more, and it was release 3
    assert (code, counter_of(run.path / "round_03.dpu")) == (0, 10)
    assert "counter 10 instead of the round's 3" in out
    device.update(run.path / "round_03.dpu")
    assert command(pack, "round_04")[0] == 0
    assert counter_of(run.path / "round_04.dpu") == 11
    device.update(run.path / "round_04.dpu")
    assert device.status()["fingerprint"] == run.deployed.fingerprint


def test_a_counter_belongs_to_its_target(run, runs, command, tmp_path):
    command(pack, "round_01", "--from", "round_02", "--counter", 7, "-q")
    for options in ((), ("--from", "init"), ("--bundle",)):
        assert command(pack, "round_01", *options, "--json")[0] == 0
    assert {line["counter"] for line in lines_of(run)} == {7}
    assert len({line["file"] for line in lines_of(run)}) == 4


def test_a_counter_that_is_another_rounds_is_refused(run, runs, command):
    command(pack, "round_02", "-q")
    code, _, err = command(pack, "round_03", "--counter", 2)
    assert (code, "release 2 is round_02 already" in err) == (3, True)
    command(pack, "round_04", "-q")
    code, _, err = command(pack, "round_03", "--counter", 3)
    assert (code, "older than 4 (round_04)" in err) == (0, True)


@pytest.mark.parametrize("options", [(), ("--bundle",), ("--from", "init")])
def test_an_absurd_counter_is_refused_unless_it_is_meant(run, runs, command, options):
    for counter, force, code in (
        (RESERVED_COUNTER, [], 3),
        (RESERVED_COUNTER, ["--force"], 3),
        (MAX_JUMP + 10, [], 3),
        (MAX_JUMP + 10, ["--force"], 0),
        (MAX_JUMP + 11, [], 0),
    ):
        words = ("round_02", *options, "--counter", counter, *force)
        assert (counter, command(pack, *words)[0]) == (counter, code)


def test_a_parent_that_was_released_anew_asks_for_a_still_newer_release(
    run, runs, command
):
    command(pack, "round_02", "--from", "round_03", "--counter", 9, "-q")
    code, _, err = command(pack, "round_01", "--from", "round_02", "--counter", 8)
    assert code == 3
    assert "devices at round_02 have seen release 9" in err


# What the ledger says -----------------------------------------------------------------


def test_a_line_tells_who_signed_what_and_where_it_went(
    run, runs, command, key, tmp_path
):
    command(pack, "round_01", "--sign", key, "-q")
    command(pack, "round_02", "-q", "-o", tmp_path / "out" / "two.dpu")
    one, two = lines_of(run)
    signed = run.path / "round_01.dpu"
    assert (one["file"], one["to"], one["bytes"]) == (
        "round_01.dpu",
        ".",
        signed.stat().st_size,
    )
    assert len(one["signers"]) == 1
    assert (two["file"], two["to"]) == ("two.dpu", str(tmp_path / "out"))
    assert two["signers"] == []
    command(patch, "sign", run.path / "round_01.dpu", "--key", key)
    assert len(lines_of(run)) == 2  # nothing new

    record = json.loads(command(patch, "releases", "tiny", "--json")[1])
    assert record["newest"] == 2
    assert [r["state"] for r in record["releases"]] == ["there", "there"]
    assert [r["parent_name"] for r in record["releases"]] == ["round_00", "round_01"]
    signed.write_bytes(b"x")
    (tmp_path / "out" / "two.dpu").unlink()
    record = json.loads(command(patch, "releases", run.path, "--json")[1])
    assert [r["state"] for r in record["releases"]] == ["replaced", "gone"]
    text = command(patch, "releases", "tiny")[1]
    assert one["signers"][0] in text
    assert "nobody" in text


def test_a_signature_that_is_added_later_is_recorded(run, runs, command, key):
    command(pack, "round_01", "-q")
    command(patch, "sign", run.path / "round_01.dpu", "--key", key)
    assert [len(line["signers"]) for line in lines_of(run)] == [0, 1]


def test_releases_of_what_is_no_run_are_a_usage_error(runs, command):
    code, _, err = command(patch, "releases", "other")
    assert (code, "no run other" in err) == (2, True)


# When it is missing or damaged --------------------------------------------------------


def test_a_missing_ledger_is_made_again_from_the_files(run, runs, command, key):
    command(pack, "round_00", "--bundle", "--sign", key, "-q")
    command(pack, "round_01", "--from", "round_02", "--counter", 8, "-q")
    before = lines_of(run)
    (run.path / "releases.jsonl").unlink()
    listed = json.loads(command(patch, "releases", "tiny", "--json")[1])["releases"]
    facts = ("counter", "target", "parent", "signers", "file", "to", "sha256", "kind")
    assert [[line[k] for k in facts] for line in before] == [
        [release[k] for k in facts] for release in listed
    ]
    assert not (run.path / "releases.jsonl").exists()  # who looks changes nothing
    command(pack, "round_02", "-q")
    assert [line["counter"] for line in lines_of(run)] == [0, 8, 9]


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no disk with such times")
@pytest.mark.parametrize("seconds", [-62_135_596_800, 999_999_999_999])
def test_a_file_of_a_time_that_no_calendar_holds_leaves_a_ledger(run, command, seconds):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as runs:
        shutil.copytree(run.path, f"{runs}/tiny")
        command(pack, "tiny/round_00", "--runs", runs, "-q")
        Path(f"{runs}/tiny/releases.jsonl").unlink()
        os.utime(f"{runs}/tiny/round_00.dpu", (seconds, seconds))
        for _ in range(2):  # what is written is read again
            assert command(pack, "tiny/round_01", "--runs", runs, "-q")[0] == 0


@pytest.mark.parametrize("kept", [0, 1, 40, -1])
def test_a_line_that_was_cut_off_is_left_out_and_written_over(run, runs, command, kept):
    command(pack, "round_01", "-q")
    path = run.path / "releases.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + (whole[:kept] or b"\0" * 100))
    code, _, err = command(pack, "round_02")
    assert (code, "was cut off" in err) == (0, True)
    assert [line["counter"] for line in lines_of(run)] == [1, 2]
    assert path.read_bytes().startswith(whole)


@pytest.mark.parametrize(
    "line", [b"{}", b"no JSON", b'{"schema": 1}', b'{"schema": 1, "counter": "7"}']
)
def test_damage_within_is_named_and_nothing_is_packed(run, runs, command, line):
    command(pack, "round_01", "-q")
    path = run.path / "releases.jsonl"
    whole = path.read_bytes()
    path.write_bytes(line + b"\n" + whole)
    for script, words in ((pack, ["round_02"]), (patch, ["releases", "tiny"])):
        code, _, err = command(script, *words)
        assert (code, "releases.jsonl, line 1," in err) == (3, True)
    assert path.read_bytes() == line + b"\n" + whole
    assert not (run.path / "round_02.dpu").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: b"\xef\xbb\xbf" + line,
        lambda line: line.replace(b'"round"', b'"rund"'),
        lambda line: b"\0" * (len(line) - 1) + b"\n",
        lambda line: line.replace(b'Z"}', b'"}'),
    ],
)
def test_a_damaged_last_line_that_has_its_end_is_no_line_that_was_cut_off(
    run, runs, command, damage
):
    command(pack, "round_01", "--counter", 7, "-q")
    path = run.path / "releases.jsonl"
    path.write_bytes(damaged := damage(path.read_bytes()))
    code, _, err = command(pack, "round_02")
    assert (code, "releases.jsonl, line 1," in err) == (3, True)
    assert path.read_bytes() == damaged


def test_a_file_whose_name_is_no_text_is_recorded_once(run, runs, command):
    command(pack, "round_01", "-q", "-o", os.fsdecode(bytes(run.path) + b"/a\xff.dpu"))
    for name in ("round_02", "round_03"):
        command(pack, name, "-q")
    assert len(lines_of(run)) == 3


def test_a_pipe_beside_the_rounds_is_not_waited_for(run, runs, command):
    os.mkfifo(run.path / "pipe.dpu")
    os.mkfifo(run.path / "pipe.bundle.zip")
    code, _, err = command(patch, "releases", "tiny")
    assert (code, err.count("is not counted")) == (0, 2)


def test_what_is_no_patch_beside_the_rounds_is_not_counted(run, runs, command):
    (run.path / "notes.dpu").write_bytes(b"mine")
    (run.path / "x.bundle.zip").write_bytes(b"PK\x03\x04 mine")
    code, _, err = command(pack, "round_01")
    assert code == 0
    assert "notes.dpu is not counted" in err
    assert "x.bundle.zip is not counted" in err


def test_a_patch_of_another_run_beside_the_rounds_does_not_count(
    run, runs, new_run, command
):
    other = new_run("other", run_id="44" * 16)
    other.add(0)
    other.add(1)
    foreign = pack_round(read_round(other.path / "round_01"), counter=50).data
    (run.path / "foreign.dpu").write_bytes(foreign)
    command(pack, "round_02", "-q")
    assert counter_of(run.path / "round_02.dpu") == 2


def test_a_release_that_could_not_be_written_leaves_no_line(run, runs, command):
    (run.path / "round_01.dpu").mkdir()
    assert command(pack, "round_01")[0] == 10
    assert not (run.path / "releases.jsonl").exists()
    command(pack, "round_02", "-q")
    assert [line["round"] for line in lines_of(run)] == [2]


def test_an_interrupt_leaves_neither_a_line_nor_a_part_of_a_file(
    run, runs, command, monkeypatch
):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Files, "rename", interrupted)
        assert command(pack, "round_01")[0] == 130
    assert [path.name for path in run.path.iterdir() if path.is_file()] == []
    command(pack, "tiny", "-q")
    assert [line["round"] for line in lines_of(run)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("last", ["write", "rename"])
def test_what_a_killed_packer_left_is_packed_with_what_is_new(run, runs, command, last):
    child = os.fork()
    if child == 0:
        setattr(Files, last, lambda *_, **__: os._exit(9))
        command(pack, "round_01")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert command(pack, "tiny", "-q")[0] == 0
    assert sorted(line["round"] for line in lines_of(run)) == [0, 1, 2, 3, 4]
    names = [f"round_0{n}.dpu" for n in range(5)]
    found = {path.name for path in run.path.iterdir() if path.is_file()}
    assert found == {"releases.jsonl", *names}


def test_a_file_that_somebody_moved_away_is_not_packed_again(run, runs, command):
    command(pack, "tiny", "-q")
    (run.path / "round_02.dpu").unlink()
    assert "released already" in command(pack, "tiny")[2]


@pytest.fixture
def closed(run):
    """Somebody else's run as ``tiny``, beside a folder ``out`` that may be written."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        shutil.copytree(run.path, place / "tiny")
        (place / "out").mkdir()
        for folder in (place, place / "out"):
            folder.chmod(0o777)
        (place / "tiny").chmod(0o555)
        with somebody_else():
            yield place
        (place / "tiny").chmod(0o755)


def test_a_run_that_cannot_be_written_is_packed_elsewhere_and_says_so(closed, command):
    file = closed / "out" / "p.dpu"
    code, _, err = command(pack, closed / "tiny" / "round_01", "-o", file)
    assert (code, counter_of(file)) == (0, 1)
    assert "cannot be written: this release is not recorded" in err


def test_a_release_that_could_not_be_recorded_is_said_by_publish_too(closed, command):
    words = ("publish", closed / "tiny" / "round_01", "--to", closed / "out")
    code, _, err = command(fleet, *words)
    assert code == 0
    assert err.count("cannot be written: this release is not recorded") == 1


def test_two_packers_at_once_never_give_out_one_counter_twice(run, runs):
    command = [sys.executable, "-m", "packager", "--runs", str(runs), "-q"]
    # Each of them would be release 10: all are overtaken by it.
    with open_ledger(run.path) as ledger:
        round_ = read_round(run.path / "round_00")
        parent = parent_from(read_round(run.path / "round_04"))
        data = pack_round(round_, parent, counter=9).data
        ledger.publish(data, run.path / "back.dpu")
        started = [
            subprocess.Popen([*command, f"round_{n:02d}"], stderr=subprocess.PIPE)
            for n in (1, 2, 3)
        ]
        for process in started:  # each found the ledger taken, and waits
            assert b"waiting" in process.stderr.readline()
    for process in started:
        process.communicate()
        assert process.returncode == 0
    counters = [line["counter"] for line in lines_of(run)]
    assert counters[0] == 9
    assert sorted(counters[1:]) in ([10, 11, 12],)
    assert len({line["target"] for line in lines_of(run)}) == 4


def test_who_only_looks_never_waits(run, runs):
    with open_ledger(run.path):
        assert read_ledger(run.path).releases == []


# Signed files -------------------------------------------------------------------------


def test_a_signed_patch_is_not_lost_to_an_unsigned_one(run, runs, command, key):
    command(pack, "round_01", "--sign", key, "-q")
    path = run.path / "round_01.dpu"
    signed = path.read_bytes()
    code, _, err = command(pack, "round_01")
    assert (code, "this very file, signed by" in err) == (0, True)
    assert path.read_bytes() == signed

    code, _, err = command(pack, "round_01", "--counter", 5)
    assert code == 8
    assert "is signed by" in err
    assert "--force" in err
    assert path.read_bytes() == signed
    assert [line["counter"] for line in lines_of(run)] == [1]
    assert command(pack, "round_01", "--counter", 5, "--force")[0] == 0
    assert [len(line["signers"]) for line in lines_of(run)] == [1, 0]


def test_a_signed_bundle_is_not_lost_either(run, runs, command, key):
    command(pack, "round_00", "--bundle", "-q")
    path = run.path / "round_00.bundle.zip"
    command(patch, "sign", path, "--key", key)
    signed = path.read_bytes()
    assert command(pack, "round_00", "--bundle")[0] == 0
    assert path.read_bytes() == signed
    assert command(pack, "round_00", "--bundle", "--counter", 3)[0] == 8
    assert path.read_bytes() == signed


def test_composing_onto_a_signed_patch_is_refused(run, runs, command, key):
    for name in ("round_01", "round_02"):
        command(pack, name, "--sign", key, "-q")
    one, two = (run.path / f"round_0{n}.dpu" for n in (1, 2))
    base = run.path / "round_00" / "weights.safetensors"
    words = ("compose", one, two, "--base", base, "-o", two)
    assert command(patch, *words)[0] == 8
    assert command(patch, *words, "--force")[0] == 0
    assert [line["file"] for line in lines_of(run)][-1] == "round_02.dpu"


def test_two_who_sign_one_patch_by_packing_it_are_both_signers(
    run, runs, command, key, tmp_path
):
    other = tmp_path / "other.pem"
    other.write_bytes(encode_private(generate_key()))
    command(pack, "round_01", "--sign", key, "-q")
    path = run.path / "round_01.dpu"
    code, _, err = command(pack, "round_01", "--sign", other)
    assert (code, "their signatures are kept" in err) == (0, True)
    publics = tmp_path / "key.pub.pem", tmp_path / "other.pub.pem"
    for public, private in zip(publics, (key, other), strict=True):
        public.write_bytes(encode_public(load_private(private.read_bytes())))
    by_both = "--key", publics[0], "--key", publics[1]
    assert command(patch, "verify", path, *by_both)[0] == 0
    assert [len(line["signers"]) for line in lines_of(run)] == [1, 2]

    both = path.read_bytes()
    code, _, err = command(pack, "round_01", "--counter", 5, "--sign", key)
    assert (code, "give the signatures up with --force" in err) == (8, True)
    assert path.read_bytes() == both
    words = "--counter", 5, "--sign", key, "--force"
    assert command(pack, "round_01", *words)[0] == 0


def test_a_bundle_of_another_signer_is_not_replaced(run, runs, command, key, tmp_path):
    other = tmp_path / "other.pem"
    other.write_bytes(encode_private(generate_key()))
    command(pack, "round_00", "--bundle", "--sign", key, "-q")
    signed = (run.path / "round_00.bundle.zip").read_bytes()
    assert command(pack, "round_00", "--bundle", "--sign", other)[0] == 8
    assert (run.path / "round_00.bundle.zip").read_bytes() == signed


# A run's name -------------------------------------------------------------------------


def test_a_runs_name_packs_what_was_not_released_yet(run, runs, command):
    command(pack, "round_00", "--bundle", "-q")
    command(pack, "round_02", "-q")
    run.add(5, dict(run.deployed.items()))  # kept base
    code, out, _ = command(pack, "tiny", "--json")
    assert code == 0
    assert [r["round"] for r in json.loads(out)["packed"]] == [1, 3, 4]
    code, out, err = command(pack, "tiny")
    assert (code, out) == (0, "")
    assert "released already" in err
    run.add(6)
    command(pack, run.path, "-q")
    assert (run.path / "round_06.dpu").exists()


def test_a_runs_name_packs_the_patch_that_other_files_do_not_stand_for(
    run, runs, command
):
    command(pack, "round_00", "--bundle", "-q")  # leads from the init, as its patch
    command(pack, "round_02", "--bundle", "-q")
    command(pack, "round_03", "--from", "round_00", "-q")
    command(pack, "round_04", "-q")
    out = command(pack, "tiny", "--json")[1]
    packed = [Path(record["path"]).name for record in json.loads(out)["packed"]]
    assert packed == ["round_01.dpu", "round_02.dpu", "round_03.dpu"]


def test_a_dry_run_of_a_run_records_nothing(run, runs, command):
    assert command(pack, "tiny", "--dry-run")[0] == 0
    assert not (run.path / "releases.jsonl").exists()


def test_a_bundle_is_of_one_round(runs, command):
    code, _, err = command(pack, "tiny", "--bundle")
    assert (code, "give tiny/round_00" in err) == (2, True)


def test_a_newer_schema_is_refused_in_words(run, runs):
    (run.path / "releases.jsonl").write_text('{"schema": 2}\n{"schema": 2}\n')
    with pytest.raises(RoundError, match="schema 2, this runtime knows 1"):
        read_ledger(run.path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_ledger_that_is_no_file_is_refused_and_not_waited_for(runs, make):
    make(runs / "tiny" / "releases.jsonl")
    with pytest.raises(RoundError, match="no ordinary file"):
        read_ledger(runs / "tiny")
    with (
        pytest.raises(RoundError, match="no ordinary file"),
        open_ledger(runs / "tiny"),
    ):
        pass
