# SPDX-License-Identifier: Apache-2.0
"""What a fleet reported, in one SQLite file that any tool reads.

Reports come at least once and in any order, so that adding them has one rule: each has
a number, and of its device the highest one counts. What no known key signed is kept as
unproved under the name that it claims, and never takes the place of what is proved.
"""

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from edge_runtime.errors import StoreError
from edge_runtime.sync.head import SHORT, SignedHead
from packager.fleet.head import insist_countable
from packager.packed_file import BUNDLE
from packager.release import Release

SCHEMA = 1
DAY_S = 86_400
# Times are seconds since 1970, a day is how many of them have begun; proved and
# withdrawn are 0 or 1; a fingerprint is empty where nobody knows it.
_TABLES = """
CREATE TABLE device(                 -- one row a device: its newest report
    id TEXT PRIMARY KEY, key_id TEXT, name TEXT, grp TEXT,
    first_seen INTEGER, last_seen INTEGER, last_proved INTEGER,
    round INTEGER, target TEXT, counter INTEGER,  -- what it runs
    outcome TEXT, reason TEXT, runtime TEXT, month_bytes INTEGER,
    proved INTEGER, n INTEGER) WITHOUT ROWID;
CREATE TABLE report(
    device TEXT, n INTEGER, at INTEGER, received INTEGER,
    head_version INTEGER, counter INTEGER, round INTEGER, target TEXT,  -- it is about
    outcome TEXT, reason TEXT, proved INTEGER,
    running TEXT,                    -- what the device ran then
    PRIMARY KEY(device, n)) WITHOUT ROWID;
CREATE TABLE release(
    counter INTEGER PRIMARY KEY, version INTEGER, round INTEGER, target TEXT,
    at INTEGER, patch_bytes INTEGER, full_bytes INTEGER, withdrawn INTEGER);
CREATE TABLE daily(                  -- proved devices that ran it as the day ended
    day INTEGER, target TEXT, devices INTEGER,
    PRIMARY KEY(day, target)) WITHOUT ROWID;
CREATE TABLE head(sha256 TEXT PRIMARY KEY, channel TEXT, version INTEGER,
    counter INTEGER, at INTEGER, paused INTEGER) WITHOUT ROWID;
CREATE TABLE file(path TEXT PRIMARY KEY, tag TEXT) WITHOUT ROWID;  -- read already
CREATE INDEX report_time ON report(at) WHERE proved;
CREATE INDEX report_of ON report(device, at, n) WHERE proved;
CREATE INDEX report_unproved ON report(device) WHERE NOT proved;
CREATE INDEX report_about ON report(counter, device, n) WHERE proved;
"""
# Devices whose keys are known, heard of or not; earlier databases lack it.
_EXPECTED = "CREATE TABLE IF NOT EXISTS expected(id TEXT PRIMARY KEY) WITHOUT ROWID"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A report, as the database takes it.

    Attributes:
        device: Whose key signed it, or who it claims to be from.
        n: Its number on that device.
        at: When it was made, as far as that is known.
        received: When it was collected.
        head_version: Version of the head that the device knew; 0 for none.
        counter: Release counter of the release that it is about.
        round: Its round.
        target: Its fingerprint.
        outcome: What became of it.
        reason: Why.
        proved: Whether a key that the operator knows signed it.
        running: Fingerprint of what the device runs, by its proof; empty if unclear.
        running_round: The round of that.
        running_counter: Its release counter.
        key_id: Of the signer.
        name: Of the model's run.
        group: Of the device.
        runtime: Version of its runtime.
        month_bytes: Bytes on the wire this month.
    """

    device: str
    n: int
    at: int
    received: int
    head_version: int
    counter: int
    round: int
    target: str
    outcome: str
    reason: str
    proved: bool
    running: str
    running_round: int
    running_counter: int
    key_id: str = ""
    name: str = ""
    group: str = ""
    runtime: str = ""
    month_bytes: int = 0


_NAMES = [field.name for field in fields(Row)]
_NEWER = "excluded.proved > device.proved OR excluded.n > device.n"
_REPORT = f"""
INSERT INTO report SELECT {", ".join(f":{name}" for name in _NAMES[:12])} WHERE true
ON CONFLICT(device, n) DO UPDATE SET {
    ", ".join(f"{name} = excluded.{name}" for name in _NAMES[2:12])
} WHERE excluded.proved > report.proved"""
_STATE = (
    *("key_id", "name", "grp", "round", "target", "counter", "outcome", "reason"),
    *("runtime", "month_bytes", "n"),
)
_DEVICE = f"""
INSERT INTO device SELECT
    :device, :key_id, :name, :group, :at, :at, CASE WHEN :proved THEN :at END,
    :running_round, :running, :running_counter, :outcome, :reason, :runtime,
    :month_bytes, :proved, :n WHERE true
ON CONFLICT(id) DO UPDATE SET
    {
    ", ".join(
        f"{c} = CASE WHEN {_NEWER} THEN excluded.{c} ELSE device.{c} END"
        for c in _STATE
    )
},
    first_seen = CASE WHEN excluded.proved > proved THEN excluded.first_seen
                 ELSE min(first_seen, excluded.first_seen) END,
    last_seen = CASE WHEN excluded.proved > proved THEN excluded.last_seen
                ELSE max(last_seen, excluded.last_seen) END,
    last_proved = max(coalesce(last_proved, excluded.last_proved),
                      excluded.last_proved),
    proved = excluded.proved
WHERE excluded.proved >= device.proved"""
_RELEASE = """
INSERT INTO release VALUES (?, ?, ?, ?, ?, ?, ?, 0)
ON CONFLICT(counter) DO UPDATE SET
    version = max(version, excluded.version), at = min(at, excluded.at),
    patch_bytes = coalesce(nullif(patch_bytes, 0), excluded.patch_bytes),
    full_bytes = coalesce(nullif(full_bytes, 0), excluded.full_bytes)
