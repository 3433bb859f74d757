# SPDX-License-Identifier: Apache-2.0
"""dpu-edge sync, against real files and a real server: whole, cut, and attacked."""

import json
import os
import shutil
from contextlib import suppress
from dataclasses import replace

import pytest

from edge_runtime.cli.main import main
from edge_runtime.errors import StoreError, SyncError, TrialError, TrustError
from edge_runtime.live.outbox import read_told
from edge_runtime.live.shared import public_key
from edge_runtime.sync.head import PERMILLE, place
from edge_runtime.sync.http import HttpSource, open_source
from edge_runtime.sync.plan import SyncResult, route
from edge_runtime.sync.source import FolderSource
from edge_runtime.sync.state import HEAD_NAME, STATE_NAME, SyncState, read_sync_state
from edge_runtime.times import MAX_SECONDS, utc
from edge_runtime.trust import first_root
from edge_runtime.update.device import Device
from packager.fleet.channel import add_list
from packager.fleet.head import pause_head, sign_head
from packager.fleet.ways import pack_ways
from packager.key_lists import change_list, make_list, sign_list
from packager.keys import generate_key
from packager.rounds.folder import read_round
from packager.rounds.names import named_parent
from tests.edge_runtime.sync.world import KEY, NOW, OPTIONS, PAUSER, TIMES, TRUST, lists

# Catching up --------------------------------------------------------------------------


def test_a_device_that_missed_rounds_fetches_and_applies(world, server):
    for number in (1, 2, 3, 4):
        world.publish(number)
    found = world.look(HttpSource(server.url))
    assert found.result is SyncResult.FETCHED
    assert world.apply() == world.head.target
    assert world.look(HttpSource(server.url)).result is SyncResult.CURRENT


def test_a_poll_that_finds_nothing_new_costs_at_most_340_bytes(world, server):
    world.look(HttpSource(server.url))
    before = server.bytes
    found = world.look(HttpSource(server.url))
    assert (found.result, found.fetched) == (SyncResult.CURRENT, ())
    assert server.bytes - before <= 340


def test_an_update_costs_at_most_1300_bytes_beside_its_patch(world, server):
    world.publish(1)
    found = world.look(HttpSource(server.url))
    patches = sum((world.folder / name).stat().st_size for name in found.fetched)
    assert server.bytes - patches <= 1300
    assert abs(found.spent - server.bytes) <= 100  # what counts against budgets


def test_a_connection_is_kept_where_the_server_keeps_it(world, server):
    """With TLS each new one costs 2 kB; an error page is read to keep it."""
    world.publish(1)
    server.kept, server.statuses = True, {"nothing.head": 404}
    source = HttpSource(server.url)
    world.look(source)
    world.look(source)
    with source.get("nothing.head") as answer:
        assert answer.status == 404
    world.look(source)
    assert server.connections == 1


def test_a_wrong_address_is_told_whole(world, server):
    beta = replace(OPTIONS, channel="beta")
    world.options = beta
    root = world.place.root
    for source, words in (
        (HttpSource(server.url), f"{server.url}/beta.head: the server says 404"),
        (FolderSource(root), f"{root}/beta.head is not there"),
    ):
        with pytest.raises(SyncError) as caught:
            world.look(source)
        assert words in str(caught.value)
        assert caught.value.permanent


def test_a_stick_or_a_network_drive_needs_no_server(world):
    world.publish(1)
    assert world.look(open_source(f"file://{world.place.root}")).fetched
    assert world.apply() == world.head.target


def test_what_is_cut_goes_on_and_no_byte_comes_twice(world, server):
    world.publish(1)
    server.cut, cuts = 100, 0
    source = HttpSource(server.url)
    while True:
        try:
            found = world.look(source)
        except SyncError as err:
            assert "broke off" in str(err)
            cuts += 1
            continue
        break
    (name,) = found.fetched
    size = (world.folder / name).stat().st_size
    assert cuts == (size - 1) // 100 > 2
    assert server.bodies[f"patches/{name}"] == size
    assert world.apply() == world.head.target


