# SPDX-License-Identifier: Apache-2.0
"""A key list is taken as a whole or not at all, wherever the power is cut."""

import errno
import itertools
from contextlib import suppress

import pytest

from edge_runtime import Device
from edge_runtime.errors import DpuError, TrustError
from tests.crash import examine as examining
from tests.crash import world
from tests.crash.disk import Disk, read_tree
from tests.crash.examine import BadStateError, insist
from tests.crash.explore import Count, cut_power, written
from tests.crash.recording import Recording
from tests.crash.traced import Failing
from tests.edge_runtime.trust import fleet

LIST_3 = fleet.list_2(
    fleet.list_2(),
    add={"targets": fleet.public("newest")},
    remove={"targets": fleet.public("new")},
)


def take_list(recording):
    recording.device.add_list(fleet.list_2())


def release(recording):
    state = recording.device.store.state
    recording.device.update(signed_for(state))


def signed_for(state):
    """What the server sends to a device with the newest list that it has."""
    name = {1: "fleet", 2: "new", 3: "newest"}[state.key_list.root.version]
    return fleet.sign_patch_with(world.next_patch(state), name)


def examine(base, states):
    """Start; the list is an acknowledged one, its keys count, the next ones follow."""
    try:
        device = examining._start(base / "store", states)
        _refuse_revoked(device)
        for data in (fleet.list_2(), LIST_3):
            if device.store.state.key_list.root.version < 3:
                device.add_list(data)
        number = device.store.state.floor + 1
        device.update(signed_for(device.store.state), force=True)
        insist(device, world.weights(number).fingerprint)
        _refuse_revoked(device)
    except TrustError as err:
        if "older than" not in str(err):
            raise BadStateError(f"TrustError: {err}") from err
    except (DpuError, OSError) as err:
        raise BadStateError(f"{type(err).__name__}: {err}") from err


def _refuse_revoked(device):
    state = device.store.state
    if state.trust != state.key_list.root.releases:
        raise BadStateError("the keys are not those of the list")
    if state.key_list.root.version > 1:
        data = fleet.sign_patch_with(world.next_patch(state), "fleet")
        with pytest.raises(TrustError):
            device.update(data)


@pytest.fixture
def base():
    with world.scratch() as folder:
        base = folder / "base"
        base.mkdir()
        device = fleet.device(base)
        device.update(fleet.release(0, 1, "fleet"))
        yield base


def recording_of(base, files=None):
    state = Device.open(base / "store").store.state
    return Recording(base, files, [state])


def test_a_new_list_survives_a_power_cut_anywhere(base):
    recording = recording_of(base).play(take_list, release)
    count = Count()
    cut_power(recording, count, examined=examine)
    assert not count.bad
    assert count.states > 50


def test_a_new_list_survives_a_kill_and_then_a_power_cut(base):
    """Killed after every operation; the next start mends and is cut in turn."""
    recording = recording_of(base).play(take_list)
    count, log = Count(share=0.15), recording.files.log
    for position in range(len(log) + 1):
        disk = Disk(recording.start)
        for entry in log[:position]:
            disk.apply(*entry)
        with written(disk.running()) as again:
            next_ = Recording(again, states=recording.states(position))
            next_.play(release)
            cut_power(next_, count, disk=disk, examined=examine)
    assert not count.bad
    assert count.states > 20


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_refuses_leaves_the_old_list_or_the_new(base, code):
    start, before, failures = read_tree(base), recording_of(base).states(), 0
    for number in itertools.count():
        with written(start) as folder:
            files = Failing(folder, number, code, for_good=code == errno.ENOSPC)
            recording = Recording(folder, files, before)
            with suppress(OSError):
                recording.play(take_list)
            if files.left >= 0:
                break
            failures += 1
            examine(folder, recording.states())
    assert failures > 5
