"""Work on a store, written down: every operation, and what was acknowledged when."""

from edge_runtime import Device
from edge_runtime.errors import StoreError, TrialError
from edge_runtime.state import decode_state
from tests.crash import world
from tests.crash.disk import read_tree
from tests.crash.traced import Recorder


class Recording:
    """A log of operations on a store.

    Attributes:
        base: The folder that holds the store.
        files: What records; ``files.log`` is the log.
        start: What was there before.
        device: The device that the steps are about, once there is one.
    """

    def __init__(self, base, files=None, states=(None,)):
        self.base, self.files = base, files or Recorder(base)
        self.start = read_tree(base)
        self.device = None
        self._acknowledged = [(0, list(states))]
        self._bad_model = False

    def play(self, *steps):
        """Take steps, all of them through the recorded files."""
        for step in steps:
            if self.device is None and step is not install:
                self.device = Device.open(
                    self.base / "store", files=self.files, trial=self._trial
                )
            step(self)
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

    def _trial(self, *_, **__):
        if self.device is not None:
            # That this try counts must be on the disk by now.
            self.acknowledge()
        if self._bad_model:
            raise TrialError("outputs are not finite")

    # Steps ---------------------------------------------------------------------------

    def install(self):
        self.device = world.install(self.base / "store", self.files, self._trial)

    def update(self):
        if self.device.store.state.pinned:
            self.device.pin(held=False)
        # Forced: three cut trials, or a refusal, must not end the story.
        self.device.update(world.next_patch(self.device.store.state), force=True)

    def refused(self):
        """An update that fails its trial."""
        self._bad_model = True
        try:
            self.update()
        except TrialError:
            return
        finally:
            self._bad_model = False
        raise StoreError("a bad model was installed")

    def rollback(self):
        self.device.rollback()

    def rollback_far(self):
        """To the oldest round that can be reached."""
        self.device.rollback(min(self.device.status()["reachable_rounds"]))

    def pin(self):
        self.device.pin()

    def unpin(self):
        self.device.pin(held=False)


install = Recording.install
update, refused = Recording.update, Recording.refused
rollback, rollback_far = Recording.rollback, Recording.rollback_far
pin, unpin = Recording.pin, Recording.unpin

LIFE = (
    *(update, update, update, update),
    *(rollback, update, refused, update),
    *(rollback_far, update, pin, unpin),
)
