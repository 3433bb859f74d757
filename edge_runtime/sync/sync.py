# SPDX-License-Identifier: Apache-2.0
"""Fill the agent's folder with what leads to the newest release of a channel.

It reads the store to know whom to trust and where the device is, and writes nothing
there: what is applied is decided by the agent alone. Two floors stand in the state of
its own, on the disk before anything is fetched: the version of the newest head, and the
newest signed time.
"""

import hashlib
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from edge_runtime.errors import (
    BundleError,
    DpuError,
    HeadError,
    KeyListError,
    PatchError,
    StoreError,
    SyncError,
    TrustError,
    WrongModelError,
)
from edge_runtime.files import Files, lock_file
from edge_runtime.formats.bundle import read_bundle
from edge_runtime.formats.header import PatchHeader
from edge_runtime.formats.json_record import is_digest
from edge_runtime.formats.signed_header import read_signed_header
from edge_runtime.formats.signing import Trust
from edge_runtime.limits import limits
from edge_runtime.live.outbox import Outbox, Told, read_told, write_told
from edge_runtime.store.admission import signers
from edge_runtime.store.state import MAX_REASON, State, utc
from edge_runtime.store.state_file import read_state
from edge_runtime.sync.head import (
    SHORT,
    Head,
    SignedHead,
    Way,
    encode_head,
    read_head,
)
from edge_runtime.sync.http import CHUNK, Answer, Source, read_all
from edge_runtime.sync.plan import (
    PAUSED,
    SyncResult,
    TufStaleError,
    passed,
    route,
    standing,
)
from edge_runtime.sync.state import (
    HEAD_NAME,
    read_sync_state,
    write_sync_state,
)
from edge_runtime.sync.uploads import Uploads
from edge_runtime.trust.root import load_list

if TYPE_CHECKING:
    from edge_runtime.sync.tuf import TufClient

HEAD_DEADLINE_S = 120.0
SLOWEST = 16  # bytes a second that a file must come with, over all of it
LISTS = 16  # key lists that are taken at once
FAILED = "failed"  # in place of a result: the look ended with an error
SPARE_BYTES = 1 << 16  # left free beside what is fetched, for the state
LOCK_NAME = ".sync.lock"


class Full(StrEnum):
    """What to do where nothing but full weights leads to a release."""

    NEVER = "never"
    ASK = "ask"  # a person: the size is told
    YES = "yes"


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncOptions:
    """Who a device is to a channel, and what it may spend.

    Attributes:
        channel: The channel that it follows.
        device: Its id, any text that stays the same; decides its place in a rollout.
        group: The group that it belongs to, or empty.
        day_bytes: What it may spend a day; None for any.
        month_bytes: The same a month.
        metered: Whether it only polls, and fetches no patches.
        full: Whether it fetches full weights where no patch leads there.
        slowest: Bytes a second that a file must come with.
    """

    channel: str = "stable"
    device: str
    group: str = ""
    day_bytes: int | None = None
    month_bytes: int | None = None
    metered: bool = False
    full: Full = Full.NEVER
    slowest: float = SLOWEST


@dataclass(frozen=True, slots=True)
class Synced:
    """The outcome of a look at a channel.

    Attributes:
        result: In a word.
        head: What the channel says; None where nothing is known of it.
        fetched: Names of the files that came into the folder.
        spent: Bytes on the wire.
        reason: More about it, for people; may be empty.
    """

    result: SyncResult
    head: Head | None
    fetched: tuple[str, ...]
    spent: int
    reason: str = ""


class _OverBudgetError(SyncError):
    """What comes next may not be spent."""


