# SPDX-License-Identifier: Apache-2.0
"""Watch a channel: collect what devices reported, and halt a release that fails.

Only what a known key signed counts for the halt, and each device once, by its newest
report about the release: unknown keys, silent devices, other releases, old reports that
are played again and a device that changes its mind all day trigger nothing.
"""

import hashlib
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from edge_runtime.errors import ProofError, RoundError, SyncError, TrustError
from edge_runtime.formats.signing import Trust
from edge_runtime.limits import limits
from edge_runtime.live.report import FAILURES, Outcome
from edge_runtime.sync.head import SignedHead
from edge_runtime.sync.head_file import read_head
from edge_runtime.sync.paths import head_path
from edge_runtime.text import printable
from packager.fleet.channel import pause
from packager.fleet.database import Row, add_head, add_reports, expect_devices
from packager.fleet.place import Entry, Place
from packager.fleet.reports import (
    DeviceKeys,
    Known,
    device_of,
    read_report,
    row_of,
    signer,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

FOLDER = "reports"
# Many that cannot try a release must not hide that it fails where it is tried.
NO_VERDICT = (Outcome.BLOCKED, Outcome.CUT_OFF)
BATCH = 20_000
READERS = 16  # at once: an object store answers each after a while
SHOWN = 5  # of those that are refused, with the reason
MOST_UNPROVED = 10_000  # reports of nobody known that are kept; more are only counted


@dataclass(slots=True)
class Collected:
    """What a look at the reports came to.

    Attributes:
        proved: New reports of known devices.
        unproved: New ones that no known key signed.
        refused: What is no report, or claims a known key that did not sign it.
        unchanged: Files that were read before.
        reasons: Why some were refused, by path, a few.
    """

    proved: int = 0
    unproved: int = 0
    refused: int = 0
    unchanged: int = 0
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Limit:
    """When a release is halted.

    Attributes:
        share: Of the devices that tried it, those that may fail.
        least: How many have to fail at least.
    """

    share: float
    least: int = 3


@dataclass(frozen=True, slots=True)
class Standing:
    """How a release does, by what is proved.

    Attributes:
        failed: Devices on which it failed.
        tried: Devices that came to a verdict about it, good or bad.
    """

    failed: int
    tried: int

    def is_over(self, limit: Limit) -> bool:
        """Return whether so many failures halt it."""
        return self.failed >= limit.least and self.failed > limit.share * self.tried


def look_at_head(
    connection: sqlite3.Connection, place: Place, channel: str, trust: Trust
) -> SignedHead:
    """Read a channel's head and note its release.

    Raises:
        RoundError: There is no such channel.
        HeadError: What lies there is no head.
        TrustError: Whom the operator trusts did not sign it, or it is an old one.
        StoreError: The place is damaged.
        OSError: It cannot be read.
    """
    found = place.read(head_path(channel))
    if found is None:
        raise RoundError(f"no channel {channel!r} in {place.name}: nothing to watch")
    signed = read_head(found[0])
    signed.check(trust)
    sql = "SELECT max(version) FROM head WHERE channel = ?"
    (newest,) = connection.execute(sql, [signed.head.channel]).fetchone()
    if newest is not None and signed.head.version < newest:
        raise TrustError(
            f"the head in {place.name} has version {signed.head.version}, {newest} was "
            "seen before: an old one is played, or another place has this database"
        )
    add_head(connection, signed)
    return signed


def collect(
    connection: sqlite3.Connection, place: Place, keys: DeviceKeys, *, now: int
) -> Collected:
    """Add the reports that are new or changed since the last time.

    Args:
        connection: The database.
        place: Where reports lie, below ``reports/``.
        keys: From :func:`packager.fleet.reports.read_keys`.
        now: Seconds since 1970.

    Raises:
        SyncError: The place gives no answer; what was read is kept.
        OSError: It cannot be read.
    """
    found = Collected()
    known = dict(connection.execute("SELECT path, tag FROM file"))
    # With another key one that nobody known signed may be somebody's.
    basis = hashlib.sha256(" ".join(sorted(keys)).encode()).hexdigest()[:16]
    there, new = set[str](), list[Entry]()
    for entry in place.entries(FOLDER):
        if "/." in entry.path:
            continue  # what somebody is just writing
        there.add(entry.path)
        if known.get(entry.path) in (entry.tag, f"{entry.tag} {basis}"):
            found.unchanged += 1
        else:
            new.append(entry)
    turn = _Turn(connection, keys, basis, now, found)
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(new), BATCH):
            batch = new[start : start + BATCH]
            read = pool.map(lambda entry: _read(place, entry), batch)
            turn.add(zip(batch, read, strict=True))
    add_reports(connection, [], now=now)  # days go by without reports too
    expect_devices(connection, {name for _, name in keys.values()})
    with connection:
        gone = [(path,) for path in known.keys() - there]
        connection.executemany("DELETE FROM file WHERE path = ?", gone)
    return found


