# SPDX-License-Identifier: Apache-2.0
"""Watching a fleet: what is proved counts, once a device, and nothing else does."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time
from dataclasses import replace

import obstore
import pytest

from edge_runtime.errors import RoundError, TrustError
from edge_runtime.formats.signing import Trust, framed, key_id
from edge_runtime.live.proof import encode_public
from edge_runtime.live.report import CONTEXT, Outcome
from edge_runtime.live.shared import canonical, public_key
from edge_runtime.sync.head import Rollout
from edge_runtime.sync.head_file import encode_head, read_head
from packager.cli.fleet import fleet as cli
from packager.fleet import watch as module
from packager.fleet.after_halt import resume
from packager.fleet.channel import Channel, pause
from packager.fleet.database import open_database
from packager.fleet.findings import findings
from packager.fleet.head import sign_head
from packager.fleet.object_place import ObjectPlace
from packager.fleet.picture import take_picture
from packager.fleet.place import FolderPlace
from packager.fleet.publish import publish
from packager.fleet.reports import read_keys
from packager.fleet.watch import Limit, Standing, collect, halt, look_at_head, standing
from packager.keys import generate_key
from packager.rounds.folder import read_round
from tests.packager.fleet.reporting import OTHER, Fake

KEY, PAUSER = generate_key(), generate_key()
TRUST = Trust((public_key(KEY),))
NOW = int(time.time())
LIMIT = Limit(0.02, 3)
REFUSED = Outcome.REFUSED


class Fleet:
    """A channel, devices with known keys, and somebody who watches."""

    def __init__(self, run, path):
        self.run, self.place = run, FolderPlace(path / "www")
        self.keys_folder, self.path = path / "keys", path
        self.keys_folder.mkdir()
        self.publish(1)

    def publish(self, number, **changes):
        channel = Channel(name="stable", signers=[KEY], pausers=(public_key(PAUSER),))
        path = self.run.path / f"round_{number:02d}"
        changed = replace(channel, **changes)
        return publish(read_round(path), self.place, changed, now=NOW)

    @property
    def signed(self):
        return read_head(self.place.read("stable.head")[0])

    def devices(self, count, prefix="board"):
        made = [f"{prefix}{k}" for k in range(count)]
        return [Fake(name, self.place, self.keys_folder) for name in made]

    def stranger(self, name="stranger"):
        return Fake(name, self.place)

    def collect(self, now=None):
        look_at_head(self.connection, self.place, "stable", TRUST)
        keys = read_keys(self.keys_folder)
        return collect(self.connection, self.place, keys, now=now or NOW + 60)

    def watch(self, limit=LIMIT):
        """Collect and judge; return whether the channel is paused then."""
        self.collect()
        state = self.connection, self.place, self.signed
        halted = halt(*state, limit, PAUSER, now=NOW + 60)
        assert halted == self.signed.is_paused()
        return halted

    @property
    def standing(self):
        return standing(self.connection, self.signed)

    def rows(self, what="device, n, outcome, proved", table="report"):
        return self.connection.execute(f"SELECT {what} FROM {table}").fetchall()


@pytest.fixture
def fleet(run, tmp_path):
    run.add(2)
    made = Fleet(run, tmp_path)
    with open_database(tmp_path / "fleet.db") as connection:
        made.connection = connection
        yield made


# What is collected --------------------------------------------------------------------


def test_who_runs_what_is_known_by_proof(fleet):
    first, second = fleet.devices(2)
    first.send(fleet.signed, group="lab", name="digits", month_bytes=5)
    second.send(fleet.signed, REFUSED, running=OTHER, reason="worse")
    found = fleet.collect()
    assert (found.proved, found.unproved, found.refused) == (2, 0, 0)
    what = "id, grp, name, target, counter, outcome, reason, month_bytes, proved"
    assert fleet.rows(what, "device") == [
        ("board0", "lab", "digits", fleet.signed.head.target, 1, "applied", "", 5, 1),
        ("board1", "", "", OTHER, 1, "refused", "worse", 0, 1),
    ]


def test_a_device_that_never_reported_is_named_until_it_does(fleet):
    first, second = fleet.devices(2)
    first.send(fleet.signed)
    fleet.stranger("board1").send(fleet.signed)
    fleet.collect()
    _, words = findings(take_picture(fleet.connection, NOW))
    assert "1 device whose key is known never reported: board1." in words
    second.send(fleet.signed)
    fleet.collect()
    assert not take_picture(fleet.connection, NOW).unheard


def test_a_database_from_before_devices_were_expected_is_taken(tmp_path):
    for _ in range(2):
        with open_database(tmp_path / "old.db") as connection:
            assert not take_picture(connection, NOW).unheard
            connection.execute("DROP TABLE expected")


def test_a_clock_that_began_in_1970_counts_no_day_before_the_first_known_head(fleet):
    (device,) = fleet.devices(1)
    device.send(None, at=700)
    device.send(None, at=NOW - 9 * 86_400)  # of a head before that one
    fleet.collect()
    assert fleet.rows("at") == [(NOW,), (NOW - 9 * 86_400,)]
    assert fleet.rows("min(day)", "daily") == [((NOW - 9 * 86_400) // 86_400,)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"disk": None}, "disk"),
        ({"untold": [7]}, "process 7"),
        ({"live": [{"pid": 7, "status": "loading", "file_now": ""}]}, "process 7"),
        ({"disk": {"fingerprint": OTHER, "graph": OTHER, "bytes": 9}}, "disk"),
    ],
)
def test_what_a_proof_leaves_open_is_no_claim(fleet, changes, reason):
    (device,) = fleet.devices(1)
    signed = fleet.signed
    proof = device.proof(signed.sha256, signed.head.target, **changes)
    device.send(signed, proof=proof)
    fleet.collect()
    ((target, why),) = fleet.rows("target, reason", "device")
    assert target == ""
    assert reason in why


def test_only_what_is_new_or_changed_is_read(fleet, monkeypatch):
    devices = fleet.devices(3)
    for device in devices:
        device.send(fleet.signed)
    fleet.collect()
    read = []
    original = FolderPlace.read
    monkeypatch.setattr(
        FolderPlace, "read", lambda s, p: read.append(p) or original(s, p)
    )
    devices[0].send(fleet.signed)
    devices[1].n += 1
    devices[1].put(devices[1].report(fleet.signed), name="1.json")
    found = fleet.collect()
    assert sorted(path for path in read if path.startswith("reports")) == [
        "reports/board0/2.json",
        "reports/board1/1.json",
    ]
    assert (found.proved, found.unchanged) == (2, 2)


def test_one_name_for_all_reports_of_a_device_will_do(fleet):
    """As with an address that was signed beforehand."""
    (device,) = fleet.devices(1)
    for outcome in (Outcome.APPLIED, REFUSED):
        device.put(device.report(fleet.signed, outcome), name="latest.json")
        fleet.collect()
    assert [row[:3] for row in fleet.rows()] == [
        ("board0", 1, "applied"),
        ("board0", 2, "refused"),
    ]


def test_a_key_that_comes_later_proves_what_lies_there(fleet):
    fleet.devices(1)
    late = fleet.stranger("late")
    late.send(fleet.signed)
    assert fleet.collect().unproved == 1
    assert fleet.collect().unchanged == 1
    (fleet.keys_folder / "late.pub.pem").write_bytes(encode_public(late.key))
    assert fleet.collect().proved == 1
    assert fleet.rows() == [("late", 1, "applied", 1)]


def test_a_clock_that_is_wrong_puts_no_report_before_its_head_or_into_the_future(fleet):
    past, future = fleet.devices(2)
    past.send(fleet.signed, at=5)
    future.send(fleet.signed, at=NOW + 10**8)
    fleet.collect(now=NOW + 60)
    assert fleet.rows("last_seen", "device") == [(NOW,), (NOW + 60,)]


def test_a_report_about_older_weights_is_about_the_release_of_then(fleet):
    (device,) = fleet.devices(1)
    first = fleet.signed
    device.send(first)
    fleet.publish(2)
    fleet.collect()
    assert fleet.rows("counter, head_version") == [(1, 1)]


def test_reports_in_an_object_store_are_collected_too(fleet):
    store = obstore.store.MemoryStore()
    place = ObjectPlace(store, "memory://digits")
    place.create("stable.head", fleet.place.read("stable.head")[0])
    (device,) = fleet.devices(1)
    for outcome in (Outcome.APPLIED, REFUSED):
        data = device.report(fleet.signed, outcome)
        obstore.put(store, "reports/board0/latest.json", data)
        fleet.place = place
        assert fleet.collect().proved == 1
        assert fleet.collect().unchanged == 1
    assert [row[2] for row in fleet.rows()] == ["applied", "refused"]


# What halts ---------------------------------------------------------------------------


def test_a_release_that_fails_on_many_is_halted_and_by_few_is_not(fleet):
    devices = fleet.devices(10)
    for device in devices[:2]:
        device.send(fleet.signed, REFUSED)
    assert not fleet.watch()
    devices[2].send(fleet.signed, REFUSED)
    assert fleet.watch()


def test_a_share_below_the_limit_does_not_halt(fleet):
    devices = fleet.devices(10)
    for k, device in enumerate(devices):
        device.send(fleet.signed, REFUSED if k < 3 else Outcome.APPLIED)
    assert not fleet.watch(Limit(0.3, 3))
    assert fleet.watch(Limit(0.29, 3))


def test_unknown_keys_never_halt(fleet):
    fleet.devices(1)
    for k in range(20):
        fleet.stranger(f"x{k}").send(fleet.signed, REFUSED)
        fleet.stranger("board0").put(
            fleet.stranger("board0").report(fleet.signed, REFUSED), f"{k}.json"
        )
    assert not fleet.watch(Limit(0, 1))
    assert fleet.standing == Standing(0, 0)


def test_silent_devices_never_halt(fleet):
    devices = fleet.devices(50)
    for device in devices[:3]:
        device.send(fleet.signed)
    assert not fleet.watch(Limit(0, 1))


def test_reports_about_other_releases_never_halt(fleet):
    old = fleet.signed
    devices = fleet.devices(5)
    for device in devices:
        device.send(old, REFUSED)
    fleet.collect()
    fleet.publish(2)
    for device in devices:
        device.send(fleet.signed, REFUSED, about=(old.head.target, 1, 1))
        device.send(None, REFUSED)
    assert not fleet.watch(Limit(0, 1))


def test_old_reports_that_are_played_again_never_halt(fleet):
    devices = fleet.devices(4)
    failed = [device.report(fleet.signed, REFUSED) for device in devices]
    for device, data in zip(devices, failed, strict=True):
        device.send(fleet.signed)  # it has gone well since
        for k in range(5):  # and somebody puts the old one everywhere
            device.put(data, f"again{k}.json")
            device.put(data, f"9{k}.json", device="board0")
    assert not fleet.watch(Limit(0, 1))
    assert fleet.standing == Standing(0, 4)


def test_a_device_that_changes_its_mind_all_day_counts_once(fleet):
    devices = fleet.devices(10)
    for device in devices[1:]:
        device.send(fleet.signed)
    for _ in range(30):
        devices[0].send(fleet.signed)
        devices[0].send(fleet.signed, REFUSED)
    assert not fleet.watch(Limit(0.05, 2))
    assert fleet.standing == Standing(1, 10)


def test_one_key_under_many_names_counts_once(fleet):
    (device,) = fleet.devices(1)
    key = (fleet.keys_folder / "board0.pub.pem").read_bytes()
    for k in range(5):
        (fleet.keys_folder / f"copy{k}.pub.pem").write_bytes(key)
        device.name = f"copy{k}"
        device.send(fleet.signed, REFUSED)
    assert not fleet.watch(Limit(0, 2))
    assert fleet.standing == Standing(1, 1)


def test_a_rollback_by_hand_counts_and_what_blocks_a_device_does_not(fleet):
    first, second, third = fleet.devices(3)
    first.send(fleet.signed, Outcome.ROLLED_BACK)
    second.send(fleet.signed, Outcome.BLOCKED)
    third.send(fleet.signed, Outcome.CUT_OFF)
    fleet.collect()
    assert fleet.standing == Standing(1, 1)


def test_devices_that_cannot_try_a_release_do_not_hide_that_it_fails(fleet):
    for k, device in enumerate(fleet.devices(160)):
        device.send(fleet.signed, REFUSED if k < 3 else Outcome.BLOCKED)
    assert fleet.watch()


def test_a_halt_needs_a_key_that_the_head_names(fleet):
    for device in fleet.devices(3):
        device.send(fleet.signed, REFUSED)
    fleet.collect()
    state = fleet.connection, fleet.place, fleet.signed, LIMIT
    with pytest.raises(RoundError, match="does not name this key"):
        halt(*state, generate_key(), now=NOW)
    assert not fleet.signed.is_paused()


def test_a_release_that_came_meanwhile_is_not_halted_for_the_one_before(fleet):
    for device in fleet.devices(3):
        device.send(fleet.signed, REFUSED)
    fleet.collect()
    old = fleet.signed
    fleet.publish(2)
    assert not halt(fleet.connection, fleet.place, old, LIMIT, PAUSER, now=NOW)
    assert not fleet.signed.is_paused()


def test_a_head_that_somebody_else_signed_is_not_watched(fleet):
    head = fleet.signed.head
    path = fleet.place.root / "stable.head"
    path.write_bytes(sign_head(replace(head, counter=9), [generate_key()]))
    with pytest.raises(TrustError):
        fleet.collect()
    assert fleet.rows("counter", "release") == []


def test_an_old_head_that_is_played_again_is_said(fleet):
    fleet.devices(1)
    old = fleet.place.read("stable.head")[0]
    fleet.publish(2)
    fleet.collect()
    (fleet.place.root / "stable.head").write_bytes(old)
    with pytest.raises(TrustError, match="an old one is played"):
        fleet.collect()


# Going on -----------------------------------------------------------------------------


def test_after_a_pause_devices_that_reported_before_do_not_count_again(fleet):
    devices = fleet.devices(9)
    for device in devices[:3]:
        device.send(fleet.signed, REFUSED)
    assert fleet.watch()
    head, _ = resume(fleet.place, Channel(name="stable", signers=[KEY]), now=NOW + 100)
    assert (head.version, head.target) == (2, fleet.signed.head.target)
    for device in devices[:3]:
        device.send(fleet.signed, REFUSED)  # their daily ones
    assert not fleet.watch()
    for device in devices[3:6]:
        device.send(fleet.signed, REFUSED)
    assert fleet.watch()


def test_no_timer_that_publishes_again_undoes_a_halt(fleet):
    pause(fleet.place, "stable", PAUSER, now=NOW)
    fleet.publish(1)  # nothing new to say: as it was
    assert "resume" in fleet.publish(1, lifetime_s=90 * 86_400).halted
    assert fleet.signed.is_paused()
    fleet.publish(2)
    assert not fleet.signed.is_paused()


def test_shares_that_were_to_come_come_later_by_the_pause(fleet):
    shares = ((10, 0), (100, 3600), (1000, 7200))
    fleet.publish(2, shares=shares)
    pause(fleet.place, "stable", PAUSER, now=NOW + 4000)
    channel = Channel(name="stable", signers=[KEY])
    head, _ = resume(fleet.place, channel, now=NOW + 100_000)
    steps = ((10, NOW), (100, NOW + 3600), (1000, NOW + 7200 + 96_000))
    assert head.rollout == Rollout(head.rollout.id, steps)
    assert head.expires - head.at == 30 * 86_400
    fleet.signed.check(TRUST)
    assert not fleet.signed.is_paused()


@pytest.mark.parametrize(("ahead", "by"), [(-NOW, 100), (10**9, 0)], ids=["0", "far"])
def test_shares_come_later_by_no_more_than_the_head_is_old(fleet, ahead, by):
    """Whatever the pauser's clock says."""
    fleet.publish(2, shares=((10, 0), (1000, 7200)))
    pause(fleet.place, "stable", PAUSER, now=NOW + ahead)
    channel = Channel(name="stable", signers=[KEY])
    head, _ = resume(fleet.place, channel, now=NOW + 100)
    assert head.rollout.steps == ((10, NOW), (1000, NOW + 7200 + by))


