# SPDX-License-Identifier: Apache-2.0
"""The agent on real folders: what it applies, what it leaves alone, what it says."""

import json
import os
import re
import shutil
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from edge_runtime import Device
from edge_runtime.agent import agent as module
from edge_runtime.agent.agent import Agent
from edge_runtime.agent.backoff import BACKOFF_S, MAX_BACKOFF_S, MAX_BLOCKED_BACKOFF_S
from edge_runtime.agent.folder import PatchFolder
from edge_runtime.agent.status import metric_lines, read_status, status_lines
from edge_runtime.cli.main import main
from edge_runtime.errors import (
    BackendError,
    BlockedError,
    StoreError,
    TrialCutOffError,
    TrialError,
)
from edge_runtime.files import Files
from edge_runtime.formats.header import HEADER_BYTES, encode_header, parse_header
from edge_runtime.formats.signing import trust_keys
from edge_runtime.limits import limits
from edge_runtime.live.proof import encode_public
from edge_runtime.store.state import MAX_TRIES
from edge_runtime.update.repair import repair
from edge_runtime.update.trial import run_trial
from packager.build import pack_round
from packager.bundles.from_round import build_bundle
from packager.keys import generate_key
from packager.rounds.folder import read_round
from packager.signing import sign_bundle, sign_patch
from tests.crash import world


class Watch:
    """A store, a folder, a clock, and an agent that can be started again."""

    def __init__(self, path, trial=world.no_trial):
        self.folder, self.root = path / "in", path / "store"
        self.status, self.prom = self.root / "agent.json", path / "dpu.prom"
        self.folder.mkdir()
        self.trial, self.time, self.said = trial, 0.0, []

    def log(self, event, **facts):
        self.said.append((event, facts.get("file")))
        self.reason = facts.get("reason", "")

    def start(self):
        self.agent = Agent(
            lambda: Device.open(self.root, trial=lambda *a, **k: self.trial(*a, **k)),
            self.folder,
            self.log,
            metrics=self.prom,
            clock=lambda: self.time,
        )
        return self

    def put(self, name, data):
        (self.folder / name).write_bytes(data)

    def look(self):
        """Look once; return what it said."""
        self.said = []
        self.agent.look()
        return self.said

    @property
    def device(self):
        return Device.open(self.root, trial=world.no_trial)

    @property
    def round(self):
        return self.device.status()["round"]

    @property
    def errors(self):
        """Why files are refused for good, as the status file says."""
        found = read_status(self.root)["files"]
        return {name: file["error"] for name, file in found.items() if file["error"]}


@pytest.fixture
def watch(tmp_path):
    watch = Watch(tmp_path)
    world.install(watch.root)
    return watch.start()


def name(number):
    return f"round_{number:02d}.dpu"


# Getting there ---------------------------------------------------------------------


def test_a_chain_that_arrives_in_any_order_is_applied_in_the_right_one(watch):
    watch.put(name(3), world.patch(2, 3))
    watch.put(name(2), world.patch(1, 2))
    assert watch.look() == [("waiting", name(2)), ("waiting", name(3))]
    assert re.fullmatch(r"it leads from .*; nothing here .* round 0", watch.reason)
    watch.put(name(1), world.patch(0, 1))
    assert watch.look() == [("applied", name(n)) for n in (1, 2, 3)]
    assert watch.device.verify() == world.weights(3).fingerprint


def test_nothing_is_said_or_written_while_nothing_changes(watch):
    watch.put(name(1), world.patch(0, 1))
    watch.put("bad.dpu", b"something else")
    watch.look(), watch.look()

    def changes():  # and not when files were read, as this test does
        return {path: path.stat().st_ctime_ns for path in watch.root.rglob("*")}

    before = changes()
    for _ in range(3):
        assert watch.look() == []
    assert changes() == before


def test_a_skipping_patch_is_taken_and_what_it_passes_is_named(watch):
    for parent, number in ((0, 1), (1, 2), (0, 2)):
        watch.put(f"{parent}-{number}.dpu", world.patch(parent, number))
    assert watch.look() == [("applied", "0-2.dpu"), ("passed", "0-1.dpu")]
    assert "has already been at 2" in watch.reason


