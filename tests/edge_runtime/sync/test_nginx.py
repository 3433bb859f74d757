# SPDX-License-Identifier: Apache-2.0
"""dpu-edge sync and nginx, as examples/fleet configures it, over links that break."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.cli.main import main
from edge_runtime.errors import SyncError
from edge_runtime.sync.http import HttpSource
from edge_runtime.sync.plan import SyncResult
from packager.fleet.provision import Order, provision
from tests.conftest import RunOnDisk
from tests.edge_runtime.sync.certificates import Authority
from tests.edge_runtime.sync.nginx import cutting, running_nginx
from tests.edge_runtime.sync.world import World

pytestmark = pytest.mark.fleet

LARGE = {"fc1.weight": (256, 12), "fc1.bias": (256,)}
LARGE |= {"fc2.weight": (4, 256), "fc2.bias": (4,)}
PLAIN = {"listen 127.0.0.1:8443 ssl;": "listen 127.0.0.1:8443;"}
OFFSETS = 200


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A channel whose patch has 17 kB, a device at the round before, certificates."""
    base = tmp_path_factory.mktemp("large")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.conftest.SHAPES", LARGE)
        run, rng = RunOnDisk(base / "runs" / "tiny"), np.random.default_rng(5)
        for number in (0, 1):
            run.add(
                number,
                {n: rng.normal(size=s).astype("f4") for n, s in LARGE.items()},
            )
    world = World(base)
    world.publish(0)
    world.install()
    world.publish(1)
    (base / "www").rename(base / "tree")
    (base / "www").mkdir()
    (base / "tree").rename(base / "www" / "tiny")
    Authority(base / "ca").certify("server").rename(base / "server.pem")
    shutil.copy(base / "server.pem", base / "server.key")
    provision(base / "cards", 2, Order(certificates=True))
    return base


