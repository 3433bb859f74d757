# SPDX-License-Identifier: Apache-2.0
"""The measuring tools: what a relay counts, and rows that can be missed."""

import http.client
import time
from pathlib import Path

import pytest

from tests.conftest import RunOnDisk
from tools.bench import fleet
from tools.bench.fleet import Row, measure_wire, table
from tools.fleet.publisher import Publisher
from tools.fleet.servers import LOOPBACK, FileServer, Relay, running_nginx
from tools.load_fleet import load_all
from tools.load_fleet import main as load_main


@pytest.fixture
def rounds(tmp_path):
    run = RunOnDisk(tmp_path / "runs" / "tiny")
    for number in range(5):
        run.add(number)
    return run.path


def test_a_relay_counts_every_byte_of_both_directions(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 1000)
    server = FileServer(tmp_path)
    relay = Relay(server.server_port)
    connection = http.client.HTTPConnection(LOOPBACK, relay.port)
    connection.request("GET", "/file", headers={"Connection": "close"})
    answer = connection.getresponse()
    assert answer.read() == b"x" * 1000
    connection.close()
    head = sum(len(f"{k}: {v}\r\n") for k, v in answer.headers.items())
    head += len("HTTP/1.1 200 OK\r\n\r\n")
    asked = (
        f"GET /file HTTP/1.1\r\nHost: {LOOPBACK}:{relay.port}\r\n"
        "Accept-Encoding: identity\r\nConnection: close\r\n\r\n"
    )
    assert relay.count == 1000 + head + len(asked)
    relay.close()
    server.stop()


def test_the_bars_on_the_wire_hold_for_a_small_network(rounds, tmp_path, monkeypatch):
    monkeypatch.setattr(fleet, "find", lambda _name: None)  # as on a bare machine
    (tmp_path / "board").mkdir()
    publisher = Publisher(
        rounds, tmp_path / "www", now=int(time.time()), pausable=False
    )
    rows = list(measure_wire(publisher, tmp_path / "board"))
    assert [row.name for row in rows if row.is_missed] == []
    assert any("cuts" in row.name for row in rows)


def test_a_row_over_its_bar_is_missed():
    rows = [Row("good", 1, 1, "B"), Row("bad", 1.5, 1, "s"), Row("told", 9, None, "B")]
    assert [row.is_missed for row in rows] == [False, True, False]
    assert "| bad | 1.50 s | 1 s |" in table(rows, {"cores": 2})


def test_what_is_not_installed_is_said_and_left_out(
    rounds, monkeypatch, command, capsys
):
    monkeypatch.setattr("tools.load_fleet.find", lambda _name: None)
    found, absent = load_all(rounds, (1, 0.1, 10))
    assert (found, len(absent)) == ([], 2)
    code, _, err = command(load_main, "--run", rounds, "--seconds", "0.1")
    assert code == 1
    assert "nginx is not installed" in err
    assert "SeaweedFS is not installed" in err


@pytest.mark.fleet
def test_no_process_of_nginx_outlives_it(tmp_path):
    (tmp_path / "nginx").mkdir()
    with running_nginx(tmp_path, tmp_path / "nginx"):
        main = int((tmp_path / "nginx/nginx.pid").read_text())
        workers = Path(f"/proc/{main}/task/{main}/children").read_text().split()
    assert workers
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