def test_patches_stay_where_they_are(watch):
    for number in (1, 2):
        watch.put(name(number), world.patch(number - 1, number))
    watch.put("0-2.dpu", world.patch(0, 2))
    watch.put("bad.dpu", b"not a patch")
    before = {path.name: path.stat() for path in watch.folder.iterdir()}
    watch.look(), watch.look()
    after = {path.name: path.stat() for path in watch.folder.iterdir()}
    assert {n: s.st_ctime_ns for n, s in after.items()} == {
        n: s.st_ctime_ns for n, s in before.items()
    }


def test_other_files_are_left_alone(watch):
    patch = world.patch(0, 1)
    watch.put("round_01.dpu.part", patch)
    watch.put(".round_01.dpu", patch)
    watch.put("notes.txt", patch)
    assert watch.look() == []
    assert watch.round == 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.mkdir(), "directory"),
        (lambda path: path.symlink_to("round_01"), "a link, expected the file itself"),
        (os.mkfifo, "no ordinary file"),
    ],
)
@pytest.mark.parametrize("name", ["link.dpu", "1.root.json"])
def test_what_has_a_patchs_name_and_is_no_file_is_told(watch, name, make, words):
    watch.put("round_01", world.patch(0, 1))
    make(watch.folder / name)
    assert watch.look() == [("waiting", name)]
    assert words in watch.reason
    assert watch.round == 0


def test_a_failure_that_nobody_thought_of_is_told_and_tried_again(watch):
    def fail(*_, **__):
        raise MemoryError

    watch.put(name(1), world.patch(0, 1))
    watch.trial = fail
    with pytest.raises(MemoryError):
        watch.look()
    assert watch.said == [("failed", None)]
    assert "MemoryError" in read_status(watch.root)["failing"]
    watch.trial, watch.time = world.no_trial, MAX_BACKOFF_S
    assert watch.look() == [("applied", name(1)), ("recovered", None)]


def test_what_another_process_installs_is_seen(watch):
    watch.put(name(2), world.patch(1, 2))
    watch.look()
    watch.device.update(world.patch(0, 1))
    assert watch.look() == [("applied", name(2))]


# What is not whole -----------------------------------------------------------------


def test_a_download_is_waited_for_until_it_is_whole(watch):
    data = world.patch(0, 1)
    said = []
    for end in (0, 10, 150, 151, len(data) - 1):
        watch.put(name(1), data[:end])
        said += watch.look()
    assert said == [("waiting", name(1))]
    watch.put(name(1), data)
    assert watch.look() == [("applied", name(1))]
    assert watch.errors == {}


def test_a_download_into_a_file_of_full_size_is_waited_for(watch):
    data = world.patch(0, 1)
    watch.put(name(1), data[:200].ljust(len(data), b"\0"))
    assert watch.look() == [("waiting", name(1))]
    watch.put(name(1), data)
    assert watch.look() == [("applied", name(1))]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "longer", "foreign"])
def test_a_bad_file_is_refused_once_and_looked_at_again_when_replaced(watch, damage):
    data = world.patch(0, 1)
    bad = {
        "truncated": data[:-1],
        "flipped": data[:-1] + bytes([data[-1] ^ 1]),
        "longer": data + b"\0",
        "foreign": b"PK\3\4 something else",
    }[damage]
    watch.put(name(1), bad)
    assert watch.look() == [("waiting", name(1))]
    assert watch.look() == [("refused", name(1))]
    assert watch.look() == []
    watch.start()  # remembered by the next agent too
    assert watch.look() == []
    watch.put(name(1), data)
    assert watch.look() == [("applied", name(1))]
    assert watch.errors == {}


def test_a_bad_file_does_not_hold_up_the_others(watch):
    watch.put(name(1), world.patch(0, 1))
    watch.put("a.dpu", b"bad")
    assert ("applied", name(1)) in watch.look()


def test_a_patch_for_another_network_is_refused(watch, new_run):
    run = new_run("other")
    run.add(0)
    watch.put(name(1), pack_round(read_round(run.add(1))).data)
    assert watch.look() == [("refused", name(1))]
    assert "another network" in watch.reason
    assert watch.errors == {name(1): "WrongModelError"}


