# SPDX-License-Identifier: Apache-2.0
"""The attacks of TUF's list on key lists and on what they vouch for, one test each.

What of that list does not apply here, or does not hold, is in SECURITY.md and in the
runtime's README. Attacks on patches, bundles and counters under fixed keys are in
tests/hostile/test_attacks.py.
"""

import json
import os

import pytest

from edge_runtime.errors import (
    DpuError,
    KeyListError,
    ListExpiredError,
    StoreError,
    TrustError,
    WrongModelError,
)
from edge_runtime.formats.signing import PATCH_CONTEXT, Trust, framed
from edge_runtime.limits import Limits
from edge_runtime.store.state import decode_state
from edge_runtime.trust import (
    first_root,
    load_list,
    next_root,
    read_root,
    tuf_key,
    tuf_key_id,
)
from edge_runtime.trust.root import _entry_id
from edge_runtime.update.device import UpdateResult
from tests.crash import world
from tests.edge_runtime.trust import fleet

MAX_BYTES, MAX_KEYS = Limits().key_list_bytes, Limits().list_keys


def refused(device, data, error=TrustError, **options):
    """The list is refused, and nothing of the device has changed."""
    before = device.store.state
    with pytest.raises(error) as caught:
        device.add_list(data, **options)
    assert device.store.state == before == fleet.again(device).store.state
    return str(caught.value)


# Arbitrary installation ---------------------------------------------------------------


def test_arbitrary_installation_a_release_of_a_key_that_no_list_names(tmp_path):
    device = fleet.device(tmp_path)
    for names in ((), ("thief",), ("ann", "bob"), ("new",)):
        with pytest.raises(TrustError):
            device.update(fleet.release(0, 1, *names))
    assert device.update(fleet.release(0, 1, "fleet")) is UpdateResult.APPLIED


def test_arbitrary_installation_a_list_that_strangers_signed(tmp_path):
    device = fleet.device(tmp_path)
    theirs = fleet.list_1(("thief", "pal"))
    refused(device, fleet.signed(fleet.list_2(theirs, ()), "thief", "pal"))
    refused(device, fleet.list_2(signers=()))


def test_arbitrary_installation_a_bundle_that_the_list_does_not_vouch_for(tmp_path):
    for names in ((), ("thief",), ("ann", "bob")):
        with pytest.raises(TrustError):
            fleet.Device.install(
                tmp_path / "store",
                fleet.bundle(*names),
                trust=first_root(fleet.list_1()),
                trial=world.no_trial,
            )
    assert not (tmp_path / "store").exists()


# Rollback -----------------------------------------------------------------------------


def test_rollback_to_an_older_list_brings_no_revoked_key_back(tmp_path):
    device = fleet.device(tmp_path)
    device.add_list(fleet.list_2())
    refused(device, fleet.list_1())
    device = fleet.again(device)
    refused(device, fleet.list_1())
    with pytest.raises(TrustError):
        device.update(fleet.release(0, 1, "fleet"))


def test_rollback_by_another_list_of_the_same_number(tmp_path):
    device = fleet.device(tmp_path)
    device.add_list(fleet.list_2())
    other = fleet.list_2(add={"targets": fleet.public("thief")})
    assert "another one than list 2" in refused(device, other)


def test_rollback_of_a_release_is_refused_under_a_new_list_too(tmp_path):
    device = fleet.device(tmp_path)
    device.update(fleet.release(0, 1, "fleet"))
    device.update(fleet.release(1, 2, "fleet"))
    device.add_list(fleet.list_2())
    with pytest.raises(TrustError, match="has already been at 2"):
        device.update(fleet.release(2, 1, "new"))


# Fast-forward -------------------------------------------------------------------------


@pytest.mark.parametrize("version", [3, 4, 2**31, 2**53, 2**64])
def test_fast_forward_no_list_number_can_be_skipped(tmp_path, version):
    device = fleet.device(tmp_path)

    def jump(record):
        record["version"] = version

    data = fleet.edited(fleet.list_2(), jump, "ann", "bob")
    refused(device, data, (TrustError, KeyListError))
    device.add_list(fleet.list_2())  # the honest one still follows


