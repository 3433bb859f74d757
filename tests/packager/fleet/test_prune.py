# SPDX-License-Identifier: Apache-2.0
"""dpu-fleet prune: what somebody needs stays, and everything else goes."""

import json
import os
import threading
import time

import pytest
from obstore.store import MemoryStore

from edge_runtime.errors import HeadError, RoundError, StoreError
from edge_runtime.formats.signing import Trust
from edge_runtime.live.shared import public_key
from edge_runtime.sync.head import SHORT
from edge_runtime.sync.head_file import read_head
from edge_runtime.sync.paths import patch_path
from edge_runtime.sync.route import cheapest
from packager.cli.fleet import fleet
from packager.fleet.channel import Channel
from packager.fleet.check import State, check_channel
from packager.fleet.database import Row, add_reports, open_database
from packager.fleet.head import named_files
from packager.fleet.object_place import ObjectPlace
from packager.fleet.place import FolderPlace
from packager.fleet.prune import _known_ways, prune
from packager.fleet.publish import publish
from packager.keys import generate_key
from packager.ledger import read_ledger
from packager.rounds.folder import read_round
from tests.conftest import RunOnDisk

KEY = generate_key()
TRUST = Trust((public_key(KEY),))
DAY = 86_400
LATER = time.time() + 10 * DAY  # when all that the tests publish is old


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    run = RunOnDisk(tmp_path_factory.mktemp("runs") / "tiny")
    for number in range(7):
        run.add(number)
    return run


@pytest.fixture(scope="module")
def published(long_run, tmp_path_factory):
    """Rounds 0 to 6, one after the other: what no head names is there as well."""
    place = FolderPlace(tmp_path_factory.mktemp("published"))
    for number in range(7):
        release(long_run, place, number)
    return place


@pytest.fixture(params=["folder", "memory"])
def place(request, published, tmp_path):
    folder = FolderPlace(tmp_path / "fleet")
    memory = ObjectPlace(MemoryStore(), "memory://")
    return copied(published, folder if request.param == "folder" else memory)


def copied(source, place):
    for path, _ in source.names(""):
        place.create(path, source.read(path)[0])
    return place


def release(run, place, number, channel="stable", **options):
    how = Channel(name=channel, signers=[KEY], skips=(2,))
    round_ = read_round(run.path / f"round_{number:02d}")
    return publish(round_, place, how, now=int(time.time()), **options)


def target_of(run, number):
    return read_round(run.path / f"round_{number:02d}").record.target


def head_of(place, channel="stable"):
    return read_head(place.read(f"{channel}.head")[0]).head


def files(place):
    return {p for top in ("patches/", "bundles/") for p, _ in place.names(top)}


def is_well(place, channel="stable"):
    def read(path, _most):
        found = place.read(path)
        return found and found[0]

    found = check_channel(read, channel, TRUST, now=int(time.time()))[1]
    return {finding.state for finding in found} == {State.OK}


def test_what_the_head_names_stays_and_the_rest_goes(place):
    before = files(place)
    done = prune(place, now=LATER, grace_s=DAY)
    assert files(place) == named_files(head_of(place)).keys() < before
    assert {entry.path for entry in done.removed} == before - files(place)
    assert done.kept == sum(named_files(head_of(place)).values())
    assert is_well(place)
    assert prune(place, now=LATER, grace_s=DAY).removed == ()


def test_every_channel_counts(long_run, place):
    release(long_run, place, 6, "beta")
    release(long_run, place, 2, "slow")
    prune(place, now=LATER, grace_s=DAY)
    assert all(is_well(place, channel) for channel in ("stable", "beta", "slow"))


def test_a_dry_run_removes_nothing_and_tells_the_same(place):
    before = list(place.entries(""))
    told = prune(place, now=LATER, grace_s=DAY, dry_run=True)
    assert list(place.entries("")) == before
    assert prune(place, now=LATER, grace_s=DAY) == told


def test_young_files_stay(place):
    before = files(place)
    assert prune(place, now=time.time(), grace_s=DAY).removed == ()
    assert files(place) == before


def test_what_leads_to_the_newest_releases_stays(long_run, place):
    releases = read_ledger(long_run.path).releases
    prune(place, now=LATER, grace_s=DAY, releases=releases, newest=3)
    newest = {
        read_round(long_run.path / f"round_{n:02d}").record.target for n in (4, 5, 6)
    }
    wanted = {r.sha256 for r in releases if r.target in newest}
    kept = {path.partition("/")[2].partition(".")[0] for path in files(place)}
    assert wanted <= kept
    assert kept - wanted <= {way.sha256 for way in head_of(place).ways}