def zero_recipe(root):
    path = root / "model" / "init.json"
    path.write_bytes(bytes(path.stat().st_size))


def exchange_recipe(root):
    path = root / "model" / "init.json"
    path.write_text(path.read_text().replace("[64, 32]", "[32, 64]"))


def lose_recipe(root):
    (root / "model" / "init.json").unlink()


def exchange_graph(root):
    (root / "model" / "graph.onnx").unlink()
    (root / "model" / "graph.onnx").write_bytes(b"another")


def break_run(root):
    (root / "model" / "run.json").write_bytes(b"{")


def cut_weights(root):
    path = root / "current" / "weights.safetensors"
    os.truncate(path, path.stat().st_size - 8)


DAMAGE = [zero_recipe, exchange_recipe, lose_recipe, exchange_graph, break_run]


@pytest.mark.parametrize("damage", [*DAMAGE, cut_weights])
def test_no_release_is_refused_for_what_is_damaged_on_this_device(watch, damage):
    damage(watch.root)
    watch.put(name(1), world.patch(0, 1))
    watch.put("other.dpu", with_other_model(world.patch(0, 1)))
    with pytest.raises(StoreError, match="'dpu-edge repair BUNDLE'"):
        watch.look()
    assert name(1) not in watch.errors
    (watch.root / "model" / "run.json").unlink(missing_ok=True)
    repair(watch.device, world.bundle())
    watch.start()
    assert ("applied", name(1)) in watch.look()
    assert watch.errors == {"other.dpu": "WrongModelError"}


def test_a_pipe_that_takes_the_name_of_an_opened_file_is_never_read(watch, monkeypatch):
    opened = module.open_regular

    def exchange(path):
        file = opened(path)
        path.unlink()
        os.mkfifo(path)
        return file

    monkeypatch.setattr(module, "open_regular", exchange)
    watch.put(f"{'ab' * 32}.zip", world.bundle())
    watch.look()
    assert watch.errors == {}


def test_a_pipe_that_takes_the_name_of_a_key_list_is_never_read(watch, monkeypatch):
    scan, path = PatchFolder.scan, watch.folder / "1.root.json"

    def exchange(folder):
        seen = scan(folder)
        path.unlink()
        os.mkfifo(path)
        return seen

    monkeypatch.setattr(PatchFolder, "scan", exchange)
    path.write_bytes(b"{}")
    assert watch.look() == [("waiting", path.name)]
    assert "no ordinary file" in watch.reason


def test_what_was_over_a_limit_is_looked_at_again_where_more_is_accepted(
    watch, monkeypatch
):
    watch.put(name(1), world.patch(0, 1))
    try:
        for accepted, verdicts in (
            ("100", ["waiting", "refused"]),
            ("100", []),
            ("1MB", ["applied"]),
        ):
            monkeypatch.setenv("DPU_LIMITS", f"patch_bytes={accepted}")
            limits.cache_clear()
            found = watch.start().look() + watch.look()
            assert [verdict for verdict, _ in found] == verdicts
    finally:
        limits.cache_clear()


def test_another_runtime_judges_anew(watch, monkeypatch):
    watch.put("bad.dpu", b"bad")
    watch.look(), watch.look()
    assert watch.start().look() == []
    monkeypatch.setattr("edge_runtime.__version__", "0.0.1")
    assert watch.start().look() + watch.look() == [
        ("waiting", "bad.dpu"),
        ("refused", "bad.dpu"),
    ]


def with_other_model(data):
    return world.with_header(data, replace(world.header_of(data), model="a" * 64))


# Trust and releases ----------------------------------------------------------------


def test_only_what_the_trusted_key_signed_is_applied(tmp_path):
    ours, strangers = generate_key(), generate_key()
    watch = Watch(tmp_path)
    bundle = sign_bundle(world.bundle(), ours)
    trust = trust_keys({"ours": encode_public(ours)})
    Device.install(watch.root, bundle, trust=trust, trial=world.no_trial)
    watch.start()
    patch = world.patch(0, 1)
    watch.put("unsigned.dpu", patch)
    watch.put("stranger.dpu", sign_patch(patch, strangers))
    assert watch.look() == [("refused", "stranger.dpu"), ("refused", "unsigned.dpu")]
    watch.put("unsigned.dpu", sign_patch(patch, ours))
    assert watch.look() == [("applied", "unsigned.dpu")]
    assert watch.errors == {"stranger.dpu": "TrustError"}