def test_fast_forward_of_the_time_ends_with_the_list_that_says_it(tmp_path, clock):
    # Who can sign a list could claim any time. It is before that list's own expiry,
    # and no device's clock is believed for it.
    clock("1970-01-01T00:00:00Z")
    device = fleet.device(tmp_path)
    late = "2099-12-31T00:00:00Z"
    device.add_list(fleet.list_2(times=(late, fleet.UNTIL)))
    assert not device.store.state.expired()
    device.update(fleet.release(0, 1, "new"))

    def of_its_end(record):
        record["x-issued"] = record["expires"]

    other = fleet.device(tmp_path / "other")
    with pytest.raises(KeyListError, match="x-issued"):
        other.add_list(fleet.edited(fleet.list_2(), of_its_end, "ann", "bob"))


# Freeze -------------------------------------------------------------------------------

SHORT = "2026-01-01T00:00:00Z", "2027-01-01T00:00:00Z"
BEFORE, AFTER = "2026-06-01T00:00:00Z", "2027-06-01T00:00:00Z"


def test_indefinite_freeze_under_an_old_list_ends_when_it_expires(tmp_path, clock):
    clock(BEFORE)
    device = fleet.device(tmp_path, fleet.list_1(times=SHORT))
    device.update(fleet.release(0, 1, "fleet"))
    clock(AFTER)
    with pytest.raises(ListExpiredError, match="expired 2027-01-01"):
        device.update(fleet.release(1, 2, "fleet"), force=True)
    # The running model runs on, and so does the way back.
    device.verify()
    device.rollback()
    assert fleet.again(device).status()["key_list"]["expired"] is True


def test_indefinite_freeze_a_clock_that_is_set_back_helps_nobody(tmp_path, clock):
    clock(AFTER)
    device = fleet.device(tmp_path)
    device.add_list(fleet.list_2(times=(AFTER, "2028-01-01T00:00:00Z")))
    late = "2027-12-01T00:00:00Z"
    third = fleet.list_2(
        fleet.list_2(times=(AFTER, "2028-01-01T00:00:00Z")),
        times=(late, "2027-12-02T00:00:00Z"),
        add={"targets": fleet.public("more")},
    )
    device.add_list(third)
    for now in ("1970-01-01T00:00:00Z", SHORT[0], late):
        clock(now)
        assert device.store.state.key_list.now(now) == late
    clock("2027-12-02T00:00:00Z")
    assert fleet.again(device).store.state.expired()


NO_CLOCK = "1970-01-01T00:00:00Z"


def test_freeze_a_board_without_a_clock_refuses_what_was_signed_too_late(
    tmp_path, clock
):
    clock(NO_CLOCK)
    device = fleet.device(tmp_path, fleet.list_1(times=SHORT))
    for when in (SHORT[1], AFTER, "9999-12-31T23:59:59Z"):
        with pytest.raises(ListExpiredError, match=f"was signed {when}"):
            device.update(fleet.dated(0, 1, when, "fleet"))
    device.update(fleet.dated(0, 1, BEFORE, "fleet"))
    assert fleet.again(device).store.state.key_list.seen == BEFORE


def test_freeze_the_newest_signed_time_never_goes_back(tmp_path, clock):
    """A release that was signed earlier is as good as ever; the time stays."""
    clock(NO_CLOCK)
    device = fleet.device(tmp_path, fleet.list_1(times=SHORT))
    device.update(fleet.dated(0, 1, BEFORE, "fleet"))
    device.update(fleet.dated(1, 2, "2026-02-01T00:00:00Z", "fleet"))
    device.rollback()
    assert fleet.again(device).store.state.key_list.seen == BEFORE


@pytest.mark.parametrize("dated", [True, False])
def test_freeze_a_list_does_not_set_the_time_back(tmp_path, clock, dated):
    clock(NO_CLOCK)
    device = fleet.device(tmp_path, fleet.list_1(times=SHORT))
    device.update(fleet.dated(0, 1, BEFORE, "fleet"))
    early = fleet.list_2(fleet.list_1(times=SHORT), times=(SHORT[0], fleet.UNTIL))
    if not dated:
        early = fleet.edited(early, lambda s: s.pop("x-issued"), "ann", "bob")
    device.add_list(early)
    assert fleet.again(device).store.state.key_list.seen == BEFORE


