# SPDX-License-Identifier: Apache-2.0
"""What a key list says, and what a store keeps of it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import KeyListError, StoreError, TrustError
from edge_runtime.store.state import Slot, State, decode_state, encode_state
from edge_runtime.trust import KeyList, first_root, is_list, list_number, read_root
from edge_runtime.trust.keylist import MAX_LISTED
from tests.edge_runtime.trust import fleet

STATE = State("d" * 64, "e" * 64, "a" * 64, 0, "a" * 64, (Slot("a" * 64, 0, 0),))

FRAGMENTS = [
    *(b"[" * 40, b'{"a":' * 40, b"1e999", b"NaN", b"-0", b"1.5", b"9" * 400, b"null"),
    *(b'"\\ud800"', b"\xff", b"\0", b'"', b"{}", b"[]", b",", b":", b"true", b" "),
    *(b'"signed"', b'"signatures"', b'"_type"', b'"root"', b'"keyids"', b'"keys"'),
]


def test_a_list_says_who_signs_what_and_how_long():
    root = first_root(fleet.list_1())
    assert (root.version, root.issued, root.expires) == (1, *fleet.TIMES)
    assert (root.keys.keys, root.keys.threshold) == (
        tuple(fleet.public("ann", "bob")),
        2,
    )
    assert (root.releases.keys, root.releases.threshold) == (
        tuple(fleet.public("fleet")),
        1,
    )


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("1.root.json", 1),
        ("42.ROOT.JSON", 42),
        ("0.root.json", None),
        ("01.root.json", None),
        ("root.json", None),
        ("2.root.json.part", None),
        (".2.root.json", None),
        ("2.root.json\n", None),
        ("99999999999.root.json", None),
    ],
)
def test_a_list_is_named_by_its_number(name, number):
    assert list_number(name) == number


def test_a_list_is_told_from_a_key():
    assert is_list(fleet.list_1())
    assert not is_list(b"-----BEGIN PUBLIC KEY-----")


@pytest.mark.parametrize(
    "time",
    [
        "2026-02-30T00:00:00Z",
        "2026-1-1T00:00:00Z",
        "2026-01-01T00:00:60Z",
        "2026-01-01T00:00:00+00:00",
        "2026-01-01",
        "٢٠٢٦-01-01T00:00:00Z",
        20260101,
        None,
    ],
)
@pytest.mark.parametrize("field", ["expires", "x-issued"])
def test_a_time_has_one_form(field, time):
    def edit(record):
        record[field] = time

    with pytest.raises(KeyListError):
        read_root(fleet.edited(fleet.list_1(), edit, "ann", "bob"))


def test_a_state_without_a_list_is_written_as_before():
    """So an older runtime still reads it."""
    record = json.loads(encode_state(STATE))
    assert record["schema"] == 1
    assert "key_list" not in record


def test_a_state_with_a_list_comes_back_from_its_file():
    key_list = KeyList.begin(first_root(fleet.list_1()), fleet.MADE)
    key_list = key_list.follow(fleet.list_2(), "2026-03-01T00:00:00Z")
    state = STATE.trusting(key_list)
    assert state.history[-1].event == "keys changed"
    assert [entry.version for entry in key_list.history] == [1, 2]
    assert decode_state(encode_state(state)) == state
    assert json.loads(encode_state(state))["schema"] == 2


@pytest.mark.parametrize("key_list", [None, {}, [], "x", {"root": 1}, {"root": {}}])
def test_a_state_with_an_odd_list_is_damaged(key_list):
    from edge_runtime.store.state import _digest

    record = json.loads(encode_state(STATE)) | {"schema": 2, "key_list": key_list}
    del record["sha256"]
    sealed = record | {"sha256": _digest(record)}
    with pytest.raises(StoreError):
        decode_state(json.dumps(sealed).encode())


def test_the_history_of_lists_is_bounded_and_keeps_the_newest():
    data = fleet.list_1()
    key_list = KeyList.begin(first_root(data), fleet.MADE)
    for number in range(MAX_LISTED + 3):
        data = fleet.list_2(data, add={"targets": []})
        key_list = key_list.follow(data, fleet.MADE)
        assert key_list.root.version == number + 2
    assert len(key_list.history) == MAX_LISTED
    assert key_list.history[-1].version == key_list.root.version


@given(st.data())
def test_damage_of_any_kind_is_refused_in_words_or_leaves_what_was_signed(data):
    good = fleet.list_1()
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(bad) - 1))
        end = data.draw(st.integers(at, min(len(bad), at + 40)))
        bad[at:end] = data.draw(st.binary(max_size=8) | st.sampled_from(FRAGMENTS))
    try:
        root = first_root(bytes(bad))
    except (KeyListError, TrustError):
        return
    assert root == first_root(good)


@given(st.binary(max_size=300) | st.lists(st.sampled_from(FRAGMENTS)).map(b"".join))
def test_any_bytes_are_refused_in_words(data):
    with pytest.raises(KeyListError):
        read_root(data)
