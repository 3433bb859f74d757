# SPDX-License-Identifier: Apache-2.0
"""Reports on their way: at least once, within budgets, never before an update."""

import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from edge_runtime.errors import AddressError, SyncError
from edge_runtime.live.outbox import Kind, Outbox, read_told
from edge_runtime.sync import http
from edge_runtime.sync.desk import SyncOptions
from edge_runtime.sync.plan import SyncResult
from edge_runtime.sync.source import FolderSource
from edge_runtime.sync.sync import Sync
from edge_runtime.sync.uploads import (
    FIRST_WAIT_S,
    REFUSED_S,
    FolderOutlet,
    Uploads,
    open_outlet,
    target_of,
)
from tests.edge_runtime.sync.test_wire import forever, serving
from tests.edge_runtime.sync.world import World


class DropBox(ThreadingHTTPServer):
    """Takes what is put, or answers with a status."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Putter)
        self.status, self.got, self.asked, self.bytes = 201, {}, [], 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/digits"


class Putter(BaseHTTPRequestHandler):
    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        head = len(self.raw_requestline) + len(bytes(self.headers)) + 2
        self.server.bytes += len(data) + head
        self.server.asked.append(self.path)
        status = self.server.status
        if status < 300:
            self.server.got[self.path] = data
        self.send_response_only(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@contextmanager
def drop_box():
    with DropBox() as server:
        yield server
        server.shutdown()


@pytest.fixture
def box():
    with drop_box() as server:
        yield server


class Board(World):
    """A device whose agent left three reports."""

    def prepare(self, outlet):
        self.said, self.time = [], 0.0
        self.options = SyncOptions(device="board7", group="lab")
        for n, kind in ((1, Kind.DAILY), (2, Kind.CHANGE), (3, Kind.FAILURE)):
            Outbox(self.root).add(n, kind, b'{"n":%d}' % n)
        self.uploads = Uploads(outlet, self.said.append, lambda: self.time)
        return self

    def look(self, source=None):
        source = source or FolderSource(self.place.root)
        made = Sync(
            *(self.root, self.folder, source, self.options),
            clock=lambda: self.now,
            uploads=self.uploads,
        )
        return made.look()


@pytest.fixture
def board(template, tmp_path):
    return template(Board, tmp_path / "world")


def test_reports_go_to_their_own_places_failures_first(board, box):
    board.prepare(open_outlet(box.url))
    board.look()
    paths = [f"/digits/reports/board7/{n}.json" for n in (3, 2, 1)]
    assert box.asked == paths
    assert box.got[paths[0]] == b'{"n":3}'
    assert read_told(board.folder).sent == (1, 2, 3)


def test_what_was_sent_is_not_sent_again_over_restarts_too(board, box):
    board.prepare(open_outlet(box.url))
    board.look()
    board.uploads = Uploads(open_outlet(box.url), board.said.append)
    board.look(), board.look()
    assert len(box.asked) == 3


def test_what_cannot_be_noted_is_not_sent_in_a_loop(board, box, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    board.prepare(open_outlet(box.url))
    monkeypatch.setattr("edge_runtime.sync.sync.write_told", full)
    board.look(), board.look()
    assert len(box.asked) == 3


def test_reports_go_into_a_folder(board, tmp_path):
    (tmp_path / "stick").mkdir()
    board.prepare(open_outlet(f"file://{tmp_path}/stick"))
    board.look()
    found = sorted((tmp_path / "stick/reports/board7").iterdir())
    assert [path.name for path in found] == ["1.json", "2.json", "3.json"]


def test_a_folder_that_is_not_mounted_is_not_made(board, tmp_path):
    board.prepare(FolderOutlet(tmp_path / "stick"))
    board.look()
    assert not (tmp_path / "stick").exists()
    assert "mounted" in board.said[0]


@pytest.mark.parametrize("outlet", ["http://127.0.0.1:9/x", "{}/none", "@{}/none"])
def test_no_report_is_in_the_way_of_an_update(board, outlet, tmp_path):
    board.prepare(open_outlet(outlet.format(tmp_path)))
    board.publish(1)
    found = board.look()
    assert found.result is SyncResult.FETCHED
    assert len(board.said) == 1
    assert len(Outbox(board.root).waiting()) == 3


def test_reports_are_sent_though_the_channel_gives_no_answer(board, box, tmp_path):
    board.prepare(open_outlet(box.url))
    with pytest.raises(SyncError):
        board.look(FolderSource(tmp_path / "nothing"))
    assert len(box.got) == 3


def test_a_server_that_is_busy_is_asked_later_and_later(board, box):
    board.prepare(open_outlet(box.url))
    box.status, times = 503, []
    for second in range(0, 200, 10):
        board.time, before = float(second), len(box.asked)
        board.look()
        times += [second] * (len(box.asked) - before)
    assert times == [0, 10, 30, 70, 150]  # one report each, and twice the pause
    assert len(board.said) == 1
    box.status, board.time = 201, 1000.0
    board.look()
    assert len(box.got) == 3


@pytest.mark.parametrize("status", [400, 403, 404, 413, 301])
def test_a_server_that_refuses_is_asked_again_after_hours_and_said_once(
    board, box, status
):
    board.prepare(open_outlet(box.url))
    box.status = status
    for second in range(0, int(REFUSED_S), 3600):
        board.time = float(second)
        board.look()
    assert len(box.asked) == 3
    assert len(board.said) == 1
    assert str(status) in board.said[0]
    board.time, box.status = REFUSED_S + 1, 204
    board.look()
    assert len(box.got) == 3


def test_one_report_that_is_refused_holds_no_other_back(board, box):
    board.prepare(open_outlet(box.url))
    taken = Putter.do_PUT

    class Picky(Putter):
        def do_PUT(self):
            self.server.status = 413 if self.path.endswith("/3.json") else 201
            taken(self)

    box.RequestHandlerClass = Picky
    board.look()
    assert read_told(board.folder).sent == (1, 2)


@pytest.mark.parametrize("status", [409, 412])
def test_what_a_store_has_already_is_sent(board, box, status):
    board.prepare(open_outlet(box.url))
    box.status = status
    board.look()
    assert read_told(board.folder).sent == (1, 2, 3)


def test_reports_count_against_budgets_and_wait_for_them(board, box):
    board.prepare(open_outlet(box.url))
    before = board.look()
    assert abs(before.spent - box.bytes - 3 * 40) <= 300
    Outbox(board.root).add(9, Kind.FAILURE, b"{}")
    board.options = replace(board.options, day_bytes=before.spent + 10)
    board.look()
    assert len(box.got) == 3
    assert "bytes were spent today" in board.said[-1]


def test_reports_wait_while_every_byte_is_dear(board, box):
    board.prepare(open_outlet(box.url))
    board.options = replace(board.options, metered=True)
    board.look()
    assert not box.asked
    board.options = replace(board.options, metered=False)
    board.look()
    assert len(box.got) == 3


def test_a_secret_address_is_read_each_time_and_never_said(board, box, tmp_path):
    secret = tmp_path / "address"
    base = box.url.removesuffix("/digits")
    secret.write_text(f"{base}/{{device}}/{{n}}?X-Signature=secret\n")
    board.prepare(open_outlet(f"@{secret}"))
    board.look()
    assert box.asked[0] == "/board7/3?X-Signature=secret"
    secret.write_text("http://127.0.0.1:9/x?X-Signature=secret")
    Outbox(board.root).add(9, Kind.FAILURE, b"{}")
    board.look()
    assert len(board.said) == 1
    assert "secret" not in board.said[0]


def test_an_answer_that_drips_ends_with_the_exchange(board, monkeypatch):
    monkeypatch.setattr(http, "EXCHANGE_S", 0.3)

    def drip():
        yield b"HTTP/1.1 201 X\r\n"
        yield from forever(b"A: b\r\n", 0.05)

    with serving(drip) as server:
        board.prepare(open_outlet(f"http://{server.address}"))
        board.publish(1)
        assert board.look().result is SyncResult.FETCHED
    assert board.said == ["reports wait: 127.0.0.1 did not come within 0.3 s"]


def test_a_secret_that_is_no_address_is_in_the_way_of_nothing(board, tmp_path):
    secret = tmp_path / "address"
    secret.write_text("https://[x/?sig=secret")
    board.prepare(open_outlet(f"@{secret}"))
    board.publish(1)
    assert board.look().result is SyncResult.FETCHED
    assert "no address" in board.said[0]
    assert "sig=" not in board.said[0]


def test_an_address_that_was_signed_beforehand_is_used_as_it_is():
    assert target_of("https://s3/r/b.json?sig=x", "b", 1) == "https://s3/r/b.json?sig=x"


@pytest.mark.parametrize("path", ["/r?sig=x", "/{device}.json"])
def test_at_one_address_the_newest_report_stays(board, box, path):
    board.prepare(open_outlet(box.url + path))
    Outbox(board.root).add(4, Kind.CHANGE, b"newest")
    box.status = 503
    board.look()
    assert read_told(board.folder).sent == ()
    box.status, board.time = 201, 1000.0
    board.look()
    assert list(box.got.values()) == [b"newest"]
    assert read_told(board.folder).sent == (1, 2, 3, 4)
    Outbox(board.root).add(5, Kind.DAILY, b"newer")
    board.look()
    assert list(box.got.values()) == [b"newer"]


@pytest.mark.parametrize("address", ["ftp://x/y", "s3://bucket/x"])
def test_an_address_that_nothing_can_be_sent_to_is_refused(address):
    with pytest.raises(AddressError, match="expected https"):
        open_outlet(address)


def test_an_address_that_is_none_is_refused():
    with pytest.raises(AddressError, match="no address"):
        open_outlet("https://[x/?sig=1")


def test_a_look_tells_the_agent_what_its_reports_should_answer(board, box):
    board.prepare(open_outlet(box.url))
    board.publish(1)
    board.look()
    told = read_told(board.folder)
    head = board.head
    assert (told.device, told.group) == ("board7", "lab")
    assert (told.version, told.counter, told.target) == (
        *(head.version, head.counter),
        head.target,
    )
    assert (told.month_bytes, told.seen) == (0, head.at)  # a folder costs nothing
    assert FIRST_WAIT_S
