# SPDX-License-Identifier: Apache-2.0
"""A run that is published round by round, and a device that follows it."""

import json
import time
from datetime import UTC, datetime

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile

from edge_runtime.agent.agent import Agent
from edge_runtime.files import Files
from edge_runtime.formats.signing import Trust
from edge_runtime.live.shared import public_key
from edge_runtime.sync.desk import SyncOptions
from edge_runtime.sync.head_file import head_message, read_head
from edge_runtime.sync.source import FolderSource
from edge_runtime.sync.sync import Sync
from edge_runtime.sync.tuf import TufClient
from edge_runtime.update.device import Device
from edge_runtime.update.trial import run_trial
from packager.fleet.channel import Channel, add_list
from packager.fleet.place import FolderPlace
from packager.fleet.publish import publish
from packager.fleet.tuf import _targets as targets_of
from packager.fleet.tuf import mirror
from packager.fleet.tuf_keys import ONLINE, TufFolder, make_folder
from packager.key_lists import change_list, make_list, sign_list
from packager.keys import generate_key
from packager.rounds.folder import read_round

KEY, PAUSER = generate_key(), generate_key()
TRUST = Trust((public_key(KEY),))
# Tomorrow morning: what a test signs is valid by clocks that no test sets (commands',
# python-tuf's), which lag behind what was signed, and an hour later is the same day.
NOW = (int(time.time()) // 86_400 + 1) * 86_400 + 8 * 3600
TIMES = ("2026-01-01T00:00:00Z", "2090-01-01T00:00:00Z")
OPTIONS = SyncOptions(device="board 7")


class World:
    """A run that is published round by round, and a device that follows it."""

    def __init__(self, base):
        self.run, self.place = base / "runs" / "tiny", FolderPlace(base / "www")
        self.folder, self.root = base / "in", base / "store"
        self.folder.mkdir(exist_ok=True)
        self.now, self.options, self.files = NOW, OPTIONS, Files()

    def publish(self, number, *, revert=False, now=NOW, **changes):
        fields = {"name": "stable", "signers": [KEY]} | changes
        path = self.run / f"round_{number:02d}"
        channel = Channel(**fields)
        found = publish(read_round(path), self.place, channel, now=now, revert=revert)
        return found.head

    def install(self, trust=TRUST):
        _, sha256 = self.head.bundle
        bundle, _ = self.place.read(f"bundles/{sha256}.zip")
        return Device.install(self.root, bundle, trust=trust)

    def exchange(self, new, two):
        """Publish round 1 by another key than the one that a list revokes."""
        add_list(self.place, two)
        (self.place.root / "stable.head").unlink()
        return self.publish(1, signers=[new])

    @property
    def head(self):
        return read_head(self.head_bytes).head

    @property
    def head_bytes(self):
        return self.place.read("stable.head")[0]

    @head_bytes.setter
    def head_bytes(self, data):
        (self.place.root / "stable.head").write_bytes(data)

    def look(self, source=None, **options):
        source = source or FolderSource(self.place.root)
        clock = lambda: self.now  # noqa: E731
        arguments = (self.root, self.folder, source, self.options, self.files)
        return Sync(*arguments, clock=clock, **options).look()

    def apply(self, trial=run_trial):
        agent = Agent(
            lambda: Device.open(self.root, trial=trial),
            self.folder,
            lambda *_, **__: None,
        )
        agent.look()
        return Device.open(self.root).verify()


def lists(owner, *others):
    """Return a first key list, one that exchanges the release key, and that key."""
    new = generate_key()
    one = make_list([public_key(owner)], [public_key(KEY)], TIMES)
    swap = {"targets": [public_key(new)]}, {"targets": [public_key(KEY)]}
    two = change_list(one, TIMES, add=swap[0], remove=swap[1])
    return sign_list(one, [owner, *others]), sign_list(two, [owner]), new


class TufWorld(World):
    """The same, as a TUF repository too, which the device believes."""

    def __init__(self, base):
        super().__init__(base)
        self.keys = base / "keys"

    def publish(self, number, **changes):
        head = super().publish(number, **changes)
        self.mirror(head)
        return head

    def mirror(self, head=None, place=None, now=NOW):
        if not self.keys.exists():
            make_folder(self.keys, now=NOW)
        folder, place = TufFolder.open(self.keys), place or self.place
        options = {"now": now, "lifetime_s": 30 * 86_400, "ask": lambda _: None}
        return mirror(place, folder, head, **options)

    def look(self, source=None, root="1.root.json"):
        client = TufClient(self.folder, root and self.keys / root, self.files)
        return super().look(source, tuf=client)

    def at(self, role):
        """Read the newest metadata of a role, as it lies in the place."""
        name = "timestamp.json"
        for other in ("timestamp", "snapshot", "targets"):
            found = Metadata.from_bytes(self.place.read(f"tuf/{name}")[0])
            if other == role:
                return found
            meta = getattr(found.signed, "snapshot_meta", None)
            meta = meta or found.signed.meta["targets.json"]
            below = {"timestamp": "snapshot", "snapshot": "targets"}[other]
            name = f"{meta.version}.{below}.json"
        raise KeyError(role)

    def sign(
        self,
        head,
        key=None,
        until=NOW + 86_400,
        step=1,
        roles=ONLINE,
        expiring=ONLINE,
    ):
        """Have a head signed into the repository, by its keys or by somebody's.

        Other roles than those that are named are signed by a stranger, and are valid.
        """
        folder = TufFolder.open(self.keys)
        record = {"stable": json.loads(head_message(head))}
        expires = datetime.fromtimestamp(until, UTC)
        meta = {}
        for role in ONLINE:
            signed = self.at(role).signed
            signed.version += step
            signed.expires = expires if role in expiring else signed.expires
            if role == "targets":
                signed.targets = targets_of(record)
            elif role == "snapshot":
                signed.meta = {"targets.json": meta["targets"]}
            else:
                signed.snapshot_meta = meta["snapshot"]
            made = Metadata(signed)
            own = folder.private(role, folder.number, lambda _: None)
            for signer in [key or KEY] if key or role not in roles else own:
                made.sign(CryptoSigner(signer), append=True)
            meta[role] = MetaFile(signed.version, len(made.to_bytes()))
            name = role if role == "timestamp" else f"{signed.version}.{role}"
            (self.place.root / f"tuf/{name}.json").write_bytes(made.to_bytes())
