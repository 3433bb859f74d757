"""Cut the power everywhere, start again, and insist on everything promised."""

import errno
import itertools
import re
import shutil
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

from edge_runtime import Device, fingerprint_file
from edge_runtime.errors import DpuError, StoreError
from edge_runtime.state import decode_state
from tests.crash import world
from tests.crash.disk import Disk, write_tree
from tests.crash.recording import Recording, install, update
from tests.crash.traced import Failing, Recorder


class BadStateError(Exception):
    """What the next start found is not what was promised."""


# What must hold --------------------------------------------------------------------


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
            _insist(device, world.weights(0).fingerprint)
            return
        _go_back(device)
        _go_on(device)
    except (DpuError, OSError, LookupError, ValueError) as err:
        raise BadStateError(f"{type(err).__name__}: {err}") from err


def _start(root, states):
    """Open the store; it knows what was acknowledged, and its slots are whole."""
    if None in states and not (root / "state.json").exists():
        return None
    device = Device.open(root, trial=world.no_trial)
    state = device.store.state
    if state not in states:
        raise BadStateError("what was acknowledged is lost")
    for name, data in world.members().items():
        if (root / "model" / name).read_bytes() != data:
            raise BadStateError(f"model/{name} is damaged")
    for slot in state.slots:
        device.store.check_slot(slot.target)
    link = root / "current"
    if link.is_symlink():
        target = fingerprint_file(link / "weights.safetensors")
        if not target.startswith(link.readlink().name):
            raise BadStateError("'current' leads to damaged weights")
    for name in ("state.json", "state.copy"):
        _rots(root / name, states, state.floor)
    return device


def _rots(path, states, floor):
    """If one of the two state files is damaged the other serves; no floor is lower."""
    if not path.exists():
        return
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(bytes(len(data)))
    device = Device.open(path.parent, trial=world.no_trial)
    state = device.store.state
    if state.history[-1].event == "mended":
        state = replace(state, history=state.history[:-1])
    if state not in states or state.floor < floor:
        raise BadStateError(f"without {path.name} the state is older")
    device.verify()
    path.unlink()
    path.write_bytes(data)


def _go_back(device):
    """The way back along the reverse patches can be gone; each way is tried once."""
    state, root = device.store.state, device.store.root
    files = [*root.glob("reverse/*"), *root.glob("slots/*/weights.safetensors")]
    way = state.former, frozenset((path.name, path.read_bytes()) for path in files)
    if state.former and hash(way) not in _ways:
        device.rollback(state.former[-1].round)
        _insist(device, state.former[-1].target)
        _ways.add(hash(way))


_ways: set[int] = set()


def _go_on(device):
    """The next patch applies."""
    if device.store.state.pinned:
        device.pin(held=False)
    number = device.store.state.floor + 1
    device.update(world.next_patch(device.store.state), force=True)
    _insist(device, world.weights(number).fingerprint)


def _insist(device, target):
    """The active weights are the promised ones, and nothing is left lying about."""
    if device.verify() != target:
        raise BadStateError("not the promised weights")
    store, state = device.store, device.store.state
    named = {store.slot_folder(slot.target) for slot in state.slots}
    named |= {store.reverse_path(link.target) for link in state.former}
    there = [*store.root.glob("slots/*"), *store.root.glob("reverse/*")]
    if set(there) != named or list(store.root.rglob("*.part")):
        raise BadStateError("something is missing, or was left lying about")


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
    """

    points: int = 0
    states: int = 0
    bad: Counter = field(default_factory=Counter)
    seen: set = field(default_factory=set, repr=False)
    enough: int = 10**9

    def is_new(self, tree, states):
        key = hash((_timeless(tree), _plain(repr(states))))
        new = key not in self.seen
        self.seen.add(key)
        return new

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
        states = recording.states(position)
        for tree in disk.after_power_cut():
            if count.bad.total() >= count.enough:
                return
            if not count.is_new(tree, states):
                continue
            count.states += 1
            with written(tree) as base:
                try:
                    examined(base, states)
                except BadStateError as err:
                    where = log[position - 1][:2] if position else "start"
                    count.report(err, f"{position}: {where}")


def cut_again(recording, count):
    """As :func:`cut_power`, and cut it again while the next start does its work."""

    def recover(base, states):
        again = Recording(base, states=found(base))
        again.play(update if (base / "store" / "state.json").exists() else install)
        cut_power(again, count)

    cut_power(recording, Count(), examined=recover)


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


FAULTS = tuple(itertools.product((errno.EIO, errno.ENOSPC, errno.EROFS), (False, True)))


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
                shutil.copytree(base, base.with_name("copy"), symlinks=True)
                try:
                    examine(base.with_name("copy"), recording.states())
                except BadStateError as err:
                    where = f"{errno.errorcode[code]} at {number}, {for_good=}"
                    count.report(err, f"{step.__name__}: {where}")
                cut_power(recording, count, start=number)
    return injected


@contextmanager
def written(tree):
    """A folder with this tree's content."""
    with world.scratch() as folder:
        write_tree(tree, folder / "base")
        yield folder / "base"