def test_freeze_what_was_signed_in_time_is_taken_late(tmp_path, clock):
    clock(BEFORE)
    device = fleet.device(tmp_path, fleet.list_1(times=SHORT))
    clock(AFTER)
    device.update(fleet.dated(0, 1, BEFORE, "fleet"))
    with pytest.raises(ListExpiredError, match="now it is 2027"):
        device.update(fleet.release(1, 2, "fleet"))


def test_freeze_a_time_that_nobody_trusted_signed_moves_nothing(tmp_path, clock):
    clock(NO_CLOCK)
    device = fleet.device(tmp_path, fleet.list_1(times=SHORT))
    for names in ((), ("thief",), ("ann", "bob")):
        with pytest.raises(TrustError):
            device.update(fleet.dated(0, 1, BEFORE, *names))
    assert fleet.again(device).store.state.key_list.seen == SHORT[0]


def test_a_dated_release_says_nothing_to_a_device_with_single_keys(tmp_path):
    device = fleet.pem_device(tmp_path, "fleet")
    device.update(fleet.dated(0, 1, "2999-01-01T00:00:00Z", "fleet"))
    assert device.status()["key_list"] is None


def test_freeze_a_sleeper_takes_every_list_that_was_signed_in_time(tmp_path, clock):
    """What counts is when a list was signed, not when it arrives."""
    clock(BEFORE)
    first = fleet.list_1(times=SHORT)
    device = fleet.device(tmp_path, first)
    second = fleet.list_2(first, times=("2026-12-01T00:00:00Z", "2028-01-01T00:00:00Z"))
    third = fleet.list_2(
        second,
        times=("2027-12-01T00:00:00Z", "2040-01-01T00:00:00Z"),
        add={"targets": fleet.public("more")},
    )
    clock("2035-01-01T00:00:00Z")
    device.add_list(second)
    assert device.store.state.expired()
    device.add_list(third)
    assert not device.store.state.expired()
    device.update(fleet.release(0, 1, "more"))


@pytest.mark.parametrize("dated", [True, False])
def test_an_expired_list_vouches_for_no_list_that_was_signed_later(
    tmp_path, clock, dated
):
    clock(AFTER)
    first = fleet.list_1(times=SHORT)
    with pytest.raises(ListExpiredError):  # no new device begins with it
        fleet.device(tmp_path, first)
    assert not (tmp_path / "store").exists()
    clock(BEFORE)
    device = fleet.device(tmp_path, first)
    clock(AFTER)
    later = fleet.list_2(first, times=(AFTER, fleet.UNTIL))
    if not dated:  # as tools of others write it: it counts as signed now
        later = fleet.edited(later, lambda s: s.pop("x-issued"), "ann", "bob")
    assert "--lapsed" in refused(device, later, ListExpiredError)
    assert device.add_list(later, lapsed=True) is UpdateResult.APPLIED
    device.update(fleet.release(0, 1, "new"))


def test_the_way_out_of_an_expired_list_asks_for_every_signature(tmp_path, clock):
    clock(BEFORE)
    first = fleet.list_1(times=SHORT)
    device = fleet.device(tmp_path, first)
    clock(AFTER)
    for signers in ((), ("ann",), ("thief", "pal")):
        later = fleet.list_2(first, signers, (AFTER, fleet.UNTIL))
        refused(device, later, lapsed=True)


def test_a_list_that_claims_to_be_older_than_the_one_before_it(tmp_path):
    device = fleet.device(tmp_path)
    early = fleet.list_2(times=("2025-12-31T23:59:59Z", fleet.UNTIL))
    assert "make it anew" in refused(device, early)


# Endless data -------------------------------------------------------------------------


def test_endless_data_no_more_is_read_than_a_list_may_have(tmp_path):
    path = tmp_path / "2.root.json"
    with open(path, "wb") as file:
        os.truncate(file.fileno(), 1 << 40)
    with pytest.raises(KeyListError, match=str(MAX_BYTES)):
        load_list(path)


def test_endless_data_the_largest_list_is_taken_and_one_byte_more_is_not():
    data = fleet.list_1()
    read_root(data + b" " * (MAX_BYTES - len(data)))
    with pytest.raises(KeyListError):
        read_root(data + b" " * (MAX_BYTES + 1 - len(data)))


