# SPDX-License-Identifier: Apache-2.0
"""Publishing to a real S3 server: publishers that race, and some that are killed."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from datetime import timedelta

import obstore
import pytest

from edge_runtime.errors import RoundError, StoreError
from edge_runtime.formats.signing import Trust
from edge_runtime.live.outbox import Kind, Outbox
from edge_runtime.live.proof import encode_public
from edge_runtime.sync.head_file import read_head
from edge_runtime.sync.uploads import Uploads, open_outlet
from packager.cli.fleet import fleet
from packager.fleet.address import open_place
from packager.fleet.channel import Channel
from packager.fleet.database import open_database
from packager.fleet.head import named_files
from packager.fleet.publish import publish
from packager.fleet.reports import read_keys
from packager.fleet.watch import collect, look_at_head
from packager.keys import encode_private, generate_key, load_private
from packager.rounds.folder import read_round
from tests.packager.fleet.reporting import Fake
from tests.packager.fleet.seaweed import KillingProxy
from tools.fleet.servers import ID, SECRET, running_store

pytestmark = pytest.mark.fleet

KEY = generate_key()
NOW = 1_800_000_000


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    with running_store(tmp_path_factory.mktemp("seaweed")) as port:
        yield port


@pytest.fixture(autouse=True)
def credentials(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


def address(port, folder):
    return f"s3://fleet/{folder}?endpoint=http://127.0.0.1:{port}"


def head_of(place):
    return read_head(place.read("stable.head")[0]).head


def is_whole(place):
    return named_files(head_of(place)).items() <= dict(place.names("")).items()


def release(run, place, number, key=KEY, now=NOW):
    channel = Channel(name="stable", signers=[key])
    return publish(read_round(run / f"round_{number:02d}"), place, channel, now=now)


def at_once(count, work):
    """Call a function in threads that begin together; return what each returned."""
    found, begin = [None] * count, threading.Barrier(count)

    def run(number):
        begin.wait()
        found[number] = work(number)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_of_racing_creates_one_wins(port):
    def create(turn, number):
        place = open_place(address(port, "creates"))
        try:
            return place.create(f"patches/{turn}.dpu", b"by %d" % number)
        except StoreError:
            return False

    for turn in range(10):
        won = at_once(12, lambda number, turn=turn: create(turn, number))
        assert won.count(True) == 1
        found = open_place(address(port, "creates")).read(f"patches/{turn}.dpu")
        assert found[0] == b"by %d" % won.index(True)


def test_no_racing_swap_is_lost(port):
    def append(number):
        place, lost = open_place(address(port, "swaps")), 0
        for turn in range(10):
            while True:
                found = place.read("x.head")
                old, tag = found or (b"", None)
                if place.swap("x.head", old + b"%d.%d " % (number, turn), tag):
                    break
                lost += 1
        return lost

    lost = at_once(4, append)
    words = open_place(address(port, "swaps")).read("x.head")[0].split()
    assert sorted(words) == sorted(
        b"%d.%d" % (n, t) for n in range(4) for t in range(10)
    )
    assert sum(lost) > 0


def _publish_all(run, url, key, number, done):
    place = open_place(url)
    for round_ in range(1, 7):
        try:
            found = release(run, place, round_, load_private(key), NOW + number)
            done.put(found.head.version if found.changed else 0)
        except RoundError:
            done.put(0)  # another publisher is at a newer round


def test_racing_publishers_lose_no_head(port, run, tmp_path):
    for number in range(2, 7):
        run.add(number)
    url = address(port, "race")
    release(run.path, open_place(url), 0)
    spawn = multiprocessing.get_context("spawn")
    done, workers = spawn.Queue(), []
    for number in range(4):
        copy = tmp_path / f"machine{number}" / run.path.name
        shutil.copytree(run.path, copy)
        arguments = (copy, url, encode_private(KEY), number, done)
        workers.append(spawn.Process(target=_publish_all, args=arguments))
    for worker in workers:
        worker.start()
    made = [done.get(timeout=300) for _ in range(24)]
    for worker in workers:
        worker.join()
    versions = sorted(filter(None, made))
    assert versions == list(range(2, 2 + len(versions)))
    place = open_place(url)
    assert (head_of(place).version, head_of(place).round) == (versions[-1], 6)
    assert is_whole(place)


def test_a_publisher_that_is_killed_at_any_request_leaves_a_whole_channel(
    port, run, tmp_path
):
    """Before the store has it, and after, without an answer: kill -9, really."""
    key = tmp_path / "key.pem"
    key.write_bytes(encode_private(KEY))
    killed, heads, number = 0, [], 0
    while True:
        counts = []
        for answered in (False, True):
            copy = tmp_path / f"{number}{answered}" / "runs" / "tiny"
            shutil.copytree(run.path, copy)
            folder = f"kill-{number}-{answered}"
            place = open_place(address(port, folder))
            release(copy, place, 0)
            old = head_of(place)
            with KillingProxy(port) as proxy:
                proxy.at, proxy.answered = number, answered
                code = run_command(copy, key, address(proxy.server_port, folder), proxy)
                proxy.shutdown()
            counts.append(proxy.count)
            assert is_whole(place)
            if not code:
                continue
            assert code == -9
            killed += 1
            heads.append(head_of(place).version - old.version)
            assert run_command(copy, key, address(port, folder)) == 0
            assert (head_of(place).round, head_of(place).version) == (
                1,
                old.version + 1,
            )
            assert is_whole(place)
        if number >= max(counts):
            break
        number += 1
    print(f"killed {killed} times at {number} requests; new heads: {heads}")
    assert killed == 2 * number >= 18
    assert heads.count(1) == 1  # where the store had the head and was not heard


def run_command(run, key, url, proxy=None):
    """Run the real command; return its exit code."""
    words = [sys.executable, "-c", "from packager.__main__ import fleet; fleet()"]
    words += ["publish", "round_01", "--runs", str(run.parent), "--to", url]
    words += ["--sign", str(key)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(words, env=dict(os.environ), **pipes)
    if proxy:
        proxy.victim = process
        proxy.ready.set()
    errors = process.communicate(timeout=120)[1]
    assert process.returncode in (0, -9), errors.decode()
    return process.returncode


def test_publishing_the_same_twice_changes_nothing(port, run):
    place = open_place(address(port, "twice"))
    first = release(run.path, place, 1)
    before = list(place.entries(""))
    again = release(run.path, place, 1)
    assert (first.changed, again.changed, again.head) == (True, False, first.head)
    assert list(place.entries("")) == before


def test_a_channel_is_well_before_and_after_pruning(port, run, command, tmp_path):
    run.add(2)
    url, key = address(port, "pruned"), tmp_path / "key.pub.pem"
    key.write_bytes(encode_public(KEY))
    place = open_place(url)
    for number in range(3):
        release(run.path, place, number, now=int(time.time()))
    before = dict(place.names(""))
    place.create(".probe/0123456789abcdef", b"1")
    assert command(fleet, "check", url, "--trust", key)[0] == 0
    assert command(fleet, "prune", url)[1].startswith("0 files")  # all are young
    time.sleep(2.5)  # times of the store are of whole seconds
    code, out, _ = command(fleet, "prune", url, "--grace", "1s", "--json")
    gone = {entry["path"] for entry in json.loads(out)["removed"]}
    assert (code, ".probe/0123456789abcdef" in gone) == (0, True)
    assert {entry.path for entry in place.entries("")} == before.keys() - gone
    assert len(gone) > 2
    assert command(fleet, "check", url, "--trust", key)[0] == 0
    assert is_whole(place)


def test_reports_come_by_a_pre_signed_address_which_is_good_for_no_other(
    port, run, tmp_path
):
    place = open_place(address(port, "reported"), say=lambda _: None)
    release(run.path, place, 1)
    signed = read_head(place.read("stable.head")[0])
    device, outbox = Fake("board7", None, tmp_path / "keys"), Outbox(tmp_path)
    path, said = "reports/board7/latest.json", []
    url = obstore.sign(place._store, "PUT", path, timedelta(hours=1))
    secret = tmp_path / "address"
    uploads = Uploads(open_outlet(f"@{secret}"), said.append)

    def send(text, n):
        secret.write_text(text)
        outbox.add(n, Kind.CHANGE, device.report(signed, n=n))
        return uploads.send("board7", outbox.waiting(), lambda _: "")

    with open_database(tmp_path / "fleet.db") as connection:
        keys = read_keys(tmp_path / "keys")
        for n in (1, 2):
            assert n in send(url, n)
            look_at_head(connection, place, "stable", Trust())
            assert collect(connection, place, keys, now=NOW).proved == 1
    assert send(url.replace("board7", "board8"), 3) == {1, 2}
    assert said == ["reports: the server refuses them (403)"]
    assert [entry.path for entry in place.entries("reports")] == [path]
