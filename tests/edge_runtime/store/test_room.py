# SPDX-License-Identifier: Apache-2.0
"""Small disks: what is given up for new weights, and for nothing less."""

import dataclasses
import errno
import os
import subprocess
from pathlib import Path

import pytest

from edge_runtime import Device
from edge_runtime.errors import StoreError, VerificationError
from edge_runtime.files import Files
from edge_runtime.store.slots import SPARE_BYTES
from edge_runtime.store.state import decode_state
from tests.crash import world
from tests.crash.disk import read_tree
from tests.crash.examine import insist
from tests.crash.explore import Count, fail_everywhere
from tests.crash.realdisk import obstacle, run_in_namespace
from tests.crash.recording import Recording, install, update


@pytest.fixture
def device(tmp_path):
    """A device with two slots and two reverse patches."""
    device = world.install(tmp_path / "store")
    for _ in range(3):
        device.update(world.next_patch(device.store.state))
    return device


class Small(Files):
    """A file system of its own below a folder, with so many bytes and inodes.

    Attributes:
        free: Bytes that it says are free.
        inodes: How many it has; links to a file share its inode.
    """

    def __init__(self, root, free=1 << 40, inodes=1 << 40):
        self.root, self.free, self.inodes = root, free, inodes

    def free_bytes(self, path):
        return self.free

    def is_full(self, path):
        return self.used() >= self.inodes

    def used(self):
        return len({path.lstat().st_ino for path in self.root.rglob("*")})

    def _take(self, path):
        if not os.path.lexists(path) and self.used() >= self.inodes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def mkdir(self, path):
        self._take(path)
        super().mkdir(path)

    def write(self, path, chunks, **options):
        self.unlink(path)
        self._take(path)
        super().write(path, chunks, **options)

    def symlink(self, link, folder):
        self._take(link)
        super().symlink(link, folder)


def everything(root):
    return {name: tree for name, tree in read_tree(root)[1] if name != "lock"}


# Not before it is proved --------------------------------------------------------------


@pytest.mark.parametrize("free", [0, SPARE_BYTES, SPARE_BYTES + 4096])
def test_garbage_costs_nothing_on_a_full_disk(device, free):
    device.store.files = Small(device.store.root, free)
    before = everything(device.store.root)
    for _ in range(3):
        with pytest.raises((VerificationError, StoreError)):
            device.update(world.garbage(device.store.state))
    assert everything(device.store.root) == before
    assert device.status()["reachable_rounds"] == [2, 1, 0]


def test_garbage_costs_nothing_where_all_inodes_are_used_up(device):
    root = device.store.root
    device.store.files = Small(root)
    device.store.files.inodes = device.store.files.used()
    before = everything(root)
    with pytest.raises(VerificationError):
        device.update(world.garbage(device.store.state))
    assert everything(root) == before


def test_a_patch_on_damaged_weights_costs_nothing(device):
    root, store = device.store.root, device.store
    data = store.slot_folder(store.state.active) / "weights.safetensors"
    rotten = bytearray(data.read_bytes())
    rotten[-1] ^= 1
    data.write_bytes(rotten)
    store.files = Small(root, SPARE_BYTES)
    before = everything(root)
    with pytest.raises(StoreError, match="the parent on this device is damaged"):
        device.update(world.next_patch(store.state))
    assert everything(root) == before


def test_a_way_back_that_is_damaged_costs_nothing(device):
    root = device.store.root
    device.store.files = Small(root, SPARE_BYTES)
    path = device.store.reverse_path(world.weights(1).fingerprint)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    before = everything(root)
    with pytest.raises(StoreError, match="not usable"):
        device.rollback(0)
    assert everything(root) == before


def test_a_damaged_kept_slot_stays_until_the_new_one_is_proved(device):
    newest = device.store.state.active
    device.rollback()
    path = device.store.slot_folder(newest) / "weights.safetensors"
    path.write_bytes(b"rot")
    before = device.store.state
    garbage = world.garbage(before)
    header = dataclasses.replace(world.header_of(garbage), target=newest, counter=3)
    with pytest.raises(VerificationError):
        device.update(world.with_header(garbage, header))
    assert device.store.state == before
    device.update(world.patch(2, 3))
    insist(device, newest)


# All inodes used up -------------------------------------------------------------------


@pytest.mark.parametrize("left", range(6))
def test_with_few_inodes_left_kept_slots_make_room(device, left):
    root = device.store.root
    device.store.files = Small(root)
    device.store.files.inodes = device.store.files.used() + left
    for number in (4, 5, 6):
        device.update(world.next_patch(device.store.state))
        insist(device, world.weights(number).fingerprint)
        assert device.store.files.used() <= device.store.files.inodes
    assert device.rollback().round == 5
    insist(device, world.weights(5).fingerprint)


