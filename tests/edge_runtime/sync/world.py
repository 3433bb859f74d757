# SPDX-License-Identifier: Apache-2.0
"""A run that is published round by round, and a device that follows it."""

from edge_runtime.agent.agent import Agent
from edge_runtime.files import Files
from edge_runtime.formats.signing import Trust
from edge_runtime.live.proof import public_key
from edge_runtime.sync.head import read_head
from edge_runtime.sync.http import FolderSource
from edge_runtime.sync.sync import Sync, SyncOptions
from edge_runtime.update.device import Device
from edge_runtime.update.trial import run_trial
from packager.fleet.place import FolderPlace
from packager.fleet.publish import Channel, publish
from packager.keys import generate_key
from packager.rounds.folder import read_round

KEY, PAUSER = generate_key(), generate_key()
TRUST = Trust((public_key(KEY),))
NOW = 1_800_000_000
OPTIONS = SyncOptions(device="board 7")


class World:
    """A run that is published round by round, and a device that follows it."""

    def __init__(self, base):
        self.run, self.place = base / "runs" / "tiny", FolderPlace(base / "www")
        self.folder, self.root = base / "in", base / "store"
        self.folder.mkdir(exist_ok=True)
        self.now, self.options, self.files = NOW, OPTIONS, Files()

    def publish(self, number, *, revert=False, **changes):
        fields = {"name": "stable", "signers": [KEY]} | changes
        path = self.run / f"round_{number:02d}"
        channel = Channel(**fields)
        found = publish(read_round(path), self.place, channel, now=NOW, revert=revert)
        return found.head

    def install(self, trust=TRUST):
        _, sha256 = self.head.bundle
        bundle, _ = self.place.read(f"bundles/{sha256}.zip")
        return Device.install(self.root, bundle, trust=trust)

    @property
    def head(self):
        return read_head(self.head_bytes).head

    @property
    def head_bytes(self):
        return self.place.read("stable.head")[0]

    @head_bytes.setter
    def head_bytes(self, data):
        (self.place.root / "stable.head").write_bytes(data)

    def look(self, source=None):
        source = source or FolderSource(self.place.root)
        clock = lambda: self.now  # noqa: E731
        arguments = (self.root, self.folder, source, self.options, self.files)
        return Sync(*arguments, clock=clock).look()

    def apply(self, trial=run_trial):
        agent = Agent(
            lambda: Device.open(self.root, trial=trial),
            self.folder,
            lambda *_, **__: None,
        )
        agent.look()
        return Device.open(self.root).verify()
