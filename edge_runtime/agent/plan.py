# SPDX-License-Identifier: Apache-2.0
"""Which patches lead a device to the newest release. No I/O.

The rules are in :mod:`edge_runtime.store.admission`; here is only what follows from
them for many patches at once. A device that was rolled back is brought forward to newer
releases only, never to the one that its owner went back from.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import groupby

from edge_runtime.errors import HeldError, ListExpiredError
from edge_runtime.formats.header import PatchHeader
from edge_runtime.store.admission import refusal, was_left
from edge_runtime.store.state import State


class Decision(StrEnum):
    """What becomes of a patch file."""

    APPLIED = "applied"
    PASSED = "passed"  # an older release than one that was active
    WAITING = "waiting"  # for the patches before it, or for the rest of the file
    HELD = "held"  # by the owner
    BLOCKED = "blocked"  # by this device, which cannot try it now
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, order=True)
class Offer:
    """A patch that is whole, trusted and for this network.

    Attributes:
        name: Of the file.
        size: Its bytes.
        header: What it is for.
    """

    name: str
    size: int
    header: PatchHeader = field(compare=False)


# How many patches, their bytes, and themselves; the best compares lowest.
_Way = tuple[int, int, tuple[Offer, ...]]


def decide(state: State, header: PatchHeader, held: str = "") -> tuple[Decision, str]:
    """Say what becomes of a patch that does not lead to the newest release now.

    Args:
        state: Of the store.
        header: The patch's header.
        held: Why the owner holds back what could be applied, if so.

    Returns:
        Decision and reason.
    """
    target, past = header.target, header.counter <= state.floor
    if was_left(state, header):
        return Decision.HELD, (
            f"this device was rolled back from round {header.round}; a newer release "
            "comes by itself, this one with 'dpu-edge apply'"
        )
    if past and state.was_active(target):
        return Decision.APPLIED, ""
    error = refusal(state, header)
    if isinstance(error, HeldError | ListExpiredError):
        return Decision.HELD, str(error)
    if error:
        return Decision.PASSED if past else Decision.REFUSED, str(error)
    if held:
        return Decision.HELD, held
    return Decision.WAITING, (
        f"it leads from weights {header.parent[:12]}; nothing here leads to them from "
        f"round {state.active_slot.round}"
    )


def find_chain(state: State, offers: Iterable[Offer]) -> list[Offer]:
    """Find the patches that lead to the newest release within reach.

    Of all ways there it takes the one with the fewest patches, and of those the one
    with the fewest bytes: the bytes are on this disk already, but each patch that is
    applied writes all weights once and runs a trial.

    Returns:
        What to apply, in this order; empty if nothing newer is within reach.
    """
    start: _Way = (0, 0, ())
    ways = dict.fromkeys({state.init, *(slot.target for slot in state.slots)}, start)
    newest = start
    # Along a chain the counters increase: one pass in their order sees every chain.
    admitted = sorted(
        (offer for offer in offers if not refusal(state, offer.header)),
        key=lambda offer: offer.header.counter,
    )
    for counter, release in groupby(admitted, lambda offer: offer.header.counter):
        found: list[tuple[_Way, str]] = []
        for offer in release:
            # Weights whose slot is still there need no parent to be released again.
            for base in {offer.header.parent, offer.header.target} & ways.keys():
                number, size, chain = ways[base]
                way = (number + 1, size + offer.size, (*chain, offer))
                found.append((way, offer.header.target))
        # The best one last, which makes it the goal.
        for way, target in sorted(found, reverse=True):
            ways[target] = min(way, ways.get(target, way))
            newest = way if counter > state.floor else newest
    return list(newest[2])