def test_a_replayed_release_is_passed(watch):
    for number in (1, 2):
        watch.put(name(number), world.patch(number - 1, number))
    watch.look()
    watch.put("replayed.dpu", world.patch(0, 1))  # was active: nothing to say
    watch.put("older.dpu", world.patch(2, 0))
    watch.put("rival.dpu", world.patch(2, 1))
    assert watch.look() == []
    assert watch.round == 2


def test_a_pinned_store_is_left_alone_until_it_is_not(watch):
    watch.device.pin()
    watch.put(name(1), world.patch(0, 1))
    assert watch.look() == [("held", name(1))]
    assert "pinned to round 0" in watch.reason
    assert watch.look() == []
    watch.device.pin(held=False)
    assert watch.look() == [("applied", name(1))]


def test_a_rollback_is_respected_until_something_newer_comes(watch):
    for number in (1, 2):
        watch.put(name(number), world.patch(number - 1, number))
    watch.look()
    watch.device.rollback()
    assert watch.look() == [("held", name(2))]
    assert "rolled back from round 2" in watch.reason
    assert watch.round == 1
    watch.put(name(3), world.patch(2, 3))
    assert watch.look()[0] == ("applied", name(3))


# Bad models ------------------------------------------------------------------------


def test_a_signed_but_bad_model_is_tried_once_and_gone_around(watch):
    tried = []

    def trial(slot, *_, **__):
        tried.append(slot.name)
        if slot.name == world.weights(1).fingerprint:
            raise TrialError("outputs that are not finite")

    watch.trial = trial
    watch.put(name(1), world.patch(0, 1))
    watch.put(name(2), world.patch(1, 2))
    assert watch.look() == [("refused", name(1)), ("waiting", name(2))]
    watch.put("again.dpu", world.patch(0, 1))  # the same release under another name
    watch.start()
    assert watch.look() == [("refused", "again.dpu")]
    assert len(tried) == 1
    watch.put("0-2.dpu", world.patch(0, 2))
    assert ("applied", "0-2.dpu") in watch.look()
    assert watch.device.verify() == world.weights(2).fingerprint
    assert watch.errors == {name(1): "TrialError"}


def test_a_device_without_a_runtime_tries_again_and_refuses_nothing(watch):
    def no_runtime(*_, **__):
        raise BackendError("onnxruntime cannot be imported")

    watch.trial = no_runtime
    watch.put(name(1), world.patch(0, 1))
    for _ in range(MAX_TRIES + 1):
        with pytest.raises(BackendError):
            watch.look()
        watch.time += MAX_BACKOFF_S
    assert watch.errors == {}
    watch.trial = world.no_trial
    assert ("applied", name(1)) in watch.look()


def test_what_this_device_cannot_do_is_tried_less_and_less_often(watch):
    tried = []

    def no_memory(*_, **__):
        tried.append(watch.time)
        raise BlockedError("not enough memory")

    watch.trial = no_memory
    watch.put(name(1), world.patch(0, 1))
    with pytest.raises(BlockedError):
        watch.look()
    assert ("blocked", name(1)) in watch.said
    assert watch.look() == []  # what the store notes of it is no reason to look
    while watch.time < 2 * 24 * 3600:
        watch.time += BACKOFF_S
        with suppress(BlockedError):
            watch.look()
    waits = [late - early for early, late in pairwise(tried)]
    assert waits[:3] == [BACKOFF_S, 2 * BACKOFF_S, 4 * BACKOFF_S]
    assert waits == sorted(waits)
    assert waits[-1] == MAX_BLOCKED_BACKOFF_S
    (line,) = (li for li in status_lines(read_status(watch.root)) if "round_01" in li)
    assert "by this device: not enough memory" in line
    assert watch.errors == {}
    assert watch.device.store.state.tries == {}
    watch.trial = world.no_trial
    watch.time += MAX_BLOCKED_BACKOFF_S
    assert ("applied", name(1)) in watch.look()


