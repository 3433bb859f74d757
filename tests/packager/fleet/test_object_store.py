# SPDX-License-Identifier: Apache-2.0
"""Publishing to object stores: S3 on loopback, with and without conditional writes."""

import json

import pytest
from obstore.store import MemoryStore

from edge_runtime.errors import StoreError, SyncError
from edge_runtime.sync.head_file import read_head
from packager.cli.fleet import fleet
from packager.fleet.address import open_place
from packager.fleet.channel import Channel
from packager.fleet.head import named_files
from packager.fleet.object_place import ObjectPlace
from packager.fleet.publish import publish
from packager.keys import encode_private, generate_key
from packager.ledger import read_ledger
from packager.rounds.folder import read_round
from tests.packager.fleet.s3_server import S3Server

KEY = generate_key()
NOW = 1_800_000_000
CHANNEL = Channel(name="stable", signers=[KEY])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-id-of-mine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-of-mine")
    with S3Server() as server:
        yield server
        server.shutdown()


def release(run, place, number, **options):
    round_ = read_round(run.path / f"round_{number:02d}")
    return publish(round_, place, CHANNEL, now=NOW, **options)


def head_of(place):
    return read_head(place.read("stable.head")[0]).head


def is_whole(place):
    """Whether everything that the head names is there, with its size."""
    return named_files(head_of(place)).items() <= dict(place.names("")).items()


# With conditional writes --------------------------------------------------------------


def test_the_command_publishes_to_a_store_and_names_it_without_its_server(
    run, server, command, tmp_path
):
    key = tmp_path / "key.pem"
    key.write_bytes(encode_private(KEY))
    words = ("round_01", "--runs", run.path.parent, "--to", server.url, "--sign", key)
    code, out, err = command(fleet, "publish", *words, "--json")
    record = json.loads(out)
    assert (code, record["to"], record["version"]) == (0, "s3://fleet/digits", 1)
    assert {release.to for release in read_ledger(run.path).listed} == {record["to"]}
    assert "of-mine" not in err + out + (run.path / "releases.jsonl").read_text()
    assert is_whole(open_place(server.url))
    puts = server.log.copy()
    code, out, _ = command(fleet, "publish", *words)
    assert (code, "as it was" in out) == (0, True)
    assert {method for method, _ in server.log[len(puts) :]} == {"GET"}


def test_an_answer_that_was_lost_is_no_race_that_was_lost(server):
    place = open_place(server.url)
    place.swap("stable.head", b"1", None)
    tag = place.read("stable.head")[1]
    server.lost = 1  # the store has written it, the client asks again
    assert place.swap("stable.head", b"2", tag)
    server.lost = 1
    assert place.create("patches/a.dpu", b"a") in (True, False)
    assert place.read("patches/a.dpu")[0] == b"a"


def test_a_dry_run_tells_what_is_new_and_writes_nothing(run, server):
    place = open_place(server.url)
    release(run, place, 0)
    before = dict(server.objects)
    done = release(run, place, 1, dry_run=True)
    assert done.changed
    assert all(new for _, new in done.offered)
    assert server.objects == before
    release(run, place, 1)
    again = release(run, place, 1, dry_run=True)
    assert not again.changed


class Cut(BaseException):
    """A publisher that ended."""


class Dying(ObjectPlace):
    """A place whose publisher ends before one of its requests that change something."""

    left = 0

    def _put(self, *args):
        self._count()
        return super()._put(*args)

    def remove(self, path):
        self._count()
        super().remove(path)

    def _count(self):
        self.left -= 1
        if self.left < 0:
            raise Cut


def test_a_publisher_that_ends_before_any_write_leaves_the_channel_as_it_was(run):
    store = MemoryStore()
    place = ObjectPlace(store, "memory://")
    release(run, place, 0)
    old, ended = head_of(place), 0
    for left in range(30):
        dying = Dying(store, "memory://")
        dying.left = left
        try:
            release(run, dying, 1)
            break
        except Cut:
            ended += 1
            assert head_of(place) == old
            assert is_whole(place)
    assert ended >= 8  # the probe's, two patches', the bundle's and the head's
    assert (head_of(place).round, head_of(place).version) == (1, old.version + 1)
    assert is_whole(place)


