# SPDX-License-Identifier: Apache-2.0
"""The attacks of TUF's list on a channel, one named test for each and for each way.

The table of SECURITY.md is this file. Most tests run for both ways to know what is
newest: a channel's own head, and TUF metadata (``--tuf``). Attacks on key lists are in
tests/edge_runtime/trust/test_attacks.py, those on patches and bundles in
tests/hostile/test_attacks.py.
"""

import shutil
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata

from edge_runtime.errors import HeadError, SyncError, TrustError
from edge_runtime.files import Files
from edge_runtime.formats.signing import Trust
from edge_runtime.live.shared import public_key
from edge_runtime.sync.desk import insist_on_trust
from edge_runtime.sync.head import SHORT
from edge_runtime.sync.http import HttpSource
from edge_runtime.sync.plan import SyncResult
from edge_runtime.sync.route import cheapest
from edge_runtime.sync.state import HEAD_NAME, SLIP_S, read_sync_state
from edge_runtime.sync.tuf import FOLDER, PINNED
from edge_runtime.times import MAX_SECONDS
from edge_runtime.trust import first_root
from edge_runtime.update.device import Device
from packager.fleet.channel import add_list
from packager.fleet.head import sign_head
from packager.fleet.tuf_keys import ONLINE, TufFolder, rotate
from packager.key_lists import change_list, make_list, sign_list
from packager.keys import generate_key, load_private
from tests.edge_runtime.sync.server import FileServer
from tests.edge_runtime.sync.tls import write_certificate
from tests.edge_runtime.sync.world import KEY, NOW, OPTIONS, TufWorld, World

TIMES = ("2026-01-01T00:00:00Z", "2090-01-01T00:00:00Z")
LATE = NOW + 365 * 86_400


class OwnHead(World):
    """A channel that devices follow by its signed head."""

    changing = ("stable.head",)  # the files that say what is newest

    def sign(self, head, key=KEY, until=None):
        """Put a head there that somebody signed."""
        head = replace(head, expires=until) if until else head
        self.head_bytes = sign_head(head, [key])

    def lose_what_is_not_synced(self):
        (self.folder / HEAD_NAME).unlink()


class Tuf(TufWorld):
    """A channel that devices follow by TUF metadata."""

    changing = ("tuf/timestamp.json",)

    def lose_what_is_not_synced(self):
        for path in (self.folder / FOLDER).glob("*.json"):
            if path.name != PINNED:
                path.unlink()
        shutil.rmtree(self.folder / FOLDER / "root_history")


WAYS = {"own head": OwnHead, "tuf": Tuf}


@pytest.fixture(params=WAYS)
def way(request, template, tmp_path):
    return template(WAYS[request.param], tmp_path / "world")


@pytest.fixture
def own_head(template, tmp_path):
    return template(OwnHead, tmp_path / "world")


@pytest.fixture
def tuf(template, tmp_path):
    return template(Tuf, tmp_path / "world")


@pytest.fixture
def server(request):
    name = "tuf" if "tuf" in request.fixturenames else "way"
    world = request.getfixturevalue(name)
    with FileServer(world.place.root) as server:
        yield server
        server.shutdown()


def refused(way, error, words, source=None):
    """A look ends with an error, and brings nothing that an agent would look at."""
    with pytest.raises(error, match=words):
        way.look(source)
    assert not list(way.folder.glob("*.dpu"))


def newest(way):
    return {name: way.place.read(name)[0] for name in way.changing}


def put_back(way, files):
    for name, data in files.items():
        (way.place.root / name).write_bytes(data)


# Arbitrary software -------------------------------------------------------------------


def test_arbitrary_software_what_strangers_signed_is_refused(way):
    way.sign(way.publish(1), generate_key())
    refused(way, TrustError, "not trusted|was signed by 0/1 keys")