def test_a_trial_that_crashed_is_tried_again_after_a_while(watch):
    def crashed(*_, **__):
        raise TrialCutOffError("ended by SIGSEGV")

    watch.trial = crashed
    watch.put(name(1), world.patch(0, 1))
    with pytest.raises(TrialCutOffError):
        watch.look()
    watch.trial = world.no_trial
    watch.time += MAX_BACKOFF_S - 1
    assert watch.look() == []
    watch.time += 1
    assert ("applied", name(1)) in watch.look()


def test_a_trial_that_always_crashes_is_given_up(watch):
    def crashed(*_, **__):
        raise TrialCutOffError("ended by SIGSEGV")

    watch.trial = crashed
    watch.put(name(1), world.patch(0, 1))
    for _ in range(MAX_TRIES):
        with pytest.raises(TrialCutOffError):
            watch.look()
        watch.time += MAX_BACKOFF_S
    assert ("refused", name(1)) in watch.look()
    assert watch.look() == []


def test_a_patch_with_a_wrong_result_is_staged_once(watch):
    """Correctly signed, but not what the packager says: never tried again."""
    good, other = world.patch(0, 1), world.patch(0, 2)
    header = parse_header(good[:HEADER_BYTES])[0]
    body = other[HEADER_BYTES + 2 :]
    watch.put(name(1), encode_header(header, body) + b"\0\0" + body)
    assert watch.look() == [("refused", name(1))]
    assert watch.errors == {name(1): "VerificationError"}
    watch.start()
    assert watch.look() == []


def test_a_real_model_that_computes_nan_is_rolled_back_by_itself(tmp_path, new_run):
    run = new_run()
    round_0 = run.add(0)
    arrays = run.changed(number=1)
    arrays["fc2.bias"][:] = np.nan
    watch = Watch(tmp_path)
    watch.trial = run_trial
    Device.install(watch.root, build_bundle(read_round(round_0)).data)
    watch.put(name(1), pack_round(read_round(run.add(1, arrays))).data)
    watch.start()
    assert watch.look() == [("refused", name(1))]
    assert "not finite" in watch.reason
    assert watch.round == 0
    assert watch.look() == []


def test_a_trial_that_ends_everything_each_time_is_given_up(watch):
    class KilledError(BaseException):
        pass

    def kill(*_, **__):
        raise KilledError

    watch.trial = kill
    watch.put(name(1), world.patch(0, 1))
    for _ in range(MAX_TRIES):
        with pytest.raises(KilledError):
            watch.start().look()
    assert watch.start().look() == [("refused", name(1))]
    assert "cut off in 3 of them" in watch.reason
    assert watch.look() == []


# Failures --------------------------------------------------------------------------


def test_a_hook_that_refuses_is_asked_again_later_and_less_often(watch):
    folder = watch.root / "hooks" / "before-apply.d"
    folder.mkdir(parents=True)
    hook, asked = folder / "battery", watch.root.parent / "asked"
    hook.write_text(f"#!/bin/sh\necho >> {asked}; echo low battery; exit 1\n")
    hook.chmod(0o755)
    watch.put(name(1), world.patch(0, 1))
    assert watch.look() == [("held", name(1))]
    assert "low battery" in watch.reason
    waits = (0, BACKOFF_S, BACKOFF_S, 2 * BACKOFF_S, 2 * BACKOFF_S)
    for wait, times in zip(waits, (1, 2, 2, 3, 3), strict=True):
        watch.time += wait
        watch.look()
        assert asked.read_text().count("\n") == times
    hook.unlink()
    watch.time += 4 * BACKOFF_S
    assert watch.look() == [("applied", name(1))]


def test_a_failure_is_said_once_and_so_is_its_end(watch):
    shutil.rmtree(watch.folder)
    said = []
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            watch.look()
        said += watch.said
    assert said == [("failed", None)]
    model = ("model", world.MODEL)
    assert parse(watch.prom.read_text())["dpu_edge_failing", model] == 1
    watch.folder.mkdir()
    watch.put(name(1), world.patch(0, 1))
    assert watch.look() == [("applied", name(1)), ("recovered", None)]
    assert parse(watch.prom.read_text())["dpu_edge_failing", model] == 0