@pytest.fixture
def base(published, tmp_path):
    shutil.copytree(published, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def start(base, command):
    """Run dpu-edge sync as it is typed; its exit code and what it said."""

    def run(url, *options):
        code, out, err = command(
            main,
            "--store",
            base / "store",
            "sync",
            url,
            base / "in",
            "--json",
            *options,
        )
        return code, json.loads(out) if out else {}, err

    return run


def whole(base):
    """Return the fetched patch; there is one, and it is what was published."""
    (path,) = (base / "in").glob("*.dpu")
    data = path.read_bytes()
    assert data == (base / "www" / "tiny" / "patches" / path.name).read_bytes()
    return data


def begin_anew(base):
    shutil.rmtree(base / "in")
    (base / "in").mkdir()


def of_patches(answers):
    """Return how many bytes of patches are in what a proxy passed on, unencrypted."""
    count = 0
    for answer in answers:
        # A connection begins with the answer for the head.
        for part in bytes(answer).split(b"HTTP/1.1 20")[1:]:
            headers, _, body = part.partition(b"\r\n\r\n")
            count += len(body) if b"immutable" in headers else 0
    return count


@pytest.mark.parametrize("reset", [False, True], ids=["ended", "reset"])
def test_a_cut_at_any_byte_brings_no_byte_twice(base, start, reset, capsys):
    with running_nginx(base, PLAIN) as (port, _), cutting(port) as proxy:
        url = f"http://{proxy.url}/tiny"
        assert start(url)[0] == 0
        size, length = len(whole(base)), len(proxy.answers[0])
        offsets = np.unique(np.linspace(1, length - 1, OFFSETS, dtype=int))
        twice = []
        for offset in offsets:
            begin_anew(base)
            proxy.answers.clear()
            proxy.cuts, proxy.after, proxy.reset = 0, int(offset), reset
            code, _, err = start(url)
            assert (code, proxy.cuts) == (10, 1), err
            proxy.after = None
            assert start(url)[0] == 0
            assert len(whole(base)) == size
            twice.append(of_patches(proxy.answers) - size)
    with capsys.disabled():
        print(f" {len(offsets)} cuts of {length} B: {sum(twice)} B twice", end=" ")
    # What a reset throws away was not read by anybody, and has to come again.
    assert max(twice) <= (16 << 10 if reset else 0)
    assert min(twice) >= 0


def test_a_link_that_always_breaks_gets_on_by_small_records(base, start):
    with running_nginx(base) as (port, _), cutting(port) as proxy:
        url, proxy.after = f"https://{proxy.url}/tiny", 6000
        for _ in range(20):
            code, _, err = start(url, "--ca", base / "ca" / "ca.pem")
            if code == 0:
                break
            assert code == 10, err
        assert proxy.cuts >= 3
        whole(base)


def test_with_large_records_it_would_never_get_on(base, start):
    """Why the example sets ssl_buffer_size: nginx's own 16 kB bring nothing."""
    usual = {"ssl_buffer_size 1400;": ""}
    with running_nginx(base, usual) as (port, _), cutting(port) as proxy:
        url, proxy.after = f"https://{proxy.url}/tiny", 6000
        for _ in range(4):
            assert start(url, "--ca", base / "ca" / "ca.pem")[0] == 10
    assert not any(path.stat().st_size for path in (base / "in").glob(".*.part"))


def test_a_file_that_was_put_there_again_is_fetched_anew(base, start):
    with running_nginx(base, PLAIN) as (port, _), cutting(port) as proxy:
        url, proxy.after = f"http://{proxy.url}/tiny", 9000
        assert start(url)[0] == 10
        for path in (base / "www" / "tiny" / "patches").iterdir():
            os.utime(path, (1, 1))  # another tag of nginx's: time and size
        proxy.answers.clear()
        proxy.after = None
        assert start(url)[0] == 0
        assert of_patches(proxy.answers) == len(whole(base))


def test_a_trickle_ends_at_the_lowest_rate(base, monkeypatch):
    monkeypatch.setattr("edge_runtime.sync.channel.HEAD_DEADLINE_S", 1.0)
    monkeypatch.setattr("edge_runtime.sync.downloads.EXCHANGE_S", 1.0)
    slow = PLAIN | {"root www;": "root www; limit_rate 1000;"}
    world = World(base)
    world.options = type(world.options)(device="board 7", slowest=1e9)
    with running_nginx(base, slow) as (port, _):
        with pytest.raises(SyncError, match=r"within|less than|broke off"):
            world.look(HttpSource(f"http://127.0.0.1:{port}/tiny"))
        world.options = type(world.options)(device="board 7")
        found = world.look(HttpSource(f"http://127.0.0.1:{port}/tiny"))
    assert found.result is SyncResult.FETCHED


def test_redirections_go_to_another_host_and_never_out_of_tls(base, start):
    with running_nginx(base, PLAIN) as (port, _):
        for away in ("http", "https"):
            other = base / away
            other.mkdir()
            for name in ("server.pem", "server.key", "cards"):
                (other / name).symlink_to(base / name)
            onward = f"return 302 http://127.0.0.1:{port}$request_uri;"
            changes = {"limit_except GET { deny all; }": onward}
            changes |= PLAIN if away == "http" else {}
            with running_nginx(other, changes) as (there, _):
                url = f"{away}://127.0.0.1:{there}/tiny"
                begin_anew(base)
                code, found, err = start(url, "--ca", base / "ca" / "ca.pem")
                if away == "http":
                    assert (code, found["result"]) == (0, "fetched"), err
                else:
                    assert code == 10
                    assert "anybody on the way" in err


def test_an_authority_that_nobody_knows_is_refused(base, start, tmp_path):
    other = Authority(tmp_path / "other")
    with running_nginx(base) as (port, _):
        url = f"https://127.0.0.1:{port}/tiny"
        assert start(url, "--ca", other.ca)[0] == 10
        assert start(url, "--ca", base / "ca" / "ca.pem")[0] == 0


# The drop box -------------------------------------------------------------------------


class Box:
    """Puts files into the drop box as curl would, with the path as it is given."""

    def __init__(self, base, port):
        self.base, self.port = base, port

    def put(self, path, data=b"{}", *, device="board-0001", method="PUT"):
        code = (
            "import http.client, ssl, sys\n"
            "port, ca, cert, method, path = sys.argv[1:]\n"
            "context = ssl.create_default_context(cafile=ca)\n"
            "if cert: context.load_cert_chain(cert)\n"
            "link = http.client.HTTPSConnection('127.0.0.1', port, context=context)\n"
            "link.request(method, path, sys.stdin.buffer.read())\n"
            "print(link.getresponse().status)\n"
        )
        cert = str(self.base / "cards" / device / "client.pem") if device else ""
        ca = str(self.base / "ca" / "ca.pem")
        words = [sys.executable, "-c", code, str(self.port), ca, cert, method, path]
        done = subprocess.run(words, input=data, capture_output=True, check=True)
        return int(done.stdout)


@pytest.fixture
def box(base):
    with running_nginx(base) as (_, port):
        yield Box(base, port)


def test_a_device_puts_its_own_reports_again_too(box):
    path = "/tiny/reports/board-0001/17.json"
    assert [box.put(path), box.put(path, b"[]")] == [201, 204]
    assert (box.base / "www" / path[1:]).read_bytes() == b"[]"


@pytest.mark.parametrize(
    "path",
    [
        "/tiny/reports/board-0002/17.json",
        "/tiny/reports/board-0001/../board-0002/17.json",
        "/tiny/reports/board-0001/%2e%2e/board-0002/17.json",
        "/tiny/reports/board-0001/../../stable.head",
        "/tiny/reports/board-0001/17.txt",
        "/tiny/reports/board-0001/more/17.json",
        "/tiny/stable.head",
        "/stable.head",
    ],
)
def test_a_device_puts_nothing_elsewhere(box, path):
    before = sorted(Path(box.base / "www").rglob("*"))
    assert box.put(path) == 403
    assert sorted(Path(box.base / "www").rglob("*")) == before


def test_a_device_makes_no_model_of_its_own(box):
    assert box.put("/evil/reports/board-0001/17.json") == 404
    assert not (box.base / "www" / "evil").exists()


def test_a_report_has_at_most_64_kilobytes(box):
    path = "/tiny/reports/board-0001/17.json"
    assert box.put(path, b"x" * (64 << 10)) == 201
    assert box.put(path, b"x" * ((64 << 10) + 1)) == 413


def test_nobody_puts_without_a_certificate_or_reads_or_removes(box):
    path = "/tiny/reports/board-0001/17.json"
    assert box.put(path, device="") == 400
    assert box.put(path) == 201
    for method in ("GET", "DELETE", "POST"):
        assert box.put(path, b"", method=method) in (403, 405)
