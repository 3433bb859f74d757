# SPDX-License-Identifier: Apache-2.0
"""A device is installed from a channel, and repaired from it, over a bad link."""

import json
from dataclasses import replace

import pytest

from edge_runtime.cli.main import main
from edge_runtime.files import Files
from edge_runtime.live.proof import encode_public
from edge_runtime.live.shared import public_key
from edge_runtime.sync.head import Rollout
from edge_runtime.trust import first_root
from edge_runtime.update.device import Device
from packager.fleet.channel import add_list
from packager.fleet.head import pause_head, sign_head
from packager.key_lists import change_list, sign_list
from packager.keys import generate_key
from tests.edge_runtime.sync.world import (
    KEY,
    NOW,
    PAUSER,
    TIMES,
    TRUST,
    World,
    lists,
)


@pytest.fixture
def world(run, tmp_path):
    world = World(tmp_path)
    world.publish(0, lifetime_s=1 << 33)
    world.publish(1, lifetime_s=1 << 33)
    (tmp_path / "key.pem").write_bytes(encode_public(KEY))
    world.key = tmp_path / "key.pem"
    return world


@pytest.fixture
def paused(world):
    head = replace(world.head, pausers=(public_key(PAUSER),))
    world.head_bytes = pause_head(sign_head(head, [KEY]), PAUSER, at=NOW)
    return world


@pytest.fixture
def edge(world, command):
    return lambda *words: command(main, "--store", world.root, *words)


def test_a_device_is_installed_over_the_link(world, server, edge):
    code, out, err = edge("init", server.url, "--trust", world.key)
    assert (code, out.splitlines()[0]) == (0, f"installed round 1 in {world.root}")
    assert "round 1 of stable: " in err
    assert Device.open(world.root).verify() == world.head.target
    assert [p.name for p in world.root.parent.glob("store*")] == ["store"]


def test_an_installation_that_is_cut_goes_on_and_no_byte_comes_twice(
    world, server, edge
):
    size, sha256 = world.head.bundle
    server.cut, cuts = size // 3, 0
    while (code := edge("init", server.url, "--trust", world.key)[0]) != 0:
        assert code == 10
        assert not world.root.exists()  # nothing half-installed
        cuts += 1
    assert cuts >= 2
    assert server.bodies[f"bundles/{sha256}.zip"] == size
    assert Device.open(world.root).verify() == world.head.target


def test_a_bundle_that_changed_meanwhile_begins_anew(world, server, edge):
    server.cut = world.head.bundle[0] // 2
    assert edge("init", server.url, "--trust", world.key)[0] == 10
    (part,) = world.root.with_name("store.download").glob(".*.part")
    part.write_bytes(bytes(part.stat().st_size))  # as a bad card would
    server.cut = None
    assert edge("init", server.url, "--trust", world.key)[0] == 0


def test_the_head_is_checked_before_a_byte_of_the_bundle_comes(world, server, edge):
    world.head_bytes = sign_head(world.head, [generate_key()])
    code, _, err = edge("init", server.url, "--trust", world.key)
    assert (code, "not trusted" in err) == (8, True)
    assert not any(path.startswith("bundles/") for path in server.bodies)
    assert not world.root.exists()


def test_plain_http_is_for_devices_that_trust_keys(world, server, edge):
    for words in ([], ["--trust-on-first-use"]):
        code, _, err = edge("init", server.url, *words)
        assert (code, "use https://" in err) == (8, True)
    assert server.bytes == 0


def test_room_is_looked_for_before_a_byte_of_the_bundle_comes(
    world, server, edge, monkeypatch
):
    monkeypatch.setattr(Files, "free_bytes", lambda *_: 100)
    code, _, err = edge("init", server.url, "--trust", world.key)
    assert (code, "100 bytes free" in err) == (10, True)
    assert not any(path.startswith("bundles/") for path in server.bodies)


def test_a_store_that_is_there_costs_no_byte(world, server, edge):
    world.install()
    code, _, err = edge("init", server.url, "--trust", world.key)
    assert (code, "already holds an installed model" in err) == (7, True)
    assert server.bytes == 0


def test_a_stick_installs_as_a_server_does(world, edge):
    code, out, _ = edge("init", world.place.root, "--trust", world.key, "--json")
    assert (code, json.loads(out)["round"]) == (0, 1)