def test_what_may_have_left_the_house_is_in_the_ledger_before_the_head_names_it(run):
    """Else its counter could be given to other weights after a kill."""
    store = MemoryStore()

    class Last(ObjectPlace):
        def swap(self, *args):
            super().swap(*args)
            raise Cut

    with pytest.raises(Cut):
        release(run, Last(store, "memory://"), 0)
    head = head_of(ObjectPlace(store, "memory://"))
    counters = {line.counter for line in read_ledger(run.path).listed}
    assert counters == {head.counter}


def test_a_file_that_was_removed_before_the_head_named_it_is_written_again(run):
    """As it happens where somebody prunes while a publisher finds an old file there."""
    store = MemoryStore()

    class Pruned(ObjectPlace):
        def swap(self, *args):
            for path, _ in [*self.names("patches/"), *self.names("bundles/")]:
                self.remove(path)
            return super().swap(*args)

    said = []
    release(run, Pruned(store, "memory://"), 0, say=said.append)
    place = ObjectPlace(store, "memory://")
    assert is_whole(place)
    assert any("is there again" in words for words in said)
    for path in named_files(head_of(place)):
        place.remove(path)
    assert not release(run, place, 0).changed  # the same again mends it too
    assert is_whole(place)


def test_a_channel_with_many_releases_stays_as_it_is_when_published_again(new_run):
    run, place = new_run(), ObjectPlace(MemoryStore(), "memory://")
    for number in range(10):
        run.add(number)
        round_ = read_round(run.path / f"round_{number:02d}")
        channel = Channel(name="stable", signers=[KEY], skips=())
        publish(round_, place, channel, now=NOW)
    assert not publish(round_, place, channel, now=NOW).changed


# Without ------------------------------------------------------------------------------


@pytest.mark.parametrize("conditions", ["ignored", "refused"])
def test_a_store_without_conditional_writes_is_refused_before_anything_is_written(
    run, server, command, conditions
):
    server.conditions = conditions
    words = ("round_00", "--runs", run.path.parent, "--to", server.url)
    code, _, err = command(fleet, "publish", *words)
    assert (code, "--single-publisher" in err, conditions[:-1] in err) == (
        7,
        True,
        True,
    )
    assert server.objects == {}
    assert read_ledger(run.path).listed == []


@pytest.mark.parametrize("conditions", ["ignored", "refused"])
def test_a_single_publisher_may_do_without(run, server, command, conditions):
    server.conditions = conditions
    words = ("round_00", "--runs", run.path.parent, "--to", server.url)
    code, _, err = command(fleet, "publish", *words, "--single-publisher")
    assert (code, "nobody else writes" in err) == (0, True)
    place = open_place(server.url, single_publisher=True)
    assert is_whole(place)
    stale = place.read("stable.head")[1]
    assert place.swap("stable.head", b"1", stale)
    assert not place.swap("stable.head", b"2", stale)
    with pytest.raises(StoreError, match="something else"):
        place.create("stable.head", b"3")


def test_a_probe_that_may_not_clean_up_is_no_obstacle(server, monkeypatch):
    def forbid(method, _key):
        if method == "DELETE":
            raise ConnectionError

    monkeypatch.setattr("packager.fleet.object_place.RETRIES", {"max_retries": 0})
    server.before, said = forbid, []
    server.handle_error = lambda *_: None
    place = open_place(server.url, say=said.append)
    assert place.create("patches/a.dpu", b"a")
    assert any("prune" in words for words in said)
    assert [path for path, _ in place.names("")] == ["patches/a.dpu"]
    assert len(list(place.entries(".probe/"))) == 1


def test_a_bucket_that_is_not_there_is_no_empty_channel(server):
    place = open_place(server.url.replace("s3://fleet", "s3://elsewhere"))
    for ask in (lambda: list(place.names("")), lambda: place.read("stable.head")):
        with pytest.raises(SyncError, match=r"NoSuchBucket.*is there such a bucket"):
            ask()
