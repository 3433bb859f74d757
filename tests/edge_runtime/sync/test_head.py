# SPDX-License-Identifier: Apache-2.0
"""The head of a channel: small, of one form, and believed only if signed."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import HeadError, TrustError
from edge_runtime.formats.signing import Trust, key_id
from edge_runtime.live.shared import public_key
from edge_runtime.sync.head import PERMILLE, Head, Rollout, Way, place
from edge_runtime.sync.head_file import encode_head, read_head
from edge_runtime.times import MAX_SECONDS
from packager.fleet.head import pause_head, sign_head
from packager.keys import generate_key

HUGE = int("9" * 4300)  # a number of as many digits as JSON may have here
A, B, C = "aa" * 32, "bb" * 32, "cc" * 32
KEY, PAUSER = generate_key(), generate_key()
TRUST = Trust((public_key(KEY),))


def ways(count, target=B):
    digests = [f"{n:02x}" * 32 for n in range(count)]
    return tuple(Way(d[:12], target[:12], 9324 + n, d) for n, d in enumerate(digests))


def head(**changes):
    fields = {"model": A, "channel": "stable", "version": 17}
    fields |= {"at": 1796169600, "expires": 1798761600}
    fields |= {"counter": 5, "round": 5, "target": B, "ways": ways(4)}
    return Head(**(fields | changes))


def test_a_head_with_four_ways_has_at_most_640_bytes():
    data = sign_head(head(keys=2), [KEY])
    assert len(data) <= 640
    found = read_head(data)
    assert (found.head, found.check(TRUST)) == (head(keys=2), TRUST.ids)


digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
shorts = digests.map(lambda digest: digest[:12])
names = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
rollouts = st.builds(
    Rollout,
    names,
    st.lists(st.tuples(st.integers(0, PERMILLE), st.integers(0, MAX_SECONDS)))
    .map(lambda steps: sorted(steps, key=lambda step: step[1]))
    .map(tuple),
    st.lists(names).map(tuple),
)
heads = st.builds(
    Head,
    digests,
    st.from_regex(r"\A[a-z0-9][a-z0-9_-]{0,31}\Z"),
    st.integers(1, 1 << 40),
    st.integers(0, 1 << 37),
    st.integers(1 << 37 | 1, MAX_SECONDS),
    *[st.integers(0, 1 << 40)] * 2,
    digests,
    st.lists(st.builds(Way, shorts, shorts, st.integers(1, 1 << 40), digests)).map(
        tuple
    ),
    st.none() | st.tuples(st.integers(1, 1 << 40), digests),
    st.integers(0, 99),
    st.none() | rollouts,
    st.lists(digests).map(tuple),
)


@given(heads)
def test_what_is_written_is_what_is_read(found):
    data = sign_head(found, [KEY])
    read = read_head(data)
    assert read.head == found
    assert encode_head(read.head, read.signatures) == data


@given(st.data())
def test_a_changed_head_is_refused(data):
    good = bytearray(sign_head(head(rollout=Rollout("r", ((10, 5),))), [KEY]))
    at = data.draw(st.integers(0, len(good) - 1))
    good[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises((HeadError, TrustError)):
        read_head(bytes(good)).check(TRUST)


def test_a_head_of_somebody_else_is_not_trusted():
    with pytest.raises(TrustError, match="not trusted"):
        read_head(sign_head(head(), [generate_key()])).check(TRUST)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema", 2),
        ("channel", "../x"),
        ("channel", "Stable"),
        ("version", 0),
        ("version", True),
        ("target", "AA"),
        ("target", "=" * 43),
        ("ways", [["AAAAAAAA", 0, "A" * 43]]),
        ("ways", [["AAAAAAAA", 1, "A" * 43, 7]]),
        ("ways", [["AAAAAAAA", 1, "A" * 42 + "B"]]),
        ("ways", {}),
        ("bundle", [True, "A" * 43]),
        ("rollout", {"id": "r", "steps": [[1001, 0]]}),
        ("rollout", {"id": "a\x7f", "steps": []}),
        ("rollout", {"id": "r", "steps": [[1, 9], [2, 8]]}),
        ("rollout", {"id": "r", "steps": [[True, 0]]}),
        ("rollout", {"id": "r", "steps": [[1, MAX_SECONDS + 1]]}),
        ("ways", [["AAAAAAAA", HUGE, "A" * 43]]),
        ("bundle", [HUGE, "A" * 43]),
        ("at", MAX_SECONDS + 1),
        ("expires", MAX_SECONDS + 1),
        ("expires", 1796169600),  # the second in which it was signed
        ("pausers", ["AA"]),
    ],
)
def test_fields_of_another_form_are_refused_by_name(field, value):
    record = json.loads(sign_head(head(), [KEY]))
    record["signed"][field] = value
    with pytest.raises(HeadError, match=field):
        read_head(json.dumps(record).encode())


def test_a_field_that_nobody_knows_is_refused_and_not_lost():
    record = json.loads(sign_head(head(), [KEY]))
    record["signed"]["more"] = 1
    with pytest.raises(HeadError, match="holds more"):
        read_head(json.dumps(record).encode())


# Pausing ------------------------------------------------------------------------------


def pausable():
    return head(pausers=(public_key(PAUSER),))


def test_a_pauser_can_stop_a_head_and_change_nothing_else():
    data = sign_head(pausable(), [KEY])
    paused = read_head(pause_head(data, PAUSER, at=1798700000))
    assert (paused.head, paused.check(TRUST)) == (pausable(), TRUST.ids)
    assert paused.is_paused()
    assert not read_head(data).is_paused()


def test_a_pause_of_another_key_or_another_head_stops_nothing():
    data = sign_head(pausable(), [KEY])
    assert not read_head(pause_head(data, generate_key(), at=1)).is_paused()
    other = read_head(pause_head(data, PAUSER, at=1))
    newer = replace(pausable(), version=18)
    moved = encode_head(newer, other.signatures, other.pause)
    assert not read_head(moved).is_paused()


# Rollout ------------------------------------------------------------------------------


@given(names, names, st.integers(0, PERMILLE), st.integers(0, PERMILLE))
def test_whoever_takes_part_still_does_when_the_share_grows(
    rollout, device, one, other
):
    small, large = sorted([one, other])
    steps = Rollout(rollout, ((small, 10), (large, 20)))
    assert steps.includes(device, "", 20) >= steps.includes(device, "", 10)
    assert not steps.includes(device, "", 9)


def test_a_share_is_that_share_of_devices_and_another_rollout_takes_others():
    devices = [f"device {n}" for n in range(20_000)]
    taken = [{d for d in devices if place(r, d) < 100} for r in ("5", "6")]
    assert all(abs(len(t) / len(devices) - 0.1) < 0.01 for t in taken)
    assert len(taken[0] & taken[1]) / len(devices) < 0.02


def test_a_rollout_to_groups_leaves_all_others_out():
    rollout = Rollout("r", (), ("lab",))
    assert rollout.includes("a", "lab", 0)
    assert not rollout.includes("a", "field", 0)
    assert not rollout.includes("a", "", 0)


def test_key_ids_are_those_of_the_keys():
    (signature,) = read_head(sign_head(head(), [KEY])).signatures
    assert signature.key_id == key_id(TRUST.keys[0])