def test_a_paused_release_is_installed_from_a_file_alone(paused, edge):
    code, _, err = edge("init", paused.place.root, "--trust", paused.key)
    assert (code, "paused; wait until" in err) == (10, True)
    assert not paused.root.exists()
    bundle = paused.place.root / f"bundles/{paused.head.bundle[1]}.zip"
    assert edge("init", bundle, "--trust", paused.key)[0] == 0


@pytest.mark.parametrize(
    ("rollout", "words"),
    [
        (Rollout("1", ((15, 0), (1000, NOW + 60))), "come to 1.5 % of the devices\n"),
        (Rollout("1", (), ("lab", "van")), "come to 100 % of the devices of lab, van"),
        (Rollout("1", ((1000, 0),)), "on the wire\n"),
    ],
)
def test_a_new_device_is_told_that_others_wait_for_its_release(
    world, edge, rollout, words
):
    world.head_bytes = sign_head(replace(world.head, rollout=rollout), [KEY])
    code, _, err = edge("init", world.place.root, "--trust", world.key)
    assert (code, words in err) == (0, True), err


def test_a_pause_keeps_no_damaged_store_from_what_it_holds(paused, edge):
    current = paused.head.bundle[1]
    for bundle in (paused.place.root / "bundles").iterdir():
        paused.root = paused.root.with_name(bundle.stem)
        Device.install(paused.root, bundle, trust=TRUST)
        (paused.root / "model" / "graph.onnx").unlink()
        code, _, err = edge("repair", paused.place.root)
        assert (code, "was paused" in err) == (0, bundle.stem != current)


def test_a_damaged_store_is_repaired_over_the_link(world, server, edge):
    world.install()
    weights = world.root / "slots" / world.head.target / "weights.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(bytes(len(data)))
    code, out, _ = edge("repair", server.url, "--json")
    record = json.loads(out)
    assert (code, record["mended"]) == (0, ["the weights of round 1"])
    assert abs(record["bytes"] - server.bytes) < 200
    assert weights.read_bytes() == data
    assert [p.name for p in world.root.parent.glob("store*")] == ["store"]


def test_a_channel_of_another_model_repairs_nothing(world, server, edge, new_run):
    new_run("other", run_id="cd" * 16).add(0)
    elsewhere = world.root.parent / "elsewhere"
    elsewhere.mkdir()
    mine = World(elsewhere)
    mine.run = world.run.with_name("other")
    mine.publish(0)
    mine.root = world.root
    mine.install()
    (world.root / "model" / "graph.onnx").unlink()
    code, _, err = edge("repair", server.url)
    assert (code, "the channel is of model" in err) == (8, True)
    assert not world.root.with_name("store.download").exists()  # nothing came


def test_a_device_whose_card_has_an_older_key_list_is_installed_over_the_link(
    world, server, edge, tmp_path
):
    one, two, new = lists(generate_key())
    (tmp_path / "1.root.json").write_bytes(one)
    world.exchange(new, two)
    code, _, err = edge("init", server.url, "--trust", tmp_path / "1.root.json")
    assert (code, "round 1 of stable" in err) == (0, True)
    state = Device.open(world.root).store.state
    assert (state.key_list.root.version, state.active) == (2, world.head.target)


def test_however_many_key_lists_came_since_its_card_was_made_a_device_takes_them(
    world, edge, tmp_path
):
    one, data, new = lists(owner := generate_key())
    (tmp_path / "1.root.json").write_bytes(one)
    for _ in range(3, 21):  # the first one after the card's exchanged the key
        add_list(world.place, data)
        data = sign_list(change_list(data, TIMES), [owner])
    world.exchange(new, data)
    code, _, _ = edge("init", world.place.root, "--trust", tmp_path / "1.root.json")
    assert (code, Device.open(world.root).store.state.key_list.root.version) == (0, 20)


def test_a_store_with_an_older_key_list_is_repaired_over_the_link(world, server, edge):
    one, two, new = lists(generate_key())
    world.install(trust=first_root(one))
    world.exchange(new, two)
    weights = world.root / "slots" / world.head.target / "weights.safetensors"
    weights.unlink()
    code, out, _ = edge("repair", server.url, "--json")
    assert (code, json.loads(out)["mended"]) == (0, ["the weights of round 1"])
    assert Device.open(world.root).store.state.key_list.root.version == 2
