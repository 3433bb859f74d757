# SPDX-License-Identifier: Apache-2.0
"""Base of the sync client: its folder, source, saved state and byte budgets.

Two floors stand in the state, on the disk before anything is fetched: the version of
the newest head, and the newest signed time.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from edge_runtime.errors import SyncError, TrustError
from edge_runtime.files import Files
from edge_runtime.formats.signing import Trust
from edge_runtime.store.state_file import read_state
from edge_runtime.sync.source import Source
from edge_runtime.sync.state import SyncState, write_sync_state
from edge_runtime.sync.uploads import Uploads

SLOWEST = 16  # bytes a second that a file must come with, over all of it
WAITS = 24  # looks that are over budget, to one that polls under a wrong clock
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


class OverBudgetError(SyncError):
    """What comes next may not be spent."""


class Desk:
    """One device and one channel: folder, source, state, budgets."""

    def __init__(
        self,
        folder: Path,
        source: Source,
        options: SyncOptions,
        files: Files | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Name everything; nothing is read yet.

        Args:
            folder: The agent's folder.
            source: Where the channel lies.
            options: Who the device is.
            files: The seam to the disk.
            clock: Seconds since 1970.
        """
        self._folder, self._source, self._options = folder, source, options
        self._files, self._clock = files or Files(), clock
        self._uploads: Uploads | None = None
        self._state = SyncState()
        self._fetched: list[str] = []
        self._lost: set[str] = set()  # SHA-256 of what cannot be had in this look
        self._counted = 0  # bytes of the source that the state has
        self._polls_anyway = False

    @property
    def _spent(self) -> int:
        return self._source.spent + (self._uploads.spent if self._uploads else 0)

    def _allow(self, needed: int) -> None:
        if (reason := self._over_budget(needed)) and not self._polls_anyway:
            raise OverBudgetError(reason)

    def _may_poll(self, over: str) -> bool:
        """Tell whether this look asks what is newest, as far as budgets go.

        Under a clock that begins anew at each boot no day ends, and with it no budget,
        before there is a newer head: so now and then that is asked for all the same.
        """
        self._polls_anyway = False
        if over and not 0 < self._state.seen <= self._clock():
            waits = (self._state.waits + 1) % WAITS
            self._state = replace(self._state, waits=waits)
            self._polls_anyway = waits == 0
        return not over or self._polls_anyway

    def _over_budget(self, needed: int) -> str:
        day = self._state.day(self._clock())
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
            self._state = self._state.spending(self._state.day(self._clock()), fresh)
            self._counted = self._spent
        write_sync_state(self._folder, self._state, self._files)


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
