# SPDX-License-Identifier: Apache-2.0
"""dpu-edge doctor: each thing that may be wrong is found, and nothing is changed."""

import fcntl
import json
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from edge_runtime.cli.main import main
from edge_runtime.doctor import machine as module
from edge_runtime.doctor import stored
from edge_runtime.doctor.examine import examine
from edge_runtime.doctor.finding import Health
from edge_runtime.files import Files
from edge_runtime.live.outbox import Kind, Outbox
from edge_runtime.live.proof import device_key
from edge_runtime.store.store import Store
from edge_runtime.sync.state import STATE_NAME
from edge_runtime.sync.story import Known
from edge_runtime.update.device import Device
from tests.crash.world import install, scratch
from tests.edge_runtime.sync.conftest import template  # noqa: F401 - a fixture
from tests.edge_runtime.sync.world import World


class Settled(World):
    """A device that has looked at its channel and applied what there was."""

    def install(self):
        super().install()
        self.publish(1, lifetime_s=1 << 33)
        self.look(), self.apply(), self.look()
        device_key(Device.open(self.root).store)


@pytest.fixture
def world(template, tmp_path, monkeypatch):  # noqa: F811
    world = template(Settled, tmp_path / "world")
    monkeypatch.setattr(module, "_SYSTEMD", tmp_path / "no systemd here")
    at = world.clock = world.head.at + 60
    monkeypatch.setattr(module.time, "time", lambda: world.clock)
    change(world.folder / STATE_NAME, checked=at)
    change(world.root / "agent.json", last_success=at, folder=str(world.folder))
    return world


def wrong(world, root=None):
    found = examine(root or world.root)
    return {f.check: f.words for f in found if f.health is Health.WRONG}


def tree(root):
    return sorted(
        (str(path), path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file()
    )


def test_a_healthy_device_is_well_and_stays_as_it_is(world):
    before = tree(world.root.parent)
    assert wrong(world) == {}
    assert tree(world.root.parent) == before


def set_clock_back(world):
    world.clock -= 86_400


def set_clock_far_ahead(world):
    world.clock += 20 * 366 * 86_400


@pytest.mark.parametrize(("year", "health"), [(1970, "ok"), (1999, "wrong")])
def test_a_clock_may_be_set_for_the_first_time_after_the_installation(
    tmp_path, year, health
):
    store = install(tmp_path / "store").store
    event = replace(store.state.history[0], at=f"{year}-01-01T00:05:00Z")
    store.commit(replace(store.state, history=(event,)))
    (finding,) = module.clock(store, Known())
    assert finding.health == health


def test_an_update_that_tidies_up_meanwhile_is_no_fault_of_the_disk(world, monkeypatch):
    calls, lock = [], module.lock_file

    def end_an_update(*what):
        lock(*what)
        calls.append(what)
        if len(calls) == 1:
            with Store.open(world.root).lock():
                pass

    monkeypatch.setattr(module, "lock_file", end_an_update)
    assert wrong(world) == {}
    assert len(calls) == 2


def mount_read_only(world):
    real = os.statvfs(world.root)
    names = ("f_bavail", "f_bfree", "f_blocks", "f_frsize", "f_files", "f_favail")
    facts = {name: getattr(real, name) for name in names}
    status = SimpleNamespace(**facts, f_flag=os.ST_RDONLY)
    world.patch.setattr(module.os, "statvfs", lambda _path: status)


def forbid_locks(world):
    def refuse(*_, **__):
        raise OSError(95, "Operation not supported")

    world.patch.setattr(module, "lock_file", refuse)


def break_runtime(world):
    (world.root / "model" / "contract.json").write_text("{}")


def open_key(world):
    (world.root / "device.key").chmod(0o644)


def break_key(world):
    (world.root / "device.key").write_text("no key")


def rot(world):
    active = Device.open(world.root).store.state.active
    path = world.root / "slots" / active / "weights.safetensors"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-1] + b"x")


def break_state(world):
    for name in ("state.json", "state.copy"):
        (world.root / name).write_text("{")


def change(path, **facts):
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def break_one_state(world):
    (world.root / "state.json").write_text("{")


def put_a_folder_in_place_of_the_state(world):
    (world.root / "state.json").unlink()
    (world.root / "state.json").mkdir()


def break_the_copy(world):
    (world.root / "state.copy").write_bytes(b"")


def put_a_folder_in_place_of_the_lock(world):
    (world.root / "lock").unlink(missing_ok=True)
    (world.root / "lock").mkdir()


def take_run_bit(world):
    folder = world.root / "hooks" / "before-apply.d"
    folder.mkdir(parents=True)
    (folder / "10-gate").touch(0o644)


def lose_hooks(world):
    (world.root / "hooks").symlink_to("/mnt/gone")


def lose_folder(world):
    change(world.root / "agent.json", folder="/mnt/gone")


def fail_agent(world):
    change(world.root / "agent.json", failing="the disk is gone")


def end_agent(world):
    change(world.root / "agent.json", last_success=world.clock - 7200)


def fail_sync(world):
    change(world.folder / STATE_NAME, result="failed", reason="no answer")


def expire(world):
    change(world.folder / STATE_NAME, result="stale", reason="the head expired")


def end_sync(world):
    change(world.folder / STATE_NAME, checked=world.clock - 5 * 86_400)


def break_sync(world):
    (world.folder / STATE_NAME).write_text("{")