def test_only_a_paused_channel_goes_on_and_only_with_its_own_key(fleet):
    channel = Channel(name="stable", signers=[KEY])
    assert resume(fleet.place, channel, now=NOW) == (fleet.signed.head, False)
    pause(fleet.place, "stable", PAUSER, now=NOW)
    with pytest.raises(TrustError):
        resume(fleet.place, replace(channel, signers=[PAUSER]), now=NOW)
    with pytest.raises(RoundError, match="no channel"):
        resume(fleet.place, replace(channel, name="beta"), now=NOW)


# What is no report --------------------------------------------------------------------


def resigned(device, record):
    """A record of a test's own making, signed as the device signs."""
    body = {k: v for k, v in record.items() if k != "signature"}
    value = device.key.sign(framed(CONTEXT, canonical(body))).hex()
    return canonical(body | {"signature": {"key_id": device.id, "value": value}})


def changed(**fields):
    def make(device, signed):
        return resigned(device, json.loads(device.report(signed)) | fields)

    return make


def tampered(device, signed):
    return device.report(signed).replace(b'"applied"', b'"refused"')


def foreign_proof(device, signed):
    other = Fake("other")
    proof = other.proof(signed.sha256, signed.head.target)
    return device.report(signed, proof=proof)


def old_proof(device, signed):
    proof = device.proof("00" * 32, signed.head.target)
    return device.report(signed, proof=proof)


