# SPDX-License-Identifier: Apache-2.0
"""Which patches an agent applies, in which order: the choice alone, without files."""

import dataclasses
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.agent.plan import Decision, Offer, decide, find_chain
from edge_runtime.formats.header import PatchHeader
from edge_runtime.store.admission import refusal
from edge_runtime.store.state import MAX_TRIES, Event, Slot, State


def state(active=3, kept=(), floor=None, **fields):
    """A device at some release, that knows ``w<number>`` by that name."""
    slots = [Slot(f"w{n}", n, n) for n in (active, *kept)]
    floor = active if floor is None else floor
    record = {"history": (Event("", "updated", active, f"w{active}"),)} | fields
    return State("m", "init", f"w{active}", floor, f"w{floor}", tuple(slots), **record)


def offer(parent, target, *, counter=None, size=100, name=None):
    parent = parent if isinstance(parent, str) else f"w{parent}"
    number = target if counter is None else counter
    header = PatchHeader("m", parent, f"w{target}", target, number, 1000)
    return Offer(name or f"{parent}-{target}-{number}-{size}.dpu", size, header)


def ways(chain):
    return [(o.header.parent, o.header.target) for o in chain]


def test_a_chain_is_found_whatever_the_order():
    steps = [offer(3, 4), offer(4, 5), offer(5, 6)]
    for offers in permutations(steps):
        assert find_chain(state(), offers) == steps


def test_one_patch_that_skips_beats_a_chain_with_fewer_bytes():
    offers = [offer(3, 4, size=1), offer(4, 5, size=1), offer(3, 5, size=500)]
    assert ways(find_chain(state(), offers)) == [("w3", "w5")]


def test_of_two_ways_of_one_length_the_smaller_is_taken():
    offers = [offer(3, 5, size=9), offer(3, 5, size=8), offer("init", 5, size=7)]
    assert [o.size for o in find_chain(state(), offers)] == [7]


def test_the_newest_release_within_reach_is_the_goal_not_the_newest_there_is():
    assert ways(find_chain(state(), [offer(3, 4), offer(5, 6)])) == [("w3", "w4")]


def test_a_chain_may_begin_at_a_kept_slot_or_at_the_init_weights():
    assert ways(find_chain(state(kept=[2]), [offer(2, 5)])) == [("w2", "w5")]
    assert ways(find_chain(state(), [offer("init", 5)])) == [("init", "w5")]


def test_old_releases_are_no_way_even_to_new_ones():
    offers = [offer(3, 2), offer(2, 5), offer(3, 1, counter=3)]
    assert find_chain(state(), offers) == []


def test_earlier_weights_as_a_newer_release_are_taken():
    chain = find_chain(state(), [offer(3, 2, counter=4), offer(2, 5)])
    assert ways(chain) == [("w3", "w2"), ("w2", "w5")]


def test_a_kept_target_needs_no_parent():
    chain = find_chain(state(kept=[2]), [offer(9, 2, counter=7)])
    assert ways(chain) == [("w9", "w2")]


def test_what_was_skipped_is_gone_around():
    offers = [offer(3, 4, size=1), offer(4, 6), offer(3, 5), offer(5, 6)]
    skipped = state(tries={"w4": MAX_TRIES})
    assert ways(find_chain(skipped, offers)) == [("w3", "w5"), ("w5", "w6")]


def test_a_pinned_device_goes_nowhere():
    pinned = state(pinned=True)
    assert find_chain(pinned, [offer(3, 4)]) == []
    assert decide(pinned, offer(3, 4).header)[0] is Decision.HELD


def test_a_rollback_is_not_undone_but_newer_releases_come():
    back = state(3, floor=5)
    assert find_chain(back, [offer(3, 5), offer(3, 4), offer(4, 5)]) == []
    verdict, reason = decide(back, offer(3, 5).header)
    assert (verdict, "rolled back from round 5" in reason) == (Decision.HELD, True)
    # The way to what is newer may lead through it.
    chain = find_chain(back, [offer(3, 5), offer(5, 6)])
    assert ways(chain) == [("w3", "w5"), ("w5", "w6")]


@pytest.mark.parametrize(
    ("header", "verdict"),
    [
        (offer(2, 3).header, Decision.APPLIED),
        (offer(1, 2).header, Decision.PASSED),
        (offer(2, 9, counter=3).header, Decision.PASSED),
        (offer(3, 4).header, Decision.REFUSED),
        (offer(3, 5).header, Decision.WAITING),
    ],
)
def test_the_state_alone_says_what_becomes_of_a_release(header, verdict):
    assert decide(state(tries={"w4": MAX_TRIES}), header)[0] is verdict


graphs = st.lists(
    st.builds(
        offer,
        st.sampled_from(["init", *range(1, 7)]),
        st.integers(1, 6),
        counter=st.integers(1, 8),
        size=st.integers(1, 3),
    ),
    max_size=6,
    unique_by=lambda entry: entry.name,
)


@given(
    graphs, st.integers(1, 6), st.sets(st.integers(1, 6), max_size=2), st.integers(0, 3)
)
def test_no_other_order_of_applying_gets_further_or_is_shorter(offers, at, kept, ahead):
    """The choice is as good as that of trying every order of every subset."""
    start = state(at, kept=sorted(kept - {at}), floor=at + ahead)
    best = {}
    for count in range(1, len(offers) + 1):
        for order in permutations(offers, count):
            end = walk(start, order)
            if end and end.floor > start.floor:
                cost = (count, sum(o.size for o in order))
                best[end.floor] = min(best.get(end.floor, cost), cost)
    chain = find_chain(start, offers)
    if not best:
        assert chain == []
        return
    assert walk(start, chain).floor == max(best)
    assert (len(chain), sum(o.size for o in chain)) == best[max(best)]


def walk(at, order):
    """Apply one after the other as a device does; None if one of them is refused."""
    for o in order:
        target = o.header.target
        is_current = target == at.active and o.header.counter <= at.floor
        known = {at.init, *(slot.target for slot in at.slots)}
        if refusal(at, o.header):
            return None
        if is_current or not {target, o.header.parent} & known:
            return None
        slot = Slot(target, o.header.round, o.header.counter)
        at = dataclasses.replace(at.activated(slot, at.history[0]))
    return at
