# SPDX-License-Identifier: Apache-2.0
"""dpu-fleet check: what is wrong with a channel is found, and a whole one is well."""

import json
import shutil
import time
from dataclasses import replace

import pytest

from edge_runtime.formats.signing import Trust
from edge_runtime.live.proof import encode_public
from edge_runtime.live.shared import public_key
from edge_runtime.sync.head import SHORT
from edge_runtime.sync.head_file import read_head
from edge_runtime.sync.paths import bundle_path, patch_path
from edge_runtime.sync.route import cheapest
from edge_runtime.trust.rules import first_root
from packager.cli.fleet import fleet
from packager.fleet.channel import Channel, add_list
from packager.fleet.check import State, check_channel
from packager.fleet.head import named_files, sign_head
from packager.fleet.place import FolderPlace
from packager.fleet.prune import prune
from packager.fleet.publish import publish
from packager.fleet.reader import open_reader
from packager.key_lists import change_list, make_list, sign_list
from packager.keys import generate_key
from packager.rounds.folder import read_round
from tests.conftest import RunOnDisk
from tests.edge_runtime.sync.server import FileServer

KEY = generate_key()
TRUST = Trust((public_key(KEY),))
NOW = 1_800_000_000
DAY = 86_400


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Rounds 0 to 2 of a run."""
    run = RunOnDisk(tmp_path_factory.mktemp("runs") / "tiny")
    place = FolderPlace(tmp_path_factory.mktemp("published"))
    for number in range(3):
        run.add(number)
        release(run, place, number)
    return place


@pytest.fixture
def place(published, tmp_path):
    shutil.copytree(published.root, tmp_path / "fleet")
    return FolderPlace(tmp_path / "fleet")


def release(run, place, number, **options):
    channel = Channel(name="stable", signers=[KEY])
    round_ = read_round(run.path / f"round_{number:02d}")
    return publish(round_, place, channel, now=NOW, **options)


def head_of(place):
    return read_head(place.read("stable.head")[0]).head


def look(place, trust=TRUST, now=NOW):
    read = open_reader(str(place.root)).read
    return check_channel(read, "stable", trust, now=now)[1]


def faults(place, **options):
    """What is not well, by its name."""
    return {
        finding.what: (finding.state, finding.words)
        for finding in look(place, **options)
        if finding.state is not State.OK
    }


def rewrite(place, **changes):
    """Put a head there that says something else, signed as ever."""
    data = sign_head(replace(head_of(place), **changes), [KEY])
    assert place.swap("stable.head", data, place.read("stable.head")[1])


def test_all_that_devices_ask_of_a_channel_is_looked_at(place):
    found = look(place)
    head = head_of(place)
    assert {finding.state for finding in found} == {State.OK}
    names = [finding.what for finding in found]
    assert names[:3] == ["head", "signature", "expiry"]
    assert names.count("bundle") == 1
    assert len([name for name in names if name.startswith("patch")]) == len(head.ways)
    starts = [name for name in names if name.startswith("from")]
    assert len(starts) == len({way.parent for way in head.ways})
    assert "from init" in starts


def test_a_channel_that_went_back_is_well(new_run, tmp_path):
    run, place = new_run(), FolderPlace(tmp_path / "back")
    for number in range(4):
        run.add(number)
        release(run, place, number)
    release(run, place, 1, revert=True)
    assert faults(place) == {}
    prune(place, now=time.time() + DAY, grace_s=1)
    assert faults(place) == {}
    release(run, place, 3)
    assert faults(place) == {}


def test_a_way_over_an_older_release_than_the_one_before_is_named(new_run, tmp_path):
    """No device takes it: what it had seen was newer."""
    run, place = new_run(), FolderPlace(tmp_path / "back")
    ways = {}
    for number in (0, 1, 2, 3, 1, 4):
        if not (run.path / f"round_{number:02d}").exists():
            run.add(number)
        done = release(run, place, number, revert=True)
        ways |= {(offer.start, number): offer.way for offer, _ in done.offered}
    rewrite(place, ways=(ways["init", 1], ways["round_01", 2], ways["round_02", 4]))
    assert "from init" in faults(place)
    assert "[4, 2, 5]" in faults(place)["from init"][1]


def test_a_channel_that_is_not_there_is_said(place):
    (place.root / "stable.head").unlink()
    ((what, (state, words)),) = faults(place).items()
    assert (what, state, "publish" in words) == ("head", State.WRONG, True)


def test_a_damaged_head_is_said(place):
    (place.root / "stable.head").write_bytes(b"{}")
    assert faults(place)["head"][0] is State.WRONG


def test_a_head_in_another_channels_place_is_said(place):
    shutil.copy(place.root / "stable.head", place.root / "beta.head")
    read = open_reader(str(place.root)).read
    found = check_channel(read, "beta", TRUST, now=NOW)[1]
    assert "'stable'" in found[0].words
    assert found[0].state is State.WRONG


@pytest.mark.parametrize(
    ("at", "state", "words"),
    [
        (22 * DAY, State.OK, "in 8 d"),
        (28 * DAY, State.NOTE, "in 2 d"),
        (30 * DAY, State.WRONG, "over for"),
        (33 * DAY + 7200, State.WRONG, "over for 3 d 2 h"),
    ],
)
def test_when_a_head_expires_is_said_before_it_does(place, at, state, words):
    found = {finding.what: finding for finding in look(place, now=NOW + at)}
    assert found["expiry"].state is state
    assert found["expiry"].words.startswith(words)


def test_a_head_from_the_future_is_noted(place):
    assert "expiry" not in faults(place, now=NOW - 3600)
    state, words = faults(place, now=NOW - 20 * DAY)["expiry"]
    assert (state, "dated 20 d from now" in words) == (State.NOTE, True)


def test_each_missing_and_each_damaged_file_is_named(place):
    for path in named_files(head_of(place)):
        whole = (place.root / path).read_bytes()
        for damaged in (None, whole[:-1], whole[:-1] + b"?", whole + b"?", b""):
            (place.root / path).unlink(missing_ok=True)
            if damaged is not None:
                (place.root / path).write_bytes(damaged)
            found = [words for state, words in faults(place).values() if path in words]
            assert len(found) == 1
            assert "publish the same round again" in found[0]
        (place.root / path).write_bytes(whole)
    assert faults(place) == {}


def test_a_start_without_a_way_is_named(place):
    head = head_of(place)
    first = {way.parent for way in head.ways}
    for number, way in enumerate(head.ways):
        (place.root / patch_path(way.sha256)).rename(place.root / "away")
        left = head.ways[:number] + head.ways[number + 1 :]
        target = head.target[:SHORT]
        lost = {start for start in first if cheapest({start}, target, left) is None}
        words = {what for what in faults(place) if what.startswith("from")}
        assert len(words) == len(lost)
        (place.root / "away").rename(place.root / patch_path(way.sha256))
    rewrite(place, ways=())
    assert set(faults(place)) == {"from init"}


def test_a_patch_that_leads_elsewhere_than_the_head_says_is_named(place):
    head = head_of(place)
    way = head.ways[0]
    lies = [
        {"ways": (replace(way, parent="0" * 12), *head.ways[1:])},
        {"ways": (replace(way, target="0" * 12), *head.ways[1:])},
        {"counter": head.counter + 1},
        {"model": "0" * 64},
    ]
    for lie in lies:
        rewrite(place, **lie)
        wrong = [w for w, (s, _) in faults(place).items() if s is State.WRONG]
        assert any(what.startswith("patch") for what in wrong), lie
        rewrite(place, **{name: getattr(head, name) for name in lie})
    assert faults(place) == {}


def test_files_that_a_device_would_not_trust_are_named(place):
    stranger = Trust((public_key(generate_key()),))
    found = faults(place, trust=stranger)
    count = len(head_of(place).ways)
    untrusted = [what for what, (s, _) in found.items() if s is State.UNTRUSTED]
    assert len(untrusted) == count + 2  # the patches, the head and the bundle
    assert faults(place, trust=Trust())["signature"][0] is State.NOTE


def test_key_lists_are_followed_as_devices_follow_them(place):
    owner, stranger = generate_key(), generate_key()
    times = ("2026-01-01T00:00:00Z", "2099-01-01T00:00:00Z")
    one = sign_list(make_list([public_key(owner)], TRUST.keys, times), [owner])
    two = change_list(one, times, add={"targets": [public_key(stranger)]}, remove={})
    trust = first_root(one)
    assert faults(place, trust=trust) == {}
    add_list(place, sign_list(two, [owner]))
    rewrite(place, keys=2)
    assert faults(place, trust=trust) == {}
    (place.root / "keys" / "2.root.json").unlink()
    for damaged in (None, b"{}"):
        if damaged:
            (place.root / "keys" / "2.root.json").write_bytes(damaged)
        assert faults(place, trust=trust)["key list 2"][0] is State.WRONG
        assert faults(place)["key list 2"][0] is State.WRONG
    (place.root / "keys" / "2.root.json").unlink()
    add_list(place, sign_list(two, [stranger]))
    assert faults(place, trust=trust)["key list 2"][0] is State.UNTRUSTED


def test_the_command_has_a_table_and_exit_codes(place, command, tmp_path, monkeypatch):
    key = tmp_path / "key.pub.pem"
    key.write_bytes(encode_public(KEY))
    monkeypatch.setattr(time, "time", lambda: NOW)
    code, out, _ = command(fleet, "check", place.root, "--trust", key)
    assert (code, out.splitlines()[0]) == (0, "stable")
    assert "from init" in out
    (place.root / bundle_path(head_of(place).bundle[1])).unlink()
    code, out, _ = command(fleet, "check", place.root, "--trust", key, "--json")
    (channel,) = json.loads(out)["channels"]
    wrong = [f["what"] for f in channel["findings"] if f["state"] == "wrong"]
    assert (code, wrong) == (5, ["bundle"])
    key.write_bytes(encode_public(generate_key()))
    assert command(fleet, "check", place.root, "--trust", key)[0] == 8
    assert command(fleet, "check", tmp_path / "nothing")[0] == 5
    assert command(fleet, "check", place.root, "--channel", "beta")[0] == 5


def test_a_web_server_is_read_as_devices_read_it(place, command, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: NOW)
    with FileServer(place.root) as server:
        assert command(fleet, "check", server.url)[0] == 0
        way = head_of(place).ways[0]
        (place.root / patch_path(way.sha256)).unlink()
        code, out, _ = command(fleet, "check", server.url)
        assert (code, f"{way.sha256}.dpu is missing" in out) == (5, True)
        server.status = 503
        assert command(fleet, "check", server.url)[0] == 10
        server.shutdown()
