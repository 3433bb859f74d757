# SPDX-License-Identifier: Apache-2.0
"""dpu-fleet publish --tuf: killed, raced, rotated, and read by python-tuf as it is."""

import json
import os
import shutil
import stat
import time
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata
from tuf.ngclient import Updater, UpdaterConfig

from edge_runtime.errors import KeyFileError, RoundError, TrustError
from edge_runtime.files import Files
from edge_runtime.live.shared import public_key
from edge_runtime.sync.head_file import read_head
from edge_runtime.sync.http import HttpSource
from edge_runtime.sync.plan import SyncResult
from edge_runtime.sync.story import read_known
from packager.cli.fleet import fleet
from packager.fleet.check import State
from packager.fleet.check_tuf import check_tuf
from packager.fleet.head import pause_head
from packager.fleet.place import FolderPlace
from packager.fleet.prune import prune
from packager.fleet.tuf_keys import ONLINE, TufFolder, make_folder, rotate
from packager.key_lists import sign_list
from packager.keys import encode_private, load_private
from tests.edge_runtime.sync.world import KEY, NOW, PAUSER, TufWorld

DAY = 86_400


@pytest.fixture
def world(template, tmp_path):
    return template(TufWorld, tmp_path / "world")


def versions(world):
    return {role: world.at(role).signed.version for role in ONLINE}


def owner(world):
    return load_private((world.keys / "root.pem").read_bytes())


# What it writes -----------------------------------------------------------------------


def test_targets_are_the_files_that_lie_there_and_metadata_is_compact(world):
    head = world.publish(1)
    targets = world.at("targets")
    for path, target in targets.signed.targets.items():
        data, _ = world.place.read(path)
        target.verify_length_and_hashes(data)
    ways = {f"patches/{way.sha256}.dpu" for way in head.ways}
    assert set(targets.signed.targets) == ways | {f"bundles/{head.bundle[1]}.zip"}
    for entry in world.place.entries("tuf"):
        if entry.path.endswith("root.json"):
            continue
        data, _ = world.place.read(entry.path)
        value = json.loads(data)
        assert data == json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def test_python_tufs_own_client_fetches_the_files(world, server, tmp_path):
    head = world.publish(1)
    (tmp_path / "targets").mkdir()
    updater = Updater(
        str(tmp_path / "metadata"),
        f"{server.url}/tuf/",
        str(tmp_path / "targets"),
        f"{server.url}/",
        config=UpdaterConfig(prefix_targets_with_hash=False),
        bootstrap=(world.keys / "1.root.json").read_bytes(),
    )
    for way in head.ways:
        target = updater.get_targetinfo(f"patches/{way.sha256}.dpu")
        path = Path(updater.download_target(target))
        assert target.length == way.size
        assert path.read_bytes() == world.place.read(target.path)[0]


def test_publishing_twice_changes_nothing_until_half_of_the_time_is_over(world):
    head = world.publish(1)
    before = {e.path: world.place.read(e.path) for e in world.place.entries("")}
    assert not world.mirror(head).changed
    assert not world.mirror(now=NOW + 14 * DAY).changed
    assert {e.path: world.place.read(e.path) for e in world.place.entries("")} == before
    old = versions(world)
    assert world.mirror(now=NOW + 16 * DAY).changed
    raised = {role: old[role] + (role != "targets") for role in ONLINE}
    assert versions(world) == raised


def test_each_role_expires_at_its_time(world):
    world.publish(1)
    expires = {role: world.at(role).signed.expires.timestamp() - NOW for role in ONLINE}
    assert expires == {
        "targets": 365 * DAY,
        "snapshot": 30 * DAY,
        "timestamp": 30 * DAY,
    }
    root = Metadata.from_bytes((world.keys / "1.root.json").read_bytes())
    assert root.signed.expires.timestamp() - NOW == 730 * DAY


def test_channels_share_a_repository(world):
    stable = world.publish(1)
    beta = world.publish(2, name="beta")
    custom = {}
    for target in world.at("targets").signed.targets.values():
        custom |= target.custom or {}
    assert {name: record["round"] for name, record in custom.items()} == {
        "stable": stable.round,
        "beta": beta.round,
    }
    assert world.look().head.round == 1


# Keys ---------------------------------------------------------------------------------