class Sync:
    """One device and one channel."""

    def __init__(  # noqa: PLR0913 - what it reads, what it knows, and three seams
        self,
        store: Path,
        folder: Path,
        source: Source,
        options: SyncOptions,
        files: Files | None = None,
        clock: Callable[[], float] = time.time,
        uploads: Uploads | None = None,
        tuf: "TufClient | None" = None,
    ) -> None:
        """Name everything; nothing is read yet.

        Args:
            store: The device's store, which is only read.
            folder: The agent's folder.
            source: Where the channel lies.
            options: Who the device is.
            files: The seam to the disk.
            clock: Seconds since 1970.
            uploads: Sends the device's reports; None to send none.
            tuf: Tells what the channel says; by default the channel's own head does.
        """
        self._tuf = tuf
        self._uploads, self._taken = uploads, None  # type: Uploads | None, Head | None
        self._store, self._folder, self._source = store, folder, source
        self._options, self._files, self._clock = options, files or Files(), clock
        self._fetched: list[str] = []
        self._counted = 0  # bytes of the source that the state has

    def look(self) -> Synced:
        """Look at the channel, and fetch what leads to its newest release.

        Raises:
            SyncError: No answer, or none that may be used; later it may be another.
            TrustError: The head is not signed by whom the device trusts, or is older
                than one that was.
            HeadError: What is there is no head.
            StoreError: The device's own files are at fault.
            OSError: The disk is full or refuses.
        """
        self._fetched = []
        with self._files.open_lock(self._folder / LOCK_NAME) as lock:
            lock_file(lock, self._folder / LOCK_NAME)
            self._state = read_sync_state(self._folder)
            self._forget_others()
            try:
                result, head, reason = self._look()
                self._note(result, reason)
            except (DpuError, OSError) as err:
                self._note(FAILED, str(err))
                raise
            finally:
                self._report()
                self._save()
        return Synced(result, head, tuple(self._fetched), self._spent, reason)

    @property
    def _spent(self) -> int:
        return self._source.spent + (self._uploads.spent if self._uploads else 0)

    def _note(self, result: str, reason: str) -> None:
        """Keep, for whoever asks the device, how a look ended and what it may cost."""
        self._state = replace(
            self._state,
            result=result,
            reason=reason[:MAX_REASON],
            source=self._source.name,
            day_bytes=self._options.day_bytes,
            month_bytes=self._options.month_bytes,
        )

    def _look(self) -> tuple[SyncResult, Head | None, str]:
        device = read_state(self._store)
        if reason := self._over_budget(0):
            return SyncResult.OVER_BUDGET, None, reason
        if self._tuf is None:
            signed = self._head(device)
            expires = signed.head.expires
        else:
            try:
                signed, expires = self._told(device, self._tuf)
            except TufStaleError as err:
                return SyncResult.STALE, None, str(err)
            except _OverBudgetError as err:
                return SyncResult.OVER_BUDGET, None, str(err)
        head, now = signed.head, max(int(self._clock()), self._state.seen)
        if head.keys:
            self._take_lists(device, head.keys)
        if device.floor >= head.counter:
            self._prune(())
        options = self._options
        found = standing(
            device,
            replace(head, expires=expires),
            paused=self._state.paused,
            device=options.device,
            group=options.group,
            now=now,
        )
        if found:
            if found[0] in (SyncResult.PAUSED, SyncResult.LATER):
                self._set_aside()
            return found[0], head, found[1]
        ask = self._tuf and head.pausers and not self._options.metered
        if ask and self._is_paused_there(signed):
            self._state = replace(self._state, paused=True)
            self._set_aside()
            return SyncResult.PAUSED, head, PAUSED
        return self._fetch_all(device, head)

    # The head -----------------------------------------------------------------------

    def _head(self, device: State) -> SignedHead:
        """Return the channel's head, by the server or as it is known already."""
        path, kept = f"{self._options.channel}.head", self._kept_head()
        known = kept and self._state.channel == self._options.channel
        tag = self._state.tag if known else ""
        with self._source.get(path, tag=tag, within=HEAD_DEADLINE_S) as answer:
            if answer.status == 304 and tag:
                data, tag = kept, self._state.tag
            elif answer.status == 200:
                tag = answer.tag
                data = read_all(answer, limits().head_bytes, path, HEAD_DEADLINE_S)
            else:
                raise SyncError(
                    f"{answer.refusal}; is the address that of the model's own folder, "
                    "and the channel's name right?",
                    permanent=True,
                )
        signed = read_head(data)
        self._admit(device, signed)
        self._take(signed, data, tag)
        return signed

    def _kept_head(self) -> bytes:
        """Return the head that was taken; nothing if its file is damaged or gone."""
        with suppress(OSError, HeadError):
            data = (self._folder / HEAD_NAME).read_bytes()
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
        path = f"{self._options.channel}.head"
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
            if head.keys:
                self._take_lists(device, head.keys)
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
            kept = read_head((self._folder / HEAD_NAME).read_bytes())
            if kept.signatures and kept.sha256 == self._state.digest:
                try:
                    kept.check(device.trust)
                except TrustError:
                    return True
        return False

    def _take_lists(self, device: State, newest: int) -> None:
        """Put the key lists that follow this device's own into the agent's folder."""
        key_list = device.key_list
        if key_list is None:
            return
        first = key_list.root.version + 1
        for number in range(first, min(newest, first + LISTS - 1) + 1):
            name = f"{number}.root.json"
            path, present = self._folder / name, b""
            with suppress(FileNotFoundError, KeyListError):
                present = load_list(path)
            data = present
            if not data:
                with self._source.get(f"keys/{name}") as answer:
                    if answer.status != 200:
                        return
                    most = limits().key_list_bytes
                    data = read_all(answer, most, name, HEAD_DEADLINE_S)
            # The agent judges for good; here only so that nobody fills the disk.
            key_list = key_list.follow(data, utc(self._clock()))
            if not present:
                self._files.replace(path, data)
                self._fetched.append(name)

    # Files --------------------------------------------------------------------------

    def _fetch_all(self, device: State, head: Head) -> tuple[SyncResult, Head, str]:
        # A release that was taken back must not be applied for want of bytes meanwhile.
        self._prune([*head.ways, *filter(None, [bundle_way(head)])])
        refused = ""
        while True:
            way_there = route(device, head, self._state.bad) or self._full(head)
            if way_there is None:
                reason = refused or (
                    f"none of {len(head.ways)} ways leads to round {head.round} from "
                    f"{device.active[:SHORT]}"
                )
                return SyncResult.NO_WAY, head, reason
            is_full = not way_there[0].parent
            if is_full and self._options.full is Full.ASK:
                reason = f"nothing but full weights leads to round {head.round}: "
                reason += f"{way_there[0].size} bytes; --full yes fetches them"
                return SyncResult.FULL, head, reason
            missing = [way for way in way_there if not self._path(way).exists()]
            needed = sum(way.size - self._part_size(way) for way in missing)
            if needed and self._options.metered:
                reason = f"{needed} bytes would lead to round {head.round}"
                return SyncResult.METERED, head, reason
            if reason := self._no_room(needed):
                return SyncResult.NO_ROOM, head, reason
            if reason := self._over_budget(needed):
                return SyncResult.OVER_BUDGET, head, reason
            try:
                if self._bring(way_there, device, head):
                    self._prune(way_there)
                    return SyncResult.FETCHED, head, ""
            except (PatchError, BundleError, TrustError, WrongModelError) as err:
                refused = str(err)

    def _full(self, head: Head) -> tuple[Way] | None:
        """Return full weights, where the owner has said how to do with them."""
        way = bundle_way(head)
        if way is None or way.sha256 in self._state.bad:
            return None
        return None if self._options.full is Full.NEVER else (way,)

    def _bring(self, way_there: Sequence[Way], device: State, head: Head) -> bool:
        """Have the files of a route; False if one is not what the head says.

        Raises:
            DpuError: The device would never take one; from now on it is gone around.
        """
        known = device.key_list.root.version if device.key_list else head.keys
        # With a newer list others may be trusted, so signatures are for later then.
        trust = signers(device) if known >= head.keys else Trust()
        for way in way_there:
            if not self._path(way).exists() and not self._fetch(way):
                return False
            try:
                device = passed(device, self._header(way, trust))
            except DpuError:
                self._shun(way)
                self._files.unlink(self._path(way))
                raise
        return True

    def _header(self, way: Way, trust: Trust) -> PatchHeader:
        file: BinaryIO
        if way.parent:
            file = self._path(way).open("rb")
        else:  # the bundle is signed, not the patch in it
            file, trust = BytesIO(read_bundle(self._path(way), trust).patch), Trust()
        with file:
            return read_signed_header(file, limits(), trust).header

    def _shun(self, way: Way) -> None:
        self._state = replace(self._state, bad=(*self._state.bad, way.sha256))

    def _fetch(self, way: Way) -> bool:
        """Bring a file into the folder; False if it is not what the head says."""
        if problem := limits().problem("patch_bytes", way.size, "the patch"):
            raise SyncError(problem)
        for _ in range(2):  # after what a cut or a cache spoiled, one clean try
            self._download(way)
            part = self._part(way)
            with part.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found == way.sha256:
                self._files.rename(part, self._path(way))
                self._files.sync_folder(self._folder)
                self._fetched.append(self._path(way).name)
                return True
            self._files.unlink(part)
        self._shun(way)
        return False

    def _download(self, way: Way) -> None:
        """Go on with a file where it was cut; in the end the part has its size."""
        path, offset = _remote(way), self._part_size(way)
        if offset == way.size:
            return
        tag = self._state.tags.get(way.sha256, "") if offset else ""
        within = HEAD_DEADLINE_S + way.size / self._options.slowest
        with self._source.get(path, tag=tag, offset=offset, within=within) as answer:
            if answer.status == 416:
                self._files.unlink(self._part(way))
                raise SyncError(f"{path}: the server has less than this device")
            if answer.status not in (200, 206):
                raise SyncError(
                    f"{answer.refusal}; publish again, or prune less",
                    permanent=True,
                )
            if answer.size is not None and answer.offset + answer.size != way.size:
                raise SyncError(
                    f"{path} has {answer.offset + answer.size} bytes, {way.size} "
                    "were said"
                )
            tags = dict(self._state.tags) | {way.sha256: answer.tag}
            self._state = replace(self._state, tags=tags)
            self._receive(way, answer, time.monotonic() + within)

    def _receive(self, way: Way, answer: Answer, end: float) -> None:
        with self._part(way).open("r+b" if answer.offset else "wb") as file:
            count = file.seek(answer.offset)
            try:
                while data := answer.body.read(min(CHUNK, way.size - count + 1)):
                    count += len(data)
                    if count > way.size:
                        raise SyncError(
                            f"{_remote(way)} has more than {way.size} bytes"
                        )
                    file.write(data)
                    if time.monotonic() > end:
                        raise SyncError(
                            f"{_remote(way)} comes with less than "
                            f"{self._options.slowest:g} bytes a second"
                        )
            finally:
                file.flush()
                self._files.sync(file.fileno())
        if count < way.size:
            raise SyncError(f"{_remote(way)} broke off at {count} bytes")

    def _path(self, way: Way) -> Path:
        return self._folder / Path(_remote(way)).name

    def _part(self, way: Way) -> Path:
        return self._folder / f".{way.sha256}.part"

    def _part_size(self, way: Way) -> int:
        try:
            size = self._part(way).stat().st_size
        except FileNotFoundError:
            return 0
        return size if size <= way.size else 0

    def _prune(self, route: Collection[Way]) -> None:
        """Remove what was fetched and is on no way any more; nothing of others."""
        kept = {self._path(way) for way in route}
        for path in self._own():
            if path not in kept:
                self._files.unlink(path)

    def _own(self) -> list[Path]:
        """Return what was fetched and lies in the agent's sight."""
        files = [*self._folder.glob("*.dpu"), *self._folder.glob("*.zip")]
        return [path for path in files if is_digest(path.stem)]

    def _set_aside(self) -> None:
        """Take what was fetched out of the agent's sight, until it may be applied.

        A halt must reach files that are here already. They stay as whole parts, so
        that no byte comes twice when the rollout goes on.
        """
        for path in self._own():
            self._files.rename(path, self._folder / f".{path.stem}.part")
            self._files.sync_folder(self._folder)

    def _forget_others(self) -> None:
        """Remove parts of files that no head asks for any more."""
        wanted = set[str]()
        with suppress(OSError, DpuError):
            head = read_head((self._folder / HEAD_NAME).read_bytes()).head
            wanted = {way.sha256 for way in head.ways}
            wanted |= {head.bundle[1]} if head.bundle else set()
        for path in self._folder.glob(".*.part"):
            name = path.name[1:-5]
            if is_digest(name) and name not in wanted:
                self._files.unlink(path)
        tags = {k: v for k, v in self._state.tags.items() if k in wanted}
        self._state = replace(self._state, tags=tags)

    # Reports ------------------------------------------------------------------------

    def _report(self) -> None:
        """Send reports, and tell the agent what its next ones should say.

        Nothing of it is in the way of an update: what goes wrong here waits.
        """
        told = Told()
        with suppress(OSError, StoreError):
            told = read_told(self._folder)
        try:
            waiting = Outbox(self._store).waiting()
        except OSError as err:
            waiting = []
            if self._uploads:
                self._uploads.tell(f"reports wait: {err}")
        sent = set(told.sent)
        if self._uploads and not self._options.metered:
            left = (report for report in waiting if report.n not in sent)
            sent |= self._uploads.send(self._options.device, left, self._over_budget)
        state, head = self._state, self._taken
        told = replace(
            told.having_sent(sent, {report.n for report in waiting}),
            device=self._options.device,
            group=self._options.group,
            month_bytes=state.spent_in(utc(self._clock())[:7]),
        )
        if head:
            told = replace(
                told,
                head=state.digest,
                version=head.version,
                counter=head.counter,
                target=head.target,
            )
        with suppress(OSError):  # it is told again at the next look
            write_told(self._folder, told, self._files)

    # What it may spend ---------------------------------------------------------------

    def _allow(self, needed: int) -> None:
        if reason := self._over_budget(needed):
            raise _OverBudgetError(reason)

    def _over_budget(self, needed: int) -> str:
        day = utc(self._clock())[:10]
        for words, begin, budget in (
            ("today", day, self._options.day_bytes),
            ("this month", day[:7], self._options.month_bytes),
        ):
            spent = self._state.spent_in(begin) + self._spent - self._counted
            if budget is not None and spent + needed > budget:
                return (
                    f"{spent} bytes were spent {words}, {needed} more are needed, "
                    f"{budget} are allowed"
                )
        return ""

    def _no_room(self, needed: int) -> str:
        """Say that the disk has no room; what is fetched in vain costs bytes."""
        free = self._files.free_bytes(self._folder)
        if not needed or free >= needed + SPARE_BYTES:
            return ""
        return (
            f"{self._folder} has {free} bytes free, {needed + SPARE_BYTES} are needed; "
            "free some space"
        )

    def _save(self) -> None:
        """Write the state, with what was spent since the last time."""
        fresh = self._spent - self._counted
        if fresh:
            self._state = self._state.spending(utc(self._clock())[:10], fresh)
            self._counted = self._spent
        write_sync_state(self._folder, self._state, self._files)


def bundle_way(head: Head) -> Way | None:
    """Return full weights as a way that leads from anywhere; None without a bundle."""
    return head.bundle and Way("", head.target[:SHORT], *head.bundle)


def _remote(way: Way) -> str:
    """Return where a file lies in the channel's place."""
    folder, end = ("patches", "dpu") if way.parent else ("bundles", "zip")
    return f"{folder}/{way.sha256}.{end}"


def insist_on_trust(url: str, store: Path) -> None:
    """Insist that a device uses plain HTTP only where it checks signatures.

    Raises:
        TrustError: Anybody on the way could give this device any weights.
        StoreError: Nothing is installed there.
    """
    refuse_plain(url, read_state(store).trust)


def refuse_plain(url: str, trust: Trust) -> None:
    """Refuse plain HTTP where nobody's signature is asked for.

    Raises:
        TrustError: Anybody on the way could give this device any weights.
    """
    if url.lower().startswith("http://") and not trust.keys:
        raise TrustError(
            "this device trusts no keys, so over http:// anybody on the way could "
            "give it any weights: use https://, or install it with --trust"
        )
