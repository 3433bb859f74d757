# SPDX-License-Identifier: Apache-2.0
"""Publishing: any device catches up, and no publisher loses what another one did."""

import json
import multiprocessing
import os
import shutil

import pytest

from edge_runtime.errors import RoundError, StoreError, TrustError
from edge_runtime.formats.patch import open_patch
from edge_runtime.formats.signing import Trust
from edge_runtime.live.proof import encode_public
from edge_runtime.live.shared import public_key
from edge_runtime.sync.head import SHORT
from edge_runtime.sync.head_file import read_head
from edge_runtime.sync.route import cheapest
from edge_runtime.update.device import Device
from packager.cli.fleet import fleet
from packager.cli.pack import pack, patch
from packager.fleet.channel import Channel
from packager.fleet.place import FolderPlace
from packager.fleet.publish import publish
from packager.fleet.successor import ALL_NOW
from packager.fleet.ways import parents_ahead
from packager.keys import encode_private, generate_key
from packager.ledger import read_ledger
from packager.rounds.folder import read_round

KEY = generate_key()
TRUST = Trust((public_key(KEY),))
NOW, DAY = 1_800_000_000, 86_400


@pytest.fixture
def long_run(run):
    for number in range(2, 7):
        run.add(number)
    return run


@pytest.fixture
def place(tmp_path):
    return FolderPlace(tmp_path / "fleet")


def release(run, place, number, **options):
    channel = Channel(name="stable", signers=[KEY])
    path = run.path / f"round_{number:02d}"
    return publish(read_round(path), place, channel, now=NOW, **options)


def target_of(run, number):
    return read_round(run.path / f"round_{number:02d}").record.target


def head_of(place):
    signed = read_head(place.read("stable.head")[0])
    signed.check(TRUST)
    return signed.head


def catch_up(device, place):
    """Do what a device does that reads the head: fetch the cheapest way, and apply."""
    head, state = head_of(place), device.store.state
    starts = {state.init[:SHORT], *(slot.target[:SHORT] for slot in state.slots)}
    for way in cheapest(starts, head.target[:SHORT], head.ways):
        data, sha256 = place.read(f"patches/{way.sha256}.dpu")
        assert (len(data), sha256) == (way.size, way.sha256)
        device.update(data)
    return device.verify()


def bundle_of(place):
    _, sha256 = head_of(place).bundle
    return place.read(f"bundles/{sha256}.zip")[0]


def test_a_device_at_any_round_catches_up(long_run, place, tmp_path):
    devices = []
    for number in range(7):
        release(long_run, place, number)
        store = tmp_path / f"store{number}"
        devices.append(Device.install(store, bundle_of(place), trust=TRUST))
    targets = {catch_up(device, place) for device in devices}
    assert targets == {target_of(long_run, 6)}


def test_a_head_lists_only_ways_that_some_device_takes(long_run, place):
    for number in range(7):
        release(long_run, place, number)
    head = head_of(place)
    parents = {way.parent for way in head.ways}
    routes = [cheapest({p}, head.target[:SHORT], head.ways) for p in parents]
    assert set(head.ways) <= {way for route in routes for way in route}
    assert len(place.read("stable.head")[0]) < 1500


def test_publishing_the_same_twice_changes_nothing(long_run, place):
    first = release(long_run, place, 0)
    files = sorted(place.names(""))
    lines = len(read_ledger(long_run.path).listed)
    again = release(long_run, place, 0)
    assert (first.changed, again.changed, again.head) == (True, False, first.head)
    assert sorted(place.names("")) == files
    assert len(read_ledger(long_run.path).listed) == lines


def test_a_dry_run_writes_nothing(long_run, place):
    release(long_run, place, 0, dry_run=True)
    assert not place.root.exists()
    assert read_ledger(long_run.path).listed == []


def test_going_back_is_a_newer_release_of_older_weights(long_run, place, tmp_path):
    for number in range(4):
        release(long_run, place, number)
    device = Device.install(tmp_path / "store", bundle_of(place), trust=TRUST)
    with pytest.raises(RoundError, match="dpu-fleet revert"):
        release(long_run, place, 2)
    release(long_run, place, 2, revert=True)
    assert head_of(place).counter == 4
    assert (
        catch_up(device, place) == read_round(long_run.path / "round_02").record.target
    )
    release(long_run, place, 4)
    assert head_of(place).counter == 5
    assert (
        catch_up(device, place) == read_round(long_run.path / "round_04").record.target
    )