def test_weak_tags_cost_no_byte_twice(world, server):
    world.publish(1)
    server.weak = True
    part_of(world, server)
    (name,) = world.look(HttpSource(server.url)).fetched
    assert server.bodies[f"patches/{name}"] == (world.folder / name).stat().st_size


def test_a_part_that_is_none_is_fetched_anew_once(world, server):
    """The 206 says the right range and sends the beginning again."""
    world.publish(1)
    part_of(world, server)
    server.lies = True
    (name,) = world.look(HttpSource(server.url)).fetched
    size = (world.folder / name).stat().st_size
    assert server.bodies[f"patches/{name}"] == 2 * size
    assert world.apply() == world.head.target


def part_of(world, server):
    """Cut the first fetch after 100 bytes of the patch."""
    server.cut = 100
    with pytest.raises(SyncError, match="broke off"):
        world.look(HttpSource(server.url))
    server.cut = None


@pytest.mark.parametrize("at", [0, 1, 7, 100, 338])
def test_a_part_of_any_size_goes_on(world, at):
    world.publish(1)
    (way,) = world.head.ways[:1]
    data, _ = world.place.read(f"patches/{way.sha256}.dpu")
    (world.folder / f".{way.sha256}.part").write_bytes(data[: min(at, len(data))])
    world.look()
    assert world.apply() == world.head.target


def test_a_head_that_is_known_is_not_needed_again_for_the_next_file(world, server):
    world.publish(1)
    world.look(HttpSource(server.url))
    state = read_sync_state(world.folder)
    assert (state.version, state.seen) == (world.head.version, NOW)


def test_what_was_applied_is_removed_and_nothing_of_others(world):
    (world.folder / "by-hand.dpu").write_bytes(b"somebody put it here")
    for number in (1, 2):
        world.publish(number)
        assert world.look().fetched
        world.apply()
    world.look()
    assert [path.name for path in world.folder.glob("*.dpu")] == ["by-hand.dpu"]


def test_a_release_that_the_owner_went_back_from_is_not_fetched_again(world):
    world.publish(1)
    world.look()
    world.apply()
    Device.open(world.root).rollback()
    assert world.look().result is SyncResult.HELD
    assert not list(world.folder.glob("*.dpu"))
    world.publish(2)
    assert world.look().result is SyncResult.FETCHED
    assert world.apply() == world.head.target


# What is wrong, taken back or gone around ---------------------------------------------


@pytest.mark.parametrize("took_it", [True, False])
def test_a_bad_release_that_is_taken_back_is_left(world, took_it):
    world.publish(1)
    world.look()
    world.apply()
    world.publish(2)
    if took_it:
        world.look()
        world.apply()
    head = world.publish(1, revert=True)
    found = world.look()
    assert (found.result, len(found.fetched)) == (SyncResult.FETCHED, 1)
    assert world.apply() == head.target
    # The floor is raised as well: else the bad release could be played later.
    assert Device.open(world.root).store.state.floor == head.counter
    assert world.look().result is SyncResult.CURRENT


def failing(*_, **__):
    raise TrialError("worse than before")


def only(world, *pairs):
    """Sign a head that offers these ways alone: from which round to which."""
    rounds = [read_round(world.run / f"round_{n:02d}") for n in range(5)]
    ways = []
    for begin, end in pairs:
        name = begin if begin == "init" else f"round_{begin:02d}"
        parent = named_parent(rounds[end], name, world.run.parent)
        (offer,) = pack_ways(rounds[end], [parent], counter=end, signers=[KEY])
        world.place.create(f"patches/{offer.way.sha256}.dpu", offer.packed.data)
        ways.append(offer.way)
    head = replace(world.head, version=world.head.version + 1, ways=tuple(ways))
    world.head_bytes = sign_head(head, [KEY])
    return ways


