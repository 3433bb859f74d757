# SPDX-License-Identifier: Apache-2.0
"""Cut the power everywhere, refuse every operation, and start again each time."""

import errno
import itertools
import os
import random
import re
import shutil
import sys
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import SimpleNamespace

from edge_runtime import Device, fingerprint_file
from edge_runtime.errors import DpuError, StoreError
from edge_runtime.store import slots
from edge_runtime.store.state import decode_state
from tests.crash import world
from tests.crash.disk import Disk, write_tree
from tests.crash.examine import BadStateError, examine, go_on, insist
from tests.crash.recording import Recording, install, update
from tests.crash.traced import Failing, Recorder

_encode_reverse, _encoded = slots.encode_reverse, {}


def encode_reverse(layout, base, target, header):
    """Encode each reverse patch once: files and header alone decide its bytes."""
    key = fingerprint_file(base), fingerprint_file(target), header
    if key not in _encoded:
        _encoded[key] = _encode_reverse(layout, base, target, header)
    return _encoded[key]


slots.encode_reverse = encode_reverse  # half the time of thousands of small stores


# Where to cut ----------------------------------------------------------------------


@dataclass
class Count:
    """What an exploration saw.

    Attributes:
        points: Places in a log at which the power was cut.
        states: Different states of a disk that were started from.
        bad: How many of them broke a promise, by what and where.
        seen: States that need not be looked at again.
        enough: Stop at this many bad states.
        share: Of the new states, the share that is looked at, drawn with a
            fixed seed.
        passed: States that were not drawn.
    """

    points: int = 0
    states: int = 0
    bad: Counter = field(default_factory=Counter)
    seen: set = field(default_factory=set, repr=False)
    enough: int = 10**9
    share: float = 1.0
    passed: int = 0
    rng: random.Random = field(default_factory=lambda: random.Random(0), repr=False)

    def is_new(self, tree, states):
        key = hash((_timeless(tree), _plain(repr(states))))
        new = key not in self.seen
        self.seen.add(key)
        return new

    def draw(self):
        """Whether a new state is to be looked at."""
        drawn = self.share == 1 or self.rng.random() < self.share
        self.states, self.passed = self.states + drawn, self.passed + (not drawn)
        return drawn

    def report(self, problem, where):
        text = re.sub(r"/[^\s':]*/(store|state)", r"\1", str(problem))
        self.bad[f"{re.sub('[0-9a-f]{12,64}', '#', text)[:160]} | {where}"] += 1


def _plain(text):
    """Leave out what differs between two runs: times, and checksums over them."""
    return re.sub(r"""(at=|"at": |"sha256": )['"][^'"]*['"]""", "", text)


def _timeless(tree):
    kind, content = tree
    if kind == "d":
        return kind, tuple((name, _timeless(child)) for name, child in content)
    if kind == "f" and b'"history"' in content:
        return kind, _plain(content.decode(errors="replace"))
    return tree


def cut_power(recording, count, *, disk=None, start=0, examined=examine):
    """Cut the power after every operation, in every way, and start again each time.

    Args:
        recording: What was done.
        count: Where to count; states that it has seen are not looked at again.
        disk: What was on the disk, in flight or not, when the recording began.
        start: Look at no place in the log before this one.
        examined: Called with a folder and the states that may be found in it.
    """
    disk = disk or Disk(recording.start)
    log = recording.files.log
    for position in range(len(log) + 1):
        if position:
            disk.apply(*log[position - 1])
        if position < start:
            continue
        count.points += 1
        if _has_current(recording.start) and not _has_current(disk.running()):
            count.report(
                "a kill leaves no 'current'", f"{position}: {log[position - 1]}"
            )
        states = recording.states(position)
        for tree in disk.after_power_cut():
            if count.bad.total() >= count.enough:
                return
            if not (count.is_new(tree, states) and count.draw()):
                continue
            with written(tree) as base:
                try:
                    examined(base, states)
                except BadStateError as err:
                    where = log[position - 1][:2] if position else "start"
                    count.report(err, f"{position}: {where}")


def _has_current(tree):
    return "current" in dict(dict(tree[1]).get("store", ("d", ()))[1])


def cut_again(recording, count, files=Recorder):
    """As :func:`cut_power`, and cut it again while the next start does its work."""

    def recover(base, states):
        again = Recording(base, files(base), found(base))
        again.play(update if (base / "store" / "state.json").exists() else install)
        cut_power(again, count)

    cut_power(recording, Count(share=count.share), examined=recover)