def test_a_cheapest_way_from_all_that_devices_reported_stays(long_run, place):
    releases = read_ledger(long_run.path).releases
    before = files(place)
    target = head_of(place).target[:SHORT]
    ways = [*head_of(place).ways, *_known_ways(releases, before)]
    reported = [
        read_round(long_run.path / f"round_{n:02d}").record.target for n in range(7)
    ]
    best = [cheapest({start[:SHORT]}, target, ways) for start in reported]
    assert any(
        patch_path(way.sha256) not in named_files(head_of(place)) for way in best[0]
    )
    done = prune(
        place, now=LATER, grace_s=DAY, releases=releases, reported=[*reported, "f" * 64]
    )
    assert {patch_path(way.sha256) for route in best for way in route} <= files(place)
    assert len(done.removed) > 0
    assert done.stranded == ("f" * 64,)


def test_only_files_of_ours_go(place):
    for path in ("patches/notes.txt", "bundles/mine.zip", "reports/a/1.json", "x.dpu"):
        place.create(path, b"of somebody")
    place.create("keys/1.root.json", b"{}")
    prune(place, now=LATER, grace_s=DAY)
    names = {path for path, _ in place.names("")}
    assert {"patches/notes.txt", "bundles/mine.zip", "reports/a/1.json"} <= names
    assert {"x.dpu", "keys/1.root.json", "stable.head"} <= names


def test_what_killed_publishers_left_goes_once_it_is_old(place):
    left = [".probe/0123456789abcdef", "patches/.0a.dpu.0123456789abcdef.new"]
    left += [".stable.head.0123456789abcdef.new"]
    for path in left:
        place.create(path, b"1")
    prune(place, now=time.time(), grace_s=DAY)
    assert set(left) <= {entry.path for entry in place.entries("")}
    prune(place, now=LATER, grace_s=DAY)
    assert not set(left) & {entry.path for entry in place.entries("")}


def test_nothing_goes_while_a_head_cannot_be_read(place):
    before = files(place)
    place.create("other.head", b"{}")
    with pytest.raises(HeadError):
        prune(place, now=LATER, grace_s=DAY)
    assert files(place) == before


def test_nothing_goes_where_there_is_no_channel(place):
    before = files(place)
    place.remove("stable.head")
    with pytest.raises(RoundError, match="no channel"):
        prune(place, now=LATER, grace_s=DAY)
    assert files(place) == before


# Together with publishers -------------------------------------------------------------


class Meeting(ObjectPlace):
    """A place where somebody else comes in before a request."""

    def __init__(self, store, at, other):
        super().__init__(store, "memory://")
        self.at, self.other, self.met = at, other, False

    def remove(self, path):
        self._meet("remove", path)
        super().remove(path)

    def read(self, path, *most):
        self._meet("read", path)
        return super().read(path, *most)

    def entries(self, folder, *, deep=True):
        self._meet("entries", folder)
        return super().entries(folder, deep=deep)

    def swap(self, path, data, tag):
        self._meet("swap", path)
        return super().swap(path, data, tag)

    def _meet(self, name, path):
        if not self.met and self.at(name, path):
            self.met = True
            self.other()


@pytest.fixture(scope="module")
def left(long_run):
    """Rounds 0 to 3, and patches to round 4 that somebody left long ago."""
    place = ObjectPlace(MemoryStore(), "memory://")
    for number in range(4):
        release(long_run, place, number)
    spare = ObjectPlace(MemoryStore(), "memory://spare")
    for number in range(5):
        release(long_run, spare, number)
    for path in named_files(head_of(spare)):
        place.create(path, spare.read(path)[0])
    return place


@pytest.fixture
def store(left):
    store = MemoryStore()
    copied(left, ObjectPlace(store, "memory://"))
    return store


STEPS = ["entries patches/", "entries .probe/", "entries keys/", "read", "remove"]


@pytest.mark.parametrize("step", STEPS)
def test_a_publisher_that_comes_while_somebody_prunes_loses_nothing(
    long_run, store, step
):
    """It finds its patches there, and they are about to go."""
    name, _, folder = step.partition(" ")

    def at(method, path):
        return method == name and path.startswith(folder)

    def other():
        release(long_run, ObjectPlace(store, "memory://"), 4)

    place = Meeting(store, at, other)
    try:
        prune(place, now=LATER, grace_s=DAY)
    except StoreError as err:  # in the very moment of the removal
        assert step == "remove"
        assert "publish the same round again" in str(err)
        assert not is_well(place)
        other()
    assert place.met
    assert head_of(place).round == 4
    assert is_well(place)


