# SPDX-License-Identifier: Apache-2.0
"""Fill the agent's folder with what leads to the newest release of a channel.

It reads the store to know whom to trust and where the device is, and writes nothing
there: what is applied is decided by the agent alone.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from edge_runtime.errors import (
    BundleError,
    DpuError,
    PatchError,
    StoreError,
    TrustError,
    WrongModelError,
)
from edge_runtime.files import Files
from edge_runtime.formats.bundle import read_bundle
from edge_runtime.formats.header import PatchHeader
from edge_runtime.formats.signed_header import read_signed_header
from edge_runtime.formats.signing import Trust
from edge_runtime.limits import limits
from edge_runtime.live.outbox import Outbox, Told, read_told, write_told
from edge_runtime.reading import open_regular
from edge_runtime.store.state import MAX_REASON, State
from edge_runtime.store.state_file import read_state
from edge_runtime.sync.channel import Channel
from edge_runtime.sync.desk import LOCK_NAME, Full, OverBudgetError, SyncOptions
from edge_runtime.sync.downloads import all_ways
from edge_runtime.sync.head import SHORT, Head, Way
from edge_runtime.sync.plan import (
    PAUSED,
    SyncResult,
    TufStaleError,
    passed,
    route,
    standing,
)
from edge_runtime.sync.source import Source, UnusableError
from edge_runtime.sync.state import read_sync_state
from edge_runtime.sync.uploads import Uploads
from edge_runtime.text import printable

if TYPE_CHECKING:
    from edge_runtime.sync.tuf import TufClient

FAILED = "failed"  # in place of a result: the look ended with an error
# What a store says of a file that it will never take, whatever else comes.
_REFUSALS = (PatchError, BundleError, TrustError, WrongModelError)


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


class Sync(Channel):
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
        super().__init__(folder, source, options, files, clock)
        self._store, self._tuf, self._uploads = store, tuf, uploads

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
        self._fetched, self._lost, self._taken = [], set(), None
        with self._files.locked(self._folder / LOCK_NAME):
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

    def _note(self, result: str, reason: str) -> None:
        """Keep, for whoever asks the device, how a look ended and what it may cost."""
        self._state = replace(
            self._state,
            result=result,
            reason=printable(reason)[:MAX_REASON],
            source=printable(self._source.name),
            day_bytes=self._options.day_bytes,
            month_bytes=self._options.month_bytes,
        )

    def _look(self) -> tuple[SyncResult, Head | None, str]:
        device = read_state(self._store)
        if not self._may_poll(reason := self._over_budget(0)):
            return SyncResult.OVER_BUDGET, None, reason
        if self._tuf is None:
            signed = self._head(device)
            expires = signed.head.expires
        else:
            try:
                signed, expires = self._told(device, self._tuf)
            except TufStaleError as err:
                return SyncResult.STALE, None, str(err)
            except OverBudgetError as err:
                return SyncResult.OVER_BUDGET, None, str(err)
        head, now = signed.head, max(int(self._clock()), self._state.seen)
        for _, follower in self._lists(device, head.keys):
            device = follower  # as the agent makes it before it looks at patches
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

    # Files --------------------------------------------------------------------------

    def _fetch_all(self, device: State, head: Head) -> tuple[SyncResult, Head, str]:
        # A release that was taken back must not be applied for want of bytes meanwhile.
        self._prune(all_ways(head))
        failed: DpuError | None = None
        while way_there := self._cheapest(device, head):
            if found := self._obstacle(way_there, head, failed):
                return found[0], head, found[1]
            try:
                self._bring(way_there, device, head)
            except (UnusableError, *_REFUSALS) as err:
                failed = err
            else:
                self._prune(way_there)
                return SyncResult.FETCHED, head, ""
        if isinstance(failed, UnusableError):
            raise failed  # it may be mended, so it is asked for again
        none = f"none of {len(head.ways)} ways leads to round {head.round} from "
        none += device.active[:SHORT]
        return SyncResult.NO_WAY, head, str(failed or none)

    def _obstacle(
        self, way_there: Sequence[Way], head: Head, failed: DpuError | None
    ) -> tuple[SyncResult, str] | None:
        """Say why a route is not fetched now; None if it is."""
        missing = [way for way in way_there if not self._path(way).exists()]
        needed = sum(way.size - self._part_size(way) for way in missing)
        if needed and not way_there[0].parent and self._options.full is Full.ASK:
            reason = f"nothing but full weights leads to round {head.round}: "
            reason += f"{way_there[0].size} bytes; --full yes fetches them"
            return SyncResult.FULL, f"{reason} ({failed})" if failed else reason
        if needed and self._options.metered:
            reason = f"{needed} bytes would lead to round {head.round}"
            return SyncResult.METERED, reason
        if reason := self._no_room(needed):
            return SyncResult.NO_ROOM, reason
        if reason := self._over_budget(needed):
            return SyncResult.OVER_BUDGET, reason
        return None

    def _cheapest(self, device: State, head: Head) -> Sequence[Way]:
        """Return what leads to the release: what lies here, else the fewest bytes."""
        whole = (way for way in all_ways(head) if self._is_whole(self._path(way), way))
        absent = {way.sha256 for way in all_ways(head)} - {way.sha256 for way in whole}
        out = {*self._state.bad, *self._lost}
        return self._way(device, head, out | absent) or self._way(device, head, out)

    def _way(self, device: State, head: Head, out: set[str]) -> Sequence[Way]:
        """Return the cheapest way without some files; full weights if there is none."""
        is_wanted = self._options.full is not Full.NEVER
        full = [way for way in all_ways(head) if is_wanted and not way.parent]
        usable = [way for way in full if way.sha256 not in out]
        return route(device, head, out) or usable

    def _bring(self, way_there: Sequence[Way], device: State, head: Head) -> None:
        """Have the files of a route.

        Raises:
            UnusableError: The place has not one of them; in this look it is lost.
            DpuError: The device would never take one; from now on it is gone around.
        """
        known = device.key_list.root.version if device.key_list else head.keys
        # With a newer list others may be trusted, so signatures are for later then.
        trust = device.trust if known >= head.keys else Trust()
        for way in way_there:
            try:
                if not self._path(way).exists():
                    self._fetch(way)
                device = passed(device, self._header(way, trust))
            except UnusableError:
                self._lost.add(way.sha256)
                raise
            except _REFUSALS:
                self._shun(way.sha256)
                self._files.unlink(self._path(way))
                raise

    def _header(self, way: Way, trust: Trust) -> PatchHeader:
        file: BinaryIO = open_regular(self._path(way))
        if not way.parent:  # the bundle is signed, not the patch in it
            file, trust = BytesIO(read_bundle(file, trust).patch), Trust()
        with file:
            return read_signed_header(file, limits(), trust).header

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
            device=printable(self._options.device),
            group=printable(self._options.group),
            month_bytes=state.spent_in(state.day(self._clock())[:7]),
            seen=state.seen,
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