def test_a_release_taken_back_is_left_by_all_and_entered_by_none(
    long_run, place, tmp_path
):
    devices = []
    for number in range(4):
        release(long_run, place, number)
        store = tmp_path / f"store{number}"
        devices.append(Device.install(store, bundle_of(place), trust=TRUST))
    catch_up(devices[2], place)  # has what it came from beside the bad release
    release(long_run, place, 2, revert=True)
    head, bad = head_of(place), target_of(long_run, 3)
    assert bad[:SHORT] not in {way.target for way in head.ways}
    for device in devices:
        assert catch_up(device, place) == target_of(long_run, 2)
        assert device.store.state.floor == head.counter
    events = [d.store.state.was_active(bad) for d in devices]
    assert events == [False, False, True, True]


def test_weights_that_a_device_still_has_are_released_again_by_few_bytes(
    long_run, place, tmp_path
):
    for number in range(3):
        release(long_run, place, number)
    release(long_run, place, 1, revert=True)
    head = head_of(place)
    (again,) = cheapest({head.target[:SHORT]}, head.target[:SHORT], head.ways)
    assert again.size < min(way.size for way in head.ways if way != again)
    release(long_run, place, 3)
    assert again not in head_of(place).ways


def test_a_channel_goes_on_when_its_signers_are_exchanged(long_run, place, tmp_path):
    release(long_run, place, 0)
    device = Device.install(tmp_path / "store", bundle_of(place), trust=TRUST)
    release(long_run, place, 1)
    new = generate_key()
    path = read_round(long_run.path / "round_02")
    with pytest.raises(TrustError, match="--former"):
        publish(path, place, Channel(name="stable", signers=[new]), now=NOW)
    exchanged = Channel(name="stable", signers=[new], former=TRUST.keys)
    publish(path, place, exchanged, now=NOW)
    signed = read_head(place.read("stable.head")[0])
    assert signed.head.version == 3
    # Who trusts the new key alone must not be led through patches of the old one.
    for way in signed.head.ways:
        data, _ = place.read(f"patches/{way.sha256}.dpu")
        open_patch(data, trust=Trust((public_key(new),))).close()
    starts = {device.store.state.active[:SHORT], device.store.state.init[:SHORT]}
    assert cheapest(starts, signed.head.target[:SHORT], signed.head.ways)
    path = read_round(long_run.path / "round_03")
    publish(path, place, Channel(name="stable", signers=[new]), now=NOW)


def test_a_forgotten_key_does_not_take_a_signed_channel_from_its_devices(
    long_run, place
):
    release(long_run, place, 0)
    before = place.read("stable.head")
    path = read_round(long_run.path / "round_01")
    with pytest.raises(TrustError, match="--sign"):
        publish(path, place, Channel(name="stable"), now=NOW)
    assert place.read("stable.head") == before


def test_the_counter_of_the_channel_wins_over_a_ledger_that_was_lost(
    long_run, place, tmp_path
):
    for number in (0, 1, 2):
        release(long_run, place, number)
    release(long_run, place, 1, revert=True)
    (long_run.path / "releases.jsonl").unlink()
    release(long_run, place, 3)
    assert head_of(place).counter == 4


def test_a_head_of_somebody_else_is_not_built_on(long_run, place):
    other = Channel(name="stable", signers=[generate_key()])
    publish(read_round(long_run.path / "round_00"), place, other, now=NOW)
    with pytest.raises(TrustError):
        release(long_run, place, 1)


def test_a_channel_is_of_one_model(long_run, new_run, place):
    release(long_run, place, 0)
    other = new_run("another", run_id="22" * 16)
    other.add(1)
    with pytest.raises(RoundError, match="a folder of its own"):
        release(other, place, 1)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_lost_patch_that_is_not_packed_again_is_named_no_more(
    long_run, place, tmp_path, damage
):
    for number in range(4):
        release(long_run, place, number)
    device = Device.install(tmp_path / "store", bundle_of(place), trust=TRUST)
    release(long_run, place, 2, revert=True)
    bad = target_of(long_run, 3)[:SHORT]
    (lost,) = (way for way in head_of(place).ways if way.parent == bad)
    path = place.root / "patches" / f"{lost.sha256}.dpu"
    path.unlink() if damage == "missing" else path.write_bytes(b"cut")
    assert release(long_run, place, 2).changed
    assert lost not in head_of(place).ways
    assert catch_up(device, place) == target_of(long_run, 2)
    assert not release(long_run, place, 2).changed


