# SPDX-License-Identifier: Apache-2.0
"""The way back: kept slots, and reverse patches that the device wrote itself."""

import dataclasses
import itertools
import os

import numpy as np
import pytest

from edge_runtime import Device, PatchHeader, UpdateResult, open_patch, pack_weights
from edge_runtime.errors import RoundNotFoundError, StoreError, TrustError
from edge_runtime.files import Files
from edge_runtime.formats.apply import apply_patch
from edge_runtime.formats.model_folder import WEIGHTS_NAME
from edge_runtime.formats.weights import write_weights
from edge_runtime.store import slots
from edge_runtime.store.slots import MAX_CHANGES, SPARE_BYTES, encode_reverse
from edge_runtime.store.state import MAX_FORMER
from packager.build import build_patch
from tests.crash import world


@pytest.fixture
def device(tmp_path):
    return world.install(tmp_path / "store")


def advance(device, rounds):
    for _ in range(rounds):
        device.update(world.next_patch(device.store.state))


def test_a_rollback_reaches_rounds_whose_slots_are_gone(device):
    advance(device, 5)
    assert device.status()["kept_rounds"] == [5, 4]
    assert device.status()["reachable_rounds"] == [4, 3, 2, 1, 0]
    for number in (0, 3, 5, 1):
        assert device.rollback(number).round == number
        assert device.verify() == world.weights(number).fingerprint
        assert device.status()["round"] == number


def test_ways_back_are_written_where_a_copy_lost_the_empty_folder_for_them(device):
    (device.store.root / "reverse").rmdir()
    advance(device, 3)
    assert device.status()["reachable_rounds"] == [2, 1, 0]
    assert device.rollback(0).round == 0


def test_a_rollback_without_a_round_goes_back_one_release_each_time(device):
    advance(device, 3)
    assert [device.rollback().round for _ in range(3)] == [2, 1, 0]
    with pytest.raises(RoundNotFoundError, match="within reach"):
        device.rollback()


def test_a_far_rollback_never_lowers_the_release_floor(device):
    advance(device, 4)
    device.rollback(0)
    assert device.status()["release_floor"] == 4
    with pytest.raises(TrustError, match="already been at 4"):
        device.update(world.patch(0, 1))
    assert device.update(world.next_patch(device.store.state)) is UpdateResult.APPLIED
    assert device.status()["round"] == 5


def test_a_round_that_was_never_here_cannot_be_gone_back_to(device):
    advance(device, 2)
    with pytest.raises(RoundNotFoundError, match="rounds within reach: 1, 0"):
        device.rollback(7)
    assert device.status()["round"] == 2


def test_only_the_newest_reverse_patches_are_kept(device):
    advance(device, MAX_FORMER + 4)
    files = list((device.store.root / "reverse").iterdir())
    assert len(files) == len(device.store.state.former) == MAX_FORMER
    oldest = min(device.status()["reachable_rounds"])
    device.rollback(oldest)
    assert device.verify() == world.weights(oldest).fingerprint


def test_together_they_never_take_more_than_one_slot(device):
    advance(device, MAX_FORMER + 4)
    sizes = [p.stat().st_size for p in (device.store.root / "reverse").iterdir()]
    assert sum(sizes) <= device.store.layout.file_size


def test_a_way_back_larger_than_an_eighth_of_a_slot_is_not_kept(device):
    advance(device, 1)
    rng = np.random.default_rng(1)
    arrays = {n: rng.normal(size=a.shape).astype("f4") for n, a in world.INIT.items()}
    others, size = pack_weights(arrays), world.INIT.layout.file_size
    chain = (world.weights(1), others, world.weights(3))
    for number, (base, target) in enumerate(itertools.pairwise(chain), start=2):
        prints = base.fingerprint, target.fingerprint
        header = PatchHeader(world.MODEL, *prints, number, number, size)
        device.update(build_patch(base, target, header))
    # From round 2 to 1 every weight changes; round 0 lies behind round 1.
    assert device.status()["reachable_rounds"] == [2]
    assert list((device.store.root / "reverse").iterdir()) == []


def test_a_damaged_way_back_is_refused_and_changes_nothing(device):
    advance(device, 4)
    for path in (device.store.root / "reverse").iterdir():
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    with pytest.raises(StoreError, match=r"way back to round 0 is not usable.*repair"):
        device.rollback(0)
    assert device.verify() == world.weights(4).fingerprint
    assert device.status()["kept_rounds"] == [4, 3]


def test_an_exchanged_reverse_patch_is_refused(device):
    advance(device, 3)
    to_0, to_1 = (
        device.store.reverse_path(world.weights(n).fingerprint) for n in (0, 1)
    )
    to_0.write_bytes(to_1.read_bytes())
    with pytest.raises(StoreError, match="not usable"):
        device.rollback(0)
    assert device.status()["round"] == 3


