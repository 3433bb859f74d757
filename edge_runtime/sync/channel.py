# SPDX-License-Identifier: Apache-2.0
"""Ask what a channel says, and insist that this device may believe it."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from edge_runtime.errors import HeadError, KeyListError, SyncError, TrustError
from edge_runtime.limits import limits
from edge_runtime.store.state import State
from edge_runtime.sync.downloads import Downloads
from edge_runtime.sync.head import SHORT, Head, SignedHead
from edge_runtime.sync.head_file import encode_head, read_head
from edge_runtime.sync.paths import head_path, list_path
from edge_runtime.sync.source import BARRED, read_all
from edge_runtime.sync.state import HEAD_NAME, read_kept
from edge_runtime.times import utc
from edge_runtime.trust import KeyList, first_root, load_list

if TYPE_CHECKING:
    from edge_runtime.sync.tuf import TufClient

HEAD_DEADLINE_S = 120.0
LISTS = 16  # key lists that are taken at once; the next look goes on


class Channel(Downloads):
    """The head of a channel, by itself or as a TUF repository tells it."""

    _taken: Head | None = None  # the one that this look took

    def _head(self, device: State) -> SignedHead:
        """Return the channel's head, by the server or as it is known already."""
        path, kept = head_path(self._options.channel), self._kept_head()
        known = kept and self._state.channel == self._options.channel
        tag = self._state.tag if known else ""
        with self._source.get(path, tag=tag, within=HEAD_DEADLINE_S) as answer:
            if answer.status == 304 and tag:
                data, tag = kept, self._state.tag
            elif answer.status == 200:
                tag = answer.tag
                data = read_all(answer, limits().head_bytes, path, HEAD_DEADLINE_S)
            else:
                words = answer.refusal
                if answer.status not in BARRED:
                    words += (
                        "; is the address that of the model's own folder, and the "
                        "channel's name right?"
                    )
                raise SyncError(words, permanent=True)
        signed = read_head(data)
        self._admit(device, signed)
        self._take(signed, data, tag)
        return signed

    def _kept_head(self) -> bytes:
        """Return the head that was taken; nothing if its file is damaged or gone."""
        with suppress(OSError, HeadError):
            data = read_kept(self._folder)
            if read_head(data).sha256 == self._state.digest:
                return data
        return b""

    def _take(
        self, signed: SignedHead, data: bytes, tag: str, expires: int = 0
    ) -> None:
        self._files.replace(self._folder / HEAD_NAME, data)
        taken = self._state.took(signed, tag)
        checked = int(self._clock())
        self._state = replace(taken, checked=checked, tuf_expires=expires)
        self._save()  # the floors, before anything is done because of it
        self._taken = signed.head

    def _told(self, device: State, tuf: "TufClient") -> tuple[SignedHead, int]:
        """Return what the TUF repository says of the channel, and when that expires.

        Its versions have floors of their own: python-tuf syncs nothing, and takes an
        old repository for a new one once its files are gone. They end with the keys
        that set them, as TUF says.
        """
        said = tuf.ask(
            self._source,
            self._options.channel,
            slowest=self._options.slowest,
            deadline_s=HEAD_DEADLINE_S,
            allow=self._allow,
        )
        state, is_same = self._state, said.keys == self._state.tuf_keys
        for role, version in said.versions.items():
            floor = state.tuf.get(role, 0)
            if version < floor and (is_same or role == "root"):
                raise TrustError(
                    f"TUF: {role} has version {version}, this device has seen {floor}: "
                    "an old one is played, or a mirror is behind"
                )
        if state.tuf and not is_same:
            self._state = state.anew()
            self._save()
        self._insist_newer(device, said.signed)
        self._state = replace(self._state, tuf=said.versions, tuf_keys=said.keys)
        kept = encode_head(said.signed.head, ())
        self._take(said.signed, kept, "", said.expires)
        return said.signed, said.expires

    def _is_paused_there(self, signed: SignedHead) -> bool:
        """Return whether somebody paused the channel's own head, which TUF leaves out.

        It is asked only by a device that would fetch, and costs as much as that head.
        """
        path = head_path(self._options.channel)
        with self._source.get(path, within=HEAD_DEADLINE_S) as answer:
            if answer.status != 200:
                return False
            data = read_all(answer, limits().head_bytes, path, HEAD_DEADLINE_S)
        with suppress(HeadError):
            found = read_head(data)
            if found.sha256 == signed.sha256:
                return replace(signed, pause=found.pause).is_paused()
        return False

    def _admit(self, device: State, signed: SignedHead) -> None:
        """Insist that a head is for this device, and not older than one it took."""
        head, state = signed.head, self._state
        try:
            signed.check(device.trust)
        except TrustError:
            # Its keys may stand in a list that this device has not taken yet.
            for _ in self._lists(device, head.keys):
                pass
            raise
        if self._was_revoked(device):
            self._state = state.anew()
            self._save()  # before the head that proves it is gone
        self._insist_newer(device, signed)

    def _insist_newer(self, device: State, signed: SignedHead) -> None:
        head, state = signed.head, self._state
        if device.model and head.model != device.model:
            raise TrustError(
                f"the channel is of model {head.model[:SHORT]}, this device runs "
                f"{device.model[:SHORT]}: give the address of its own model's folder"
            )
        if head.channel != self._options.channel:
            raise TrustError(
                f"the head is of channel {head.channel!r}, asked for was "
                f"{self._options.channel!r}: the files were exchanged"
            )
        if state.channel != head.channel:
            self._state = state.anew(state.seen)
        elif head.version < state.version:
            raise TrustError(
                f"the head has version {head.version}, this device has seen "
                f"{state.version}: an old one is played, or a cache is behind"
            )
        elif head.version == state.version and signed.sha256 != state.digest:
            raise TrustError(
                f"there are two heads of version {head.version}: two publishers share "
                "a key and not the place; publish again"
            )

    def _was_revoked(self, device: State) -> bool:
        """Return whether the head that set the floors is of keys that count no more.

        Else whoever stole a key could set a version and a time that no honest head
        ever reaches, and the key list that revokes it would not help.
        """
        with suppress(OSError, HeadError):
            kept = read_head(read_kept(self._folder))
            if kept.signatures and kept.sha256 == self._state.digest:
                try:
                    kept.check(device.trust)
                except TrustError:
                    return True
        return False

    # Key lists ----------------------------------------------------------------------
    # The agent judges for good; here only so that nobody fills the disk.

    def _lists(
        self, device: State, newest: int, most: int = LISTS
    ) -> Iterator[tuple[bytes, State]]:
        """Put the key lists that a device lacks into the agent's folder, one by one.

        Yields:
            A list, and the device as it is once it has taken it.
        """
        for _ in range(most):
            known = device.key_list.root.version if device.key_list else 0
            if newest <= known:
                return
            take = self._list if known else self._first_list
            found = take(device, known + 1 if known else newest)
            if found is None:
                return
            device = found[1]
            yield found

    def _first_list(self, device: State, newest: int) -> tuple[bytes, State] | None:
        """Return the list that replaces a device's single keys, where they signed one.

        Owners have them sign every list, or the first alone. Without one the device
        goes on as it is, and asks again under the next head.
        """
        for number in dict.fromkeys((newest, 1)) if device.trust.keys else ():
            name = f"{number}.root.json"
            if name in self._state.bad:
                continue
            with suppress(KeyListError, TrustError):
                if found := self._list(device, number):
                    return found
            if self._taken:  # else nobody knows whether the channel says so
                self._shun(name)
        return None

    def _list(self, device: State, number: int) -> tuple[bytes, State] | None:
        """Have a list in the agent's folder; None if the place has none."""
        name = f"{number}.root.json"
        path = self._folder / name
        with suppress(OSError, KeyListError, TrustError):  # else it is fetched anew
            return self._with_list(device, load_list(path, regular=True))
        with self._source.get(list_path(number)) as answer:
            if answer.status != 200:
                return None
            data = read_all(answer, limits().key_list_bytes, name, HEAD_DEADLINE_S)
        found = self._with_list(device, data)
        if path.is_dir():
            self._files.remove(path)
        self._files.replace(path, data)
        self._fetched.append(name)
        return found

    def _with_list(self, device: State, data: bytes) -> tuple[bytes, State]:
        now = utc(self._clock())
        if device.key_list:
            return data, device.trusting(device.key_list.follow(data, now))
        root = first_root(data, device.trust)
        return data, device.trusting(KeyList.begin(root, now))
