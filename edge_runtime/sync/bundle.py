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
from edge_runtime.sync.head import SignedHead
from edge_runtime.sync.source import Source
from edge_runtime.sync.state import read_sync_state
from edge_runtime.times import utc


class BundleSync(Channel):
    """One channel, and a folder beside a store that its bundle comes into.

    Attributes:
        lists: The key lists that the device has to take before the bundle.
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
        self._device, self.lists = device, list[bytes]()

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
        for data, follower in self._lists(device, signed.head.keys):
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
