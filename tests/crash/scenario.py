"""A tiny model, real patches, recorded work on a store, and what must hold after it."""

import errno
import itertools
import re
import shutil
import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from edge_runtime import Device, fingerprint_file
from edge_runtime.errors import DpuError, StoreError, TrialError
from edge_runtime.state import decode_state
from packager.bundle import build_bundle
from packager.build import pack_round
from packager.rounds import read_round
from tests.conftest import Run
from tests.crash.disk import Disk, read_tree, write_tree
from tests.crash.traced import Failing, Recorder

SHM = Path("/dev/shm")


def no_trial(*_, **__):
    """The files are what is tried here."""


def bad_trial(*_, **__):
    raise TrialError("outputs are not finite")


@contextmanager
def scratch():
    """A folder in memory, where thousands of small stores cost little."""
    parent = SHM if SHM.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="dpu-crash-", dir=parent) as path:
        yield Path(path)


class World:
    """The server's side: a bundle and a chain of patches."""

    def __init__(self, folder, rounds=8):
        run = Run(folder / "runs" / "tiny")
        for number in range(rounds):
            run.add(number)
        packed = [
            pack_round(read_round(run.path / f"round_{number:02d}"))
            for number in range(1, rounds)
        ]
        self.bundle = build_bundle(read_round(run.path / "round_00")).data
        self.patches = [None, *(patch.data for patch in packed)]
        files = sorted(run.path.glob("round_*/weights.safetensors"))
        self.targets = [fingerprint_file(path) for path in files]

    def after(self, fingerprint):
        """The patch that leads on from these weights."""
        return self.patches[self.targets.index(fingerprint) + 1]

    def install(self, base, files=None):
        root = base / "store"
        return Device.install(root, self.bundle, files=files, trial=no_trial)


class BadStateError(Exception):
    """What the next start found is not what was promised."""


class Recording:
    """A log of operations, and what was acknowledged at which place in it."""

    def __init__(self, base, files=None, states=(None,)):
        self.base, self.files = base, files or Recorder(base)
        self.start = read_tree(base)
        self.acknowledged = [(0, list(states))]

    def acknowledge(self, state):
        self.acknowledged.append((len(self.files.log), [state]))

    def play(self, world, *steps):
        """Take steps on the store, all of them through the recorded files."""
        device = None
        for step in steps:
            if device is None and step is not install:
                device = Device.open(
                    self.base / "store", files=self.files, trial=no_trial
                )
            device = step(world, self, device) or device
            self.acknowledge(device.store.state)
        return self

    def states(self, position):
        """The states that the next start may find if power ends at this place.

        None stands for a store in which nothing is installed.
        """
        at, last = [a for a in self.acknowledged if a[0] <= position][-1]
        written = [
            decode_state(rest[0])
            for kind, path, *rest in self.files.log[at:position]
            if kind == "data" and path.name.startswith("state.")
        ]
        return [*last, *written]


def install(world, recording, device):
    return world.install(recording.base, recording.files)


def update(world, recording, device):
    device.update(world.after(device.store.state.active))


def forced(world, recording, device):
    device.update(world.after(device.store.state.active), force=True)


def rollback(world, recording, device):
    device.rollback()


def refused(world, recording, device):
    """An update that fails its trial."""
    device._trial = bad_trial
    try:
        device.update(world.after(device.store.state.active))
    except TrialError:
        device._trial = no_trial
        return
    raise BadStateError("a bad model was installed")


def examine(base: Path, states, world: World) -> None:
    """Start on what a power cut left, and insist on everything promised.

    Raises:
        BadStateError: A promise is broken.
    """
    try:
        _examine(base, states, world)
    except (DpuError, OSError, LookupError, ValueError) as err:
        raise BadStateError(f"{type(err).__name__}: {err}") from err


def _examine(base, states, world):
    root = base / "store"
    try:
        device = Device.open(root, trial=no_trial)
    except StoreError:
        if None not in states:
            raise
        device = world.install(base)
    else:
        if device.store.state not in states:
            raise BadStateError("an acknowledged update is lost")
    for slot in device.store.state.slots:
        device.store.check_slot(slot.target)
    check_link(device)
    _go_on(device, world)


def check_link(device):
    """``current`` leads to weights that are whole, or is not there."""
    link = device.store.root / "current"
    if link.is_symlink():
        target = fingerprint_file(link / "weights.safetensors")
        if not target.startswith(link.readlink().name):
            raise BadStateError("'current' leads to damaged weights")


def _go_on(device, world):
    """The next patch applies, leaves nothing lying about, and can be undone."""
    store, before = device.store, device.store.state.active
    device.update(world.after(before), force=True)
    for target in (world.targets[world.targets.index(before) + 1], before):
        if device.verify() != target:
            raise BadStateError("not the promised weights")
        names = {path.name for path in (store.root / "slots").iterdir()}
        if names != {store.slot_folder(slot.target).name for slot in store.state.slots}:
            raise BadStateError(f"left lying about: {names}")
        if left := list(store.root.rglob("*.part")):
            raise BadStateError(f"left lying about: {left}")
        if device.store.state.active != before:
            device.rollback()


