# SPDX-License-Identifier: Apache-2.0
"""Every operation may fail: then nothing changed, or the update counts."""

import errno
import sys
import threading

import pytest

from edge_runtime import files
from tests.crash import world
from tests.crash.disk import read_tree
from tests.crash.explore import Count, fail_everywhere, fail_reads
from tests.crash.recording import (
    LIFE,
    TROUBLE,
    Recording,
    install,
    rollback_far,
    update,
)


@pytest.mark.parametrize(
    ("before", "step", "fault"),
    [
        ((), install, (errno.EROFS, True)),
        ((install, update), update, (errno.EIO, False)),
        ((install, update, update), rollback_far, (errno.ENOSPC, True)),
    ],
)
def test_every_operation_may_fail_before_a_power_cut(before, step, fault):
    with world.scratch() as folder:
        states = Recording(folder).play(*before).states() if before else [None]
        count = Count()
        failures = fail_everywhere(step, read_tree(folder), states, count, [fault])
    assert not count.bad
    assert failures > 25


def test_every_read_of_an_update_may_fail():
    with world.scratch() as folder:
        states = Recording(folder).play(install, update, update).states()
        count = Count()
        failures = fail_reads(update, read_tree(folder), states, count)
    assert not count.bad
    assert failures > 5


# The seam --------------------------------------------------------------------------

CHANGES = {
    *("os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir"),
    *("os.truncate", "os.chmod", "os.chown", "os.utime", "shutil.rmtree"),
}
watched = threading.local()


def watch(event, arguments):
    """Note every change of a watched folder that goes around the seam."""
    folder = getattr(watched, "folder", None)
    if folder is None:
        return
    if event == "open":
        path, mode, flags = arguments
        changes = flags & (1 | 2) or (mode and set(mode) & set("wax+"))
    else:
        path, changes = (arguments or [None])[0], event in CHANGES
    if changes and str(path).startswith(folder):
        frame = sys._getframe(1)
        while frame and frame.f_code.co_filename != files.__file__:
            frame = frame.f_back
        (watched.within if frame else watched.around).append(f"{event} {path}")


sys.addaudithook(watch)


def test_no_change_goes_around_the_seam():
    # A file that rots does so by itself.
    steps = [step for step in TROUBLE if not step.__name__.startswith("rot")]
    with world.scratch() as base:
        watched.within, watched.around, watched.folder = [], [], str(base)
        try:
            Recording(base).play(install, *LIFE, *steps)
        finally:
            watched.folder = None
    assert watched.around == []
    assert len(watched.within) > 150
