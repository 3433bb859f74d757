# SPDX-License-Identifier: Apache-2.0
"""dpu-edge status, as one story of the channel, the folder and the agent."""

import json
from dataclasses import replace

import pytest

from edge_runtime.cli.main import main
from edge_runtime.errors import SyncError
from edge_runtime.live.shared import public_key
from edge_runtime.sync.address import plain_address
from edge_runtime.sync.head import PERMILLE
from edge_runtime.sync.http import open_source
from edge_runtime.sync.plan import SyncResult
from edge_runtime.sync.state import HEAD_NAME, STATE_NAME
from edge_runtime.sync.story import age, read_known, span, tell
from edge_runtime.update.device import Device
from packager.fleet.head import pause_head
from tests.edge_runtime.sync.world import NOW, OPTIONS, PAUSER


@pytest.fixture
def story(world):
    """Tell the story of a device a quarter of an hour later."""
    from edge_runtime.agent.status import read_status

    def now():
        store = Device.open(world.root).store
        agent = read_status(world.root)
        return tell(store, agent, read_known(world.folder), world.now + 900)

    return now


def test_without_sync_nothing_tells_what_is_newest(story):
    found = story()
    assert found["missing"] == "unknown"
    assert found["summary"] == (
        "runs round 0; nothing tells what is newest: no 'dpu-edge sync' fills the "
        "folder of this device's agent"
    )


def test_a_device_at_the_newest_release_says_how_old_that_knowledge_is(story, world):
    world.look()
    found = story()
    assert found["summary"] == "runs round 0, the newest release, known 15 minutes ago"
    assert (found["missing"], found["age_s"]) == ("nothing", 900)


def hold(world):
    world.publish(1, groups=("lab",))


def pause(world):
    world.publish(1, pausers=(public_key(PAUSER),))
    world.head_bytes = pause_head(world.head_bytes, PAUSER, at=NOW)


def spend(world):
    world.publish(1)
    world.options = replace(OPTIONS, month_bytes=100)


def pin(world):
    world.publish(1)
    Device.open(world.root).pin()


@pytest.mark.parametrize(
    ("what", "missing", "reason"),
    [
        (hold, "later", "the rollout has not reached this device yet"),
        (pause, "paused", "the rollout of this release was paused"),
        (spend, "over budget", "100 are allowed"),
        (pin, "held", "updates are pinned"),
    ],
)
def test_what_is_missing_has_a_word_and_a_reason(story, world, what, missing, reason):
    what(world)
    world.look()
    found = story()
    assert found["missing"] == missing
    assert "round 1 is the newest, known 15 minutes ago: " in found["summary"]
    assert reason in found["summary"]


def test_a_patch_that_lies_here_is_told_apart_from_one_that_is_not_here(story, world):
    world.publish(1)
    world.look()
    found = story()
    assert found["missing"] == "not applied yet"
    assert "no agent has looked yet" in found["reason"]
    for path in world.folder.glob("*.dpu"):
        path.unlink()
    assert story()["missing"] == "not here"


def test_what_the_agent_says_of_the_file_is_the_reason(story, world):
    world.publish(1)
    world.look()
    (path,) = world.folder.glob("*.dpu")
    path.write_bytes(b"damaged")
    world.apply(), world.apply()
    assert "and the agent says: not a patch" in story()["reason"]


def test_a_device_that_went_back_is_held(story, world):
    world.publish(1)
    world.look(), world.apply()
    Device.open(world.root).rollback()
    world.look()
    assert story()["missing"] == "held"


def test_a_look_that_failed_is_told_with_what_was_known_before(story, world):
    world.publish(1, shares=((0, 0), (PERMILLE, 1 << 20)))
    world.look()
    (world.place.root / "stable.head").unlink()
    with pytest.raises(SyncError):
        world.look()
    found = story()
    assert (found["missing"], found["newest"]["round"]) == ("failed", 1)
    assert "is not there" in found["summary"]


def test_a_kept_head_that_was_exchanged_tells_nothing(story, world):
    world.publish(1)
    world.look()
    old = (world.folder / HEAD_NAME).read_bytes()
    world.publish(2)
    world.look()
    (world.folder / HEAD_NAME).write_bytes(old)
    assert story()["newest"] is None
    assert "not the head that was taken" in story()["summary"]


def test_an_expired_head_is_stale_in_the_story(story, world):
    world.look()
    world.now += 40 * 86_400
    found = story()
    assert found["stale"]
    assert "known 40 days ago (stale)" in found["summary"]


def test_status_finds_the_folder_by_what_the_agent_wrote(world, command):
    world.publish(1)
    world.look(), world.apply(), world.look()
    code, out, _ = command(main, "--store", world.root, "status")
    first, *rest = out.splitlines()
    assert (code, first.startswith("runs round 1, the newest")) == (0, True)
    assert any(line.startswith("last look      current; ") for line in rest)
    _, out, _ = command(main, "--store", world.root, "status", "--json")
    record = json.loads(out)["fleet"]
    assert record["bytes"]["month"] == 0  # a folder costs nothing
    assert record["folder"] == str(world.folder)


def test_what_the_network_side_wrote_cannot_pass_for_a_line_of_status(world, command):
    world.look(), world.apply(), world.look()
    path = world.folder / STATE_NAME
    evil = {"result": "x\npinned", "source": "y\nround 9", "channel": "z\nw"}
    path.write_text(json.dumps(json.loads(path.read_text()) | evil))
    _, out, _ = command(main, "--store", world.root, "status")
    assert "last look      x\\npinned; " in out


def test_a_state_from_before_there_was_a_story_is_read(world):
    world.look()
    path = world.folder / STATE_NAME
    record = json.loads(path.read_text())
    for name in ("result", "reason", "source", "day_bytes", "month_bytes"):
        del record[name]
    path.write_text(json.dumps(record))
    assert read_known(world.folder).state.version == world.head.version
    assert world.look().result is SyncResult.CURRENT


def test_an_address_is_shown_without_its_credentials():
    url = "https://me:secret@host:8443/digits?token=x#y"
    assert plain_address(url) == "https://host:8443/digits"
    url = url.removesuffix("?token=x#y")
    assert open_source(url).name == "https://host:8443/digits"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 seconds"), (61, "1 minute"), (7200, "2 hours"), (86_400, "1 day")],
)
def test_spans_are_told_in_their_largest_unit(seconds, words):
    assert span(seconds) == words
    assert age(-5) == "at a time that is still to come by this clock"
