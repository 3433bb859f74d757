# SPDX-License-Identifier: Apache-2.0
"""Work on a store, written down: every operation, and what was acknowledged when."""

from dataclasses import replace

from edge_runtime import Device
from edge_runtime.errors import (
    HeldError,
    StoreError,
    TrialError,
    TrustError,
    VerificationError,
)
from edge_runtime.store.state import decode_state
from tests.crash import world
from tests.crash.disk import read_tree
from tests.crash.traced import Recorder


class PowerCutError(BaseException):
    """A trial that takes the whole device down."""


class Told(Device):
    """A device whose owner learns of an update the moment that a hook would run."""

    def __init__(self, recording):
        root, files = recording.base / "store", recording.files
        device = Device.open(root, files=files, trial=recording.trial)
        super().__init__(device.store, recording.trial)
        self.recording = recording

    def _run_hooks(self, when, event, slot):
        if when == "after-apply":
            if self.store.state.active != slot.target:
                raise StoreError("a hook was told of what is not done yet")
            self.recording.acknowledge()
            if self.recording.hook_fails:
                raise HeldError("no such service")


class Recording:
    """A log of operations on a store.

    Attributes:
        base: The folder that holds the store.
        files: What records; ``files.log`` is the log.
        start: What was there before.
        device: The device that the steps are about, once there is one.
        hook_fails: Whether the owner's hook fails after an update.
    """

    def __init__(self, base, files=None, states=(None,)):
        self.base, self.files = base, files or Recorder(base)
        self.start = read_tree(base)
        self.device = None
        self.hook_fails = False
        self._acknowledged = [(0, list(states))]
        self._end = None

    def play(self, *steps):
        """Take steps, all of them through the recorded files."""
        for step in steps:
            if self.device is None and step is not install:
                self.device = Told(self)
            try:
                step(self)
            finally:
                self._end, self.hook_fails, self.files.room = None, False, None
            # A step may go on after a failure. What counts then is what a hook was
            # told; of what was not written, the next start may find either.
            if not self.files.failed:
                self.acknowledge()
        return self

    def acknowledge(self):
        """From here on, the state of now must not be lost any more."""
        entry = len(self.files.log), [self.device.store.state]
        self._acknowledged.append(entry)

    def states(self, position=None):
        """The states that the next start may find if power ends at a place in the log.

        They are the last one that was acknowledged, and all that were being written
        since. None stands for a store in which nothing is installed.
        """
        position = len(self.files.log) if position is None else position
        at, last = [a for a in self._acknowledged if a[0] <= position][-1]
        written = [
            decode_state(rest[0])
            for kind, path, *rest in self.files.log[at:position]
            if kind == "data" and path.name.startswith("state.")
        ]
        return [*last, *written]

    def trial(self, slot, *_, **__):
        if self.device is not None:
            # That this try counts must be on the disk by now.
            tries = self.device.store.state.tries
            if not any(target.startswith(slot.name) for target in tries):
                raise StoreError("a trial that was not counted")
            self.acknowledge()
        if self._end is not None:
            raise self._end

    # Steps ---------------------------------------------------------------------------

    def install(self):
        world.install(self.base / "store", self.files, self.trial)
        self.device = Told(self)

    def update(self):
        # Forced: three cut trials, or a refusal, must not end the story.
        self._update(world.next_patch, force=True)

    def _update(self, patch, **options):
        if self.device.store.state.pinned:
            self.device.pin(held=False)
        self.device.update(patch(self.device.store.state), **options)

    def come_forward(self):
        """After a rollback, to the slot that is still there."""
        self._update(world.latest_patch)

    def release_again(self):
        """The weights of now under a higher counter."""
        self._update(world.same_patch)

    def refused(self):
        """An update that fails its trial."""
        self._end = TrialError("outputs are not finite")
        try:
            self.update()
        except TrialError:
            return
        raise StoreError("a bad model was installed")

    def too_many_tries(self):
        """A release whose trials are cut off until it is refused."""
        self._end = PowerCutError()
        for error in (PowerCutError, PowerCutError, PowerCutError, TrustError):
            try:
                self._update(world.next_patch)
            except error:
                continue
            raise StoreError(f"it did not end with {error.__name__}")

    def hook_after_fails(self):
        self.hook_fails = True
        self.update()

    def little_room(self):
        """An update on a disk with room for two slots and one reverse patch."""
        self.files.room = 2, 1
        self.update()

    def no_room(self):
        """Not even for one slot more; the patch does not lead from the active one."""
        self.files.room = 1, 0
        try:
            self._update(lambda state: world.patch(None, state.floor + 1))
        except StoreError:
            return
        raise StoreError("the active slot made room")

    def garbage(self):
        """A patch that does not lead where it says costs nothing on a full disk."""
        self.files.room = 2, 1
        before = self.device.store.state
        try:
            self._update(world.garbage)
        except VerificationError:
            if self.device.store.state != before:
                raise StoreError("garbage cost something") from None
            return
        raise StoreError("garbage was installed")

    def rollback(self):
        self.device.rollback()

    def rollback_far(self):
        """To the oldest round that can be reached."""
        self.device.rollback(min(self.device.status()["reachable_rounds"]))

    def pin(self):
        self.device.pin()

    def unpin(self):
        self.device.pin(held=False)

    # Damage, and what comes after it -------------------------------------------------

    def rot_slot(self):
        """The kept slot of the newest release goes bad on its own."""
        self.files.rot(
            self.device.store.slot_folder(self.device.store.state.floor_target)
            / "weights.safetensors"
        )

    def rot_state(self):
        self.files.rot(self.base / "store" / "state.json")
        self.device.store.reload()

    def rot_copy(self):
        self.files.rot(self.base / "store" / "state.copy")


def without_note(state):
    """A state as it was before it was read from its copy."""
    while state and state.history[-1].event == "mended":
        state = replace(state, history=state.history[:-1])
    return state


install = Recording.install
update, refused = Recording.update, Recording.refused
rollback, rollback_far = Recording.rollback, Recording.rollback_far
pin, unpin = Recording.pin, Recording.unpin

LIFE = (
    *(update, update, update, update),
    *(rollback, update, refused, update),
    *(rollback_far, update, pin, unpin),
)
TROUBLE = (
    *(update, update, update, Recording.garbage, Recording.little_room),
    *(rollback, Recording.come_forward, Recording.release_again),
    *(Recording.too_many_tries, Recording.hook_after_fails, Recording.no_room),
    *(rollback, Recording.rot_slot, Recording.come_forward),
    *(Recording.rot_state, update, Recording.rot_copy, rollback_far),
)