def test_what_is_cut_short_is_not_passed_over_when_published_again(long_run, place):
    release(long_run, place, 0)
    (bundle,) = (place.root / "bundles").iterdir()
    bundle.write_bytes(b"cut")
    with pytest.raises(StoreError, match="remove it and publish again"):
        release(long_run, place, 0)


# Races and kills ----------------------------------------------------------------------


class Dying(FolderPlace):
    """A place whose publisher is killed before one of its writes."""

    left = 0

    def create(self, path, data):
        self._count()
        return super().create(path, data)

    def swap(self, path, data, tag):
        self._count()
        return super().swap(path, data, tag)

    def _count(self):
        if self.left == 0:
            os._exit(9)
        self.left -= 1


def test_a_publisher_that_is_killed_leaves_the_channel_as_it_was(
    long_run, place, tmp_path
):
    release(long_run, place, 0)
    old, killed = head_of(place), 0
    for left in range(10):
        dying = Dying(place.root)
        dying.left = left
        child = os.fork()
        if child == 0:
            release(long_run, dying, 1)
            os._exit(0)
        if not os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            break
        killed += 1
        assert head_of(place) == old
    assert killed >= 3
    assert head_of(place).round == 1
    device = Device.install(tmp_path / "store", bundle_of(place), trust=TRUST)
    assert catch_up(device, place) == head_of(place).target


def _publish_all(run, root, numbers, done):
    place = FolderPlace(root)
    for number in numbers:
        try:
            channel = Channel(name="stable", signers=[KEY])
            path = run / f"round_{number:02d}"
            found = publish(read_round(path), place, channel, now=NOW)
            done.put((number, found.head.version if found.changed else 0))
        except RoundError:
            done.put((number, 0))  # another publisher is at a newer round


def test_racing_publishers_lose_no_head(long_run, place, tmp_path):
    release(long_run, place, 0)
    fork = multiprocessing.get_context("fork")
    done, workers = fork.Queue(), []
    for number in range(4):  # each has its own copy of the run, as each has its machine
        run = tmp_path / f"machine{number}" / long_run.path.name
        shutil.copytree(long_run.path, run)
        arguments = (run, place.root, range(1, 7), done)
        workers.append(fork.Process(target=_publish_all, args=arguments))
    for worker in workers:
        worker.start()
    made = [done.get(timeout=60) for _ in range(24)]
    for worker in workers:
        worker.join()
    versions = sorted(version for _, version in made if version)
    assert versions == list(range(2, 2 + len(versions)))
    assert head_of(place).version == versions[-1]
    assert head_of(place).round == 6


# The command --------------------------------------------------------------------------


def test_the_command_says_what_it_published(long_run, command, tmp_path):
    key = tmp_path / "key.pem"
    key.write_bytes(encode_private(KEY))
    to, runs = tmp_path / "fleet", long_run.path.parent
    words = ("--runs", runs, "--to", to, "--sign", key)
    code, out, _ = command(fleet, "publish", "round_01", *words, "--json")
    record = json.loads(out)
    assert (code, record["round"], record["version"]) == (0, 1, 1)
    assert {patch["from"] for patch in record["patches"]} >= {"init"}
    code, out, _ = command(fleet, "publish", "round_01", *words)
    assert (code, "as it was" in out) == (0, True)