@pytest.mark.parametrize(
    ("damage", "check", "words"),
    [
        (set_clock_back, "clock", "something was signed at"),
        (set_clock_far_ahead, "clock", "years after all"),
        (mount_read_only, "file system", "read-only"),
        (forbid_locks, "file system", "not supported"),
        (break_runtime, "runtime", "contract"),
        (open_key, "key", "mode 0644"),
        (break_key, "key", "private key"),
        (rot, "store", "is damaged"),
        (break_state, "store", "state.json is damaged"),
        (break_one_state, "store", "state.json is damaged"),
        (put_a_folder_in_place_of_the_state, "store", "state.json is damaged or no"),
        (break_the_copy, "store", "state.copy is damaged"),
        (put_a_folder_in_place_of_the_lock, "lock", "directory"),
        (take_run_bit, "hooks", "chmod +x"),
        (lose_hooks, "hooks", "cannot be read"),
        (lose_folder, "folder", "/mnt/gone"),
        (fail_agent, "agent", "the disk is gone"),
        (end_agent, "agent", "none has looked for 2 hours"),
        (fail_sync, "sync", "no answer"),
        (expire, "sync", "the head expired"),
        (end_sync, "sync", "last answered 5 days ago"),
        (break_sync, "sync", "malformed"),
    ],
)
def test_what_is_wrong_is_found(world, monkeypatch, damage, check, words):
    world.patch = monkeypatch
    damage(world)
    found = wrong(world)
    assert words in found[check], found


def test_a_store_in_memory_is_wrong(world):
    with scratch() as folder:
        if not folder.is_relative_to("/dev/shm"):
            pytest.skip("there is no file system in memory here")
        root = shutil.copytree(world.root, folder / "store", symlinks=True)
        assert "a power cut takes all" in wrong(world, root)["file system"]


def test_of_a_lock_that_is_another_users_nothing_is_said(world, monkeypatch):
    def deny(*_):
        raise PermissionError(13, "Permission denied")

    (world.root / "agent.lock").touch()
    monkeypatch.setattr("fcntl.flock", deny)
    (found,) = (f for f in examine(world.root) if f.check == "agent")
    assert (found.health, "its own user sees" in found.words) == (Health.OK, True)


def test_a_lock_that_is_held_is_told_and_may_be_an_update(world):
    with (world.root / "lock").open("ab") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        (found,) = stored.lock(Store.open(world.root))
    assert (found.health, "goes on, or hangs" in found.words) == (Health.NOTE, True)
    assert "lslocks" in found.todo


def test_a_folder_that_is_not_there_is_told(world, command):
    given = ("--store", world.root, "doctor", "--folder", "/no/such")
    code, out, _ = command(main, *given)
    assert (code, "wrong  folder" in out, "/no/such" in out) == (13, True, True)


def test_a_state_without_its_copy_is_well(world):
    (world.root / "state.copy").unlink()
    assert wrong(world) == {}


def test_a_disk_without_room_for_a_slot_is_wrong_unless_an_old_slot_may_go(
    world, monkeypatch
):
    monkeypatch.setattr(Files, "free_bytes", lambda *_: 100)
    (found,) = (f for f in examine(world.root) if f.check == "space")
    assert (found.health, "older slot" in found.words) == (Health.NOTE, True)


def test_a_unit_that_failed_is_found(world, monkeypatch, tmp_path):
    program = tmp_path / "systemctl"
    program.write_text(
        "#!/bin/sh\n"
        "echo 'dpu-edge-agent.service loaded failed failed Keeps the model'\n"
        "echo 'dpu-edge-sync.service loaded active running Fetches releases'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(module, "_SYSTEMD", tmp_path)
    assert wrong(world) == {"unit": "dpu-edge-agent.service is failed (failed)"}


def test_reports_that_nobody_sends_are_noted(world):
    Outbox(world.root).add(1, Kind.CHANGE, b"{}")
    (path,) = (report.path for report in Outbox(world.root).waiting())
    os.utime(path, (world.clock - 5 * 86_400,) * 2)
    (found,) = (f for f in examine(world.root) if f.check == "reports")
    assert found.health is Health.NOTE
    assert found.words == "1 wait to be sent, the oldest was made 5 days ago"


def test_the_command_ends_with_a_code_of_its_own(world, command):
    code, out, _ = command(main, "--store", world.root, "doctor")
    assert (code, "ok     store" in out) == (0, True)
    rot(world)
    code, out, _ = command(main, "--store", world.root, "doctor", "--json")
    record = json.loads(out)
    (found,) = (f for f in record["findings"] if f["health"] == "wrong")
    assert (code, record["well"], found["check"]) == (13, False, "store")
    assert "dpu-edge repair" in found["todo"]


def test_where_nothing_is_installed_that_is_what_is_wrong(command, tmp_path):
    code, out, _ = command(main, "--store", tmp_path, "doctor")
    assert (code, "nothing is installed" in out) == (13, True)


def test_a_time_that_cannot_be_read_is_the_first_of_all():
    assert module.seconds("1970-01-02T00:00:00Z") == 86_400
    assert module.seconds("no time") == 0


def test_where_nothing_is_installed_it_says_how_to_install(tmp_path):
    (finding,) = examine(tmp_path / "none")
    assert (finding.check, finding.health) == ("store", Health.WRONG)
    assert "init BUNDLE|URL" in finding.todo
