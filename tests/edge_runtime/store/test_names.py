# SPDX-License-Identifier: Apache-2.0
"""What is named in a store: an attacker chooses targets, but never what is removed."""

import dataclasses
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest

from edge_runtime import Device
from edge_runtime.agent.agent import Agent
from edge_runtime.errors import DpuError, StoreError, VerificationError
from edge_runtime.formats.header import PatchHeader, encode_header
from edge_runtime.store.state import decode_state, encode_state
from tests.crash import world
from tests.crash.disk import read_tree, write_tree
from tests.crash.examine import insist
from tests.crash.explore import Count, cut_power
from tests.crash.recording import Recording, rollback_far, update

OLD_STORE = Path(__file__).parents[2] / "golden" / "stores" / "half_names.tar.gz"


@pytest.fixture
def device(tmp_path):
    """A device with two slots and two reverse patches."""
    device = world.install(tmp_path / "store")
    for _ in range(3):
        device.update(world.next_patch(device.store.state))
    return device


@pytest.fixture
def old(tmp_path):
    """Such a store as an earlier runtime left it, and two patches for it."""
    with tarfile.open(OLD_STORE) as archive:
        archive.extractall(tmp_path / "old", filter="data")
    return tmp_path / "old"


def opened(folder):
    return Device.open(folder / "store", trial=world.no_trial)


def forged(state, target, parent=None, counter=99):
    """A small unsigned patch that promises a target of the attacker's choice."""
    layout = world.INIT.layout
    counts = bytes(len(layout.tensors))  # of no tensor anything travels
    body = bytes([1, 1, 0, len(counts)]) + counts
    parent = parent or state.active
    size = layout.file_size
    header = PatchHeader(state.model, parent, target, 9, counter, size)
    return encode_header(header, body) + b"\0\0" + body


def content(root):
    return {
        path.relative_to(root): path.read_bytes()
        for path in (root / "slots", root / "reverse")
        for path in path.rglob("*")
        if path.is_file()
    }


def targets(state):
    return [slot.target for slot in (*state.slots, *state.former)]


def likenesses(target):
    """Targets that share a part of their name with one that a store has."""
    return [
        target[:n] + ("0" if target[n] != "0" else "1") * (64 - n) for n in (32, 63)
    ]


@pytest.mark.parametrize("which", range(4))
def test_a_target_that_is_like_anothers_removes_nothing(device, which):
    state, before = device.store.state, content(device.store.root)
    for target in likenesses(targets(state)[which]):
        with pytest.raises(VerificationError):
            device.update(forged(state, target))
        assert content(device.store.root) == before
    insist(device, state.active)


@pytest.mark.parametrize("which", range(4))
def test_nor_in_a_store_with_the_names_of_an_earlier_runtime(old, which):
    device = opened(old)
    state, before = device.store.state, content(device.store.root)
    for target in likenesses(targets(state)[which]):
        with pytest.raises(VerificationError):
            device.update(forged(state, target))
        assert content(device.store.root) == before
    insist(device, state.active)


def test_two_patches_in_the_agents_folder_cost_no_slot(old, tmp_path):
    folder = tmp_path / "patches"
    folder.mkdir()
    state, root = opened(old).store.state, old / "store"
    slots = [slot.target for slot in state.slots]
    for number, (parent, victim) in enumerate([slots, (state.init, slots[0])]):
        data = forged(state, likenesses(victim)[0], parent, 99 - number)
        (folder / f"{number}.dpu").write_bytes(data)
    before = content(root)
    agent = Agent(lambda: opened(old), folder, lambda *_, **__: None)
    with suppress(DpuError):
        agent.look()
    assert content(root) == before
    device = opened(old)
    device.verify()
    assert device.rollback().target == slots[1]