def _read(place: Place, entry: Entry) -> bytes | Exception:
    """Return a file that may be a report, or why not."""
    if not device_of(entry.path) or entry.size > limits().report_bytes:
        return ProofError("no name of a report, or too large")
    try:
        found = place.read(entry.path)
    except (OSError, SyncError) as err:
        return err  # of one file: it must not hide all the others
    return found[0] if found else FileNotFoundError("gone meanwhile")


class _Turn:
    """One look: what it needs to know, and what it found."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        keys: DeviceKeys,
        basis: str,
        now: int,
        found: Collected,
    ) -> None:
        self._connection, self._keys, self._now = connection, keys, now
        self._basis, self._found = basis, found
        self._heads = {
            sha256: Known(version, at)
            for sha256, version, at in connection.execute(
                "SELECT sha256, version, at FROM head"
            )
        }
        self._counters: dict[str, list[tuple[int, int]]] = {}
        sql = "SELECT target, counter, version FROM release"
        for target, counter, version in connection.execute(sql):
            self._counters.setdefault(target, []).append((counter, version))

    def add(self, files: Iterator[tuple[Entry, bytes | Exception]]) -> None:
        rows, tags = list[Row](), list[tuple[str, str]]()
        for entry, data in files:
            if isinstance(data, Exception):
                self._refuse(entry, data)
                # What cannot be read now is tried again.
                if isinstance(data, ProofError) and entry.path.isprintable():
                    tags.append((entry.path, entry.tag))
                continue
            row = self._row(entry, data)
            tag = entry.tag if row and row.proved else f"{entry.tag} {self._basis}"
            tags.append((entry.path, tag))
            if row:
                rows.append(row)
        proved = [row for row in rows if row.proved]
        others = [row for row in rows if not row.proved]
        sql = "SELECT count(*) FROM report WHERE NOT proved"
        (count,) = self._connection.execute(sql).fetchone()
        kept = islice(others, max(0, MOST_UNPROVED - count))
        add_reports(self._connection, [*proved, *kept], now=self._now)
        with self._connection:
            sql = "INSERT OR REPLACE INTO file VALUES (?, ?)"
            self._connection.executemany(sql, tags)
        self._found.proved += len(proved)
        self._found.unproved += len(others)

    def _row(self, entry: Entry, data: bytes) -> Row | None:
        try:
            report = read_report(data)
            name = signer(report, self._keys)
        except (ProofError, TrustError) as err:
            self._refuse(entry, err)
            return None
        heads, counters = self._heads, self._counters
        return row_of(report, name, heads=heads, counters=counters, now=self._now)

    def _refuse(self, entry: Entry, error: Exception) -> None:
        self._found.refused += 1
        if len(self._found.reasons) < SHOWN:
            self._found.reasons[printable(entry.path)] = printable(error)


# Judging ------------------------------------------------------------------------------

# Who had reported before a pause that was lifted does not count once more.
_STANDING = """
WITH newest AS (
    SELECT device, outcome, max(n) FROM report
    WHERE proved AND counter = :counter GROUP BY device)
SELECT outcome, count(*) FROM newest
WHERE NOT EXISTS (
    SELECT 1 FROM report AS before
    WHERE before.proved AND before.counter = :counter
    AND before.device = newest.device AND before.head_version <= :halted)
GROUP BY outcome"""


def standing(connection: sqlite3.Connection, signed: SignedHead) -> Standing:
    """Return how the release of a head does, by the newest report of each device."""
    head = signed.head
    sql = (
        "SELECT max(version) FROM head "
        "WHERE paused AND channel = ? AND counter = ? AND version < ?"
    )
    known = head.channel, head.counter, head.version
    (halted,) = connection.execute(sql, known).fetchone()
    values = {"counter": head.counter, "halted": -1 if halted is None else halted}
    found = dict(connection.execute(_STANDING, values).fetchall())
    failed = sum(found.get(str(outcome), 0) for outcome in FAILURES)
    undecided = sum(found.get(str(outcome), 0) for outcome in NO_VERDICT)
    return Standing(failed, sum(found.values()) - undecided)


def halt(
    connection: sqlite3.Connection,
    place: Place,
    signed: SignedHead,
    limit: Limit,
    key: "Ed25519PrivateKey",
    *,
    now: int,
) -> bool:
    """Pause a channel whose release fails on too many devices.

    Returns:
        Whether it is paused now and was not before.

    Raises:
        RoundError: The head does not name the key as one that may pause it.
        StoreError: Publishers came first every time.
        OSError: The place cannot be read or written.
    """
    head = signed.head
    if signed.is_paused() or not standing(connection, signed).is_over(limit):
        return False
    if not pause(place, head.channel, key, now=now, version=head.version):
        return False
    with connection:
        sql = "UPDATE head SET paused = 1 WHERE sha256 = ?"
        connection.execute(sql, [signed.sha256])
    return True