def unsigned_proof(device, signed):
    proof = device.proof(signed.sha256, signed.head.target)
    del proof["signature"]
    return device.report(signed, proof=proof)


HOSTILE = {
    "empty": lambda *_: b"",
    "no JSON": lambda *_: b"\x00\xff" * 50,
    "a list": lambda *_: b"[]",
    "deep": lambda *_: b'{"a":' * 30_000,
    "deep lists": lambda *_: b"[" * 60_000,
    "many values": lambda *_: b"[" + b"1," * 30_000 + b"1]",
    "huge": lambda d, s: d.report(s) + b" " * 65_536,
    "a digit too many": changed(n=1 << 70),
    "a number in words": changed(n="7"),
    "no number": changed(n=0),
    "a fraction": changed(n=1.5),
    "no such outcome": changed(outcome="<b>fine</b>"),
    "a name with HTML": changed(device="<script>"),
    "a name that goes up": changed(device="../board1"),
    "a newer schema": changed(schema=2),
    "no proof": changed(proof=7),
    "a proof of nothing": changed(proof={}),
    "no release": changed(release=None),
    "a year far away": changed(at=1 << 60),
    "another form": lambda d, s: json.dumps(json.loads(d.report(s))).encode(),
    "a name twice": lambda d, s: d.report(s).replace(b'{"at"', b'{"at":1,"at"', 1),
    "a surrogate": changed(reason="\ud800"),
    "tampered": tampered,
    "foreign proof": foreign_proof,
    "old proof": old_proof,
    "unsigned proof": unsigned_proof,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_report_is_counted_and_skipped(fleet, kind):
    bad, good = fleet.devices(2)
    bad.put(HOSTILE[kind](bad, fleet.signed))
    good.send(fleet.signed)
    found = fleet.collect()
    assert (found.refused, found.proved, found.unproved) == (1, 1, 0)
    assert list(found.reasons) == [f"reports/board0/{bad.n}.json"]
    assert [row[0] for row in fleet.rows()] == ["board1"]


def test_strange_names_and_files_are_counted_and_skipped(fleet):
    (device,) = fleet.devices(1)
    data = device.report(fleet.signed)
    root = fleet.place.root / "reports"
    for name in ("1.txt", "a b.json", "\x1b[2J.json", "<img>.json", "x" * 99 + ".json"):
        device.put(data, name)
    device.put(data, "deep.json", device="board0/more")
    (root / "loose.json").write_bytes(data)
    pathlib.Path(root / "board0" / "link.json").symlink_to("/etc/passwd")
    os.mkfifo(root / "board0" / "pipe.json")
    found = fleet.collect()
    assert (found.proved, found.refused) == (0, 7)
    assert all(path.isprintable() for path in found.reasons)


def test_a_file_that_cannot_be_read_hides_no_other_and_is_read_later(
    fleet, monkeypatch
):
    original, locked = FolderPlace.read, {"reports/board0/1.json"}

    def read(place, path):
        if path in locked:
            raise PermissionError(13, "Permission denied", path)
        return original(place, path)

    monkeypatch.setattr(FolderPlace, "read", read)
    for device in fleet.devices(2):
        device.send(fleet.signed)
    found = fleet.collect()
    assert (found.proved, found.refused) == (1, 1)
    locked.clear()
    found = fleet.collect()
    assert (found.proved, found.refused, found.unchanged) == (1, 0, 1)


def test_names_that_are_no_text_are_counted_and_hidden_ones_are_not_there(fleet):
    (device,) = fleet.devices(1)
    device.send(fleet.signed)
    folder = os.fsencode(fleet.place.root / "reports" / "board0")
    for name in (b"\xff.json", b"a\nb.json", b".1.json.part"):
        with open(folder + b"/" + name, "wb") as file:
            file.write(b"{}")
    for _ in range(2):
        found = fleet.collect()
        assert found.refused == 2
        assert all(path.isprintable() for path in found.reasons)
    assert fleet.rows("device") == [("board0",)]


def test_text_of_devices_is_shown_as_it_is_and_bounded(fleet):
    (device,) = fleet.devices(1)
    record = json.loads(device.report(fleet.signed))
    hostile = "\x1b[31m<script>alert(1)</script>\u202e" + "x" * 5000
    names = ("reason", "name", "group", "runtime")
    device.put(resigned(device, record | dict.fromkeys(names, hostile)))
    assert fleet.collect().proved == 1
    for value in fleet.rows("reason, name, grp, runtime", "device")[0]:
        assert value.isprintable()
        assert len(value) <= 1000


def test_a_flood_of_reports_of_nobody_known_is_bounded(fleet, monkeypatch):
    monkeypatch.setattr(module, "MOST_UNPROVED", 5)
    (device,) = fleet.devices(1)
    for k in range(9):
        fleet.stranger(f"x{k}").send(fleet.signed)
    device.send(fleet.signed)
    found = fleet.collect()
    assert (found.proved, found.unproved) == (1, 9)
    assert len(fleet.rows()) == 6
    assert key_id(public_key(device.key)) == fleet.rows("key_id", "device")[0][0]


# The command --------------------------------------------------------------------------


def watching(fleet, *words):
    fixed = [fleet.place.root, "--devices", fleet.keys_folder, *words]
    return ["watch", *map(str, fixed), "--db", str(fleet.path / "w.db")]


def write_head(fleet, **changes):
    """Write a head as somebody does who has no key and no scruples."""
    head = replace(fleet.signed.head, **changes)
    (fleet.place.root / "stable.head").write_bytes(encode_head(head, ()))


@pytest.mark.parametrize("field", ["counter", "version", "round"])
def test_a_number_that_no_database_holds_is_told_and_ends_nothing(
    fleet, command, field
):
    fleet.devices(1)
    write_head(fleet, **{field: 1 << 63})
    code, _, err = command(cli, *watching(fleet, "--once"))
    assert (code, "the head of 'stable' has the number" in err) == (3, True)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (r'"at": "[^"]*"', '"at": "yesterday"', "'at' is 'yesterday', expected a time"),
        (r'"at": "[^"]*"', '"at": "2026-02-30T00:00:00Z"', "expected a time"),
        (r'"counter": \d+', f'"counter": {1 << 63}', "expected at most"),
        (r'"bytes": \d+', f'"bytes": {1 << 63}', "expected at most"),
    ],
)
def test_a_ledger_that_no_database_holds_is_told(fleet, command, old, new, words):
    fleet.devices(1)
    path = fleet.run.path / "releases.jsonl"
    path.write_text(re.sub(old, new, path.read_text()))
    code, _, err = command(cli, *watching(fleet, "--once", "--run", fleet.run.path))
    assert (code, words in err) == (3, True), err


def test_a_device_whose_file_has_no_text_for_a_name_is_counted(fleet):
    device = Fake("board", fleet.place)
    name = os.fsdecode(bytes(fleet.keys_folder) + b"/b\xff.pub.pem")
    pathlib.Path(name).write_bytes(encode_public(device.key))
    device.send(fleet.signed)
    assert fleet.collect().proved == 1
    assert fleet.rows("device") == [(r"b\udcff",)]


def test_who_watches_for_ever_is_read_line_by_line_until_nobody_reads(fleet):
    fleet.devices(1)
    script = "from packager.cli.fleet import fleet; fleet()"
    words = [sys.executable, "-c", script, *watching(fleet, "--every", "1s", "--json")]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=env) as process:
        first = json.loads(process.stdout.readline())
        assert (first["schema"], first["version"]) == (1, 1)
        fleet.publish(2)
        assert json.loads(process.stdout.readline())["version"] == 2
        process.stdout.close()
        fleet.publish(2, lifetime_s=86_400 * 90)
        assert process.wait(60) == 0