def test_endless_data_keys_signatures_and_depth_have_limits():
    names = [f"key {n}" for n in range(MAX_KEYS + 1)]
    fleet.list_1(("ann",), names[: MAX_KEYS - 1], 1)
    with pytest.raises(KeyListError, match=f"{MAX_KEYS} are accepted"):
        fleet.list_1(("ann",), names[:MAX_KEYS], 1)
    record = json.loads(fleet.list_1())
    many = [{"keyid": str(n), "sig": ""} for n in range(200)]
    for deep in (b'{"signed":' + b"[" * 100_000, b"[" * 500_000):
        with pytest.raises(KeyListError):
            read_root(deep)
    with pytest.raises(KeyListError, match="signatures"):
        read_root(json.dumps(record | {"signatures": many}).encode())


# Extraneous dependencies --------------------------------------------------------------


def test_extraneous_keys_and_fields_get_no_say(tmp_path):
    def more(record):
        record["x-note"] = {"anything": ["goes", 1, None]}
        record["keys"][tuf_key_id(*fleet.public("thief"))] = tuf_key(
            *fleet.public("thief")
        )
        for role in ("snapshot", "timestamp"):
            ids = record["roles"][role]["keyids"]
            record["roles"][role]["keyids"] = [*ids, tuf_key_id(*fleet.public("thief"))]

    device = fleet.device(tmp_path, fleet.edited(fleet.list_1(), more, "ann", "bob"))
    with pytest.raises(TrustError):
        device.update(fleet.release(0, 1, "thief"))
    refused(device, fleet.list_2(signers=("ann", "thief")))
    device.add_list(fleet.list_2())


def test_extraneous_roles_are_refused():
    def more(record):
        record["roles"]["mirrors"] = record["roles"]["root"]

    with pytest.raises(KeyListError, match="roles"):
        read_root(fleet.edited(fleet.list_1(), more, "ann", "bob"))


# Mix-and-match ------------------------------------------------------------------------


def test_mix_and_match_a_signature_holds_for_its_list_alone(tmp_path):
    device = fleet.device(tmp_path)
    good = json.loads(fleet.list_2())
    other = json.loads(fleet.list_2(signers=(), add={"targets": fleet.public("thief")}))
    refused(device, json.dumps(other | {"signatures": good["signatures"]}).encode())


def test_mix_and_match_a_signature_on_a_patch_is_none_on_a_list(tmp_path):
    """And the other way round: what is signed begins with what it is."""
    device = fleet.device(tmp_path)
    record = json.loads(fleet.list_2(signers=("ann",)))
    given = read_root(json.dumps(record).encode())
    bob = fleet.key("bob")
    sig = bob.sign(framed(PATCH_CONTEXT, given.message)).hex()
    record["signatures"].append({"keyid": tuf_key_id(*fleet.public("bob")), "sig": sig})
    refused(device, json.dumps(record).encode())


def test_mix_and_match_halves_of_two_lists(tmp_path):
    device = fleet.device(tmp_path)
    one, two = (json.loads(data)["signed"] for data in (fleet.list_1(), fleet.list_2()))
    signatures = json.loads(fleet.list_2())["signatures"]
    for field in ("keys", "roles", "expires", "x-issued"):
        mixed = {"signed": two | {field: one[field]}, "signatures": signatures}
        if one[field] != two[field]:
            refused(device, json.dumps(mixed).encode(), (TrustError, KeyListError))


# Wrong software -----------------------------------------------------------------------


def test_wrong_software_a_listed_key_cannot_send_another_model(tmp_path):
    device = fleet.device(tmp_path)
    header = world.PatchHeader(
        "ab" * 32,
        world.weights(0).fingerprint,
        world.weights(1).fingerprint,
        1,
        1,
        world.INIT.layout.file_size,
    )
    data = world.build_patch(world.weights(0), world.weights(1), header, level=1)
    with pytest.raises(WrongModelError):
        device.update(fleet.sign_patch_with(data, "fleet"))


def test_wrong_software_root_keys_sign_lists_and_release_keys_sign_releases(tmp_path):
    device = fleet.device(tmp_path, fleet.list_1(("ann",), ("fleet",), 1))
    with pytest.raises(TrustError):
        device.update(fleet.release(0, 1, "ann"))
    first = fleet.list_1(("ann",), ("fleet",), 1)
    refused(device, fleet.list_2(first, ("fleet",)))