def test_keys_are_private_never_overwritten_and_never_given_out(world, tmp_path):
    for path in world.keys.glob("*.pem"):
        private = ".pub." not in path.name
        assert (stat.S_IMODE(path.stat().st_mode) == 0o600) == private
    with pytest.raises(FileExistsError, match="never overwritten"):
        make_folder(world.keys, now=NOW)
    inside = world.place.root / "keys"
    shutil.copytree(world.keys, inside)
    with pytest.raises(KeyFileError, match="keys stay outside"):
        TufFolder.open(inside).insist_outside(world.place.name)


def test_the_key_of_the_root_is_not_needed_and_others_are(world):
    (world.keys / "root.pem").unlink()
    head = world.publish(1)
    assert world.look().result is SyncResult.FETCHED
    (world.keys / "timestamp.pem").unlink()
    assert not world.mirror(head).changed
    with pytest.raises(KeyFileError, match="0 of the 1 keys of role timestamp"):
        world.publish(2)


def test_a_folder_of_keys_is_for_one_model(world, new_run):
    other = new_run("another", run_id="22" * 16)
    other.add(1)
    world.run = other.path
    world.place = FolderPlace(world.place.root.parent / "elsewhere")
    with pytest.raises(RoundError, match="a folder of its own"):
        world.publish(1)


def test_a_root_that_lacks_signatures_is_not_sent(world):
    made = rotate(world.keys, {"timestamp"}, now=NOW)
    with pytest.raises(TrustError, match="dpu-patch trust sign"):
        world.publish(1)
    made.write_bytes(sign_list(made.read_bytes(), [owner(world)]))
    world.publish(1)
    assert world.look().result is SyncResult.FETCHED


@pytest.mark.parametrize("roles", [(), ("timestamp",), ONLINE])
def test_devices_follow_a_new_root(world, roles):
    world.look()
    rotate(world.keys, roles, now=NOW, owners=[owner(world)])
    world.publish(1)
    assert world.look().result is SyncResult.FETCHED
    assert world.apply() == world.head.target
    for role in roles:  # the old key signed as well until the root was out
        assert len(world.at(role).signatures) == 2
    world.publish(2)
    assert all(len(world.at(role).signatures) == 1 for role in ONLINE)
    assert world.look(root=None).result is SyncResult.FETCHED


def test_a_rotation_that_was_cut_is_done_again_with_other_keys(world):
    """Killed as it writes the root: its keys are there, and no root names them."""
    (child := os.fork()) or _die_rotating(world.keys)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    left = {path: path.read_bytes() for path in world.keys.glob("timestamp.2*")}
    assert len(left) == 2
    assert not (world.keys / "2.root.json").exists()
    rotate(world.keys, ("timestamp",), now=NOW, owners=[owner(world)])
    assert {path: path.read_bytes() for path in left} == left
    world.publish(1)
    assert world.look().result is SyncResult.FETCHED


def _die_rotating(keys):
    Files.replace = lambda *_, **__: os._exit(9)
    rotate(keys, ("timestamp",), now=NOW)