def test_a_store_in_use_is_tried_again_and_new_files_are_not_kept_waiting(watch):
    watch.put(name(1), world.patch(0, 1))
    with watch.device.store.lock(), pytest.raises(StoreError, match="another process"):
        watch.look()
    assert watch.look() == []  # backing off
    watch.time += BACKOFF_S
    assert watch.look() == [("applied", name(1)), ("recovered", None)]


def test_a_file_that_cannot_be_read_does_not_hold_up_the_others(watch, monkeypatch):
    opened = module.open_regular

    def deny(path):
        if path.name == name(1):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path)

    watch.put(name(1), world.patch(0, 1))
    watch.put("0-2.dpu", world.patch(0, 2))
    with monkeypatch.context() as patched:
        patched.setattr(module, "open_regular", deny)
        assert watch.look() == [("waiting", name(1)), ("applied", "0-2.dpu")]
        assert watch.look() == []
    watch.time += 2 * BACKOFF_S
    assert watch.look() == [("passed", name(1))]


def test_a_status_file_that_cannot_be_written_does_not_stop_updates(watch):
    watch.prom = watch.root / "missing" / "dpu.prom"
    watch.start()
    watch.put(name(1), world.patch(0, 1))
    with pytest.raises(FileNotFoundError):
        watch.look()
    assert watch.round == 1


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"schema": 99}', b"\xff"])
def test_a_status_file_that_a_power_cut_left_behind_is_no_problem(watch, data):
    watch.status.write_bytes(data)
    watch.start()
    watch.put(name(1), world.patch(0, 1))
    assert watch.look() == [("applied", name(1))]


def test_another_model_in_the_store_makes_it_forget(watch, tmp_path, new_run):
    run = new_run()
    round_0 = read_round(run.add(0))
    watch.put(name(1), pack_round(read_round(run.add(1))).data)
    assert watch.look() == [("refused", name(1))]
    known = (watch.root / "agent.json").read_bytes()
    shutil.rmtree(watch.root)
    watch.root.mkdir()
    Device.install(watch.root, build_bundle(round_0).data, trial=world.no_trial)
    (watch.root / "agent.json").write_bytes(known)
    assert watch.look() == [("applied", name(1))]


# What it tells ---------------------------------------------------------------------

SAMPLE = re.compile(r"([a-z_]+)(?:\{(.*)\})? (-?[0-9.]+(?:e[+-]?[0-9]+)?)")
LABEL = re.compile(r'([a-z_]+)="([^"\\\n]*)"')


def parse(text):
    """Parse the text format strictly: TYPE, then the samples of each metric."""
    assert text.endswith("\n")
    samples, metric, typed = {}, None, set()
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, metric, kind = line.split(" ")
            assert metric not in typed
            typed.add(metric)
            assert kind == "gauge"
        else:
            sample, labels, value = SAMPLE.fullmatch(line).groups()
            assert sample == metric
            found = dict(LABEL.fullmatch(part).groups() for part in _split(labels))
            key = (sample, *sorted(found.items()))
            assert key not in samples
            samples[key] = float(value)
    return samples


def _split(labels):
    return labels.split(",") if labels else []


def test_metrics_are_what_prometheus_reads(watch):
    watch.put(name(1), world.patch(0, 1))
    watch.put("foreign.dpu", b"bad")
    watch.put("later.dpu", world.patch(5, 6))
    watch.look(), watch.look()
    samples = parse(watch.prom.read_text())
    weights = world.weights(1).fingerprint
    model = ("model", world.MODEL)
    assert samples["dpu_edge_installed_info", ("fingerprint", weights), model] == 1
    assert samples["dpu_edge_round", model] == 1
    counts = {"applied": 1, "waiting": 1, "refused": 1, "held": 0, "passed": 0}
    for verdict, number in counts.items():
        assert samples["dpu_edge_patches", model, ("verdict", verdict)] == number
    assert samples["dpu_edge_last_success_timestamp_seconds", model] > 1.6e9
    assert not any(
        key[0].startswith("dpu_edge_pinned") and v for key, v in samples.items()
    )