def test_without_an_inode_to_give_up_the_disk_has_the_word(tmp_path):
    device = world.install(tmp_path / "store")
    root = device.store.root
    device.store.files = Small(root)
    device.store.files.inodes = device.store.files.used()
    before = everything(root)
    with pytest.raises(OSError, match="No space left") as refused:
        device.update(world.next_patch(device.store.state))
    assert refused.value.filename
    assert everything(root) == before
    device.pin()
    assert Device.open(root).store.state.pinned


def test_an_installation_without_an_inode_is_taken_up_once_there_are_some(tmp_path):
    for inodes in range(60):
        root = tmp_path / str(inodes)
        root.mkdir()
        files = Small(root, inodes=inodes)
        try:
            world.install(root, files)
        except OSError as err:
            assert err.errno == errno.ENOSPC
            assert not (root / "state.json").exists()
            insist(world.install(root), world.weights(0).fingerprint)
        else:
            break
    assert inodes > 10


def test_a_state_that_is_damaged_never_costs_its_copy(device):
    root = device.store.root
    (root / "state.json").write_bytes(b"damaged")
    device = Device.open(root, files=Small(root), trial=world.no_trial)
    device.store.files.inodes = device.store.files.used()
    with pytest.raises(OSError, match="No space left"):
        device.pin()
    assert decode_state((root / "state.copy").read_bytes()).active == device.verify()


@pytest.mark.parametrize("more", [(), (Recording.rot_state,)], ids=["whole", "rotten"])
def test_one_failure_for_want_of_room_survives_a_power_cut_anywhere(monkeypatch, more):
    monkeypatch.setattr(Files, "is_full", lambda *_: True)
    with world.scratch() as folder:
        states = Recording(folder).play(install, update, *more).states()
        count = Count(share=0.1)
        tree = read_tree(folder)
        failures = fail_everywhere(update, tree, states, count, [(errno.ENOSPC, False)])
        assert not count.bad
        assert failures > 20


# Real file systems --------------------------------------------------------------------


def test_real_file_systems_that_are_really_small():
    """Bytes, then inodes: garbage costs nothing, and the next patch applies."""
    if why := obstacle():
        pytest.skip(why)
    counts = {"attempts": 6, "refused": 3, "bad": 0}
    assert run_in_namespace("--small") == [counts, counts]


# 'current' ---------------------------------------------------------------------------


@pytest.fixture
def copied(device, tmp_path):
    """A store that was copied with its links followed, as ``cp -rL`` does."""
    root = tmp_path / "copy"
    subprocess.run(["cp", "-rL", device.store.root, root], check=True)
    assert not (root / "current").is_symlink()
    return Device.open(root, trial=world.no_trial)


def test_current_leads_to_the_active_weights_again_after_a_copy(copied):
    copied.verify()
    for number in (4, 5):
        copied.update(world.next_patch(copied.store.state))
        insist(copied, world.weights(number).fingerprint)
    copied.rollback()
    insist(copied, world.weights(4).fingerprint)


def test_a_folder_of_somebodys_that_is_called_current_stays(copied):
    mine = copied.store.root / "current" / "thesis.txt"
    mine.write_text("mine")
    copied.update(world.next_patch(copied.store.state))
    assert mine.read_text() == "mine"
    with pytest.raises(StoreError, match="current"):
        copied.verify()


def test_a_copy_of_current_that_is_out_of_date_is_told(copied):
    path = copied.store.root / "current" / "weights.safetensors"
    path.write_bytes(bytes(world.weights(0).data))
    with pytest.raises(StoreError, match="current"):
        copied.verify()
    copied.pin()
    copied.verify()


# What a file system lacks ------------------------------------------------------------


@pytest.mark.parametrize("number", ["ENOLCK", "ENOSYS", "ENOTSUP", "EINVAL"])
def test_a_file_system_without_locks_is_named(device, monkeypatch, number):
    def no_locks(*_):
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    monkeypatch.setattr("edge_runtime.files.fcntl.flock", no_locks)
    with pytest.raises(OSError, match=r"cannot be locked.*local disk") as refused:
        device.update(world.next_patch(device.store.state))
    assert refused.value.filename == str(device.store.root / "lock")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_file_system_without_syncs_is_named(device, number, what):
    class Unsynced(Files):
        def sync(self, handle):
            if Path(f"/proc/self/fd/{handle}").is_dir() is (what == "folder"):
                raise OSError(number, os.strerror(number))
            super().sync(handle)

    device.store.files = Unsynced()
    with pytest.raises(OSError, match=r"cannot be synced.*local disk") as refused:
        device.update(world.next_patch(device.store.state))
    assert str(device.store.root) in refused.value.filename
    device.store.files = Files()
    device.update(world.next_patch(device.store.state))
    insist(device, device.store.state.active)


def test_another_process_with_the_lock_is_no_fault_of_the_file_system(device):
    with device.store.lock(), pytest.raises(StoreError, match="another process"):
        device.update(world.next_patch(device.store.state))