def test_what_a_publisher_named_since_the_heads_were_read_is_spared(long_run, store):
    """It comes as an old file goes that it does not need."""
    place = ObjectPlace(store, "memory://")
    before = files(place)
    doomed = prune(place, now=LATER, grace_s=DAY, dry_run=True).removed
    fresh = ObjectPlace(MemoryStore(), "memory://")
    for number in range(5):
        release(long_run, fresh, number)
    wanted = named_files(head_of(fresh)).keys()
    assert wanted & {entry.path for entry in doomed}

    def at(method, path):
        return method == "remove" and path not in wanted

    def other():
        release(long_run, ObjectPlace(store, "memory://"), 4)

    meeting = Meeting(store, at, other)
    prune(meeting, now=LATER, grace_s=DAY)
    assert meeting.met
    assert is_well(place)
    assert files(place) < before


@pytest.mark.parametrize("step", ["entries", "read", "swap"])
def test_somebody_who_prunes_while_a_publisher_works_loses_nothing(
    long_run, store, step
):
    def at(method, path):
        return method == step and not path.startswith(".probe")

    def other():
        prune(ObjectPlace(store, "memory://"), now=LATER, grace_s=DAY)

    place = Meeting(store, at, other)
    release(long_run, place, 4)
    assert place.met
    assert head_of(place).round == 4
    assert is_well(place)


class Cut(BaseException):
    """Somebody who prunes, and ends."""


def test_pruning_that_ends_anywhere_leaves_whole_channels(place):
    ends = 0
    for left in range(100):
        with pytest.MonkeyPatch.context() as patched:
            calls, real = [], place.remove

            def remove(path, calls=calls, real=real, left=left):
                if len(calls) == left:
                    raise Cut
                calls.append(path)
                real(path)

            patched.setattr(place, "remove", remove)
            try:
                prune(place, now=LATER, grace_s=DAY)
            except Cut:
                ends += 1
                assert is_well(place)
                continue
        break
    assert ends >= 3
    assert files(place) == named_files(head_of(place)).keys()


def test_pruning_all_the_time_costs_publishers_nothing(long_run):
    """However young a file is: what is lost is noticed by one of the two."""
    store, noticed, ends = MemoryStore(), [], threading.Event()

    def prune_always():
        while not ends.is_set():
            try:
                prune(ObjectPlace(store, "memory://"), now=LATER, grace_s=0)
            except StoreError as err:
                noticed.append(str(err))
            except RoundError:
                pass  # there is no channel yet

    pruner = threading.Thread(target=prune_always)
    pruner.start()
    place = ObjectPlace(store, "memory://")
    try:
        for number in (*range(7), 2, 5, 6):
            release(long_run, place, number, revert=True)
    finally:
        ends.set()
        pruner.join()
    if noticed:
        release(long_run, place, 6)
    assert is_well(place)


# The command --------------------------------------------------------------------------


def test_the_command_keeps_what_it_is_told_to(long_run, published, tmp_path, command):
    place = copied(published, FolderPlace(tmp_path / "fleet"))
    old = time.time() - 10 * DAY
    for path in files(place):
        os.utime(place.root / path, (old, old))
    target = target_of(long_run, 0)
    with open_database(tmp_path / "fleet.db") as connection:
        report = dict.fromkeys(Row.__slots__, 0) | dict.fromkeys(
            ("outcome", "reason", "key_id", "name", "group", "runtime"), ""
        )
        report |= {"device": "a", "target": target, "running": target, "proved": True}
        add_reports(connection, [Row(**report)], now=int(time.time()))
    run = ("--run", long_run.path.name, "--runs", long_run.path.parent)
    words = (place.root, *run, "--fleet-db", tmp_path / "fleet.db", "--json")
    code, out, _ = command(fleet, "prune", *words, "--dry-run", "--keep", 0)
    would = json.loads(out)
    assert (code, would["dry_run"], would["stranded"]) == (0, True, {})
    code, out, _ = command(fleet, "prune", *words, "--keep", 8)
    assert json.loads(out)["removed"] == []  # there were no more than 8 releases
    code, out, _ = command(fleet, "prune", *words, "--keep", 0)
    assert (code, json.loads(out)["removed"]) == (0, would["removed"])
    assert would["removed_bytes"] > 0
    assert is_well(place)
    code, out, err = command(fleet, "prune", place.root, "--grace", "1s")
    assert (code, "without --run" in err) == (0, True)
    assert out.splitlines()[-1].endswith("B stay")
    assert command(fleet, "prune", place.root, "--run", "nothing")[0] == 2