def test_a_slot_that_the_state_names_is_never_written_anew(device):
    store, before = device.store, content(device.store.root)
    for slot in store.state.slots:
        with pytest.raises(StoreError, match="in use"):
            store.stage([b"other"], slot.target)
    for link in store.state.former:
        with pytest.raises(StoreError, match="in use"):
            store.add_reverse(link.target, b"other")
    assert content(store.root) == before


def test_a_reverse_patch_leaves_those_with_a_like_name_alone(old):
    store = opened(old).store
    known = store.state.former[0].target
    before = store.reverse_path(known).read_bytes()
    store.add_reverse(likenesses(known)[0], b"other")
    assert store.reverse_path(known).read_bytes() == before


def test_names_hold_the_whole_fingerprint(device):
    root, state = device.store.root, device.store.state
    slots, reverse = (
        {p.name for p in (root / n).iterdir()} for n in ("slots", "reverse")
    )
    assert slots == {slot.target for slot in state.slots}
    assert reverse == {f"{link.target}.dpu" for link in state.former}
    assert (root / "current").readlink() == Path("slots", state.active)


# Stores of an earlier runtime --------------------------------------------------------


def test_an_old_store_goes_on_and_receives_patches(old):
    device = opened(old)
    insist(device, device.store.state.active)
    assert device.status()["reachable_rounds"] == [2, 1, 0]
    for number in (4, 5):
        device.update(old / f"round_{number:02d}.dpu")
        insist(device, opened(old).store.state.active)
        assert device.status()["round"] == number
    assert device.status()["reachable_rounds"] == [4, 3, 2, 1, 0]
    for number in (0, 3, 5, 1, 4):
        device.rollback(number)
        insist(device, opened(old).store.state.active)


@pytest.mark.parametrize("number", [2, 1, 0])
def test_an_old_store_leads_back_to_every_round(old, number):
    device = opened(old)
    assert device.rollback(number).round == number
    insist(device, device.store.state.active)
    # The weights that were left lie under their old name still, and come back.
    device.update(
        forged(device.store.state, device.store.state.floor_target, counter=3)
    )
    insist(device, device.store.state.floor_target)


def test_a_damaged_old_slot_is_written_anew(old, tmp_path):
    device = opened(old)
    newest = device.store.state.active
    device.rollback()
    (device.store.slot_folder(newest) / "weights.safetensors").write_bytes(b"rot")
    patch = world.patch(2, 3)
    device.update(patch)
    insist(device, newest)


def test_an_old_store_survives_power_cuts_during_its_first_update(old, tmp_path):
    base = tmp_path / "base"
    tree = read_tree(old)
    stores = tuple(entry for entry in tree[1] if entry[0] == "store")
    write_tree((tree[0], stores), base)
    states = [Device.open(base / "store").store.state]
    count = Count(share=0.3)
    cut_power(Recording(base, states=states).play(update, rollback_far), count)
    assert not count.bad
    assert count.states > 50


# What is not the store's -------------------------------------------------------------


def test_what_somebody_keeps_in_a_store_stays(device):
    root = device.store.root
    mine = [root / n for n in ("notes.part", "slots/notes", "reverse/way.dpu")]
    for path in mine:
        path.write_bytes(b"mine")
    folder = root / "slots" / "lost+found"
    folder.mkdir()
    device.update(world.next_patch(device.store.state))
    assert [path.read_bytes() for path in mine] == [b"mine"] * 3
    assert folder.is_dir()


@pytest.mark.parametrize("field", ["slots", "former"])
@pytest.mark.parametrize("name", ["../../../etc", "/etc", "a" * 63, "A" * 64, "", "."])
def test_a_slot_whose_name_leads_elsewhere_is_refused_by_name(device, field, name):
    state = device.store.state
    first = getattr(state, field)[0]
    hostile = dataclasses.replace(first, target=name)
    active = name if field == "slots" else state.active
    state = dataclasses.replace(
        state, active=active, **{field: (hostile, *getattr(state, field)[1:])}
    )
    with pytest.raises(StoreError) as refused:
        decode_state(encode_state(state))
    assert repr(name) in str(refused.value)
