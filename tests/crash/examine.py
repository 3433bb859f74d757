# SPDX-License-Identifier: Apache-2.0
"""What must hold after every crash: the next start insists on everything promised."""

import re

from edge_runtime import Device, fingerprint_file
from edge_runtime.errors import DpuError, StoreError
from edge_runtime.formats.model_folder import WEIGHTS_NAME
from edge_runtime.store.state import decode_state
from tests.crash import world
from tests.crash.recording import without_note
from tests.crash.traced import ROT


class BadStateError(Exception):
    """What the next start found is not what was promised."""


def examine(base, states):
    """Start on what was left, and insist on everything promised.

    Args:
        base: The folder that holds the store; it is changed.
        states: The states that may be found; None: nothing installed.

    Raises:
        BadStateError: A promise is broken.
    """
    try:
        device = _start(base / "store", states)
        if device is None:
            device = world.install(base / "store")
            insist(device, world.weights(0).fingerprint)
            return
        _go_back(device)
        go_on(device)
    except (DpuError, OSError, LookupError, ValueError) as err:
        raise BadStateError(f"{type(err).__name__}: {err}") from err


def _start(root, states):
    """Open the store; it knows what was acknowledged, and its slots are whole."""
    if None in states and not (root / "state.json").exists():
        return None
    device = Device.open(root, trial=world.no_trial)
    _insist_on_state(device, states)
    for name, data in world.members().items():
        if (root / "model" / name).read_bytes() != data:
            raise BadStateError(f"model/{name} is damaged")
    for slot in device.store.state.slots:
        if not _is_rotten(device, slot):
            device.store.check_slot(slot.target)
    link = root / "current"
    if link.is_symlink() and (link / WEIGHTS_NAME).read_bytes() != ROT:
        target = fingerprint_file(link / WEIGHTS_NAME)
        if not target.startswith(link.readlink().name):
            raise BadStateError("'current' leads to damaged weights")
    for name, other in (("json", "copy"), ("copy", "json")):
        if _is_sound(root / f"state.{other}"):
            _damage(root / f"state.{name}", states)
    return device


def _insist_on_state(device, states):
    found = without_note(device.store.state)
    if found not in [without_note(state) for state in states]:
        raise BadStateError("what was acknowledged is lost")


def _is_rotten(device, slot):
    """Whether it is a kept slot that went bad on its own, before the crash."""
    path = device.store.slot_folder(slot.target) / WEIGHTS_NAME
    return slot.target != device.store.state.active and path.read_bytes() == ROT


def _is_sound(path):
    try:
        decode_state(path.read_bytes())
    except (OSError, StoreError):
        return False
    return True


def _damage(path, states):
    """If one of the two state files is damaged the other serves; no floor is lower."""
    if not path.exists():
        return
    data = path.read_bytes()
    lower = re.sub(rb'"floor": (\d)', lambda m: b'"floor": %d' % (int(m[1]) ^ 1), data)
    for damaged in (bytes(len(data)), lower):
        path.unlink()
        path.write_bytes(damaged)
        device = Device.open(path.parent, trial=world.no_trial)
        _insist_on_state(device, states)
        device.verify()
    path.unlink()
    path.write_bytes(data)


def _go_back(device):
    """The way back along the reverse patches can be gone; each way is tried once."""
    state, root = device.store.state, device.store.root
    if not state.former or any(_is_rotten(device, slot) for slot in state.slots):
        return
    files = [*root.glob("reverse/*"), *root.glob("slots/*/weights.safetensors")]
    way = state.former, frozenset((path.name, path.read_bytes()) for path in files)
    if hash(way) not in _ways:
        device.rollback(state.former[-1].round)
        insist(device, state.former[-1].target)
        _ways.add(hash(way))


_ways: set[int] = set()


def go_on(device):
    """The next patch applies."""
    if device.store.state.pinned:
        device.pin(held=False)
    number = device.store.state.floor + 1
    patch = world.next_patch(device.store.state)
    device.update(patch, force=True)  # also where trials were cut off too often
    insist(device, world.weights(number).fingerprint)


def insist(device, target):
    """The active weights are the promised ones, and nothing is left lying about."""
    if device.verify() != target:
        raise BadStateError("not the promised weights")
    store, state = device.store, device.store.state
    named = {store.slot_folder(slot.target) for slot in state.slots}
    named |= {store.reverse_path(link.target) for link in state.former}
    there = [*store.root.glob("slots/*"), *store.root.glob("reverse/*")]
    if set(there) != named or list(store.root.rglob("*.part")):
        raise BadStateError("something is missing, or was left lying about")
    if store.root.joinpath("current").resolve() != store.slot_folder(target).resolve():
        raise BadStateError("'current' does not lead to the active weights")
    if Device.open(store.root).store.state != state:
        raise BadStateError("what the device believes is not what is on the disk")