def kill_then_cut(recording, count, *, files=Recorder, after=None):
    """Kill the process after every operation; cut the power while the next one works.

    What the first one left in flight is in flight still.

    Args:
        recording: What the first process did.
        count: Where to count.
        files: What the second process works with.
        after: Kill only after operations of this kind.
    """
    log = recording.files.log
    for position in range(len(log) + 1):
        if after and (not position or log[position - 1][0] != after):
            continue
        disk = Disk(recording.start)
        for entry in log[:position]:
            disk.apply(*entry)
        with written(disk.running()) as base:
            again = Recording(base, files(base), recording.states(position))
            again.play(update if (base / "store" / "state.json").exists() else install)
            cut_power(again, count, disk=disk)


def found(base):
    """What a start may find: the state, or what its copy says; or None."""
    root = base / "store"
    if not (root / "state.json").exists():
        return [None]
    states = [Device.open(root).store.state]
    with suppress(OSError, StoreError):
        states.append(decode_state((root / "state.copy").read_bytes()))
    return states


def live(folder, *steps):
    """Take steps, no harm done in between; after each the store is as promised."""
    recording, floor = Recording(folder), 0
    for step in steps:
        recording.play(step)
        state = recording.device.store.state
        if not step.__name__.startswith("rot"):
            insist(recording.device, state.active)
        if state.floor < floor:
            raise BadStateError(f"{step.__name__} lowered the release floor")
        floor = state.floor
    return recording.device


# What to refuse ---------------------------------------------------------------------

# No code here looks at the number, so two of them stand for all.
FAULTS = ((errno.EIO, False), (errno.ENOSPC, True))


def fail_everywhere(step, start, states, count, faults=FAULTS):
    """Let every operation of a step fail, and cut the power at any time after that.

    Args:
        step: What to do.
        start: The tree to do it on.
        states: The state that it is in.
        count: Where to count.
        faults: Error numbers, each with whether every operation after it fails too.

    Returns:
        How many failures were injected.
    """
    injected = 0
    for code, for_good in faults:
        for number in itertools.count():
            with written(start) as base:
                files = Failing(base, number, code, for_good=for_good)
                recording = Recording(base, files, states)
                with suppress(DpuError, OSError):
                    recording.play(step)
                if files.left >= 0:
                    break  # beyond the last operation
                injected += 1
                where = f"{step.__name__}: {errno.errorcode[code]} at {number}"
                _look_at_copy(recording, count, where)
                cut_power(recording, count, start=number)
                if not for_good:
                    _go_on_after(recording, count, where)
    return injected


def fail_reads(step, start, states, count):
    """Let every file that a step opens for reading fail, one by one.

    Returns:
        How many failures were injected.
    """
    number = 0
    while True:
        with written(start) as base:
            recording = Recording(base, states=states)
            _reads.folder, _reads.left = str(base), number
            with suppress(DpuError, OSError):
                recording.play(step)
            _reads.folder = None
            if _reads.left >= 0:
                return number
            number += 1
            where = f"{step.__name__}: read {number} fails"
            _look_at_copy(recording, count, where)
            _go_on_after(recording, count, where)


def _look_at_copy(recording, count, where):
    copy = recording.base.with_name("copy")
    shutil.copytree(recording.base, copy, symlinks=True)
    count.points, count.states = count.points + 1, count.states + 1
    try:
        examine(copy, recording.states())
    except BadStateError as err:
        count.report(err, where)


def _go_on_after(recording, count, where):
    """The process that saw the error is of use still."""
    try:
        if recording.device:
            go_on(recording.device)
    except (BadStateError, DpuError, OSError) as err:
        count.report(err, f"{where}, then the same process")


_reads = SimpleNamespace(folder=None, left=0)  # of all threads


def _refuse(event, arguments):
    """Refuse to open one file for reading, as a disk with a bad block would."""
    folder = _reads.folder
    if folder is None or event != "open" or not str(arguments[0]).startswith(folder):
        return
    if not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_DIRECTORY):
        _reads.left -= 1
        if _reads.left == -1:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(arguments[0]))


sys.addaudithook(_refuse)


@contextmanager
def written(tree):
    """A folder with this tree's content."""
    with world.scratch() as folder:
        write_tree(tree, folder / "base")
        yield folder / "base"