def test_what_fails_is_remembered_over_a_restart(watch):
    shutil.rmtree(watch.folder)
    with pytest.raises(FileNotFoundError):
        watch.look()
    watch.folder.mkdir()
    assert watch.start().look() == [("recovered", None)]


def test_a_file_name_cannot_write_on_the_terminal_of_status(watch):
    watch.put("a\n\x1b[2Jpinned.dpu", b"not a patch")
    watch.look()
    lines = list(status_lines(read_status(watch.root)))
    assert [line for line in lines if not line.isprintable()] == []
    assert any(r" a\n\x1b[2Jpinned.dpu: " in line for line in lines)


def test_metrics_never_replace_what_is_no_ordinary_file(watch):
    os.mkfifo(watch.prom)
    with pytest.raises(OSError, match="no ordinary file"):
        watch.look()
    assert watch.prom.is_fifo()


def test_a_fresh_agent_has_metrics_of_every_name(watch):
    watch.look()
    record = json.loads(watch.status.read_text())
    names = {key[0] for key in parse("\n".join(metric_lines(record)) + "\n")}
    assert len(names) == 8


def test_no_sample_of_one_model_on_a_board_is_one_of_another(new_run, tmp_path):
    """Of equal ones, the collector that reads both files drops the second."""
    found = []
    for name in ("cam", "mic"):
        run = new_run(name, run_id=name.encode().hex() * 5 + "00")
        run.add(0)
        bundle = build_bundle(read_round(run.path / "round_00"))
        folder = tmp_path / f"board-{name}"
        folder.mkdir()
        Device.install(folder / "store", bundle.data, trial=world.no_trial)
        watch = Watch(folder).start()
        watch.look()
        found.append(parse(watch.prom.read_text()).keys())
    assert len(found[0]) == len(found[1]) > 10
    assert not found[0] & found[1]


def test_a_name_that_holds_what_metrics_quote_is_one_label(new_run, tmp_path):
    run = new_run('cam "A" \\ 2', run_id="ab" * 16)
    run.add(0)
    bundle = build_bundle(read_round(run.path / "round_00"))
    Device.install(tmp_path / "store", bundle.data, trial=world.no_trial)
    watch = Watch(tmp_path).start()
    watch.look()
    (info,) = (line for line in watch.prom.read_text().splitlines() if "{f" in line)
    assert info.endswith(r',name="cam \"A\" \\ 2"} 1')
    assert read_status(watch.root)["installed"]["name"] == run.path.name


def test_each_line_of_a_log_names_the_run(new_run, tmp_path, command):
    run = new_run("door camera", run_id="ab" * 16)
    run.add(0)
    data = build_bundle(read_round(run.path / "round_00")).data
    Device.install(tmp_path / "store", data, trial=world.no_trial)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.dpu").write_bytes(b"bad")
    call = ("--store", tmp_path / "store", "agent", tmp_path / "in", "--once")
    _, _, err = command(main, *call)
    assert 'event=waiting name="door camera" file=x.dpu' in err
    _, out, _ = command(main, "--store", tmp_path / "store", "status", "--json")
    assert json.loads(out)["name"] == "door camera"


def test_a_name_that_cannot_be_read_stops_no_update(watch):
    (watch.root / "model" / "run.json").write_bytes(b"{")
    watch.look()
    assert "name" not in read_status(watch.root)["installed"]


def test_a_reader_never_sees_half_a_status_file(watch, monkeypatch):
    written = []
    write = Files.write

    def seen(files, path, chunks, **options):
        written.append(path)
        write(files, path, chunks, **options)

    monkeypatch.setattr(Files, "write", seen)
    watch.put(name(1), world.patch(0, 1))
    watch.look()
    own = [path for path in written if path.suffix == ".new"]
    assert {path.parent for path in own} == {watch.root, watch.prom.parent}
    assert not {watch.status, watch.prom} & set(written)
    assert not any(path.exists() for path in own)
