# SPDX-License-Identifier: Apache-2.0
"""The database of a fleet: the same reports give the same content in any order."""

import random
import sqlite3
from dataclasses import replace

import pytest

from edge_runtime.errors import StoreError
from packager.fleet.database import (
    DAY_S,
    Row,
    add_releases,
    add_reports,
    open_database,
)
from packager.release import Release

DAY = 20_000
NOW = DAY * DAY_S + 40_000
A, B = "a" * 64, "b" * 64


def row(device="board1", n=1, *, day=DAY, running=A, **changes):
    at = day * DAY_S + n
    given = {
        "device": device,
        "n": n,
        "at": at,
        "received": NOW,
        "head_version": 3,
        "counter": 5,
        "round": 5,
        "target": B,
        "outcome": "applied",
        "reason": "",
        "proved": True,
        "running": running,
        "running_round": 4,
        "running_counter": 4,
    }
    return Row(**given | changes)


@pytest.fixture
def connection(tmp_path):
    with open_database(tmp_path / "fleet.db") as opened:
        yield opened


def content(connection):
    tables = ("device", "report", "daily")
    return {t: connection.execute(f"SELECT * FROM {t}").fetchall() for t in tables}


def history():
    return [
        row(f"board{d}", n, day=DAY - 5 + n, running=A if n < d else B, reason=str(n))
        for d in range(4)
        for n in range(5)
    ]


def test_order_and_repetition_change_nothing(connection, tmp_path):
    add_reports(connection, history(), now=NOW)
    shuffled = 2 * history()
    random.Random(1).shuffle(shuffled)
    with open_database(tmp_path / "other.db") as other:
        for report in shuffled:  # one by one, as they trickle in
            add_reports(other, [report], now=NOW)
        assert content(other) == content(connection)


def test_days_count_what_each_device_ran_as_the_day_ended(connection):
    add_reports(connection, history(), now=NOW)
    days = connection.execute("SELECT * FROM daily ORDER BY day, target").fetchall()
    expected = [
        (day, target, count)
        for day in range(DAY - 5, DAY + 1)
        for target in (A, B)
        if (
            count := sum(
                (A if min(day - DAY + 5, 4) < d else B) == target for d in range(4)
            )
        )
    ]
    assert days == expected


def test_a_day_without_reports_is_as_the_day_before(connection):
    add_reports(connection, [row()], now=NOW)
    add_reports(connection, [], now=NOW + 3 * DAY_S)
    days = connection.execute("SELECT day, devices FROM daily").fetchall()
    assert days == [(DAY + k, 1) for k in range(4)]


def test_what_nobody_signed_takes_the_place_of_nothing(connection):
    proved = row(n=5, outcome="applied")
    forged = row(n=5, proved=False, outcome="refused", running=B)
    later = replace(forged, n=9, at=NOW)
    add_reports(connection, [proved], now=NOW)
    before = content(connection)
    add_reports(connection, [forged, later], now=NOW)
    after = content(connection)
    assert (after["device"], after["daily"]) == (before["device"], before["daily"])
    assert [r for r in after["report"] if r[10]] == before["report"]


def test_what_is_proved_takes_the_place_of_what_is_not(connection):
    add_reports(connection, [row(n=9, proved=False), row("x", proved=False)], now=NOW)
    add_reports(connection, [row(n=5), row(n=9, running=B)], now=NOW)
    found = connection.execute("SELECT id, n, target, proved FROM device").fetchall()
    assert found == [("board1", 9, B, 1), ("x", 1, A, 0)]
    seen = connection.execute("SELECT first_seen, last_seen, last_proved FROM device")
    assert seen.fetchone() == (DAY * DAY_S + 5, DAY * DAY_S + 9, DAY * DAY_S + 9)


def test_a_failed_turn_adds_nothing(connection):
    broken = replace(row(n=2), month_bytes=1 << 70)
    with pytest.raises(OverflowError):
        add_reports(connection, [row(), broken], now=NOW)
    assert content(connection) == {"device": [], "report": [], "daily": []}


def test_a_newer_release_of_an_older_round_withdraws_what_is_between(connection):
    releases = [
        Release(
            counter=counter,
            round=number,
            kind=kind,
            model=A,
            parent=B,
            target=f"{number:064x}",
            signers=(),
            file="f",
            to=".",
            bytes=size,
            sha256=A,
            at="2026-11-28T00:00:00Z",
        )
        for counter, number in ((1, 1), (2, 2), (3, 3), (4, 1))
        for kind, size in (("patch", 100 + number), ("bundle", 9000))
    ]
    add_releases(connection, releases, A)
    add_releases(connection, [replace(releases[0], model=B, counter=9)], A)
    found = connection.execute(
        "SELECT counter, patch_bytes, full_bytes, withdrawn FROM release"
    ).fetchall()
    assert found == [
        (1, 101, 9000, 0),
        (2, 102, 9000, 1),
        (3, 103, 9000, 1),
        (4, 101, 9000, 0),
    ]


@pytest.mark.parametrize("content", [b"not a database, but long enough " * 40, b"{}"])
def test_another_file_is_no_database(tmp_path, content):
    path = tmp_path / "fleet.db"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"fleet\.db"), open_database(path):
        pass
    assert path.read_bytes() == content


def test_a_database_of_another_version_is_left_alone(tmp_path):
    path = tmp_path / "fleet.db"
    with open_database(path) as connection:
        connection.execute("PRAGMA user_version = 9")
    with pytest.raises(StoreError, match="another"), open_database(path):
        pass
    assert sqlite3.connect(path).execute("SELECT count(*) FROM device").fetchone()
