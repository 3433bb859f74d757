# SPDX-License-Identifier: Apache-2.0
"""A repair that the power cuts anywhere leaves the damage, or what is whole."""

import errno
import itertools
import shutil
from contextlib import suppress

import pytest

from edge_runtime import Device
from edge_runtime.errors import DpuError
from edge_runtime.update.repair import find_damage, repair
from tests.crash import world
from tests.crash.disk import read_tree
from tests.crash.examine import BadStateError, insist
from tests.crash.explore import Count, cut_power, written
from tests.crash.recording import Recording
from tests.crash.traced import ROT, Failing


def mend(recording):
    repair(recording.device, world.bundle())


def examine(base, _states):
    """Start; nothing but files was ever at stake, and the repair goes on."""
    root = base / "store"
    try:
        device = Device.open(root, trial=world.no_trial)
        if device.store.state.floor != 0:
            raise BadStateError("the floor changed")
        repair(device, world.bundle())
        insist(device, world.weights(0).fingerprint)
        # The model of this world is none: its contract and inputs stand for any bytes.
        if damage := find_damage(device.store).keys() - {"contract", "golden"}:
            raise BadStateError(f"still damaged: {damage}")
        device.update(world.next_patch(device.store.state))
        insist(device, world.weights(1).fingerprint)
    except (DpuError, OSError) as err:
        raise BadStateError(f"{type(err).__name__}: {err}") from err


def rot(root):
    path = next((root / "slots").iterdir()) / "weights.safetensors"
    path.unlink()
    path.write_bytes(ROT)


def lose(root):
    shutil.rmtree(root / "model")
    shutil.rmtree(next((root / "slots").iterdir()))


@pytest.fixture(params=[rot, lose])
def base(request):
    with world.scratch() as folder:
        base = folder / "base"
        base.mkdir()
        world.install(base / "store")
        request.param(base / "store")
        yield base


def recording_of(base, files=None):
    state = Device.open(base / "store").store.state
    return Recording(base, files, [state])


def test_a_repair_survives_a_power_cut_anywhere(base):
    count = Count()
    cut_power(recording_of(base).play(mend), count, examined=examine)
    assert not count.bad
    assert count.states > 20


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_refuses_leaves_what_a_repair_can_mend(base, code):
    start, failures = read_tree(base), 0
    for number in itertools.count():
        with written(start) as folder:
            files = Failing(folder, number, code, for_good=code == errno.ENOSPC)
            with suppress(OSError, DpuError):
                recording_of(folder, files).play(mend)
            if files.left >= 0:
                break
            failures += 1
            examine(folder, None)
    assert failures > 5