@dataclass
class Count:
    """What an enumeration saw."""

    points: int = 0
    states: int = 0
    bad: Counter = field(default_factory=Counter)
    seen: set = field(default_factory=set, repr=False)

    def is_new(self, tree, states):
        key = hash((_timeless(tree), _plain(repr(states))))
        new = key not in self.seen
        self.seen.add(key)
        return new

    def report(self, problem, where):
        text = re.sub(r"/[^\s':]*/(store|state)", r"\1", str(problem))
        self.bad[f"{re.sub(r'[0-9a-f]{12,64}', '#', text)[:160]} | {where}"] += 1


def _plain(text):
    """Without what differs between two runs: times, and checksums over times."""
    return re.sub(r"""(at=|sha256=|"at": |"sha256": )['"][^'"]*['"]""", "", text)


def _timeless(tree):
    kind, content = tree
    if kind == "d":
        return kind, tuple((name, _timeless(child)) for name, child in content)
    if kind == "f" and content[:1] == b"{" and b'"history"' in content:
        return kind, _plain(content.decode(errors="replace"))
    return tree


def cut_power(recording, world, count, *, disk=None, start=0, examined=examine):
    """Cut the power after every operation, in every way, and start again each time.

    Args:
        recording: What was done.
        world: The server's side.
        count: Where to count; states that it has seen are not looked at again.
        disk: What was on the disk, in flight or not, when the recording began.
        start: Look at no place in the log before this one.
        examined: Called with a folder, the states that may be found, and the world.
    """
    disk = disk or Disk(recording.start)
    for position in range(len(recording.files.log) + 1):
        if position:
            disk.apply(*recording.files.log[position - 1])
        if position < start:
            continue
        count.points += 1
        states = recording.states(position)
        for tree in disk.after_power_cut():
            if count.is_new(tree, states):
                count.states += 1
                last = recording.files.log[position - 1][:2] if position else "start"
                with written(tree) as base:
                    try:
                        examined(base, states, world)
                    except BadStateError as err:
                        count.report(err, last)


def cut_again(recording, world, count):
    """As :func:`cut_power`, and cut it again while the next start does its work."""

    def recover(base, states, world):
        again = Recording(base, states=found(base))
        if again.acknowledged[0][1][0] not in states:
            raise BadStateError("an acknowledged update is lost")
        again.play(world, forced if again.acknowledged[0][1] != [None] else install)
        cut_power(again, world, count)

    cut_power(recording, world, Count(seen=count.seen.copy()), examined=recover)


def kill_then_cut(recording, world, count):
    """Kill the process after every operation; cut the power while the next one works.

    What the first one left in flight is in flight still.
    """
    for position in range(len(recording.files.log) + 1):
        disk = Disk(recording.start)
        for entry in recording.files.log[:position]:
            disk.apply(*entry)
        with written(disk.running()) as base:
            again = Recording(base, states=recording.states(position))
            again.play(world, forced if found(base) != [None] else install)
            cut_power(again, world, count, disk=disk)


def found(base):
    """What a start finds: one state, or None."""
    try:
        return [Device.open(base / "store").store.state]
    except StoreError as err:
        if "nothing is installed" in str(err):
            return [None]
        raise


@contextmanager
def written(tree):
    """A folder with this tree's content."""
    with scratch() as folder:
        write_tree(tree, folder / "base")
        yield folder / "base"


def fail_everywhere(step, start, states, world, count):
    """Let every operation of a step fail, and cut the power at any time after that.

    Args:
        step: What to do.
        start: The tree to do it on.
        states: The state that it is in.
        world: The server's side.
        count: Where to count.

    Returns:
        How many failures were injected.
    """
    injected = 0
    for for_good in (False, True):
        for code in (errno.EIO, errno.ENOSPC, errno.EROFS):
            for number in itertools.count():
                with written(start) as base:
                    files = Failing(base, number, code, for_good=for_good)
                    recording = Recording(base, files, states)
                    try:
                        recording.play(world, step)
                    except (DpuError, OSError):
                        pass
                    if files.left >= 0:
                        break
                    injected += 1
                    try:
                        examine(copied(base), recording.states(len(files.log)), world)
                    except BadStateError as err:
                        count.report(err, f"{step.__name__} {errno.errorcode[code]} at {number}")
                    cut_power(recording, world, count, start=number)
    return injected


def copied(base):
    """A copy of a folder, so that looking at it changes nothing."""
    copy = base.with_name("copy")
    shutil.copytree(base, copy, symlinks=True)
    return copy