def test_no_way_leads_through_a_release_that_failed_here(world):
    world.publish(1)
    world.look()
    with suppress(TrialError):
        world.apply(failing)
    world.publish(2)
    *_, detour = only(world, (0, 1), (1, 2), (0, 2))
    only(world, (0, 1), (1, 2))
    found = world.look()
    assert (found.result, found.fetched) == (SyncResult.NO_WAY, ())
    only(world, (0, 1), (1, 2), (0, 2))
    assert world.look().fetched == (f"{detour.sha256}.dpu",)
    assert world.apply() == world.head.target


def test_what_the_store_will_never_take_is_gone_around(world):
    world.publish(1)
    world.look()
    world.apply()
    world.publish(2)
    world.look()
    world.apply()
    world.publish(3)
    # By bytes the cheapest way may lead through a release that this device is past.
    only(world, ("init", 0), (0, 3))
    found = world.look()
    assert (found.result, "already been at 2" in found.reason) == (
        SyncResult.NO_WAY,
        True,
    )
    assert not any((world.folder / name).exists() for name in found.fetched)
    only(world, ("init", 0), (0, 3), ("init", 3))
    assert world.look().result is SyncResult.FETCHED
    assert world.apply() == world.head.target


def cheapest(world, *, without=()):
    """Return the paths of what leads to the release from where the device is."""
    state = Device.open(world.root).store.state
    return {f"patches/{w.sha256}.dpu" for w in route(state, world.head, without)}


def test_what_came_damaged_is_fetched_once_the_server_has_it_whole(world, server):
    """Under the same head: what is wrong with a server is not for good."""
    world.publish(1)
    sizes = {f"patches/{way.sha256}.dpu": way.size for way in world.head.ways}
    server.replace = {path: b"x" * size for path, size in sizes.items()}
    with pytest.raises(SyncError, match="is damaged at the server"):
        world.look(HttpSource(server.url))
    server.replace = {}
    assert world.look(HttpSource(server.url)).result is SyncResult.FETCHED
    assert world.apply() == world.head.target


FAULTS = {
    "missing": lambda path: path.unlink(),
    "unreadable": lambda path: (path.unlink(), path.mkdir()),
    "too short": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "shorter than what was cut": lambda path: path.write_bytes(b"x"),
    "too long": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "damaged": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\0"),
}


@pytest.mark.parametrize("by_http", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_cannot_be_had_is_gone_around_where_another_way_leads_there(
    world, server, fault, by_http
):
    world.publish(1)
    if fault.startswith("shorter"):
        part_of(world, server)
    lost = cheapest(world)
    for path in lost:
        FAULTS[fault](world.place.root / path)
    names = {path[8:-4] for path in lost}
    detour = cheapest(world, without=names)
    source = HttpSource(server.url) if by_http else FolderSource(world.place.root)
    found = world.look(source)
    assert {f"patches/{name}" for name in found.fetched} == detour
    before = dict(server.bodies)
    again = world.look(source)  # while it is here, nothing is asked for
    assert (again.result, again.fetched) == (SyncResult.FETCHED, ())
    assert {k: v for k, v in server.bodies.items() if k in lost | detour} == {
        k: v for k, v in before.items() if k in lost | detour
    }
    assert world.apply() == world.head.target


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_file_that_cannot_be_had_at_all_is_said_and_asked_for_again(
    world, server, status
):
    world.publish(1)
    paths = {f"patches/{way.sha256}.dpu" for way in world.head.ways}
    server.statuses = dict.fromkeys(paths, status)
    with pytest.raises(SyncError, match=f"the server says {status}"):
        world.look(HttpSource(server.url))
    server.statuses = {}
    assert world.look(HttpSource(server.url)).result is SyncResult.FETCHED


@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "missing"])
def test_what_rots_in_the_folder_is_fetched_anew(world, fault):
    world.publish(1)
    (name,) = world.look().fetched
    FAULTS[fault](world.folder / name)
    assert world.look().fetched == (name,)
    assert world.apply() == world.head.target