def test_wrong_software_other_metadata_of_tuf_is_no_key_list():
    def targets(record):
        record["_type"] = "targets"

    with pytest.raises(KeyListError, match="_type"):
        read_root(fleet.edited(fleet.list_1(), targets, "ann", "bob"))


# Key compromise -----------------------------------------------------------------------


def test_key_compromise_a_revoked_release_key_stops_at_once(tmp_path):
    device = fleet.device(tmp_path)
    device.add_list(fleet.list_2())
    for current in (device, fleet.again(device)):
        with pytest.raises(TrustError, match="not trusted"):
            current.update(fleet.release(0, 1, "fleet"))
    assert device.update(fleet.release(0, 1, "new")) is UpdateResult.APPLIED


def test_key_compromise_fewer_root_keys_than_the_threshold_change_nothing(tmp_path):
    device = fleet.device(tmp_path)
    evil = {"add": {"targets": fleet.public("thief")}}
    refused(device, fleet.list_2(signers=("ann",), **evil))
    # A thief may claim a lower threshold, or a role of his own, in a list he makes.
    alone = {
        "add": {"root": fleet.public("thief")},
        "remove": {"root": fleet.public("bob")},
        "thresholds": {"root": 1},
    }
    refused(device, fleet.list_2(signers=("ann", "thief"), **alone))


def test_key_compromise_root_keys_that_were_rotated_out_sign_nothing_more(tmp_path):
    device = fleet.device(tmp_path)
    swap = {
        "add": {"root": fleet.public("cat", "dan")},
        "remove": {"root": fleet.public("ann", "bob")},
    }
    second = fleet.list_2(signers=("ann", "bob", "cat", "dan"), **swap)
    device.add_list(second)
    evil = {"add": {"targets": fleet.public("thief")}}
    refused(device, fleet.list_2(second, ("ann", "bob"), **evil))
    device.add_list(fleet.list_2(second, ("cat", "dan")))


def test_key_compromise_new_root_keys_must_have_agreed(tmp_path):
    """Else a typing error in a key would lock the owners out of the fleet."""
    device = fleet.device(tmp_path)
    swap = {
        "add": {"root": fleet.public("cat", "dan")},
        "remove": {"root": fleet.public("ann", "bob")},
    }
    words = refused(device, fleet.list_2(signers=("ann", "bob", "cat"), **swap))
    assert "its own root keys" in words


def test_key_compromise_stolen_release_keys_below_the_threshold(tmp_path):
    data = fleet.make_list(
        fleet.public("ann"),
        fleet.public("fleet", "second"),
        fleet.TIMES,
        {"targets": 2},
    )
    first = fleet.signed(data, "ann")
    device = fleet.Device.install(
        tmp_path / "store",
        fleet.bundle("fleet", "second"),
        trust=first_root(first),
        trial=world.no_trial,
    )
    with pytest.raises(TrustError):
        device.update(fleet.release(0, 1, "fleet"))
    device.update(fleet.release(0, 1, "fleet", "second"))


# Thresholds, duplicates, ids ----------------------------------------------------------


def test_duplicate_signatures_one_key_counts_once(tmp_path):
    device = fleet.device(tmp_path)
    record = json.loads(fleet.list_2(signers=("ann",)))
    record["signatures"] *= 2
    refused(device, json.dumps(record).encode(), KeyListError)
    record["signatures"][1] = record["signatures"][0] | {
        "keyid": tuf_key_id(*fleet.public("bob"))
    }
    refused(device, json.dumps(record).encode())


@pytest.mark.parametrize("how", ["another id", "upper case", "another field", "twice"])
def test_key_id_confusion_one_key_under_two_ids_counts_once(how):
    """The classic: a threshold of two that one person meets."""
    (ann,) = fleet.public("ann")
    entry = tuf_key(ann)
    if how == "upper case":
        entry["keyval"]["public"] = ann.upper()
    if how == "another field":
        entry["keyval"]["x"] = "y"
    second = "ab" * 32 if how in ("another id", "twice") else _entry_id(entry)

    def double(record):
        record["keys"][second] = entry
        role = {"keyids": [tuf_key_id(ann), second], "threshold": 2}
        if how == "twice":
            role["keyids"] = [tuf_key_id(ann)] * 2
            del record["keys"][second]
        record["roles"]["root"] = role

    data = json.loads(fleet.edited(fleet.list_1(), double, "ann"))
    data["signatures"].append(data["signatures"][0] | {"keyid": second})
    with pytest.raises(KeyListError):
        first_root(json.dumps(data).encode())


