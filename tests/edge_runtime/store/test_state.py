# SPDX-License-Identifier: Apache-2.0
"""What a store knows, and that it comes back from its file."""

import hashlib
import json
from dataclasses import replace

import pytest

from edge_runtime.errors import StoreError
from edge_runtime.limits import limits
from edge_runtime.store.state import (
    MAX_HISTORY,
    MAX_TRIES,
    Slot,
    State,
    decode_state,
    encode_state,
)

A, B, C = (Slot(letter * 64, number, number) for number, letter in enumerate("abc"))
STATE = State("m", "i", A.target, A.counter, A.target, (A,))


def moved(state, *slots, keep=2):
    for slot in slots:
        state = state.activated(slot, "updated")
        while len(state.slots) > keep:
            state = state.without(state.slots[-1])
    return state


def test_the_active_and_the_former_slot_are_kept():
    assert moved(STATE, B).slots == (B, A)
    assert moved(STATE, B, C).slots == (C, B)


def test_a_rollback_keeps_the_slot_that_it_leaves():
    back = moved(moved(STATE, B), A)
    assert (back.active_slot, back.slots) == (A, (A, B))


def test_history_is_bounded():
    state = STATE
    for number in range(MAX_HISTORY + 5):
        state = state.noted("updated", A).tried(f"w{number}")
    assert len(state.history) == len(state.tries) == MAX_HISTORY


def test_a_history_of_reasons_in_any_script_comes_back_from_its_file():
    state = replace(STATE, model="d" * 64, init="e" * 64)
    for _ in range(MAX_HISTORY):
        state = state.noted("refused", A, "\U0001f600" * 2000)
    data = encode_state(state)
    assert len(data) < limits().state_bytes // 2
    assert decode_state(data) == state
    assert state.noted_once("refused", A, "\U0001f600" * 3000) is state


def test_a_state_comes_back_from_its_file():
    state = replace(STATE, model="d" * 64, init="e" * 64)
    state = moved(state, B, C).tried("x").tried("y", MAX_TRIES)
    assert decode_state(encode_state(state)) == state


@pytest.mark.parametrize("cut", range(0, 400, 7))
def test_a_torn_state_file_is_refused(cut):
    with pytest.raises(StoreError, match="damaged"):
        decode_state(encode_state(moved(STATE, B))[:cut])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"schema": 99}, "newer dpu-edge"),
        ({"active": "nowhere"}, "damaged.*active"),
        ({"active": B.target}, "damaged.*StopIteration"),
        ({"slots": [{"target": 1}]}, "damaged.*target"),
        ({"trust": {"keys": ["no hex"], "threshold": 1}}, "damaged"),
    ],
)
def test_a_sealed_state_that_makes_no_sense_is_refused(edit, message):
    state = replace(STATE, model="d" * 64, init="e" * 64)
    record = json.loads(encode_state(state)) | edit
    record.pop("sha256")
    seal = hashlib.sha256(json.dumps(record).encode()).hexdigest()
    with pytest.raises(StoreError, match=message):
        decode_state(json.dumps(record | {"sha256": seal}).encode())