# Rollout and pause --------------------------------------------------------------------


def test_a_device_waits_for_its_turn(world):
    mine = place("1", OPTIONS.device)
    world.publish(1, shares=((mine, 0), (PERMILLE, 3600)))
    assert world.look().result is SyncResult.LATER
    world.now += 3600
    assert world.look().result is SyncResult.FETCHED


def test_after_the_last_step_publishing_again_reaches_a_board_without_a_clock(
    world,
):
    day = 86_400
    world.publish(1, shares=((0, 0), (PERMILLE, day)))
    world.now = 100  # as at each of its boots
    assert world.look().result is SyncResult.LATER
    assert world.publish(1, now=NOW + day - 1).version == world.head.version == 2
    world.publish(1, now=NOW + day)
    assert world.look().result is SyncResult.FETCHED
    assert world.publish(1, now=NOW + day + 1).version == 3


def test_a_head_that_was_dated_far_ahead_is_mended_by_publishing_again(world):
    """So is its rollout, which began then; a device that took it follows."""
    far, shares = NOW + 20 * 365 * 86_400, ((0, 0), (PERMILLE, 3600))
    world.publish(1, now=far, shares=shares)
    assert world.look().result is SyncResult.LATER
    head = world.publish(1)
    assert head.expires == NOW + 30 * 86_400
    assert head.rollout.steps == ((0, NOW), (PERMILLE, NOW + 3600))
    assert world.look().result is SyncResult.LATER
    world.now += 3600
    assert world.look().result is SyncResult.FETCHED


def test_a_place_that_was_lost_goes_on_above_the_version_that_devices_have_seen(world):
    for number in (1, 2):
        world.publish(number)
    world.look()
    shutil.rmtree(world.place.root)
    world.publish(3)
    with pytest.raises(TrustError, match="this device has seen 3"):
        world.look()
    assert world.publish(3, above=3).version == 4
    assert world.look().result is SyncResult.FETCHED
    shutil.rmtree(world.place.root)
    world.place.root.mkdir()
    world.head_bytes = (world.folder / HEAD_NAME).read_bytes()
    assert world.publish(4).version == 5
    assert world.look().result is SyncResult.FETCHED


def test_a_pause_stands_though_somebody_takes_it_away(world):
    world.publish(1, pausers=(public_key(PAUSER),))
    good = world.head_bytes
    world.head_bytes = pause_head(good, PAUSER, at=NOW)
    assert world.look().result is SyncResult.PAUSED
    world.head_bytes = good
    assert world.look().result is SyncResult.PAUSED
    world.publish(2)
    assert world.look().result is SyncResult.FETCHED


def test_what_was_taken_back_leaves_the_agents_sight_though_nothing_is_fetched(world):
    world.publish(1)
    world.look()
    world.apply()
    world.publish(2)
    (bad,) = world.look().fetched
    world.publish(1, revert=True)
    world.options = replace(OPTIONS, metered=True)
    assert world.look().result is SyncResult.METERED
    assert not (world.folder / bad).exists()


def test_a_release_that_failed_its_trial_here_is_not_fetched_again(world):
    world.publish(1)
    device = Device.open(world.root)
    with device.store.lock():
        device.store.commit(device.store.state.tried(world.head.target, 99))
    assert world.look().result is SyncResult.REFUSED


# Keys ---------------------------------------------------------------------------------


def test_a_new_key_reaches_a_device_by_the_channel(world):
    """The list comes first; the head that the new key signed is believed after it."""
    one, two, new = lists(generate_key())
    shutil.rmtree(world.root)
    world.install(trust=first_root(one, None))
    world.exchange(new, two)
    with pytest.raises(TrustError, match="not trusted"):
        world.look()
    world.apply()
    assert world.look().result is SyncResult.FETCHED
    assert world.apply() == world.head.target


