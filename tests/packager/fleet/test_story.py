# SPDX-License-Identifier: Apache-2.0
"""A bad release, from its publication to the day after, with every part real."""

import json
import shutil
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from edge_runtime.agent.agent import Agent
from edge_runtime.cli.main import main as edge
from edge_runtime.formats.signing import Trust
from edge_runtime.live.outbox import Outbox
from edge_runtime.update.device import Device
from edge_runtime.update.trial import run_trial
from packager.cli.fleet import fleet
from packager.fleet.database import open_database
from packager.fleet.provision import Order, provision
from packager.keys import write_key_pair
from tests.crash.world import edit_contract, no_trial
from tests.packager.fleet.certificates import make_server

BOARDS = ("board-0001", "board-0002", "board-0003")
ALL_WELL = {"proved": 3, "tried": 3, "failed": 0, "halted": False, "paused": False}


class DropBox(ThreadingHTTPServer):
    """What a web server does for reports: whose certificate it is may write there."""

    daemon_threads = True

    def __init__(self, root, certificate, ca):
        super().__init__(("127.0.0.1", 0), Putter)
        self.root, self.codes = root, []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        context.load_verify_locations(ca)
        context.verify_mode = ssl.CERT_REQUIRED
        self.socket = context.wrap_socket(self.socket, server_side=True)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"https://127.0.0.1:{self.server_port}"


class Putter(BaseHTTPRequestHandler):
    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        subject = dict(pair for (pair,) in self.connection.getpeercert()["subject"])
        own = self.path.startswith(f"/reports/{subject['commonName']}/")
        code = 201 if own and len(data) <= 65_536 else 403
        self.server.codes.append(code)
        if code == 201:
            path = self.server.root / self.path.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        self.send_response_only(code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


class Story:
    """A fleet of three, its publisher, and who watches it."""

    def __init__(self, run, path, command):
        self.run, self.path, self.command = run, path, command
        self.www, self.cards = path / "www", path / "cards"
        for name in ("release", "watch"):
            write_key_pair(path / f"{name}.pem")
        order = Order(certificates=True)
        assert provision(self.cards, 3, order) == list(BOARDS)
        self.fleet("publish", "round_00", *self.to, "--pauser", self.pem("watch.pub"))
        bundle = next((self.www / "bundles").iterdir())
        key = public_key_of(path / "release.pub.pem")
        for name in BOARDS:
            (path / name / "in").mkdir(parents=True)
            store = path / name / "store"
            Device.install(store, bundle, trust=Trust((key,)), trial=no_trial)
            shutil.copy(self.cards / name / "device.key", store)

    def pem(self, name):
        return self.path / f"{name}.pem"

    @property
    def to(self):
        runs = "--runs", self.run.path.parent
        return *runs, "--to", self.www, "--sign", self.pem("release")

    def fleet(self, *args):
        code, out, err = self.command(fleet, *args, "--json")
        assert code == 0, err
        return json.loads(out)

    def watch(self):
        found = self.fleet(
            *("watch", self.www, "--once", "--devices", self.cards / "keys"),
            *("--trust", self.pem("release.pub"), "--db", self.path / "fleet.db"),
            *("--halt-at", "20%", "--halt-least", "1"),
            *("--pause-key", self.pem("watch"), "--run", self.run.path),
        )
        return {k: found[k] for k in ("proved", "tried", "failed", "halted", "paused")}

    def sync(self, name, *report):
        folder = self.path / name
        args = "--store", folder / "store", "sync", self.www, folder / "in"
        code, out, err = self.command(edge, *args, "--device", name, "--json", *report)
        assert code == 0, err
        return json.loads(out)["result"]

    def day(self, name, trial, *report):
        """A device looks, applies and reports."""
        self.sync(name, *report)
        store = self.path / name / "store"
        open_device = lambda: Device.open(store, trial=trial)  # noqa: E731
        Agent(open_device, self.path / name / "in", lambda *_, **__: None).look()
        self.sync(name, *report)

    def rows(self, what, table):
        with open_database(self.path / "fleet.db") as connection:
            return connection.execute(f"SELECT {what} FROM {table}").fetchall()


def public_key_of(path):
    from edge_runtime.formats.signing import load_public

    return load_public(path.read_bytes(), str(path))


@pytest.fixture
def story(run, tmp_path, command):
    return Story(run, tmp_path, command)


@pytest.fixture
def box(story, tmp_path):
    ca = story.cards / "ca"
    certificate = make_server(tmp_path / "server.pem", ca)
    with DropBox(story.www, certificate, ca / "ca.pem") as server:
        yield server
        server.shutdown()


def target(run, number):
    return json.loads((run.path / f"round_{number:02d}/round.json").read_text())[
        "target"
    ]


def test_a_bad_release_is_seen_halted_and_taken_back(story, box, run):
    first, second, third = BOARDS
    client = ["--ca", story.cards / "ca/ca.pem", "--report", box.url]
    by_https = {b: [*client, "--cert", story.cards / b / "client.pem"] for b in BOARDS}
    ways = by_https | {second: ["--report", story.www]}
    # On the third board the new release is not good enough.
    store = story.path / third / "store"
    trials = dict.fromkeys(BOARDS, no_trial) | {third: run_trial}

    for name in BOARDS:
        story.day(name, trials[name], *ways[name])
    assert story.watch() == ALL_WELL

    story.fleet("publish", "round_01", *story.to)
    edit_contract(store, accuracy_floor=1)
    for name in BOARDS:
        story.day(name, trials[name], *ways[name])
    assert story.watch() == ALL_WELL | {"failed": 1, "halted": True, "paused": True}
    running = dict(story.rows("id, target", "device"))
    assert running == {
        first: target(run, 1),
        second: target(run, 1),
        third: target(run, 0),
    }
    (reason,) = story.rows("reason", "device WHERE outcome = 'refused'")[0]
    assert "accuracy" in reason
    edit_contract(store, accuracy_floor=0)

    done = story.fleet("revert", *story.to)
    assert (done["round"], done["counter"]) == (0, 2)
    for name in BOARDS:
        story.day(name, trials[name], *ways[name])
    assert story.watch() == ALL_WELL
    assert story.rows("id, target, counter, outcome, proved", "device") == [
        (name, target(run, 0), 2, "applied", 1) for name in BOARDS
    ]
    assert story.rows("counter, round, withdrawn", "release") == [
        (0, 0, 0),
        (1, 1, 1),
        (2, 0, 0),
    ]
    assert set(box.codes) == {201}

    # Nobody else's reports: another device's certificate opens no other's folder.
    Outbox(story.path / third / "store").add(10**17, 2, b"{}")
    story.sync(third, *by_https[first])
    assert box.codes[-1] == 403
