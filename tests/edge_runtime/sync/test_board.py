# SPDX-License-Identifier: Apache-2.0
"""dpu-edge sync on a live board: halts, metered links, full disks, services."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from edge_runtime.agent.status import read_status
from edge_runtime.cli.main import main
from edge_runtime.files import Files
from edge_runtime.live.shared import public_key
from edge_runtime.sync.desk import Full
from edge_runtime.sync.head import PERMILLE
from edge_runtime.sync.http import HttpSource
from edge_runtime.sync.plan import SyncResult
from edge_runtime.update.device import Device
from packager.bundles.from_round import build_bundle
from packager.fleet.head import pause_head, sign_head
from packager.keys import generate_key
from packager.rounds.folder import read_round
from tests.edge_runtime.sync.world import KEY, NOW, OPTIONS, PAUSER


def test_a_halt_takes_back_what_no_agent_applied_yet(world):
    world.publish(1, pausers=(public_key(PAUSER),))
    world.look()
    halted = world.head_bytes
    world.head_bytes = pause_head(halted, PAUSER, at=NOW)
    assert world.look().result is SyncResult.PAUSED
    before = Device.open(world.root).verify()
    assert world.apply() == before


def test_what_was_taken_back_costs_no_byte_when_the_rollout_goes_on(world, server):
    world.publish(1, shares=((PERMILLE, 0),))
    world.look()
    (name,) = (path.name for path in world.folder.glob("*.dpu"))
    world.publish(1, shares=((0, 0), (PERMILLE, 60)))
    assert world.look(HttpSource(server.url)).result is SyncResult.LATER
    assert not list(world.folder.glob("*.dpu"))
    world.now += 61
    assert world.look(HttpSource(server.url)).fetched == (name,)
    assert f"patches/{name}" not in server.bodies
    assert world.apply() == world.head.target


def test_a_metered_link_polls_and_fetches_nothing(world, server):
    world.publish(1)
    world.options = replace(OPTIONS, metered=True)
    found = world.look(HttpSource(server.url))
    assert (found.result, found.fetched) == (SyncResult.METERED, ())
    assert not any(path.startswith("patches/") for path in server.bodies)


def test_a_disk_without_room_is_said_before_a_byte_is_fetched(world, server):
    world.publish(1)

    class Full(Files):
        def free_bytes(self, _path):
            return 1000

    world.files = Full()
    found = world.look(HttpSource(server.url))
    assert (found.result, found.fetched) == (SyncResult.NO_ROOM, ())
    assert "1000 bytes free" in found.reason
    assert not any(path.startswith("patches/") for path in server.bodies)


def test_a_disk_that_fills_up_is_said_once_and_asked_ever_more_rarely(
    world, command, monkeypatch
):
    world.publish(1, lifetime_s=1 << 33)
    world.options = replace(OPTIONS, metered=True)
    world.look()
    (way,) = world.head.ways[:1]
    (world.folder / f".{way.sha256}.part").symlink_to("/dev/full")
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr("edge_runtime.cli.sync.time.sleep", sleep)
    call = ("sync", world.place.root, world.folder, "--every", 3600)
    code, _, err = command(main, "--store", world.root, *call)
    assert (code, err.count("No space left on device; make room")) == (130, 1)
    assert waits[0] < 13 and waits == sorted(waits)


def test_a_head_that_is_not_trusted_ends_no_service(world, command, monkeypatch):
    world.publish(1)
    world.head_bytes = sign_head(world.head, [generate_key()])

    def sleep(_seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("edge_runtime.cli.sync.time.sleep", sleep)
    call = ("sync", world.place.root, world.folder, "--every", 60)
    code, _, err = command(main, "--store", world.root, *call)
    assert (code, "not trusted" in err) == (130, True)


def test_who_reads_a_service_has_a_line_at_once_until_nobody_reads(world):
    words = [sys.executable, "-m", "edge_runtime", "--store", str(world.root), "sync"]
    words += [str(world.place.root), str(world.folder), "--every", "1s", "--json"]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    world.publish(1, lifetime_s=1 << 33)
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=env) as process:
        first = json.loads(process.stdout.readline())
        assert (first["schema"], first["result"]) == (1, "fetched")
        process.stdout.close()
        world.publish(2, lifetime_s=1 << 33)
        assert process.wait(60) == 0


# Full weights, by policy --------------------------------------------------------------


def cut_off(world):
    """A release to which no patch leads from here."""
    world.publish(1)
    world.head_bytes = sign_head(replace(world.head, ways=()), [KEY])


@pytest.mark.parametrize(
    ("full", "result"), [(Full.NEVER, SyncResult.NO_WAY), (Full.ASK, SyncResult.FULL)]
)
def test_full_weights_never_come_silently(world, server, full, result):
    cut_off(world)
    world.options = replace(OPTIONS, full=full)
    found = world.look(HttpSource(server.url))
    assert (found.result, found.fetched) == (result, ())
    assert not any(path.startswith("bundles/") for path in server.bodies)


def test_full_weights_come_where_they_are_allowed_and_nothing_else_leads_there(world):
    cut_off(world)
    world.options = replace(OPTIONS, full=Full.YES)
    found = world.look()
    assert found.fetched == (f"{world.head.bundle[1]}.zip",)
    assert world.apply() == world.head.target
    assert world.look().result is SyncResult.CURRENT
    assert not list(world.folder.glob("*.zip"))


def test_full_weights_do_not_come_where_a_patch_leads_there(world):
    world.publish(1)
    world.options = replace(OPTIONS, full=Full.YES)
    assert all(name.endswith(".dpu") for name in world.look().fetched)


def test_full_weights_count_against_the_budget(world):
    cut_off(world)
    world.options = replace(OPTIONS, full=Full.YES, month_bytes=500)
    assert world.look().result is SyncResult.OVER_BUDGET


def test_full_weights_that_nobody_trusted_signed_are_refused_by_both_halves(world):
    cut_off(world)
    round_ = read_round(world.run / "round_01")
    data = build_bundle(round_, signers=[generate_key()]).data
    name = hashlib.sha256(data).hexdigest()
    world.place.create(f"bundles/{name}.zip", data)
    head = replace(world.head, bundle=(len(data), name), version=9)
    world.head_bytes = sign_head(head, [KEY])
    world.options = replace(OPTIONS, full=Full.YES)
    found = world.look()
    assert (found.result, "not trusted" in found.reason) == (SyncResult.NO_WAY, True)
    before = Device.open(world.root).verify()
    (world.folder / f"{name}.zip").write_bytes(data)
    assert world.apply() == before


def test_a_zip_of_somebody_else_is_none_of_the_agents_business(world):
    (world.folder / "holidays.zip").write_bytes(b"photos")
    world.apply()
    assert read_status(world.root)["files"] == {}