@pytest.mark.parametrize("rotten", ["too short", "damaged", "unreadable"])
def test_a_key_list_that_rots_in_the_folder_is_fetched_anew(world, rotten):
    one, two, new = lists(generate_key())
    shutil.rmtree(world.root)
    world.install(trust=first_root(one, None))
    world.exchange(new, two)
    path = world.folder / "2.root.json"
    path.write_bytes(two)
    FAULTS[rotten](path)
    with pytest.raises(TrustError, match="not trusted"):
        world.look()
    assert path.read_bytes() == two
    world.apply()
    assert world.look().result is SyncResult.FETCHED


def test_single_keys_move_over_by_the_channel(world):
    """They signed the first list; the release after the next one is another key's."""
    one, two, new = lists(generate_key(), KEY)
    add_list(world.place, one)
    world.exchange(new, two)
    with pytest.raises(TrustError, match="not trusted"):
        world.look()
    world.apply()
    assert Device.open(world.root).store.state.key_list.root.version == 2
    assert world.look().result is SyncResult.FETCHED
    assert world.apply() == world.head.target


def test_single_keys_move_over_while_they_still_sign(world):
    one, _, _ = lists(generate_key(), KEY)
    add_list(world.place, one)
    world.publish(1)
    found = world.look()
    assert (found.result, "1.root.json" in found.fetched) == (SyncResult.FETCHED, True)
    assert world.apply() == world.head.target
    assert Device.open(world.root).store.state.key_list.root.version == 1


def test_a_list_that_single_keys_did_not_sign_is_asked_for_once_a_head(world, server):
    one, two, _ = lists(generate_key())
    for data in (one, two):
        add_list(world.place, data)
    world.publish(1)
    for _ in range(3):
        assert world.look(HttpSource(server.url)).result is SyncResult.FETCHED
    assert server.bodies["keys/1.root.json"] == len(one)
    assert server.bodies["keys/2.root.json"] == len(two)
    assert not list(world.folder.glob("*.root.json"))
    assert world.apply() == world.head.target


def test_a_list_that_nobody_signed_fills_no_disk(world):
    owner = generate_key()
    one = sign_list(make_list([public_key(owner)], TRUST.keys, TIMES), [owner])
    shutil.rmtree(world.root)
    world.install(trust=first_root(one, None))
    add_list(world.place, change_list(one, TIMES))
    world.publish(1)
    with pytest.raises(TrustError):
        world.look()
    assert not list(world.folder.glob("*.root.json"))


# Budgets ------------------------------------------------------------------------------


def test_what_a_clock_that_was_set_back_spends_counts_too():
    state = SyncState()
    for day in range(1, 93):
        state = state.spending(f"2026-{day // 31 + 5:02}-{day % 31 + 1:02}", 1)
    state = state.spending("2026-01-01", 5).spending("2026-01-01", 5)
    assert state.spent_in("2026-01-01") == 10
    assert len(state.spent) == 62


def test_a_budget_is_kept_and_the_next_day_goes_on(world, server):
    world.publish(1)
    world.options = replace(OPTIONS, day_bytes=1000)
    found = world.look(HttpSource(server.url))
    assert (found.result, found.fetched) == (SyncResult.OVER_BUDGET, ())
    assert "are allowed" in found.reason
    assert server.bytes <= 1000
    world.options = replace(OPTIONS, day_bytes=20_000, month_bytes=1200)
    assert world.look(HttpSource(server.url)).result is SyncResult.OVER_BUDGET
    world.options = OPTIONS
    assert world.look(HttpSource(server.url)).result is SyncResult.FETCHED


