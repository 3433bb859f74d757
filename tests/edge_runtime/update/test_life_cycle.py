# SPDX-License-Identifier: Apache-2.0
"""Tries, pins, hooks, a damaged state, a wrong clock: what devices live through."""

import dataclasses
import errno
import json
import os
import signal
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from edge_runtime import Device, UpdateResult
from edge_runtime.errors import HeldError, StoreError, TrustError
from edge_runtime.files import Files
from edge_runtime.store.state import MAX_TRIES, State
from edge_runtime.update.hooks import find_hooks, run_hooks
from tests.crash import world
from tests.processes import is_running, wait_for
from tests.users import somebody_else


@pytest.fixture
def device(tmp_path):
    return world.install(tmp_path / "store")


def next_patch(device):
    return world.next_patch(device.store.state)


# Tries -----------------------------------------------------------------------------


class PowerCutError(BaseException):
    """The device goes down in the middle of a trial."""


def cut_off(*_, **__):
    raise PowerCutError


def crash(root):
    with pytest.raises(PowerCutError):
        Device.open(root, trial=cut_off).update(next_patch(Device.open(root)))


def test_a_model_that_takes_the_device_down_is_refused_in_the_end(device):
    root, patch = device.store.root, next_patch(device)
    target = world.weights(1).fingerprint
    for tries in range(1, MAX_TRIES + 1):
        crash(root)
        assert device.store.reload().tries == {target: tries}
    with pytest.raises(TrustError, match=r"cut off in 3 of them.* --force"):
        device.update(patch)
    assert device.status()["round"] == 0
    assert device.status()["skipped"] == [target]
    assert device.update(patch, force=True) is UpdateResult.APPLIED


def test_a_try_is_on_the_disk_before_the_trial_begins(device):
    seen = []

    def look(*_, **__):
        record = json.loads((device.store.root / "state.json").read_text())
        seen.append(record["tries"])

    Device.open(device.store.root, trial=look).update(next_patch(device))
    assert seen == [{world.weights(1).fingerprint: 1}]
    assert device.store.reload().tries == {}


def test_another_release_starts_with_no_tries(device):
    for _ in range(MAX_TRIES):
        crash(device.store.root)
    assert device.update(world.patch(0, 2)) is UpdateResult.APPLIED


def test_two_releases_that_take_turns_are_both_refused_in_the_end(device):
    root, patches = device.store.root, [world.patch(0, 1), world.patch(0, 2)]
    for patch in patches * MAX_TRIES:
        with pytest.raises(PowerCutError):
            Device.open(root, trial=cut_off).update(patch)
    for patch in patches:
        with pytest.raises(TrustError, match="--force"):
            device.update(patch)


def test_a_trial_that_the_system_cannot_start_is_no_try(device):
    def no_room(*_, **__):
        raise OSError(28, "No space left on device")

    before = device.store.state
    with pytest.raises(OSError, match="No space left"):
        Device.open(device.store.root, trial=no_room).update(next_patch(device))
    assert device.store.reload() == before


class WornOutError(Exception):
    """Whatever may come up in a process: nobody foresaw it."""