def test_key_id_confusion_a_key_under_the_id_of_another(tmp_path):
    device = fleet.device(tmp_path)
    (bob,), (thief,) = fleet.public("bob"), fleet.public("thief")

    def swap(record):
        record["keys"][tuf_key_id(bob)] = tuf_key(thief)

    data = json.loads(fleet.edited(fleet.list_2(), swap, "ann", "thief"))
    data["signatures"][1]["keyid"] = tuf_key_id(bob)
    refused(device, json.dumps(data).encode(), KeyListError)


def test_names_that_stand_twice_are_refused_whoever_signed_them():
    """Two readers of one file must not see two lists."""
    text = fleet.list_1().decode()
    twice = text.replace('"version": 1', '"version": 9,\n  "version": 1')
    with pytest.raises(KeyListError, match="given twice"):
        first_root(twice.encode())


@pytest.mark.parametrize("role", ["root", "targets"])
@pytest.mark.parametrize(
    "change",
    [
        {"threshold": 0},
        {"threshold": -1},
        {"threshold": True},
        {"threshold": 3},
        {"keyids": []},
        {"keyids": ["ab" * 32]},
    ],
)
def test_a_role_that_nobody_must_or_nobody_can_meet_is_refused(role, change):
    """No release keys at all would mean that nothing is checked any more."""

    def edit(record):
        record["roles"][role] |= change

    with pytest.raises(KeyListError):
        first_root(fleet.edited(fleet.list_1(), edit, "ann", "bob"))


# Devices without a list ---------------------------------------------------------------


def test_single_keys_move_over_by_a_list_that_enough_of_them_signed(tmp_path):
    device = fleet.pem_device(tmp_path, "fleet", "second", threshold=2)
    first = fleet.list_1()
    for signers in ((), ("fleet",), ("thief", "pal"), ("ann", "bob")):
        refused(device, fleet.signed(first, *signers))
    assert device.store.state.key_list is None
    device.add_list(fleet.signed(first, "fleet", "second"))
    assert device.store.state.trust == Trust(tuple(fleet.public("fleet")))
    device.add_list(fleet.list_2())
    with pytest.raises(TrustError):
        device.update(fleet.release(0, 1, "fleet", "second"))
    device.update(fleet.release(0, 1, "new"))


def test_single_keys_do_not_move_over_to_a_list_that_its_owners_did_not_sign(tmp_path):
    device = fleet.pem_device(tmp_path, "fleet")
    data = fleet.make_list(fleet.public("ann"), fleet.public("fleet"), fleet.TIMES)
    refused(device, fleet.signed(data, "fleet"))


def test_a_device_that_trusts_nobody_is_not_taken_over_by_a_list(tmp_path):
    world.install(tmp_path / "store")
    device = fleet.Device.open(tmp_path / "store", trial=world.no_trial)
    refused(device, fleet.list_1())
    refused(device, fleet.list_1(threshold=1)[:-40], KeyListError, first_use=True)
    device.add_list(fleet.list_1(), first_use=True)
    with pytest.raises(TrustError):
        device.update(world.patch(0, 1))


# Whoever writes on the card -----------------------------------------------------------


def test_a_state_whose_key_list_was_taken_out_is_damaged_not_old(tmp_path):
    device = fleet.device(tmp_path)
    device.add_list(fleet.list_2())
    record = json.loads((device.store.root / "state.json").read_bytes())
    assert record["schema"] == 2
    del record["key_list"]
    for schema in (1, 2):
        with pytest.raises(StoreError):
            decode_state(json.dumps(record | {"schema": schema}).encode())


@pytest.mark.parametrize(
    "junk", [b"", b"{}", b"[]", b"null", b"\xff", b'{"signed": 1}']
)
def test_whatever_else_is_named_like_a_list_is_refused_in_words(tmp_path, junk):
    device = fleet.device(tmp_path)
    refused(device, junk, KeyListError)
    with pytest.raises(DpuError):
        next_root(device.store.state.key_list.root, junk)
