# SPDX-License-Identifier: Apache-2.0
"""What a device makes of a head, and how it gets to its release. No I/O.

What a store may apply is said in :mod:`edge_runtime.store.admission`; here is only what
follows from that for what is worth fetching.
"""

from collections.abc import Collection
from dataclasses import replace
from enum import StrEnum

from edge_runtime.errors import HeldError, ListExpiredError, SyncError
from edge_runtime.formats.header import PatchHeader
from edge_runtime.store.admission import refusal
from edge_runtime.store.state import State
from edge_runtime.sync.head import SHORT, Head, Way
from edge_runtime.sync.route import cheapest
from edge_runtime.times import utc


class SyncResult(StrEnum):
    """What a look at a channel ended with."""

    CURRENT = "current"  # the device runs the newest release
    FETCHED = "fetched"  # what leads there lies in the folder
    LATER = "later"  # the rollout has not reached this device yet
    PAUSED = "paused"  # somebody paused the rollout
    STALE = "stale"  # the head has expired: nobody knows the newest release
    HELD = "held"  # the device went back from it, or has seen a newer one
    REFUSED = "refused"  # this device tried that release, and it failed
    OVER_BUDGET = "over budget"
    METERED = "metered"  # there is a newer release, and this link is for polls only
    NO_ROOM = "no room"  # on the disk of the agent's folder
    FULL = "full weights"  # nothing else leads there, and a person is to say so
    NO_WAY = "no way"  # nothing leads there from where this device is


PAUSED = "the rollout of this release was paused"


class TufStaleError(SyncError):
    """Some TUF metadata has expired: nobody knows the newest release."""


def standing(
    state: State, head: Head, *, paused: bool, device: str, group: str, now: int
) -> tuple[SyncResult, str] | None:
    """Say why a device fetches nothing because of a head; None if it fetches.

    Args:
        state: Of the device's store.
        head: A head that was admitted.
        paused: Whether it was paused once.
        device: The device's id.
        group: The group that it belongs to, or empty.
        now: Seconds since 1970, not before the newest signed time.

    Returns:
        The outcome, and more about it for people.
    """
    if now >= head.expires:
        reason = f"the head expired {utc(head.expires)}; nobody knows what is newest"
        return SyncResult.STALE, reason
    if state.floor >= head.counter:
        if state.active == head.target:
            return SyncResult.CURRENT, ""
        reason = f"this device has had release {state.floor}, and is not at it now"
        return SyncResult.HELD, reason
    if paused:
        return SyncResult.PAUSED, PAUSED
    if head.target in state.skipped:
        reason = "it failed its trial here; 'dpu-edge apply --force' tries again"
        return SyncResult.REFUSED, reason
    if head.rollout and not head.rollout.includes(device, group, now):
        return SyncResult.LATER, "the rollout has not reached this device yet"
    return None


def route(
    state: State, head: Head, bad: Collection[str] = ()
) -> tuple[Way, ...] | None:
    """Find the patches with the fewest bytes that a device can go to a release by.

    Args:
        state: Of the device's store.
        head: Names the release, and what there is to be had.
        bad: SHA-256 of files that are of no use here.

    Returns:
        As :func:`edge_runtime.sync.route.cheapest`.
    """
    failed = {target[:SHORT] for target in state.skipped}
    ways = [w for w in head.ways if w.sha256 not in bad and w.target not in failed]
    return cheapest(starts(state), head.target[:SHORT], ways)


def starts(state: State) -> set[str]:
    """Return the first digits of the weights that a device can begin at."""
    return {state.init[:SHORT], *(slot.target[:SHORT] for slot in state.slots)}


def passed(state: State, header: PatchHeader) -> State:
    """Return what a state admits once it has taken a patch of a route.

    Raises:
        DpuError: It will never take it, whatever else comes.
    """
    error = refusal(state, header)
    # What is held back now is no fault of the file, and may be let go.
    if error and not isinstance(error, HeldError | ListExpiredError):
        raise error
    if header.counter <= state.floor:
        return state
    return replace(state, floor=header.counter, floor_target=header.target)