WHERE target = excluded.target"""
_HEAD = """
INSERT INTO head VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT(sha256) DO UPDATE SET paused = max(paused, excluded.paused)"""
# Going back to older weights is a newer release of an older round.
_WITHDRAW = """
UPDATE release SET withdrawn = EXISTS(
    SELECT 1 FROM release AS newer
    WHERE newer.counter > release.counter AND newer.round < release.round)"""
# Each report moves its device from what it ran before to what it runs now.
_MOVES = """
WITH move AS (
    SELECT at / 86400 AS day, running, (
        SELECT p.running FROM report AS p
        WHERE p.proved AND p.device = r.device AND (p.at, p.n) < (r.at, r.n)
        ORDER BY p.at DESC, p.n DESC LIMIT 1) AS before
    FROM report AS r WHERE proved AND at >= ?)
SELECT day, target, sum(change) FROM (
    SELECT day, running AS target, 1 AS change FROM move UNION ALL
    SELECT day, before, -1 FROM move WHERE before IS NOT NULL)
WHERE target != '' GROUP BY day, target HAVING sum(change) != 0"""


@contextmanager
def open_database(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a fleet's database; it is made where there is none.

    Raises:
        StoreError: It is something else, or another program changes it.
    """
    try:
        with closing(sqlite3.connect(path)) as connection:
            (found,) = connection.execute("PRAGMA user_version").fetchone()
            (tables,) = connection.execute(
                "SELECT count(*) FROM sqlite_master"
            ).fetchone()
            if not found and not tables:
                script = f"BEGIN IMMEDIATE;{_TABLES}PRAGMA user_version={SCHEMA};COMMIT"
                connection.executescript(script)
            elif found != SCHEMA:
                raise StoreError(
                    f"{path} is no database of this version's dpu-fleet watch; give "
                    "another file, it is filled anew from the reports"
                )
            connection.execute(_EXPECTED)
            yield connection
    except sqlite3.Error as err:
        raise StoreError(
            f"{path} cannot be used ({err}); if it is damaged remove it: it is filled "
            "anew from the reports"
        ) from err


def add_reports(
    connection: sqlite3.Connection, rows: Iterable[Row], *, now: int
) -> None:
    """Add reports, all or none; those that are there already change nothing.

    Args:
        connection: The database.
        rows: The reports, in any order.
        now: Seconds since 1970: up to that day the days are counted.
    """
    found = [{name: getattr(row, name) for name in _NAMES} for row in rows]
    with connection:
        connection.executemany(_REPORT, found)
        connection.executemany(_DEVICE, found)
        first = min((row["at"] for row in found if row["proved"]), default=now)
        _count_days(connection, min(first, now) // DAY_S, now // DAY_S)


def _count_days(connection: sqlite3.Connection, first: int, today: int) -> None:
    """Count anew which devices ran what, from a day on."""
    (last,) = connection.execute("SELECT max(day) FROM daily").fetchone()
    first = first if last is None else min(first, last + 1)
    base = "SELECT target, devices FROM daily WHERE day = ?"
    count = dict(connection.execute(base, [first - 1]))
    moves = connection.execute(_MOVES, [first * DAY_S]).fetchall()
    moves.sort(reverse=True)
    connection.execute("DELETE FROM daily WHERE day >= ?", [first])
    for day in range(first, today + 1):
        while moves and moves[-1][0] <= day:
            _, target, change = moves.pop()
            count[target] = count.get(target, 0) + change
        rows = [(day, target, devices) for target, devices in count.items() if devices]
        connection.executemany("INSERT INTO daily VALUES (?, ?, ?)", rows)


def expect_devices(connection: sqlite3.Connection, names: set[str]) -> None:
    """Note from which devices reports may come, in place of those noted before."""
    if names == {name for (name,) in connection.execute("SELECT id FROM expected")}:
        return
    with connection:
        connection.execute("DELETE FROM expected")
        rows = [(name,) for name in sorted(names)]
        connection.executemany("INSERT INTO expected VALUES (?)", rows)


def add_head(connection: sqlite3.Connection, signed: SignedHead) -> None:
    """Add the release that a channel's head names, and the head that reports answer.

    Raises:
        RoundError: A number in it is larger than a database holds.
    """
    head = signed.head
    sizes = [way.size for way in head.ways if way.target == head.target[:SHORT]]
    full = head.bundle[0] if head.bundle else 0
    size = sizes[0] if sizes else 0  # the first one leads from the release before
    numbers = (head.counter, head.version, head.round, size, full)
    insist_countable(f"the head of {head.channel!r}", *numbers)
    row = (head.counter, head.version, head.round, head.target, head.at, size, full)
    with connection:
        known = (signed.sha256, head.channel, head.version, head.counter, head.at)
        connection.execute(_HEAD, (*known, signed.is_paused()))
        connection.execute(_RELEASE, row)
        connection.execute(_WITHDRAW)


def add_releases(
    connection: sqlite3.Connection, releases: Iterable[Release], model: str
) -> None:
    """Add the releases of a model that a run's ledger lists.

    Raises:
        RoundError: A number in it is larger than a database holds.
    """
    with connection:
        for release in releases:
            if release.model != model:
                continue
            at, size = release.second, release.bytes
            insist_countable(
                f"the ledger's release of {release.file}", release.counter, size
            )
            sizes = (0, size) if release.kind == BUNDLE else (size, 0)
            row = (release.counter, 0, release.round, release.target, at, *sizes)
            connection.execute(_RELEASE, row)
        connection.execute(_WITHDRAW)
