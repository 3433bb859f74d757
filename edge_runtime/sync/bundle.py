# SPDX-License-Identifier: Apache-2.0
"""Fetch the bundle of a channel: for a new device, or for a store that is damaged."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_runtime.errors import SyncError
from edge_runtime.files import Files
from edge_runtime.store.state import State
from edge_runtime.sync.channel import Channel
from edge_runtime.sync.desk import LOCK_NAME, SyncOptions
from edge_runtime.sync.downloads import bundle_way
from edge_runtime.sync.head import PERMILLE, Head, SignedHead
from edge_runtime.sync.plan import PAUSED
from edge_runtime.sync.source import Source
from edge_runtime.sync.state import read_sync_state
from edge_runtime.times import utc

ALL_LISTS = 256  # key lists at once, as nothing goes on: as many as TUF's client takes


class BundleSync(Channel):
    """One channel, and a folder beside a store that its bundle comes into.

    Attributes:
        lists: The key lists that the device has to take before the bundle.
        note: What keeps other devices from the release, in words; may be empty.
    """

    def __init__(
        self, folder: Path, source: Source, channel: str, device: State
    ) -> None:
        """Name everything; nothing is read yet.

        Args:
            folder: What was cut is kept there.
            source: Where the channel lies.
            channel: Its name.
            device: Whom the device trusts, and which model it is of; without a model
                any is taken.
        """
        options = SyncOptions(channel=channel, device="")
        super().__init__(folder, source, options)
        self._device, self.lists, self.note = device, list[bytes](), ""

    def fetch(self) -> tuple[Path, SignedHead]:
        """Fetch the bundle; what was cut goes on later.

        Raises:
            SyncError: No answer, none that may be used, or there is no bundle.
            TrustError: The head is not signed by whom the device trusts.
            HeadError: What is there is no head.
            StoreError: There is no room.
            OSError: The disk is full or refuses.
        """
        with self._files.locked(self._folder / LOCK_NAME):
            self._state = read_sync_state(self._folder)
            self._forget_others()
            try:
                signed = self._head(self._device)
                self._fetch_bundle(signed)
            finally:
                self._save()
        return self._path(self._way), signed

    def _admit(self, device: State, signed: SignedHead) -> None:
        """The same by the newest key list: no agent would take it meanwhile."""
        self.lists.clear()
        for data, follower in self._lists(device, signed.head.keys, ALL_LISTS):
            self.lists.append(data)
            device = follower
        super()._admit(device, signed)

    def _fetch_bundle(self, signed: SignedHead) -> None:
        head, now = signed.head, max(int(self._clock()), self._state.seen)
        if now >= head.expires:
            raise SyncError(
                f"the head expired {utc(head.expires)}, so nobody knows what is "
                "newest; publish again, or set this device's clock",
                permanent=True,
            )
        if head.target != self._device.active:
            self._note_rollout(head, now)
        way = bundle_way(head)
        if way is None:
            raise SyncError(
                f"the channel {head.channel!r} has no bundle; publish again",
                permanent=True,
            )
        self._way = way
        if self._is_whole(self._path(way), way):
            return
        if problem := self._no_room(way.size - self._part_size(way)):
            raise SyncError(problem)
        self._fetch(way)

    def _note_rollout(self, head: Head, now: int) -> None:
        """Tell that others wait for a release; a new device refuses a paused one."""
        if self._state.paused and not self._device.model:
            raise SyncError(
                f"{PAUSED}; wait until its publisher gives 'dpu-fleet resume' or "
                "'dpu-fleet revert', or install from the file of a bundle",
                permanent=True,
            )
        rollout = head.rollout
        if self._state.paused:
            self.note = f"; {PAUSED}"
        elif rollout and (rollout.groups or rollout.share(now) < PERMILLE):
            group = f" of {', '.join(rollout.groups)}" if rollout.groups else ""
            share = f"{rollout.share(now) / 10:g} % of the devices{group}"
            self.note = f"; others wait: its rollout has come to {share}"


@contextmanager
def download_folder(store: Path, files: Files) -> Iterator[Path]:
    """Give a folder beside a store; it is kept only for what was cut."""
    folder = store.absolute().with_name(f"{store.absolute().name}.download")
    files.make_folder(folder)
    try:
        yield folder
    except BaseException:
        if not [*folder.glob(".*.part"), *folder.glob("*.zip")]:
            files.remove(folder)
        raise
    files.remove(folder)
