# SPDX-License-Identifier: Apache-2.0
"""From a device's proof to the server's verdict, with real processes that predict."""

import errno
import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import edge_runtime.inference.session
import edge_runtime.live.entries
import edge_runtime.live.store_predictor
from edge_runtime import Device, RunOptions, Store, make_proof
from edge_runtime.cli.main import main as edge
from edge_runtime.formats.model_folder import WEIGHTS_NAME
from edge_runtime.inference.session import SwapPolicy
from edge_runtime.limits import Limits
from edge_runtime.live.entries import Status, measure, read_entries
from edge_runtime.live.proof import device_key, read_key
from edge_runtime.live.shared import canonical, public_key
from packager.build import pack_round
from packager.bundles.from_round import build_bundle
from packager.check_proof import differing
from packager.cli.pack import patch
from packager.rounds.folder import read_round
from tests.crash import world
from tests.crash.traced import Failing
from tests.users import somebody_else

ROOT = Path(__file__).parents[2]
NONCE = "5f2a"
INPUTS = np.ones((1, 12), np.uint8)

SERVE = """
import os, sys
import numpy as np
from edge_runtime import Device, RunOptions
predictor = Device.open(sys.argv[1]).predictor(RunOptions(backend=sys.argv[2]))
if sys.argv[3:] and os.fork():
    os.wait()
    sys.exit()
inputs = np.ones((1, 12), np.uint8)
print("ready", os.getpid(), flush=True)
for line in sys.stdin:
    if line == "refresh\\n":
        predictor.refresh()
    print(predictor.predict(inputs).tobytes().hex(), flush=True)
"""