def test_a_board_whose_clock_begins_anew_polls_again_though_its_months_bytes_are_spent(
    world, server
):
    world.options = replace(OPTIONS, month_bytes=2400)
    looks = []
    for look in range(60):
        if len(looks) == 20:
            world.publish(1, now=NOW + 31 * 86_400)
        world.now = 100 + 3600 * (look % 3)  # three hours, and a boot
        looks.append(world.look(HttpSource(server.url)).result)
    assert looks[15:20] == [SyncResult.OVER_BUDGET] * 5
    assert SyncResult.FETCHED in looks


def test_a_clock_that_stands_back_counts_days_on_from_the_newest_signed_time():
    state = SyncState(seen=NOW)
    days = [utc(NOW)[:10], utc(NOW + 86_400)[:10]]
    assert [state.day(clock) for clock in (NOW, NOW + 86_400, 0, 86_400)] == 2 * days
    assert SyncState(seen=MAX_SECONDS).day(86_400) == "9999-12-31"


def test_a_slow_clock_counts_to_the_day_of_the_newest_signed_time():
    state = SyncState(seen=NOW)
    days = {state.day(NOW - behind) for behind in (0, 600, 40 * 86_400)}
    assert days == {utc(NOW)[:10]}


# State --------------------------------------------------------------------------------


def test_a_stick_whose_name_is_no_text_leaves_the_state_readable(world):
    world.publish(1)
    stick = world.place.root.with_name(os.fsdecode(b"st\xffck"))
    world.place.root.rename(stick)
    world.options = replace(OPTIONS, device=stick.name, group=stick.name)
    for _ in range(2):
        world.look(FolderSource(stick))
        assert read_sync_state(world.folder).source.endswith("st\\udcffck")
        assert read_told(world.folder).device == "st\\udcffck"
    (stick / "stable.head").unlink()
    with pytest.raises(SyncError):
        world.look(FolderSource(stick))
    assert "st\\udcffck" in read_sync_state(world.folder).reason


def test_a_damaged_state_is_refused_by_name(world):
    world.look()
    (world.folder / STATE_NAME).write_text('{"schema": 1, "version": -1}')
    with pytest.raises(StoreError, match="malformed"):
        world.look()


@pytest.mark.parametrize("damaged", [b"", b"x", b"{}"])
def test_a_damaged_copy_of_the_head_is_fetched_anew(world, damaged):
    world.publish(1)
    world.look()
    whole = (world.folder / HEAD_NAME).read_bytes()
    (world.folder / HEAD_NAME).write_bytes(damaged)
    assert world.look().result is SyncResult.FETCHED
    assert (world.folder / HEAD_NAME).read_bytes() == whole


def test_the_store_is_only_read(world):
    world.publish(1)
    before = {p: p.stat().st_mtime_ns for p in world.root.rglob("*") if p.is_file()}
    world.look()
    after = {p: p.stat().st_mtime_ns for p in world.root.rglob("*") if p.is_file()}
    assert after == before


# The command --------------------------------------------------------------------------


def test_the_command_says_what_it_fetched(world, server, command):
    world.publish(1)
    words = ("--store", world.root, "sync", server.url, world.folder)
    code, out, _ = command(main, *words, "--json")
    record = json.loads(out)
    assert (code, record["result"], record["head"]["round"]) == (0, "fetched", 1)
    code, out, _ = command(main, *words)
    assert (code, "stable: round 1" in out) == (0, True)


@pytest.mark.parametrize("status", [404, 503])
def test_a_server_that_has_nothing_is_told_with_the_way_out(
    world, server, command, status
):
    server.status = status
    words = ("--store", world.root, "sync", server.url, world.folder)
    code, _, err = command(main, *words)
    assert code == 10
    assert str(status) in err


@pytest.mark.parametrize(
    "words", [("--budget", "5"), ("--budget", "5KB/week"), ("--channel", "../x")]
)
def test_wrong_options_are_refused(world, command, words):
    code, _, err = command(
        main, "--store", world.root, "sync", "x", world.folder, *words
    )
    assert (code, "expected" in err) == (2, True)