def test_a_damaged_file_among_the_keys_is_named(world, command):
    world.publish(1)
    renew = ("renew", world.place.root, "--tuf", world.keys)
    other = (world.keys / "timestamp.json").read_bytes()
    for name in ("1.root.json", "targets.json", "snapshot.json"):
        path = world.keys / name
        whole = path.read_bytes()
        for damaged in (whole[: len(whole) // 2], other):
            path.write_bytes(damaged)
            for words in (renew, ("rotate", world.keys)):
                if words == renew or name == "1.root.json":
                    code, _, err = command(fleet, *words)
                    assert (code in (3, 7), str(path) in err) == (True, True), err
        path.write_bytes(whole)
    assert command(fleet, *renew)[0] == 0


# Kills and races ----------------------------------------------------------------------


class DyingPlace(FolderPlace):
    """A place whose publisher is killed before one of its writes."""

    left = 99

    def create(self, path, data):
        self._count()
        return super().create(path, data)

    def swap(self, path, data, tag):
        self._count()
        return super().swap(path, data, tag)

    def _count(self):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1


@pytest.mark.parametrize("rotated", [False, True])
def test_what_a_killed_publisher_leaves_is_accepted(world, rotated, tmp_path):
    world.look()
    if rotated:
        rotate(world.keys, ONLINE, now=NOW, owners=[owner(world)])
    head = super(TufWorld, world).publish(1)
    results, dying = [], DyingPlace(world.place.root)
    for left in range(9):
        dying.left = left
        try:
            world.mirror(head, dying)
        except KeyboardInterrupt:
            results.append(world.look().head.round)
            shutil.rmtree(world.folder)
            world.folder.mkdir()
            assert world.look().head.round == results[-1]
        else:
            break
    # Some still see the release before; whoever sees the new one sees all of it.
    assert results == sorted(results)
    assert len(results) == 4
    assert world.look().result is SyncResult.FETCHED
    assert world.apply() == head.target


def test_a_publisher_on_another_machine_loses_nothing(world):
    """Both have the keys; one comes between the other's reading and its writing."""
    other = TufWorld(world.place.root.parent)
    other.keys = world.keys.with_name("copy")
    shutil.copytree(world.keys, other.keys)
    beta = super(TufWorld, world).publish(1, name="beta")

    class Raced(FolderPlace):
        raced = False

        def create(self, path, data):
            if not self.raced and path.startswith("tuf/"):
                self.raced = True
                other.mirror(beta)
            return super().create(path, data)

    stable = super(TufWorld, world).publish(2)
    world.mirror(stable, Raced(world.place.root))
    customs = [t.custom or {} for t in world.at("targets").signed.targets.values()]
    assert {name for custom in customs for name in custom} == {"stable", "beta"}
    assert world.look().head.round == 2


def test_a_number_that_a_killed_publisher_elsewhere_took_is_left_out(world):
    for role in ("targets", "snapshot"):
        (world.place.root / f"tuf/2.{role}.json").write_bytes(b"{}")
    world.publish(1)
    assert world.look().result is SyncResult.FETCHED
    assert world.place.read("tuf/2.targets.json")[0] == b"{}"


def test_pruning_leaves_what_tuf_still_names(world):
    """Its publisher was killed before TUF learned of the newest release."""
    world.publish(1)
    super(TufWorld, world).publish(2)
    old = world.at("targets").signed.targets
    removed = prune(world.place, now=NOW * 2, grace_s=0).removed
    assert world.look().head.round == 1
    assert all(world.place.read(path) for path in old)
    world.publish(3)
    removed += prune(world.place, now=NOW * 2, grace_s=0).removed
    old = {"tuf/1.targets.json", "tuf/2.targets.json", "tuf/2.snapshot.json"}
    assert old <= {entry.path for entry in removed}
    assert world.look().result is SyncResult.FETCHED
    assert world.mirror(world.head).changed is False


# A device -----------------------------------------------------------------------------


def test_the_first_root_comes_from_a_person_and_stays(world):
    with pytest.raises(TrustError, match="--tuf-root"):
        world.look(root=None)
    world.look()
    assert world.look(root=None).result is SyncResult.CURRENT
    stranger = make_folder(world.keys.with_name("others"), now=NOW)
    with pytest.raises(TrustError, match="another root"):
        world.look(root=stranger)
    shutil.rmtree(world.folder / ".sync.tuf")
    (world.keys / "no.json").write_text("{}")
    with pytest.raises(TrustError, match="TUF"):
        world.look(root="no.json")
    assert world.look().result is SyncResult.CURRENT


def test_what_is_renewed_is_believed_for_longer_than_the_head(world):
    """So the key of releases may stay where it is; what is told says so."""
    head = world.publish(1)
    world.now = NOW + 29 * DAY
    world.mirror(now=world.now)
    world.now = head.expires + DAY
    assert world.look().result is SyncResult.FETCHED
    known = read_known(world.folder)
    assert (known.problem, known.head.expires) == ("", NOW + 59 * DAY)


def test_what_a_clock_dated_too_late_is_signed_anew(world):
    world.publish(1)
    world.mirror(now=NOW + 20 * 365 * DAY)
    world.mirror()
    expiry = [world.at(role).signed.expires.timestamp() for role in ONLINE]
    assert max(expiry) == NOW + 365 * DAY
    assert min(expiry) == NOW + 30 * DAY


def test_a_pause_holds_for_tuf_too(world):
    world.publish(1, pausers=(public_key(PAUSER),))
    good = world.head_bytes
    world.head_bytes = pause_head(good, PAUSER, at=NOW)
    assert world.look().result is SyncResult.PAUSED
    world.head_bytes = good
    assert world.look().result is SyncResult.PAUSED
    world.publish(2)
    assert world.look().result is SyncResult.FETCHED


def test_wire_bytes_with_tuf(world, server):
    """A poll at most 1.3 kB, an update at most 5.2 kB beside its patch; 5 targets."""
    for number in (1, 2, 3, 4):
        world.publish(number)
    assert len(world.at("targets").signed.targets) >= 5
    found = world.look(HttpSource(server.url))
    patches = sum((world.folder / name).stat().st_size for name in found.fetched)
    update, before = server.bytes - patches, server.bytes
    assert abs(found.spent - server.bytes) <= 500  # what counts against budgets
    world.apply()
    assert world.look(HttpSource(server.url)).result is SyncResult.CURRENT
    assert server.bytes - before <= 1300
    assert update <= 5200


def test_a_budget_counts_metadata_before_it_comes(world, server):
    world.publish(1)
    world.options = type(world.options)(device="board 7", day_bytes=1500)
    found = world.look(HttpSource(server.url))
    assert found.result is SyncResult.OVER_BUDGET
    assert server.bytes <= 1500


# The commands -------------------------------------------------------------------------


def test_the_commands_make_publish_renew_and_rotate(world, command, tmp_path):
    key, keys, to = tmp_path / "key.pem", tmp_path / "new", tmp_path / "www"
    key.write_bytes(encode_private(KEY))
    words = ("--runs", world.run.parent, "--to", to, "--sign", key, "--tuf", keys)
    code, out, err = command(fleet, "publish", "round_01", *words, "--json")
    record = json.loads(out)["tuf"]
    assert (code, record["changed"], record["root"], record["version"]) == (
        0,
        True,
        1,
        1,
    )
    assert "root.pem off this machine" in err
    code, out, _ = command(fleet, "publish", "round_01", *words)
    assert (code, "as it was" in out.splitlines()[-1]) == (0, True)
    code, out, _ = command(
        fleet, "rotate", keys, "timestamp", "--key", keys / "root.pem"
    )
    assert (code, (keys / "2.root.json").exists()) == (0, True)
    code, out, _ = command(fleet, "renew", to, "--tuf", keys, "--json")
    assert (code, json.loads(out)["root"]) == (0, 2)
    assert (to / "tuf/2.root.json").exists()


def test_check_asks_as_a_new_device_would(world, command):
    """Whole, behind the head, over, and signed by others."""
    root = world.keys / "1.root.json"

    def state(now=NOW, given=root):
        read = lambda path, _: (world.place.read(path) or [None])[0]  # noqa: E731
        signed = read_head(world.head_bytes)
        return check_tuf(read, "stable", signed, given, now=now).state

    world.publish(1)
    assert state() is State.OK
    words = ("check", world.place.root, "--tuf-root", root)
    code, out, _ = command(fleet, *words)
    assert (code, "timestamp 2, snapshot 2, targets 2" in out) == (0, True)
    assert state(now=NOW + 25 * DAY) is State.NOTE
    assert state(now=NOW + 31 * DAY) is State.WRONG
    others = make_folder(world.keys.with_name("others"), now=NOW)
    assert state(given=others) is State.UNTRUSTED
    super(TufWorld, world).publish(2)
    assert state() is State.WRONG


def test_taking_a_release_back_reaches_devices_that_believe_tuf(
    world, command, tmp_path
):
    key = tmp_path / "key.pem"
    key.write_bytes(encode_private(KEY))
    world.publish(1)
    world.now = time.time()
    words = ("--runs", world.run.parent, "--to", world.place.root, "--sign", key)
    code, _, err = command(fleet, "revert", *words)
    assert (code, "again with --tuf DIR" in err) == (0, True)
    code, out, _ = command(fleet, "publish", "round_00", *words, "--tuf", world.keys)
    assert (code, "tuf     version 3" in out) == (0, True)
    assert world.look().head.round == 0


def test_keys_inside_of_what_is_given_out_are_refused_before_they_are_made(
    world, command, tmp_path
):
    words = ("--runs", world.run.parent, "--to", tmp_path / "www")
    inside = tmp_path / "www" / "keys"
    code, _, err = command(fleet, "publish", "round_01", *words, "--tuf", inside)
    assert (code, inside.exists(), "keys stay outside" in err) == (2, False, True)