class Server:
    """Another process that answers with the weights of a store."""

    def __init__(self, root, *extra, backend="onnxruntime"):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(root), backend, *extra],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.pid = int(self.process.stdout.readline().split()[1])

    def ask(self, what="predict"):
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def stop(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def device(run, tmp_path):
    bundle = build_bundle(read_round(run.path / "round_00")).data
    return Device.install(tmp_path / "store", bundle, trial=lambda *_, **__: None)


@pytest.fixture
def serve(device):
    started = []

    def start(*extra, **options):
        started.append(Server(device.store.root, *extra, **options))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def check(device, run, command, tmp_path):
    """Ask for a proof and judge it: ``check(*options) -> (code, record)``."""

    def check(*options, tensors=False):
        path = tmp_path / "proof.json"
        path.write_bytes(make_proof(device.store, NONCE, tensors=tensors))
        words = ("--nonce", NONCE, "--runs", run.path.parent, *options, "--json")
        code, out, err = command(patch, "check-proof", path, *words)
        return code, json.loads(out or err)

    return check


def update(device, run, number=1):
    device.update(pack_round(read_round(run.path / f"round_{number:02d}")).data)


def parts(record):
    return {part["name"]: part for part in record["parts"]}


def weights_path(device):
    return device.store.slot_folder(device.store.state.active) / WEIGHTS_NAME


def flip(path, at):
    """Change one byte in place, as bad memory or a worn card does."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


# Live predictors ----------------------------------------------------------------------


def test_two_processes_and_the_disk_are_equal_to_the_round(check, serve):
    first, second = serve(), serve(backend="numpy")
    code, record = check()
    assert (code, record["verdict"]) == (0, "equal")
    assert record["expected"]["name"] == "tiny/round_00"
    names = ["disk", f"process {first.pid}", f"process {second.pid}"]
    assert sorted(parts(record)) == sorted(names)


def test_a_process_that_stays_behind_is_named_until_it_moves(check, device, run, serve):
    behind, ahead = serve(), serve()
    update(device, run)
    ahead.ask("refresh")
    code, record = check()
    assert (code, record["verdict"]) == (5, "different")
    found = parts(record)
    assert found["disk"]["verdict"] == "equal"
    assert found[f"process {ahead.pid}"]["verdict"] == "equal"
    assert "still runs tiny/round_00" in found[f"process {behind.pid}"]["reason"]
    behind.ask("refresh")
    assert check()[0] == 0


def test_a_killed_process_counts_no_more(check, device, serve):
    killed, other = serve(), serve()
    killed.process.send_signal(signal.SIGKILL)
    killed.process.wait()
    assert len(list(device.store.root.glob("live/*"))) == 2
    code, record = check()
    assert (code, set(parts(record))) == (0, {"disk", f"process {other.pid}"})
    assert len(list(device.store.root.glob("live/*"))) == 1


def test_a_predictor_that_is_gone_tells_nothing(device):
    predictor = device.predictor()
    assert len(list(read_entries(device.store))) == 1
    del predictor
    assert list(device.store.root.glob("live/*")) == []


def test_what_nobody_holds_is_not_believed_whatever_its_pid(device):
    """Of another boot, or of a process whose PID was given to this one."""
    predictor = device.predictor()
    path = next(device.store.root.glob("live/*"))
    left = path.with_name(f"{os.getpid()}-1.json")
    left.write_bytes(path.read_bytes())
    assert [entry["pid"] for entry in read_entries(device.store)] == [os.getpid()]
    assert list(device.store.root.glob("live/*")) == [path]
    del predictor


@pytest.mark.parametrize("does", ["removes", "holds"])
def test_a_reader_that_comes_before_the_lock_loses_nobody(device, monkeypatch, does):
    """It finds a file that nobody holds yet."""
    flock, seen = fcntl.flock, []

    def late(file, how):
        if how & fcntl.LOCK_EX and not seen:
            (path,) = device.store.root.glob("live/*")
            seen.append(open(path, "rb"))
            if does == "removes":
                assert list(read_entries(device.store)) == []
            else:
                flock(seen[0], fcntl.LOCK_SH)
        return flock(file, how)

    monkeypatch.setattr(edge_runtime.live.entries.fcntl, "flock", late)
    predictor = device.predictor()
    seen[0].close()
    (entry,) = read_entries(device.store)
    assert entry["status"] == "loaded"
    assert len(list(device.store.root.glob("live/*"))) == 1
    del predictor


def test_an_entry_that_cannot_be_read_makes_the_answer_unclear(check, device):
    predictor = device.predictor()
    next(device.store.root.glob("live/*")).write_bytes(b"{")
    code, record = check()
    assert (code, record["verdict"]) == (5, "unclear")
    assert "nothing that can be read" in parts(record)["process 0"]["reason"]
    del predictor


@pytest.mark.parametrize(
    "make", [lambda path: path.symlink_to("/mnt/gone/live"), os.mkfifo]
)
def test_entries_that_cannot_be_listed_make_the_answer_unclear(check, device, make):
    predictor = device.predictor()
    live = device.store.root / "live"
    live.rename(live.with_name("away"))
    make(live)
    code, record = check()
    assert (code, record["verdict"]) == (5, "unclear")
    assert "nothing that can be read" in parts(record)["process 0"]["reason"]
    del predictor


def test_entries_in_a_folder_that_is_closed_to_this_user_are_unknown():
    with tempfile.TemporaryDirectory() as name:  # pytest's own is closed to nobody
        store = Store(name)
        store.root.chmod(0o755)
        (store.root / "live").mkdir(mode=0o700 if os.geteuid() == 0 else 0)
        with somebody_else():
            assert list(read_entries(store)) == [{"pid": 0, "status": Status.UNKNOWN}]


def test_more_entries_than_are_looked_at_make_the_answer_unclear(
    check, device, monkeypatch
):
    predictors = [device.predictor() for _ in range(2)]
    assert check()[1]["verdict"] == "equal"
    monkeypatch.setattr(
        edge_runtime.live.entries, "limits", lambda: Limits(live_files=1)
    )
    assert check()[1]["verdict"] == "unclear"
    del predictors


def test_whatever_the_umask_other_users_may_list_what_is_live(device):
    before = os.umask(0o077)
    try:
        predictor = device.predictor()
    finally:
        os.umask(before)
    assert (device.store.root / "live").stat().st_mode & 0o777 == 0o755
    del predictor


def test_a_reader_meets_whole_entries_or_none(device):
    """While the weights change as fast as they can."""
    predictor = device.predictor()
    path = next(device.store.root.glob("live/*"))
    folder = predictor.folder
    source = measure(folder)
    stop, found = threading.Event(), set()

    def write():
        while not stop.is_set():
            predictor._entry.declare(folder, Status.LOADING)
            predictor._entry.declare(folder, Status.LOADED, source)

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(3000):
        (entry,) = read_entries(device.store)
        found.add((entry["status"], entry.get("fingerprint")))
    stop.set()
    writer.join()
    whole = {("loading", None), ("loaded", source["fingerprint"])}
    assert found <= whole | {("unknown", None)}
    assert path.exists()


@pytest.mark.parametrize("status", [Status.LOADING, Status.EMPTY])
def test_a_process_between_two_sessions_makes_the_answer_unclear(check, device, status):
    predictor = device.predictor()
    predictor._entry.declare(predictor.folder, status)
    assert (check()[0], check()[1]["verdict"]) == (5, "unclear")


def test_weights_that_change_while_they_are_loaded_are_not_vouched_for(
    check, device, monkeypatch
):
    make = edge_runtime.inference.session.make_session

    def tampered(folder, *rest):
        session = make(folder, *rest)
        path = folder / WEIGHTS_NAME
        copy = path.read_bytes()
        path.unlink()
        path.write_bytes(copy)  # the same bytes, another file
        return session

    monkeypatch.setattr(edge_runtime.inference.session, "make_session", tampered)
    predictor = device.predictor()
    (entry,) = read_entries(device.store)
    assert entry["status"] == "changed"
    assert check()[1]["verdict"] == "unclear"
    del predictor


def test_a_swap_that_fails_tells_of_the_weights_that_stay(device, run, check):
    predictor = device.predictor()
    update(device, run)
    slot = device.store.slot_folder(device.store.state.active)
    slot.rename(slot.with_name("away"))
    with pytest.raises(Exception, match="cannot be read"):
        predictor.refresh()
    slot.with_name("away").rename(slot)
    found = parts(check()[1])[f"process {os.getpid()}"]
    assert (found["verdict"], "round_00" in found["reason"]) == ("different", True)
    predictor.refresh()
    assert check()[0] == 0


def test_a_disk_that_refuses_stops_no_answers(check, device, run, serve, caplog):
    (device.store.root / "live").write_bytes(b"no folder")
    server, predictor = serve(), device.predictor()
    assert "cannot vouch for this process" in caplog.text
    assert server.ask() == predictor.predict(INPUTS).tobytes().hex()
    # Nothing is told, but the kernel knows who maps the weights.
    code, record = check()
    assert (code, record["verdict"]) == (5, "unclear")
    for pid in (server.pid, os.getpid()):
        assert "does not tell" in parts(record)[f"process {pid}"]["reason"]
    (device.store.root / "live").unlink()
    server.ask("refresh")
    predictor.refresh()
    assert check()[0] == 0


@pytest.mark.parametrize("policy", ["availability", "frugal"])
def test_no_call_waits_for_a_hash(device, run, monkeypatch, policy):
    predictor = device.predictor(RunOptions(policy=SwapPolicy(policy)))
    answers, hash_slot = [], edge_runtime.live.store_predictor.measure

    def ask(folder):
        answers.append(predictor.predict(INPUTS).tobytes())  # would wait for ever
        return hash_slot(folder)

    monkeypatch.setattr(edge_runtime.live.store_predictor, "measure", ask)
    update(device, run)
    assert predictor.refresh()
    old, new = answers
    assert old != new


def test_a_forked_child_is_seen_though_it_tells_nothing(check, serve):
    child = serve("fork")
    code, record = check()
    assert (code, parts(record)[f"process {child.pid}"]["verdict"]) == (5, "unclear")
    os.kill(child.pid, signal.SIGKILL)


def test_every_round_of_a_life_is_proved(check, device, run):
    """Rollbacks and a second predictor on the way."""
    predictors = [device.predictor(), device.predictor()]
    for number in range(1, 9):
        if number > 1:
            run.add(number)
        update(device, run, number)
        assert all(p.refresh() for p in predictors)
        code, record = check("--round", f"tiny/round_{number:02d}", tensors=number % 2)
        assert (code, len(record["parts"])) == (0, 3)
    device.rollback()
    assert parts(check()[1])["disk"]["verdict"] == "equal"
    assert check()[0] == 5
    assert all(p.refresh() for p in predictors)
    assert check()[0] == 0
    assert check("--round", "tiny/round_08")[0] == 5


# The disk -----------------------------------------------------------------------------


def test_any_byte_that_changes_is_named_with_its_tensor(run, tmp_path):
    """Each byte of the file, the header's too; and equal bytes are always equal."""
    weights = read_round(run.path / "round_00").weights
    layout, path = weights.layout, tmp_path / WEIGHTS_NAME
    path.write_bytes(weights.data)
    path.with_name("graph.onnx").write_bytes(b"not looked at")
    assert differing(measure(tmp_path, layout), weights) == []
    owner = ["header"] * len(layout.header)
    for tensor in layout.tensors:
        owner += [tensor.name] * (tensor.stop - tensor.start)
    assert len(owner) == layout.file_size
    for at, name in enumerate(owner):
        flip(path, at)
        found = measure(tmp_path, layout)
        assert differing(found, weights) == [name]
        assert found["fingerprint"] != weights.fingerprint
        flip(path, at)
    assert measure(tmp_path, layout)["fingerprint"] == weights.fingerprint


def test_a_file_of_another_length_is_named_too(run, tmp_path):
    weights = read_round(run.path / "round_00").weights
    path = tmp_path / WEIGHTS_NAME
    path.with_name("graph.onnx").write_bytes(b"not looked at")
    path.write_bytes(bytes(weights.data) + b"\0")
    assert differing(measure(tmp_path, weights.layout), weights) == ["end"]
    path.write_bytes(weights.data[:-1])
    found = differing(measure(tmp_path, weights.layout), weights)
    assert found == [weights.layout.tensors[-1].name, "end"]


def test_a_damaged_slot_asks_for_tensors_and_then_names_them(check, device):
    predictor = device.predictor()
    flip(weights_path(device), 400)
    code, record = check()
    assert (code, "--tensors" in parts(record)["disk"]["reason"]) == (5, True)
    code, record = check(tensors=True)
    assert (code, parts(record)["disk"]["tensors"]) == (5, ["fc1.weight"])
    own = parts(record)[f"process {os.getpid()}"]
    assert (own["verdict"], "written to since" in own["reason"]) == ("different", True)
    del predictor


def test_a_file_swapped_under_the_same_name_is_found(check, device, run, serve):
    before = serve()
    path = weights_path(device)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    path.write_bytes(data)
    after = serve()
    code, record = check(tensors=True)
    found = parts(record)
    assert (code, found["disk"]["tensors"]) == (5, ["fc2.weight"])
    assert found[f"process {before.pid}"]["verdict"] == "equal"  # it maps the old one
    assert found[f"process {after.pid}"]["verdict"] == "different"
    assert "no round here" in found[f"process {after.pid}"]["reason"]


def test_another_graph_beside_equal_weights_is_no_equality(check, device):
    path = weights_path(device).with_name("graph.onnx")
    path.unlink()
    path.write_bytes((device.store.root / "model" / "graph.onnx").read_bytes() + b"\0")
    code, record = check()
    assert (code, "another graph" in parts(record)["disk"]["reason"]) == (5, True)


def test_a_slot_that_cannot_be_read_is_different(check, device):
    weights_path(device).unlink()
    code, record = check(tensors=True)
    assert (code, "cannot be read" in parts(record)["disk"]["reason"]) == (5, True)


def test_a_weight_file_instead_of_a_round(check, device, run):
    path = run.path / "round_00" / WEIGHTS_NAME
    assert check("--weights", path)[0] == 0
    code, record = check(
        "--weights", run.path / "round_01" / WEIGHTS_NAME, tensors=True
    )
    assert (code, len(parts(record)["disk"]["tensors"])) == (5, 4)


def test_of_two_runs_with_equal_weights_the_devices_own_is_expected(
    check, device, run, new_run
):
    new_run("alpha", run_id="5" * 32).add(0)
    code, record = check()
    assert (code, record["expected"]["name"]) == (0, "tiny/round_00")
    shutil.rmtree(run.path)
    code, record = check()
    assert code == 2
    assert "alpha/round_00 has these weights, of another model" in record["message"]


def test_a_round_that_cannot_be_read_keeps_no_other_from_being_checked(check, run):
    record = run.path / "round_01" / "round.json"
    record.unlink()
    record.mkdir()
    assert check()[0] == 0


def test_exit_2_where_no_run_has_the_weights(check, device, tmp_path):
    code, record = check("--runs", tmp_path)
    assert (code, "none of the 0 rounds" in record["message"]) == (2, True)


# Whose proof, and when ----------------------------------------------------------------


@pytest.fixture
def key(device, command, tmp_path):
    """The public half of the device's key, as it was registered."""
    store = ("--store", device.store.root)
    code, out, _ = command(edge, *store, "device-key")
    path = tmp_path / "board.pub.pem"
    path.write_text(out)
    assert code == 0
    return path


def test_a_device_key_is_made_once_and_is_for_its_owner_only(device, key, command):
    path = device.store.root / "device.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = command(edge, "--store", device.store.root, "device-key", "--json")[1]
    assert json.loads(again)["public"] == key.read_text().strip()
    assert public_key(device_key(device.store)) == public_key(read_key(path))


def test_a_key_that_is_elsewhere_and_out_of_reach_is_not_replaced(device, key, command):
    path = device.store.root / "device.key"
    path.unlink()
    path.symlink_to("/mnt/secure/device.key")
    for words in (["device-key"], ["proof", "--nonce", "1"]):
        code, out, err = command(edge, "--store", device.store.root, *words)
        assert (code, out) == (2, "")
        assert "links to /mnt/secure/device.key, which is not there; mount" in err
    assert path.is_symlink()


def test_a_disk_that_fails_while_a_key_is_made_leaves_none_or_all(tmp_path):
    root = world.install(tmp_path / "store").store.root
    for number in range(20):
        failing = Store.open(root, Failing(tmp_path, number, errno.ENOSPC))
        try:
            device_key(failing)
        except OSError:
            kept = list(root.glob("device.key*"))
            assert kept in ([], [root / "device.key"])
        if (root / "device.key").exists():
            assert read_key(root / "device.key")
            assert stat.S_IMODE((root / "device.key").stat().st_mode) == 0o600
            break
    assert number > 3


def test_a_signed_proof_names_the_device(check, key, command, tmp_path):
    code, record = check("--key", key)
    assert (code, len(record["key_id"])) == (0, 16)
    command(patch, "keygen", tmp_path / "other.pem")
    other = tmp_path / "other.pub.pem"
    code, record = check("--key", other)
    assert (code, "another device" in record["message"]) == (8, True)
    assert check("--key", other, "--key", key)[0] == 0


def test_an_unsigned_proof_is_refused_where_a_key_is_asked_for(
    check, command, tmp_path
):
    command(patch, "keygen", tmp_path / "other.pem")
    assert (check()[0], check()[1]["key_id"]) == (0, None)
    code, record = check("--key", tmp_path / "other.pub.pem")
    assert (code, "not signed" in record["message"]) == (8, True)


def test_a_proof_for_another_nonce_is_refused(check):
    code, record = check("--nonce", "other")
    assert (code, "old one" in record["message"]) == (8, True)


def test_a_proof_that_is_too_old_is_refused(device, run, command, tmp_path):
    path = tmp_path / "p"
    path.write_bytes(make_proof(device.store, NONCE))
    time.sleep(1.1)
    words = ("check-proof", path, "--nonce", NONCE, "--runs", run.path.parent)
    assert command(patch, *words, "--max-age", 60)[0] == 0
    assert command(patch, *words, "--max-age", 0)[0] == 8
    assert command(patch, *words, "--max-age", "nan")[0] == 2  # no age is above it


@pytest.mark.parametrize(
    "change",
    [
        {"live": [3]},
        {"live": [{"pid": 1, "status": "loaded", "file_now": ""}]},
        {"live": [{"pid": "x", "status": "loading", "file_now": ""}]},
        {"untold": ["\x1b[2J"]},
        {"disk": {"fingerprint": "00"}},
        {"time": "yesterday"},
        {"signature": "mine"},
        {"schema": 2},
        {"nonce": None},
    ],
)
def test_exit_3_for_what_is_no_proof(device, command, tmp_path, change):
    path = tmp_path / "p"
    proof = json.loads(make_proof(device.store, NONCE)) | change
    path.write_bytes(canonical(proof))
    code, _, err = command(patch, "check-proof", path, "--nonce", NONCE)
    assert (code, "\x1b" in err) == (3, False)
    path.write_bytes(json.dumps(proof, indent=1).encode())
    assert command(patch, "check-proof", path, "--nonce", NONCE)[0] == 3


# The command line ---------------------------------------------------------------------


def test_from_the_nonce_to_the_verdict(device, key, run, command, serve, tmp_path):
    server, path = serve(), tmp_path / "board.proof"
    store = ("--store", device.store.root)
    code, out, err = command(edge, *store, "proof", "--nonce", NONCE)
    assert (code, err) == (0, "")
    path.write_text(out)
    words = ("--nonce", NONCE, "--runs", run.path.parent, "--key", key)
    code, out, _ = command(patch, "check-proof", path, *words)
    assert (code, out.startswith("EQUAL  tiny/round_00  ")) == (0, True)
    assert f"process {server.pid}" in out
    assert f"signed by {key}" in out
    assert command(edge, *store, "proof", "--nonce", "")[0] == 2
    both = ("--round", "round_00", "--weights", run.path / "round_00" / WEIGHTS_NAME)
    assert command(patch, "check-proof", path, *words, *both)[0] == 2


def test_a_key_that_is_none_ends_with_2(device, command):
    store = ("--store", device.store.root)
    words = ("proof", "--nonce", NONCE)
    code, _, err = command(edge, *store, *words)
    assert (code, "not signed" in err) == (0, True)
    (device.store.root / "device.key").write_text("nonsense")
    code, _, err = command(edge, *store, *words)
    assert (code, "does not hold a device's private key" in err) == (2, True)


def test_a_proof_is_small(device):
    """It travels over the same thin links: without tensors under 2 kB."""
    predictor = device.predictor()
    assert len(make_proof(device.store, NONCE)) < 2000
    del predictor