def test_arbitrary_software_a_file_that_is_not_what_was_named(way, server):
    """It is fetched once more, then gone around."""
    head = way.publish(1)
    state = Device.open(way.root).store.state
    starts = {state.init[:SHORT], state.active[:SHORT]}
    (wrong,) = cheapest(starts, head.target[:SHORT], head.ways)
    server.replace[f"patches/{wrong.sha256}.dpu"] = b"x" * wrong.size
    others = [other for other in head.ways if other != wrong]
    detour = cheapest(starts, head.target[:SHORT], others)
    found = way.look(HttpSource(server.url))
    assert server.bodies[f"patches/{wrong.sha256}.dpu"] == 2 * wrong.size
    assert found.fetched == tuple(f"{other.sha256}.dpu" for other in detour)
    assert way.apply() == head.target


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff" * 100, b"[" * 9999])
def test_arbitrary_software_what_says_nothing_is_refused(way, data):
    put_back(way, dict.fromkeys(way.changing, data))
    refused(way, (HeadError, TrustError), r".")


# Rollback -----------------------------------------------------------------------------


def test_rollback_what_was_newest_before_is_refused(way):
    old = newest(way)
    way.publish(1)
    assert way.look().result is SyncResult.FETCHED
    way.apply()
    way.look()
    put_back(way, old)
    refused(way, TrustError, "this device has seen|must be >= 2")


def test_rollback_after_a_power_cut_that_took_all_but_the_floors(way):
    old = newest(way)
    way.publish(1)
    way.look()
    way.apply()
    way.look()
    way.lose_what_is_not_synced()
    put_back(way, old)
    refused(way, TrustError, "this device has seen")


def test_rollback_of_tuf_metadata_that_say_the_same_of_the_channel(tuf):
    """Only their own floors tell: what they say has not changed, but when they end."""
    tuf.look()
    old = newest(tuf)
    tuf.mirror(now=NOW + 16 * 86_400)
    tuf.look()
    tuf.lose_what_is_not_synced()
    put_back(tuf, old)
    refused(tuf, TrustError, "timestamp has version 1, this device has seen 2")


def test_rollback_the_floors_are_on_the_disk_before_a_patch_is_asked_for(way, server):
    way.publish(1)

    class Watching(HttpSource):
        def get(self, path, **options):
            if path.startswith("patches/"):
                floors.append(read_sync_state(way.folder).version)
            return super().get(path, **options)

    floors = []
    way.look(Watching(server.url))
    assert floors == [2]


def test_rollback_by_a_newer_head_of_an_older_release_is_not_followed(way):
    """The floor of releases stands in the store, and in no file of sync's."""
    first = way.head
    way.publish(1)
    way.look()
    way.apply()
    way.sign(replace(first, version=9))
    (way.folder / ".sync.json").unlink()
    assert way.look().result is SyncResult.HELD
    assert not list(way.folder.glob("*.dpu"))


def test_rollback_two_heads_of_one_version_are_refused(way):
    head = way.publish(1)
    way.look()
    way.sign(replace(head, counter=9))
    with pytest.raises(TrustError, match="two heads of version"):
        way.look()


# Fast-forward -------------------------------------------------------------------------


def test_fast_forward_ends_with_the_keys_that_did_it(own_head):
    """A version and a time that no honest head ever reaches, by a stolen key."""
    way, owner, new = own_head, generate_key(), generate_key()
    one = make_list([public_key(owner)], [public_key(KEY)], TIMES)
    swap = {"targets": [public_key(new)]}, {"targets": [public_key(KEY)]}
    two = change_list(one, TIMES, add=swap[0], remove=swap[1])
    shutil.rmtree(way.root)
    way.install(trust=first_root(sign_list(one, [owner])))
    way.sign(replace(way.head, version=1 << 40, at=LATE, expires=LATE + 60))
    assert way.look().result is SyncResult.CURRENT
    (way.place.root / "stable.head").unlink()
    add_list(way.place, sign_list(two, [owner]))
    way.publish(1, signers=[new])
    refused(way, TrustError, "not trusted")  # it takes the list
    way.apply()
    assert way.look().result is SyncResult.FETCHED
    assert way.apply() == way.head.target


@pytest.mark.parametrize("lost", [False, True])
def test_fast_forward_of_tuf_ends_with_the_keys_that_did_it(tuf, lost):
    honest = newest(tuf)
    head = replace(tuf.head, version=1 << 40, at=LATE, expires=LATE + 60)
    tuf.sign(head, step=1 << 40, until=LATE + 60)
    assert tuf.look().result is SyncResult.CURRENT
    with pytest.raises(TrustError, match="dpu-fleet rotate"):
        tuf.publish(1)
    put_back(tuf, honest)
    if lost:
        tuf.lose_what_is_not_synced()
    refused(tuf, TrustError, "this device has seen" if lost else "must be >=")
    root = load_private((tuf.keys / "root.pem").read_bytes())
    rotate(tuf.keys, ONLINE, now=NOW, owners=[root])
    tuf.publish(2)
    assert tuf.look().result is SyncResult.FETCHED
    assert tuf.apply() == tuf.head.target


def test_fast_forward_a_cut_while_it_ends_leaves_nobody_behind(own_head):
    way, new = own_head, generate_key()
    way.sign(replace(way.head, version=1 << 40))
    way.look()
    device = Device.open(way.root).store
    with device.lock():
        device.commit(replace(device.state, trust=Trust((public_key(new),))))
    (way.place.root / "stable.head").unlink()
    way.publish(1, signers=[new])
    way.files = Cutting()
    with pytest.raises(KeyboardInterrupt):
        way.look()
    way.files = Files()
    assert way.look().result is SyncResult.FETCHED


class Cutting(Files):
    """The power goes once the new head has its name."""

    gone = False

    def replace(self, path, data, **options):
        if not self.gone:
            super().replace(path, data, **options)
            self.gone = path.name == HEAD_NAME
        if self.gone:
            raise KeyboardInterrupt


# Indefinite freeze --------------------------------------------------------------------


@pytest.mark.parametrize("behind", [True, False])
def test_indefinite_freeze_is_noticed_when_the_head_expires(way, behind):
    """Also by a device that is at the newest release that it was told of."""
    way.publish(1)
    if not behind:
        way.look()
        way.apply()
    way.now = way.head.expires
    assert way.look().result is SyncResult.STALE
    assert not list(way.folder.glob("*.dpu"))


def test_indefinite_freeze_a_clock_that_stands_back_brings_no_old_time_back(way):
    head = way.publish(1)
    way.look()
    way.now = 0
    way.sign(replace(head, version=9, at=NOW - 10), until=NOW - 5)
    assert way.look().result is SyncResult.STALE


def test_indefinite_freeze_by_a_publishers_clock_ends_with_the_next_head(way):
    """Dated by a slip far in the future: else all to come would be stale for ever."""
    good = way.publish(1)
    way.look()
    slip = {"at": MAX_SECONDS - 1, "expires": MAX_SECONDS}
    way.sign(replace(good, version=8, **slip), until=MAX_SECONDS)
    way.look()
    way.sign(replace(good, version=9))
    assert way.look().result is SyncResult.FETCHED


def test_indefinite_freeze_by_another_channels_old_head_is_noticed(own_head):
    way, at = own_head, NOW - 2 * SLIP_S
    head = replace(way.publish(1), channel="beta", at=at, expires=at + 60)
    way.look()
    (way.place.root / "beta.head").write_bytes(sign_head(head, [KEY]))
    way.now, way.options = 0, replace(OPTIONS, channel="beta")
    assert way.look().result is SyncResult.STALE


# Endless data -------------------------------------------------------------------------


def test_endless_data_in_what_says_what_is_newest(way, server):
    way.publish(1)
    server.endless = True
    refused(way, SyncError, "has more than", source := HttpSource(server.url))
    assert source.spent < 300_000


def test_endless_data_in_a_patch_is_cut_at_its_size(way, server):
    for way_ in way.publish(1).ways:
        server.replace[f"patches/{way_.sha256}.dpu"] = b"x" * 900_000
    refused(way, SyncError, "were said", source := HttpSource(server.url))
    assert source.spent < 300_000


def test_endless_data_a_patch_over_the_limit_is_not_begun(way, server):
    head = way.publish(1)
    huge = [replace(other, size=1 << 31) for other in head.ways]
    way.sign(replace(head, version=9, ways=tuple(huge)))
    refused(way, SyncError, "are accepted", HttpSource(server.url))
    assert not any(name.startswith("patches/") for name in server.bodies)


# Extraneous dependencies --------------------------------------------------------------


def test_extraneous_dependencies_only_what_leads_there_is_fetched(way, server):
    """There are no dependencies: a patch needs the weights it leads from."""
    way.publish(1)
    head = way.publish(2)
    extra = replace(head.ways[0], parent="ab" * 6, target="cd" * 6, sha256="ef" * 32)
    (way.place.root / f"patches/{extra.sha256}.dpu").write_bytes(b"x" * extra.size)
    (way.place.root / "patches/more.dpu").write_bytes(b"x")
    way.sign(replace(head, version=9, ways=(extra, *head.ways)))
    state = Device.open(way.root).store.state
    starts = {state.init[:SHORT], state.active[:SHORT]}
    route = cheapest(starts, head.target[:SHORT], head.ways)
    found = way.look(HttpSource(server.url))
    assert found.fetched == tuple(f"{other.sha256}.dpu" for other in route)
    asked = {name for name in server.bodies if name.startswith("patches/")}
    assert asked == {f"patches/{other.sha256}.dpu" for other in route}


# Mix-and-match, wrong software --------------------------------------------------------


def test_mix_and_match_of_channels_is_refused(way):
    way.sign(replace(way.publish(1), channel="beta"))
    refused(way, TrustError, "is of channel")


@pytest.mark.parametrize("part", ["snapshot", "targets"])
def test_mix_and_match_of_parts_of_two_releases_is_refused(tuf, server, part):
    old, _ = tuf.place.read(f"tuf/{tuf.at(part).signed.version}.{part}.json")
    tuf.publish(1)
    new = tuf.at(part).signed.version
    server.replace[f"tuf/{new}.{part}.json"] = old
    refused(tuf, TrustError, "TUF", HttpSource(server.url))


def test_wrong_software_of_another_model_is_refused(way):
    way.sign(replace(way.publish(1), model="aa" * 32))
    refused(way, TrustError, "is of model")


# Slow retrieval -----------------------------------------------------------------------


@pytest.mark.parametrize("part", ["headers", "body", "patch"])
def test_slow_retrieval_ends_at_the_lowest_rate(way, server, monkeypatch, part):
    """Each byte comes long before any timeout of a socket."""
    way.publish(1)
    source = HttpSource(server.url)
    if part == "patch":
        server.statuses = {f"patches/{w.sha256}.dpu": 503 for w in way.head.ways}
        refused(way, SyncError, "503", source)
        server.statuses = {}
    monkeypatch.setattr("edge_runtime.sync.channel.HEAD_DEADLINE_S", 0.5)
    monkeypatch.setattr("edge_runtime.sync.downloads.EXCHANGE_S", 0.5)
    server.slow = "patches/" if part == "patch" else ""
    server.pause_s, server.drip_s = (0.05, 0) if part != "headers" else (0, 0.05)
    way.options = replace(OPTIONS, slowest=1e9)
    with pytest.raises(SyncError, match="did not come within"):
        way.look(source)
    assert not list(way.folder.glob("*.dpu"))


# Key compromise -----------------------------------------------------------------------


def test_key_compromise_below_the_threshold_gives_nothing(own_head):
    way, other = own_head, generate_key()
    device = Device.open(way.root).store
    with device.lock():
        both = Trust((public_key(KEY), public_key(other)), 2)
        device.commit(replace(device.state, trust=both))
    way.sign(replace(way.head, version=9))
    refused(way, TrustError, "not trusted")


@pytest.mark.parametrize("stolen", [("timestamp",), ("timestamp", "snapshot")])
def test_key_compromise_of_keys_that_are_online_brings_no_software(tuf, stolen):
    tuf.publish(1)
    tuf.sign(replace(tuf.head, version=9), roles=stolen)
    refused(tuf, TrustError, "was signed by 0/1 keys")


def test_key_compromise_of_a_key_of_tuf_ends_with_the_next_root(tuf):
    """What the old keys sign is refused once a device has the root without them."""
    folder = TufFolder.open(tuf.keys)
    thief = next(folder.private("targets", 1, lambda _: None))
    root = load_private((tuf.keys / "root.pem").read_bytes())
    rotate(tuf.keys, ("targets",), now=NOW, owners=[root])
    tuf.publish(1)
    tuf.publish(2)
    tuf.look()
    tuf.apply()
    tuf.look()
    targets = tuf.at("targets")
    tuf.sign(replace(tuf.head, version=9, counter=9), roles=("snapshot", "timestamp"))
    made = tuf.at("targets")
    made.signatures.clear()
    made.sign(CryptoSigner(thief))
    path = tuf.place.root / f"tuf/{made.signed.version}.targets.json"
    path.write_bytes(made.to_bytes())
    assert targets.signed.version < made.signed.version
    refused(tuf, TrustError, r"targets")


# Expired metadata ---------------------------------------------------------------------


@pytest.mark.parametrize("role", ["root", *ONLINE])
@pytest.mark.parametrize("behind", [True, False])
def test_expired_metadata_of_any_role_is_believed_by_nobody(tuf, role, behind):
    """By the device's clock, and by the newest signed time where that is behind."""
    tuf.publish(1)
    past = datetime.fromtimestamp(NOW - 10 if behind else 1_600_000_000, UTC)
    made = tuf.at(role) if role != "root" else None
    if made is None:
        root = Metadata.from_bytes((tuf.keys / "1.root.json").read_bytes())
        root.signed.expires = past
        key = load_private((tuf.keys / "root.pem").read_bytes())
        root.sign(CryptoSigner(key))
        (tuf.keys / "1.root.json").write_bytes(root.to_bytes())
    else:
        tuf.sign(tuf.head, until=int(past.timestamp()), expiring=(role,))
    assert tuf.look().result is SyncResult.STALE
    assert not list(tuf.folder.glob("*.dpu"))


# Mirrors that refuse ------------------------------------------------------------------


@pytest.mark.parametrize("status", [403, 404, 410, 429, 500, 503])
def test_mirrors_that_refuse_change_nothing_and_may_come_back(way, server, status):
    way.publish(1)
    server.status = status
    refused(way, SyncError, str(status), source := HttpSource(server.url))
    before = Device.open(way.root).store.state
    server.status = 0
    assert way.look(source).result is SyncResult.FETCHED
    assert Device.open(way.root).store.state == before


@pytest.mark.parametrize("status", [403, 404])
def test_mirrors_that_refuse_a_new_root_bring_no_old_key_back(tuf, server, status):
    """The old root holds until it expires, as if it were the newest."""
    tuf.look(HttpSource(server.url))
    root = load_private((tuf.keys / "root.pem").read_bytes())
    rotate(tuf.keys, ONLINE, now=NOW, owners=[root])
    tuf.publish(1)
    tuf.publish(2)
    server.statuses = {"tuf/2.root.json": status}
    refused(tuf, TrustError, "was signed by 0/1 keys", HttpSource(server.url))
    server.statuses = {}
    assert tuf.look(HttpSource(server.url)).result is SyncResult.FETCHED
    server.statuses = {"tuf/3.root.json": status}
    tuf.lose_what_is_not_synced()
    assert tuf.look(HttpSource(server.url)).result is SyncResult.FETCHED
    server.statuses = {"tuf/2.root.json": status}
    tuf.lose_what_is_not_synced()
    with pytest.raises(TrustError):
        tuf.look(HttpSource(server.url))


def test_mirrors_that_say_nothing_is_new_before_anything_was_asked(way, server):
    way.publish(1)
    server.status = 304
    refused(way, SyncError, "304", HttpSource(server.url))


# Plain http ---------------------------------------------------------------------------


def test_plain_http_is_for_devices_that_trust_keys(way):
    insist_on_trust("http://example.org", way.root)
    shutil.rmtree(way.root)
    way.install(trust=None)
    with pytest.raises(TrustError, match="https://"):
        insist_on_trust("http://example.org", way.root)
    insist_on_trust("https://example.org", way.root)


def test_plain_http_is_not_where_a_server_may_send_on_to(way, server, tmp_path):
    certificate = write_certificate(tmp_path)
    way.publish(1)
    with FileServer(way.place.root, certificate) as tls:
        tls.onward = server.url  # which an http:// server may do
        source = HttpSource(tls.url, ca=str(certificate))
        refused(way, SyncError, "anybody on the way can change", source)
        tls.onward = ""
        assert way.look(source).result is SyncResult.FETCHED
        tls.shutdown()
