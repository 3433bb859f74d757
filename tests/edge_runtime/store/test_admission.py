# SPDX-License-Identifier: Apache-2.0
"""Which patches a store admits: every rule, on plain data."""

import dataclasses

import pytest

from edge_runtime.errors import (
    HeldError,
    TrustError,
    WrongModelError,
    WrongParentError,
)
from edge_runtime.formats.header import MAX_JUMP, RESERVED_COUNTER, PatchHeader
from edge_runtime.store.admission import (
    is_current,
    parent_refusal,
    refusal,
    unknown_parent,
    was_left,
)
from edge_runtime.store.state import MAX_TRIES, State
from tests.edge_runtime.store.test_state import STATE, A, B, C, moved


def header(slot, counter=None):
    number = slot.counter if counter is None else counter
    return PatchHeader("m", "p", slot.target, slot.round, number, 0)


def test_a_newer_release_is_admitted():
    assert refusal(STATE, header(B)) is None


def test_an_older_release_is_refused_and_the_message_says_that_it_is_past():
    assert "past that round" in str(refusal(moved(STATE, B, C), header(B)))


def test_a_rollback_does_not_open_the_door_to_older_releases():
    rolled = moved(STATE, B, C, B)
    assert "has already been at 2" in str(refusal(rolled, header(A)))


def test_after_a_rollback_the_newest_release_may_come_back():
    rolled = moved(STATE, B, C, B)
    assert rolled.floor == C.counter
    assert refusal(rolled, header(C)) is None


def test_another_target_under_the_same_counter_is_refused():
    assert isinstance(
        refusal(moved(STATE, B), header(C, counter=B.counter)), TrustError
    )


def test_a_release_that_failed_its_trial_is_refused_until_forced():
    state = STATE.tried(B.target, MAX_TRIES)
    assert "--force" in str(refusal(state, header(B)))
    assert refusal(state, header(B), force=True) is None
    assert moved(state, B).tries == {}


def test_force_does_not_lower_the_floor():
    assert isinstance(refusal(moved(STATE, B), header(A), force=True), TrustError)


@pytest.mark.parametrize("floor", [0, 7, 1 << 40, (1 << 64) - 3])
def test_a_counter_far_ahead_is_refused_unless_somebody_insists(floor):
    state = dataclasses.replace(moved(STATE, A), floor=floor)
    last = min(floor + MAX_JUMP, RESERVED_COUNTER - 1)
    assert refusal(state, header(B, counter=last)) is None
    if last == floor + MAX_JUMP:
        error = refusal(state, header(B, counter=last + 1))
        assert isinstance(error, TrustError)
        assert f"counter {last + 1}, this device is at {floor}" in str(error)
        assert refusal(state, header(B, counter=last + 1), force=True) is None


@pytest.mark.parametrize("state", [STATE, State("m", "i"), moved(STATE, B)])
def test_the_reserved_counter_is_refused_by_every_device(state):
    for force in (False, True):
        error = refusal(state, header(C, counter=RESERVED_COUNTER), force=force)
        assert isinstance(error, TrustError)
        assert "reserved" in str(error)


def test_a_new_device_begins_at_the_counter_of_its_bundle():
    assert refusal(State("m", "i"), header(A, counter=1 << 50)) is None


def test_a_patch_for_another_network_is_refused_before_all_else():
    other = dataclasses.replace(header(A), model="other")
    pinned = dataclasses.replace(moved(STATE, B), pinned=True)
    assert isinstance(refusal(pinned, other), WrongModelError)


def test_a_pinned_device_takes_nothing_even_by_force():
    pinned = dataclasses.replace(STATE, pinned=True)
    assert isinstance(refusal(pinned, header(B), force=True), HeldError)


def test_a_patch_must_lead_from_weights_that_the_store_has():
    state = moved(STATE, B)
    for parent in (A.target, B.target, STATE.init):
        assert parent_refusal(state, led_from(parent)) is None
    error = parent_refusal(state, led_from("e" * 64))
    assert isinstance(error, WrongParentError)
    assert "apply the rounds between" in str(error)
    assert "no longer keeps" in str(unknown_parent(moved(state, C, A), B.target))


def led_from(parent):
    return dataclasses.replace(header(C), parent=parent)


def test_weights_that_are_kept_need_no_parent_to_be_released_again():
    again = dataclasses.replace(header(A, counter=9), parent="e" * 64)
    assert parent_refusal(moved(STATE, B), again) is None


def test_what_a_bundle_leads_from_must_be_its_own_init():
    error = unknown_parent(State("m", "i"), "e" * 64)
    assert "the bundle's patch leads from" in str(error)


def test_the_active_weights_are_current_until_a_higher_counter_names_them():
    assert is_current(STATE, header(A))
    assert not is_current(STATE, header(A, counter=9))
    assert not is_current(STATE, header(B))
    assert not is_current(STATE, dataclasses.replace(header(A), model="other"))


def test_the_release_that_was_left_is_known():
    assert was_left(moved(STATE, B, A), header(B))
    assert not was_left(moved(STATE, B), header(B))