FAULTS = [
    OSError(errno.EIO, "I/O error"),
    MemoryError(),
    WornOutError(),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
def test_what_fails_behind_a_passed_trial_is_no_try(device, monkeypatch, fault):
    def fail(*_):
        raise fault

    before, patch = device.store.state, next_patch(device)
    with monkeypatch.context() as patched:
        patched.setattr(State, "activated", fail)
        for _ in range(MAX_TRIES):
            with pytest.raises(type(fault)):
                device.update(patch)
    assert Device.open(device.store.root).store.state == before
    assert device.update(patch) is UpdateResult.APPLIED


class FailsOnce(Files):
    """A disk that fails in one of the operations behind a trial, and is well again."""

    def __init__(self, number):
        self.left, self.tried = number, False

    def _count(self):
        self.left -= self.tried
        if self.tried and self.left == 0:
            raise OSError(errno.EIO, "I/O error")

    def rename(self, source, target):
        self._count()
        super().rename(source, target)

    def sync(self, handle):
        self._count()
        super().sync(handle)


@pytest.mark.parametrize("number", range(1, 8))
def test_a_disk_that_fails_behind_a_passed_trial_is_no_try(device, number):
    device.store.files = files = FailsOnce(number)
    before, patch = device.store.state, next_patch(device)

    def trial(*_, **__):
        files.tried = True

    with suppress(OSError):
        Device(device.store, trial).update(patch)
    found = Device.open(device.store.root).store.state
    # As it was, or the whole update.
    assert found == before or found.active == world.weights(1).fingerprint
    assert not found.tries


def test_too_little_memory_in_a_trial_is_no_try(device):
    def starved(*_, **__):
        raise MemoryError

    before = device.store.state
    with pytest.raises(MemoryError):
        Device.open(device.store.root, trial=starved).update(next_patch(device))
    assert device.store.reload() == before


# Pins ------------------------------------------------------------------------------


def test_a_pinned_device_refuses_updates_and_allows_rollbacks(device):
    device.update(next_patch(device))
    device.pin()
    for force in (False, True):
        with pytest.raises(HeldError, match="pinned to round 1"):
            device.update(next_patch(device), force=force)
    assert device.rollback().round == 0
    with pytest.raises(HeldError, match="pinned to round 0"):
        device.update(next_patch(device))
    device.pin(held=False)
    assert device.update(next_patch(device)) is UpdateResult.APPLIED
    words = [event["event"] for event in device.status()["history"]]
    assert words[2:] == ["pinned", "rolled back", "unpinned", "updated"]


# Hooks -----------------------------------------------------------------------------


@pytest.fixture
def hook(device):
    """Write an executable into one of the store's hook folders."""

    def write(when, name, text, mode=0o755):
        folder = device.store.root / "hooks" / f"{when}.d"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(mode)

    return write


def test_a_hook_before_may_refuse_an_update(device, hook):
    hook("before-apply", "10-battery", "echo battery at 7 percent >&2; exit 3")
    with pytest.raises(HeldError, match="10-battery ended with 3: battery at 7 perc"):
        device.update(next_patch(device))
    assert device.status()["round"] == 0
    assert list((device.store.root / "slots").iterdir()) == [
        device.store.slot_folder(device.verify())
    ]


def test_hooks_run_in_order_and_know_what_happens(device, hook, tmp_path):
    said = tmp_path / "said"
    for when in ("before-apply", "after-apply"):
        for name in ("20-b", "10-a"):
            facts = "$DPU_EVENT $DPU_ROUND $DPU_FINGERPRINT $DPU_STORE"
            hook(when, name, f"echo {when} {name} {facts} >> {said}")
    patch = next_patch(device)
    device.update(patch)
    assert device.update(patch) is UpdateResult.ALREADY_CURRENT
    device.rollback()
    root, old, new = device.store.root, *(world.weights(n).fingerprint for n in (0, 1))
    assert said.read_text().splitlines() == [
        f"before-apply 10-a updated 1 {new} {root}",
        f"before-apply 20-b updated 1 {new} {root}",
        f"after-apply 10-a updated 1 {new} {root}",
        f"after-apply 20-b updated 1 {new} {root}",
        f"after-apply 10-a rolled back 0 {old} {root}",
        f"after-apply 20-b rolled back 0 {old} {root}",
    ]


def test_a_hook_after_is_too_late_to_refuse(device, hook):
    hook("after-apply", "restart", "echo no such service; exit 1")
    assert device.update(next_patch(device)) is UpdateResult.APPLIED
    assert device.verify() == world.weights(1).fingerprint
    event = Device.open(device.store.root).status()["history"][-1]
    assert event["event"] == "hook failed"
    assert event["reason"] == "the hook restart ended with 1: no such service"


def test_the_last_line_of_a_talkative_hook_is_told(device, hook):
    hook("before-apply", "talks", "seq 100000; echo the reason; exit 2")
    with pytest.raises(HeldError, match="talks ended with 2: the reason"):
        device.update(next_patch(device))


def test_a_hook_that_lost_its_run_bit_refuses(device, hook):
    hook("before-apply", "10-battery", "exit 0", mode=0o644)
    with pytest.raises(HeldError, match=r"10-battery may not be run.*chmod \+x .*10-b"):
        device.update(next_patch(device))
    assert device.status()["round"] == 0
    path = device.store.root / "hooks" / "before-apply.d" / "10-battery"
    path.rename(path.with_name("10-battery.disabled"))
    assert device.update(next_patch(device)) is UpdateResult.APPLIED


def test_a_hook_after_that_lost_its_run_bit_is_told(device, hook):
    hook("after-apply", "restart", "exit 0", mode=0o644)
    assert device.update(next_patch(device)) is UpdateResult.APPLIED
    event = device.status()["history"][-1]
    assert (event["event"], "chmod +x" in event["reason"]) == ("hook failed", True)


@pytest.mark.parametrize("name", ["README", "README.md", ".swp", "10-old.disabled"])
def test_notes_beside_the_hooks_are_no_hooks(device, hook, name):
    hook("before-apply", name, "exit 1", mode=0o644)
    assert device.update(next_patch(device)) is UpdateResult.APPLIED


def link_to_nothing(path):
    path.symlink_to("/mnt/gone/gate")


# A container makes a folder in place of a volume's file that is not there.
@pytest.mark.parametrize("make", [link_to_nothing, os.mkfifo, os.mkdir])
def test_a_gate_that_is_no_file_refuses(device, hook, make):
    hook("before-apply", "20-free", "exit 0")
    path = device.store.root / "hooks" / "before-apply.d" / "10-gate"
    make(path)
    with pytest.raises(HeldError, match=r"10-gate is no file.*10-gate\.disabled"):
        device.update(next_patch(device))
    assert device.status()["round"] == 0
    path.rename(path.with_name("10-gate.disabled"))
    assert device.update(next_patch(device)) is UpdateResult.APPLIED


@pytest.mark.parametrize("make", [link_to_nothing, os.mkfifo])
@pytest.mark.parametrize("name", ["hooks", "hooks/before-apply.d"])
def test_where_gates_cannot_be_read_the_update_is_held(device, make, name):
    path = device.store.root / name
    path.parent.mkdir(exist_ok=True)
    make(path)
    with pytest.raises(HeldError, match=r"before-apply\.d holds a hook cannot be read"):
        device.update(next_patch(device))
    assert device.status()["round"] == 0
    path.unlink()
    assert device.update(next_patch(device)) is UpdateResult.APPLIED


def test_gates_that_are_closed_to_the_agents_user_hold_the_update():
    with tempfile.TemporaryDirectory() as name:  # pytest's own is closed to nobody
        root = Path(name)
        root.chmod(0o755)
        folder = root / "hooks" / "before-apply.d"
        folder.mkdir(parents=True)
        for mode in (0o700, 0o744) if os.geteuid() == 0 else (0o000, 0o444):
            (folder / "10-gate").touch()
            folder.chmod(mode)
            with somebody_else(), pytest.raises(HeldError, match="Permission denied"):
                list(find_hooks(root, "before-apply"))
            folder.chmod(0o755)


def test_a_hook_that_cannot_be_run_refuses(device, hook, tmp_path):
    hook("before-apply", "broken", "")
    path = device.store.root / "hooks" / "before-apply.d" / "broken"
    path.write_text("#!/no/such/interpreter\n")
    with pytest.raises(HeldError, match="cannot be run"):
        device.update(next_patch(device))


def test_a_hook_that_hangs_is_ended_with_all_that_it_started(hook, device, tmp_path):
    pid = tmp_path / "pid"
    hook("before-apply", "hangs", f"sleep 60 & echo $! > {pid}; wait")
    store = device.store
    with pytest.raises(HeldError, match=r"hangs did not end within 0\.3 s"):
        run_hooks(
            *(store.root, "before-apply", "updated", store.state.active_slot),
            timeout_s=0.3,
        )
    wait_for(lambda: not is_running(int(pid.read_text())))


def test_a_hook_that_leaves_something_running_does_not_hold_the_update(
    device, hook, tmp_path
):
    pid = tmp_path / "pid"
    hook("after-apply", "daemon", f"sleep 600 & echo $! > {pid}")
    device.update(next_patch(device))
    assert is_running(int(pid.read_text()))
    os.kill(int(pid.read_text()), signal.SIGKILL)


# The state file --------------------------------------------------------------------


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_damaged_state_is_served_from_its_copy_and_mended(device):
    device.update(next_patch(device))
    root, before = device.store.root, device.status()
    damage(root / "state.json")
    again = Device.open(root, trial=world.no_trial)
    assert again.verify() == before["fingerprint"]
    assert again.status()["release_floor"] == before["release_floor"]
    assert again.status()["history"][-1]["event"] == "mended"
    again.update(next_patch(again))
    words = [event["event"] for event in Device.open(root).status()["history"]]
    assert words == ["installed", "updated", "mended", "updated"]
    assert (root / "state.json").read_bytes() == (root / "state.copy").read_bytes()


@pytest.mark.parametrize("names", [["state.copy"], ["state.json"], ["state.json", ""]])
def test_no_damage_lowers_the_release_floor(device, names):
    """Whatever is damaged, an old release is not let in."""
    for _ in range(2):
        device.update(next_patch(device))
    for name in names:
        damage(device.store.root / (name or "state.copy"))
    with pytest.raises((TrustError, StoreError)):
        Device.open(device.store.root, trial=world.no_trial).update(world.patch(0, 1))


def test_two_damaged_states_are_an_error_that_says_what_to_do(device):
    for name in ("state.json", "state.copy"):
        damage(device.store.root / name)
    with pytest.raises(StoreError, match="install the bundle again"):
        Device.open(device.store.root)


def test_a_lost_state_is_not_guessed_from_its_copy(device):
    (device.store.root / "state.json").unlink()
    with pytest.raises(StoreError, match=r"holds no store: .* copy state\.copy"):
        Device.open(device.store.root)


# The rest --------------------------------------------------------------------------


def test_a_clock_that_was_set_back_changes_nothing_but_times(device):
    device.update(next_patch(device))
    device.update(next_patch(device))
    state = device.store.state
    future = [
        dataclasses.replace(event, at="2099-01-01T00:00:00Z") for event in state.history
    ]
    with device.store.lock():
        device.store.commit(dataclasses.replace(state, history=tuple(future)))
    with pytest.raises(TrustError, match="already been at 2"):
        device.update(world.patch(0, 1))
    assert device.update(next_patch(device)) is UpdateResult.APPLIED
    assert device.rollback().round == 2
    words = [event["event"] for event in device.status()["history"]]
    assert words == ["installed", "updated", "updated", "updated", "rolled back"]


def test_a_damaged_kept_slot_is_written_anew(device):
    patch = next_patch(device)
    device.update(patch)
    device.rollback()
    folder = device.store.slot_folder(world.weights(1).fingerprint)
    damage(folder / "weights.safetensors")
    assert device.update(patch) is UpdateResult.APPLIED
    assert device.verify() == world.weights(1).fingerprint


def test_a_disk_without_symbolic_links_is_good_enough(tmp_path):
    class Fat(Files):
        def symlink(self, link, folder):
            raise PermissionError(1, "Operation not permitted", str(link))

        def hardlink(self, source, target):
            raise PermissionError(1, "Operation not permitted", str(target))

    device = world.install(tmp_path / "store", Fat())
    for _ in range(3):
        device.update(next_patch(device))
    assert device.verify() == world.weights(3).fingerprint
    assert not (tmp_path / "store" / "current").is_symlink()