@pytest.mark.parametrize(
    "words",
    [
        ("--expires", "30"),
        ("--expires", "3000000d"),
        ("--skip", "2,x"),
        ("--channel", "../x"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    long_run, command, tmp_path, words
):
    to, runs = tmp_path / "fleet", long_run.path.parent
    asked = ("round_01", "--runs", runs, "--to", to, *words)
    code, _, err = command(fleet, "publish", *asked)
    assert (code, to.exists()) == (2, False)
    assert words[1] in err


def test_a_rollout_keeps_its_times_when_it_is_published_again(long_run, place):
    path = read_round(long_run.path / "round_01")
    options = {"name": "stable", "signers": [KEY], "shares": ((10, 0), (1000, 3600))}
    publish(path, place, Channel(**options), now=NOW)
    steps = ((10, NOW), (1000, NOW + 3600))
    assert head_of(place).rollout.steps == steps
    again = publish(path, place, Channel(**options), now=NOW + 60)
    assert (again.changed, head_of(place).rollout.steps) == (False, steps)


def test_other_times_for_the_same_shares_count(long_run, place):
    path = read_round(long_run.path / "round_01")
    for hours in (24, 1, 48):
        shares = ((10, 0), (1000, hours * 3600))
        channel = Channel(name="stable", signers=[KEY], shares=shares)
        publish(path, place, channel, now=NOW + 60)
        assert head_of(place).rollout.steps[1] == (1000, NOW + 60 + hours * 3600)


@pytest.mark.parametrize("days", [2, 89, 400])
def test_a_clock_that_jumps_back_lets_no_share_begin_sooner(long_run, place, days):
    release(long_run, place, 0)  # which says what day it is, if the clock is far off
    path, said = read_round(long_run.path / "round_01"), []

    def go(now, *shares):
        channel = Channel(name="stable", signers=[KEY], shares=shares)
        publish(path, place, channel, now=now, say=said.append)
        return head_of(place).rollout.steps

    shares = (10, 0), (100, DAY), (1000, 2 * DAY)
    steps = go(NOW, *shares)
    back = NOW + 3600 - days * DAY
    assert not said
    assert [go(back), go(back), go(back, *shares), go(NOW + 7200)] == [steps] * 4
    assert "set this clock if it is behind" in said[0]
    assert go(back, (10, 0), (1000, DAY)) == (
        (10, NOW + 7200),
        (1000, NOW + 7200 + DAY),
    )


@pytest.mark.parametrize("shares", [(), ((10, 0), (1000, 3600))])
@pytest.mark.parametrize("groups", [(), ("lab",)])
def test_a_timer_that_publishes_a_round_again_ends_no_rollout_and_leaves_no_group(
    long_run, place, shares, groups
):
    path = read_round(long_run.path / "round_01")

    def go(now, **options):
        channel = Channel(name="stable", signers=[KEY], **options)
        return publish(path, place, channel, now=now).head.rollout

    first = go(NOW, shares=shares, groups=groups)
    assert (first is None) == (not shares and not groups)
    assert go(NOW + 20 * 86_400) == first
    assert head_of(place).version == 2
    assert go(NOW, shares=ALL_NOW) is None
    assert go(NOW) is None


def test_an_expiry_that_is_given_shorter_counts(long_run, place):
    path = read_round(long_run.path / "round_01")
    for days in (3650, 30, 1):
        channel = Channel(name="stable", signers=[KEY], lifetime_s=days * 86_400)
        assert publish(path, place, channel, now=NOW).changed
        assert head_of(place).expires == NOW + days * 86_400
        assert not publish(path, place, channel, now=NOW - 60).changed


def test_a_key_that_may_only_pause_halts_a_rollout(long_run, command, tmp_path):
    pauser, names = generate_key(), [tmp_path / n for n in ("k.pem", "p.pem", "p.pub")]
    for name, data in zip(
        names,
        (encode_private(KEY), encode_private(pauser), encode_public(pauser)),
        strict=True,
    ):
        name.write_bytes(data)
    to = tmp_path / "fleet"
    words = ("round_01", "--runs", long_run.path.parent, "--to", to, "--sign", names[0])
    rollout = ("--rollout", "1%,10%@24h,100%@48h", "--group", "lab")
    assert command(fleet, "publish", *words, *rollout, "--pauser", names[2])[0] == 0
    code, _, err = command(fleet, "pause", to, "--key", names[0])
    assert (code, "does not name this key" in err) == (3, True)
    assert command(fleet, "pause", to, "--key", names[1])[1] == "stable: paused\n"
    assert (
        command(fleet, "pause", to, "--key", names[1])[1] == "stable: paused already\n"
    )
    signed = read_head((to / "stable.head").read_bytes())
    assert (signed.check(TRUST), signed.is_paused()) == (TRUST.ids, True)
    assert [share for share, _ in signed.head.rollout.steps] == [10, 100, 1000]


@pytest.mark.parametrize("shares", ["5", "101%", "10%,1%", "1%@1d,2%@1h", "1%@x"])
def test_shares_that_make_no_sense_are_refused(long_run, command, tmp_path, shares):
    words = ("round_01", "--runs", long_run.path.parent, "--to", tmp_path / "fleet")
    code, _, err = command(fleet, "publish", *words, "--rollout", shares)
    assert (code, "error" in err) == (2, True)


def test_the_ledger_finds_what_was_published_from_anywhere(
    long_run, command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert command(fleet, "publish", long_run.path / "round_01", "--to", "www")[0] == 0
    monkeypatch.chdir("/")
    out = command(patch, "releases", long_run.path, "--json")[1]
    releases = json.loads(out)["releases"]
    assert {release["state"] for release in releases} == {"there"}
    assert {release["to"] for release in releases} == {str(tmp_path / "www")}
    shutil.rmtree(tmp_path / "www" / "patches")
    out = command(patch, "releases", long_run.path, "--json")[1]
    states = {r["kind"]: r["state"] for r in json.loads(out)["releases"]}
    assert states == {"patch": "gone", "bundle": "there"}


def test_a_folder_whose_name_is_no_text_leaves_the_ledger_readable(
    long_run, command, tmp_path
):
    to = os.fsdecode(bytes(tmp_path) + b"/www\xff")
    assert command(fleet, "publish", long_run.path / "round_01", "--to", to)[0] == 0
    assert len(read_ledger(long_run.path).listed) > 1


def test_a_counter_that_no_watcher_can_keep_is_not_published(long_run, place):
    path = long_run.path / "round_01" / "round.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"counter": 1 << 63}))
    with pytest.raises(RoundError, match="expected at most"):
        release(long_run, place, 1)
    assert not place.root.exists()


@pytest.fixture
def lists(tmp_path, command, monkeypatch):
    """Owner and stranger, and ``1.root.json`` that nobody signed yet, in one folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("owner", "stranger"):
        command(patch, "keygen", f"{name}.pem")
    keys = ("--root", "owner.pub.pem", "--release", "owner.pub.pem")
    assert command(patch, "trust", "init", *keys)[0] == 0
    return tmp_path


def test_a_key_list_that_no_device_would_take_is_not_published(
    long_run, command, lists
):
    words = ("--to", "www", "--runs", long_run.path.parent, "--key-list")
    code, _, err = command(fleet, "publish", "round_01", *words, "1.root.json")
    assert (code, "1.root.json: key list 1 is signed by nobody" in err) == (8, True)
    command(patch, "trust", "sign", "1.root.json", "--key", "owner.pem")
    code, _, _ = command(fleet, "publish", "round_77", *words, "1.root.json")
    assert (code, (lists / "www").exists()) == (2, False)
    assert command(fleet, "publish", "round_01", *words, "1.root.json")[0] == 0
    command(patch, "trust", "rotate", "1.root.json", "--sign", "stranger.pem")
    code, _, err = command(fleet, "publish", "round_02", *words, "2.root.json")
    assert (code, "2.root.json: key list 2 is signed by nobody" in err) == (8, True)
    command(patch, "trust", "sign", "2.root.json", "--key", "owner.pem")
    assert command(fleet, "publish", "round_02", *words, "2.root.json")[0] == 0
    kept = sorted(path.name for path in (lists / "www" / "keys").iterdir())
    assert kept == ["1.root.json", "2.root.json"]


def test_a_key_list_that_is_there_gets_more_signatures_and_nothing_else(
    long_run, command, lists
):
    def go(code=0):
        words = ("--to", "www", "--key-list", "1.root.json")
        found, _, err = command(fleet, "publish", long_run.path / "round_01", *words)
        assert found == code
        return (lists / "www" / "keys" / "1.root.json").read_bytes(), err

    given = lists / "1.root.json"
    command(patch, "trust", "sign", given, "--key", "owner.pem")
    once = given.read_bytes()
    assert go()[0] == once
    command(patch, "trust", "sign", given, "--key", "stranger.pem")
    both = given.read_bytes()
    assert go()[0] == both != once
    given.write_bytes(once)
    assert go()[0] == both
    keys = ("--root", "owner.pub.pem", "--release", "stranger.pub.pem")
    given.unlink()
    command(patch, "trust", "init", *keys, "--sign", "owner.pem")
    there, err = go(code=7)
    assert (there, "is another list 1" in err) == (both, True)


@pytest.mark.parametrize("option", ["--pauser", "--former"])
def test_a_private_key_is_given_to_nobody(long_run, command, lists, option):
    words = ("--to", "www", option, "owner.pem")
    code, _, err = command(fleet, "publish", long_run.path / "round_01", *words)
    assert (code, "private key" in err, (lists / "www").exists()) == (2, True, False)


# Which rounds there are ---------------------------------------------------------------


def test_rounds_beyond_a_hundred_lie_ahead_by_their_numbers(run, command):
    for number in (9, 98, 99, 100, 101):
        run.add(number)
    assert command(pack, run.path, "-q")[0] == 0
    ledger = read_ledger(run.path)

    def ahead(number):
        round_ = read_round(run.path / f"round_{number:02d}")
        return [parent.name for parent in parents_ahead(round_, ledger)]

    assert ahead(99) == ["round_101", "round_100"]
    assert ahead(100) == ["round_101"]
    assert ahead(9) == ["round_101", "round_100", "round_99", "round_98"]
