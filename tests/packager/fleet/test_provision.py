# SPDX-License-Identifier: Apache-2.0
"""Keys and configurations for cards: made once, whole or not, never given out."""

import json
import os
import ssl
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from edge_runtime.cli.main import main as edge
from edge_runtime.errors import KeyFileError, StoreError
from edge_runtime.files import Files
from edge_runtime.formats.signing import load_public
from edge_runtime.live.proof import read_key
from edge_runtime.live.shared import public_key
from edge_runtime.update.device import Device
from packager.bundles.from_round import build_bundle
from packager.cli.fleet import fleet
from packager.fleet.certificates import make_authority, make_client
from packager.fleet.provision import Order, config_text, provision
from packager.keys import write_key_pair
from packager.rounds.folder import read_round

URL = "https://releases.example.org/digits"


def everything(folder):
    """What lies there, less the lock, which holds nothing."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mode)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }


def test_a_second_run_adds_what_is_missing_and_changes_nothing(tmp_path):
    order = Order(settings={"DPU_URL": URL}, certificates=True)
    assert len(provision(tmp_path, 2, order)) == 2
    first = everything(tmp_path)
    made = provision(tmp_path, 4, Order(settings={"DPU_URL": "x"}, certificates=True))
    assert made == ["board-0003", "board-0004"]
    assert first.items() <= everything(tmp_path).items()
    assert provision(tmp_path, 3, order) == []


def test_private_keys_are_for_their_owner_alone_under_any_umask(tmp_path):
    old = os.umask(0)
    try:
        provision(tmp_path, 1, Order(certificates=True))
    finally:
        os.umask(old)
    private = {"device.key", "client.pem", "ca.key"}
    modes = {
        path.name: path.stat().st_mode & 0o777
        for path in tmp_path.rglob("*")
        if path.name == "device.key"
        or (path.is_file() and b"PRIVATE" in path.read_bytes())
    }
    assert modes == dict.fromkeys(private, 0o600)


def test_the_public_keys_are_those_of_the_devices(tmp_path):
    made = provision(tmp_path, 3, Order(prefix="cam"))
    listed = {path.name for path in (tmp_path / "keys").iterdir()}
    assert listed == {f"{name}.pub.pem" for name in made}
    keys = [public_key(read_key(tmp_path / name / "device.key")) for name in made]
    found = [
        load_public((tmp_path / "keys" / f"{n}.pub.pem").read_bytes(), n) for n in made
    ]
    assert found == keys
    assert len(set(keys)) == 3


def test_what_a_cut_run_leaves_the_next_one_completes(tmp_path):
    class Killed(BaseException):
        pass

    class Cut(Files):
        def sync(self, handle):
            self.left -= 1
            if not self.left:
                raise Killed
            super().sync(handle)

    order = Order(settings={"DPU_URL": URL}, certificates=True)
    for number in range(1, 40):
        folder, files = tmp_path / str(number), Cut()
        files.left = number
        with suppress(Killed):
            provision(folder, 2, order, files)
        kept = everything(folder)
        provision(folder, 2, order)
        whole = {p: d for p, d in kept.items() if "part" not in p and ".new" not in p}
        assert whole.items() <= everything(folder).items()
        for name in ("board-0001", "board-0002"):
            names = {path.name for path in (folder / name).iterdir()}
            assert names == {"device.key", "device.env", "client.pem"}
        assert not list(folder.glob(".*.part"))
        if files.left > 0:
            break
    assert 15 < number < 39, "every cut was tried"


def test_keys_are_never_written_where_devices_read(tmp_path):
    (tmp_path / "www/digits").mkdir(parents=True)
    (tmp_path / "www/digits/stable.head").touch()
    (tmp_path / "link").symlink_to(tmp_path / "www/digits")
    for folder in ("www/digits", "www/digits/cards", "www", "link/cards"):
        with pytest.raises(StoreError, match=r"stable\.head.*elsewhere"):
            provision(tmp_path / folder, 1, Order())
    assert [p.name for p in (tmp_path / "www").rglob("*")] == ["digits", "stable.head"]
    provision(tmp_path / "cards", 1, Order())


def test_keys_are_written_nowhere_above_where_devices_read(tmp_path):
    (tmp_path / "www/ann/digits").mkdir(parents=True)
    (tmp_path / "www/ann/digits/stable.head").touch()
    with pytest.raises(StoreError, match=r"holds ann/digits/stable\.head"):
        provision(tmp_path / "www", 1, Order())
    (tmp_path / "board/patches").mkdir(parents=True)
    (tmp_path / "board/patches/.sync.head").touch()  # a device's own copy
    provision(tmp_path / "board", 1, Order())


@pytest.mark.parametrize(
    "name", ["Устройства заказчика северного филиала", "x" * 99, os.fsdecode(b"\xff")]
)
def test_an_authority_is_made_whatever_its_folder_is_called(tmp_path, name):
    assert provision(tmp_path / name, 1, Order(certificates=True)) == ["board-0001"]


def test_a_key_of_another_device_is_noticed(tmp_path):
    provision(tmp_path, 2, Order())
    keys = tmp_path / "keys"
    (keys / "board-0001.pub.pem").replace(keys / "board-0002.pub.pem")
    with pytest.raises(KeyFileError, match="not the public half"):
        provision(tmp_path, 2, Order())


def test_certificates_are_not_half_there(tmp_path):
    provision(tmp_path, 1, Order())
    with pytest.raises(KeyFileError, match="without --ca"):
        provision(tmp_path, 2, Order(certificates=True))


@pytest.mark.parametrize("value", ["a b", 'x"y', "$HOME", "a\nB=c", "`id`", "\\"])
def test_a_configuration_is_only_what_shell_and_systemd_read_alike(value):
    with pytest.raises(KeyFileError, match="environment file"):
        config_text("board-1", Order(settings={"DPU_URL": value}))


def test_the_card_is_put_into_an_empty_store_and_its_device_signs(
    run, tmp_path, command
):
    write_key_pair(tmp_path / "ops.pem")
    words = ["provision", 1, "-o", tmp_path / "cards", "--url", URL, "--group", "lab"]
    words += ["--report", "https://drop.example.org/{device}?a=1&b=%20", "--ca"]
    code, out, err = command(fleet, *words, "--trust", tmp_path / "ops.pub.pem")
    assert code == 0, err
    card, store = tmp_path / "cards/board-0001", tmp_path / "store"
    assert (card / "ops.pub.pem").read_bytes() == (
        tmp_path / "ops.pub.pem"
    ).read_bytes()
    shown = f"set -a; . {card}/device.env; env"
    seen = subprocess.run(["sh", "-c", shown], capture_output=True, text=True).stdout
    for line in (
        f"DPU_URL={URL}",
        "DPU_DEVICE=board-0001",
        "DPU_GROUP=lab",
        "DPU_REPORT=https://drop.example.org/{device}?a=1&b=%20",
        "DPU_CERT=/etc/dpu-edge/client.pem",
    ):
        assert line in seen.splitlines()
    store.mkdir()
    key = (card / "device.key").read_bytes()
    (store / "device.key").write_bytes(key)
    bundle = build_bundle(read_round(run.path / "round_00"), counter=0).data
    Device.install(store, bundle)
    code, out, err = command(edge, "--store", store, "device-key")
    assert (
        out.strip() == (tmp_path / "cards/keys/board-0001.pub.pem").read_text().strip()
    )
    assert (store / "device.key").read_bytes() == key


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--url", "http://x/ y"), "cannot stand in an environment file"),
        (("--url", URL, "--group", "a b"), "cannot stand in an environment file"),
        (("--url", "releases.example.org"), "expected https://"),
        (("--url", "http://"), "expected https://"),
        (("--url", URL, "--report", "box"), "expected https://"),
        (("--url", URL, "--channel", "Stable"), "expected a to z"),
    ],
)
def test_a_card_that_could_not_work_is_not_begun(tmp_path, command, words, said):
    cards = tmp_path / "cards"
    code, _, err = command(fleet, "provision", 2, "-o", cards, *words)
    assert (code, said in err, cards.exists()) == (2, True, False), err


@pytest.mark.parametrize(
    "url", ["http://h:80/x", "file:///media/stick", "/media/stick"]
)
def test_a_card_may_name_a_server_or_a_folder(tmp_path, command, url):
    assert command(fleet, "provision", 1, "-o", tmp_path, "--url", url)[0] == 0
    assert f'DPU_URL="{url}"' in (tmp_path / "board-0001/device.env").read_text()


def test_json_says_what_was_made(tmp_path, command):
    words = ["provision", 2, "-o", tmp_path, "--url", URL, "--json"]
    code, out, _ = command(fleet, *words)
    record = json.loads(out)
    assert code == 0
    assert record["made"] == ["board-0001", "board-0002"]
    assert record["keys"] == str(tmp_path / "keys")


def test_a_tls_server_that_trusts_the_authority_knows_a_device_by_its_certificate(
    tmp_path,
):
    ours, theirs = make_authority("ours"), make_authority("theirs")
    (tmp_path / "ca.pem").write_bytes(ours.public_pem)
    people = {"server": ours, "board-7": ours, "stranger": theirs}
    for name, authority in people.items():
        (tmp_path / f"{name}.pem").write_bytes(make_client(authority, name))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "server.pem")
    server.load_verify_locations(tmp_path / "ca.pem")
    server.verify_mode = ssl.CERT_REQUIRED

    def name_seen_of(device):
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
        client.load_cert_chain(tmp_path / f"{device}.pem")
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        ends = client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True)
        for end in ends * 3:
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
        return dict(pair[0] for pair in ends[1].getpeercert()["subject"])["commonName"]

    assert name_seen_of("board-7") == "board-7"
    with pytest.raises(ssl.SSLCertVerificationError, match="local issuer"):
        name_seen_of("stranger")


def test_two_runs_at_once_make_each_device_once(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(provision, tmp_path, 12, Order()) for _ in range(2)]
    made = [name for run in runs for name in run.result()]
    assert sorted(made) == [f"board-{number:04d}" for number in range(1, 13)]
    assert len(list((tmp_path / "keys").iterdir())) == 12


@pytest.mark.parametrize("name", ["device.key", "client.pem", "device.env"])
def test_no_file_to_be_trusted_replaces_one_of_a_devices_own(tmp_path, name):
    order = Order(trusted={name: b"other"}, certificates=True)
    with pytest.raises(KeyFileError, match=name):
        provision(tmp_path / "cards", 1, order)
    assert not (tmp_path / "cards").exists()