class Crowded(Files):
    """A disk with room for a number of slots, or of reverse patches beside them."""

    def __init__(self, slots, reverse=99):
        self.slots, self.reverse = slots, reverse

    def free_bytes(self, path):
        if len(list(path.glob("slots/*"))) >= self.slots:
            return 0
        needed = world.INIT.layout.file_size + SPARE_BYTES
        return needed - max(0, len(list(path.glob("reverse/*"))) - self.reverse)


def test_a_slot_that_makes_room_leaves_the_way_back(device):
    device.store.files = Crowded(slots=2)
    advance(device, 3)
    assert device.status()["kept_rounds"] == [3, 2]
    assert device.status()["reachable_rounds"] == [2, 1, 0]


def test_a_rollback_that_finds_no_room_costs_nothing(device):
    device.store.files = Crowded(slots=2)
    advance(device, 3)
    with pytest.raises(StoreError, match="free some space"):
        device.rollback(0)
    assert device.status()["reachable_rounds"] == [2, 1, 0]
    device.store.files = Files()
    device.rollback(0)
    assert device.verify() == world.weights(0).fingerprint


def test_an_installation_that_finds_no_room_says_so(tmp_path):
    crowded = Crowded(slots=0)
    with pytest.raises(StoreError, match="free some space"):
        world.install(tmp_path / "store", crowded)
    assert not (tmp_path / "store" / "state.json").exists()


def test_the_ways_back_are_given_up_last(device):
    advance(device, 4)
    device.store.files = Crowded(slots=2, reverse=0)
    advance(device, 1)
    assert device.status()["kept_rounds"] == [5, 4]
    assert device.status()["reachable_rounds"] == [4]


class NoReverse(Files):
    """A disk that is full whenever it comes to a reverse patch."""

    def write(self, path, chunks, **_):
        if path.suffix == ".dpu":
            raise OSError(28, "No space left on device")
        super().write(path, chunks)


def test_a_reverse_patch_that_cannot_be_written_stops_no_update(device):
    advance(device, 3)
    device.store.files = NoReverse()
    advance(device, 1)
    # Round 2 is lost, and with it what could only be reached through it.
    assert device.status()["reachable_rounds"] == [3]
    assert list((device.store.root / "reverse").iterdir()) == []


# Reverse patches by themselves -----------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 100])
def test_a_kept_slot_whose_weight_file_was_cut_stops_no_update(device, size):
    advance(device, 1)
    os.truncate(device.store.slot_folder(kept(device)) / WEIGHTS_NAME, size)
    advance(device, 1)
    assert device.status()["round"] == 2
    assert device.status()["reachable_rounds"] == [1]


def test_too_little_memory_for_a_way_back_stops_no_update(device, monkeypatch):
    def too_much(*_):
        raise MemoryError

    advance(device, 1)
    monkeypatch.setattr(slots, "encode_reverse", too_much)
    advance(device, 1)
    assert device.status()["reachable_rounds"] == [1]


def kept(device):
    """The slot beside the active one."""
    return device.store.state.slots[1].target


def reverse(tmp_path, base, target):
    for name, weights in (("base", base), ("target", target)):
        write_weights(weights, tmp_path / name)
    header = PatchHeader(
        "ab" * 32, base.fingerprint, target.fingerprint, 1, 1, base.layout.file_size
    )
    paths = tmp_path / "base", tmp_path / "target"
    return encode_reverse(base.layout, *paths, header)


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "i8", "u2", "i1", "?"])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (300, 400)])
def test_a_reverse_patch_leads_to_the_very_bits(tmp_path, dtype, shape):
    rng = np.random.default_rng(1)
    arrays = rng.integers(0, 2, shape), rng.integers(0, 2, shape)
    base, target = (
        pack_weights({"a": array.astype(dtype), "z": np.float32(number)})
        for number, array in enumerate(arrays)
    )
    with open_patch(reverse(tmp_path, base, target)) as patch:
        assert apply_patch(base, patch).data == target.data


def test_signs_of_zero_and_nan_payloads_come_back(tmp_path):
    bits = np.array([0x80000000, 0x7FC00001, 0x7FC00002, 0], np.uint32)
    base = pack_weights({"w": np.zeros(4, np.float32)})
    target = pack_weights({"w": bits.view(np.float32)})
    with open_patch(reverse(tmp_path, base, target)) as patch:
        assert apply_patch(base, patch).data == target.data


def test_too_many_changes_are_not_worth_a_reverse_patch(tmp_path):
    zeros = np.zeros(MAX_CHANGES + 1, np.uint8)
    base, target = pack_weights({"w": zeros}), pack_weights({"w": zeros + 1})
    assert reverse(tmp_path, base, target) is None


def test_a_truncated_file_is_no_weight_file(device):
    advance(device, 1)
    kept = device.store.slot_folder(world.weights(0).fingerprint)
    path = kept / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    advance(device, 1)  # drops the damaged slot, without a way back to it
    assert device.status()["reachable_rounds"] == [1]


def test_a_state_without_its_ways_back_is_still_a_state(device):
    advance(device, 3)
    state = dataclasses.replace(device.store.state, former=())
    with device.store.lock():
        device.store.commit(state)
    again = Device.open(device.store.root)
    assert again.status()["reachable_rounds"] == [2]
