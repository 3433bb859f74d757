# SPDX-License-Identifier: Apache-2.0
"""The state of a fleet, from its database: what people ask first, in bounded size.

Whatever devices say, the answers stay small: groups and lists end after a fixed
number, and the rest is counted. Nothing here is escaped: pages do that.
"""

import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from edge_runtime.live.report import FAILURES, Outcome
from edge_runtime.times import duration
from packager.fleet.devices import Device, devices_where
from packager.fleet.releases import (
    Release,
    every_release,
    releases_by_target,
    with_takers,
)

DAY = 86_400
STALE = 3 * DAY  # a device reports once a day; three times in a row it did not
TROUBLES = (*FAILURES, Outcome.BLOCKED, Outcome.CUT_OFF)
THERE, FAILED, BLOCKED = "run it", "failed", "cannot try it now"
UNDER_WAY, SILENT = "not there yet", "not heard of since"
DAYS = 92  # of versions over time
KINDS = 12  # releases, groups and reasons in one table


@dataclass(frozen=True, slots=True)
class Trouble:
    """One kind of failure.

    Attributes:
        outcome: The word for it.
        reason: Why, without what differs from device to device.
        devices: How many proved that.
        claimed: How many others say so.
        newest: When it was last reported.
    """

    outcome: str
    reason: str
    devices: int
    claimed: int
    newest: int


@dataclass(slots=True, kw_only=True)
class Picture:
    """A fleet at one moment.

    Attributes:
        now: When, seconds since 1970.
        devices: How many were ever heard of.
        proved: How many of them by a known key.
        newest: When the newest report was made; 0 for none.
        stale: How many proved devices are silent for longer than ``STALE``.
        channels: Those whose heads are known, the newest first.
        current: The release that the newest head names.
        paused: Whether that head is paused.
        releases: Newest first, the newest few.
        known: Every release by its fingerprint, where equal weights came out twice the
            newer one.
        running: Fingerprint, round, proved devices and devices that only say so.
        progress: Proved devices by where they are with the newest release.
        groups: Name, devices, those at the newest release, those with trouble.
        troubles: What goes wrong now, the most frequent first.
        troubled: Proved devices and others whose newest report tells of trouble.
        worst: Of them those that were heard of last.
        silence: Proved devices by the days since they were last heard of.
        silent: Those silent for the longest time.
        recent: Devices that were heard of last.
        daily: Day, fingerprint, devices.
        month_bytes: What proved devices counted on the wire this month.
        claims: Some devices that nothing proves.
        unheard: How many known keys never proved a report.
        unheard_names: Some of their devices.
    """

    now: int
    devices: int = 0
    proved: int = 0
    newest: int = 0
    stale: int = 0
    channels: Sequence[str] = ()
    current: Release | None = None
    paused: bool = False
    releases: Sequence[Release] = ()
    known: Mapping[str, Release] = field(default_factory=dict)
    running: Sequence[tuple[str, int, int, int]] = ()
    progress: Counter[str] = field(default_factory=Counter)
    groups: Sequence[tuple[str, int, int, int]] = ()
    troubles: Sequence[Trouble] = ()
    troubled: tuple[int, int] = (0, 0)
    worst: Sequence[Device] = ()
    silence: Sequence[tuple[str, int]] = ()
    silent: Sequence[Device] = ()
    recent: Sequence[Device] = ()
    daily: Sequence[tuple[int, str, int]] = ()
    month_bytes: int = 0
    claims: Sequence[Device] = ()
    unheard: int = 0
    unheard_names: Sequence[str] = ()

    @property
    def tried(self) -> int:
        """How many proved devices tried the newest release."""
        return self.progress[THERE] + self.progress[FAILED]

    def bytes_sent(self, release: Release | None = None) -> tuple[int, int]:
        """Return the bytes of patches, and of full weights instead.

        Of one release or of the newest few, as far as both sizes are known.
        """
        known = [release] if release else self.releases
        known = [r for r in known if r.patch_bytes and r.full_bytes]
        sent = sum(r.took * r.patch_bytes for r in known)
        return sent, sum(r.took * r.full_bytes for r in known)

    def name_of(self, target: str, round_: int) -> str:
        """Return what to call the weights that a device runs, by its own round."""
        if not target:
            return "unclear"
        release = self.known.get(target)
        return release.name if release else f"round {round_}, not released here"

    def ago(self, at: int) -> str:
        """Return how long before this picture something was."""
        return f"{duration(self.now - at)} ago" if at < self.now else "just now"


_SILENCE = [(1, "up to a day"), (3, "1 to 3 days"), (7, "3 to 7 days")]
_SILENCE += [(30, "7 to 30 days"), (0, "over 30 days")]


def take_picture(connection: sqlite3.Connection, now: int) -> Picture:
    """Read the state of a fleet.

    Args:
        connection: From :func:`packager.fleet.database.open_database`.
        now: Seconds since 1970.
    """
    picture = Picture(now=now, known=releases_by_target(connection))
    releases = every_release(connection)
    picture.releases = with_takers(connection, releases[:KINDS])
    heads = connection.execute(
        "SELECT channel, counter, paused, max(version) FROM head GROUP BY channel "
        "ORDER BY at DESC"
    ).fetchall()
    picture.channels = [channel for channel, *_ in heads]
    head = heads[0][1:] if heads else None
    # A ledger may know more: what is released elsewhere, or about to be.
    followed = [r for r in releases if head is None or r.counter == head[0]]
    picture.current = followed[0] if followed else None
    picture.paused = bool(head and head[1])
    row = connection.execute(
        "SELECT count(*), total(proved), max(last_seen) FROM device"
    ).fetchone()
    picture.devices, picture.proved = row[0], int(row[1])
    picture.newest = min(row[2] or 0, now)
    picture.running = _running(connection)
    if current := picture.current:
        picture.progress = _progress(connection, current)
    _groups(connection, picture)
    _troubles(connection, picture)
    _silence(connection, picture)
    picture.recent = devices_where(connection, "1", "last_seen DESC, id")
    picture.claims = devices_where(connection, "NOT proved", "last_seen DESC, id")
    unheard = connection.execute(
        "SELECT count(*) OVER (), id FROM expected WHERE id NOT IN "
        "(SELECT id FROM device WHERE proved) ORDER BY id LIMIT ?",
        [KINDS],
    ).fetchall()
    picture.unheard = unheard[0][0] if unheard else 0
    picture.unheard_names = [name for _, name in unheard]
    today = now // DAY
    picture.daily = connection.execute(
        "SELECT day, target, devices FROM daily WHERE day BETWEEN ? AND ? ORDER BY day",
        [today - DAYS + 1, today],
    ).fetchall()
    month = datetime.fromtimestamp(now, UTC).replace(
        day=1, hour=0, minute=0, second=0, microsecond=0
    )
    (spent,) = connection.execute(
        # A device may say anything: no sum overflows.
        "SELECT total(min(month_bytes, 1e15)) FROM device "
        "WHERE proved AND last_seen >= ?",
        [month.timestamp()],
    ).fetchone()
    picture.month_bytes = int(spent)
    return picture


def _running(connection: sqlite3.Connection) -> list[tuple[str, int, int, int]]:
    return connection.execute(
        "SELECT target, max(round), total(proved), count(*) - total(proved) "
        "FROM device GROUP BY target "
        "ORDER BY total(proved) DESC, count(*) DESC, target LIMIT ?",
        [KINDS],
    ).fetchall()


def _progress(connection: sqlite3.Connection, current: Release) -> Counter[str]:
    """Count the proved devices by where they are with a release."""
    rows = connection.execute(
        "SELECT target = :target, last_seen >= :at, tried.outcome, count(*) "
        "FROM device LEFT JOIN (SELECT device, outcome, max(n) FROM report "
        "WHERE proved AND counter = :counter GROUP BY device) AS tried "
        "ON tried.device = device.id WHERE proved GROUP BY 1, 2, 3",
        {"target": current.target, "at": current.at, "counter": current.counter},
    )
    found: Counter[str] = Counter()
    for there, seen, outcome, number in rows:
        if there:
            found[THERE] += number
        elif outcome in FAILURES:
            found[FAILED] += number
        elif outcome in TROUBLES:
            found[BLOCKED] += number
        else:
            found[UNDER_WAY if seen else SILENT] += number
    return found


def _groups(connection: sqlite3.Connection, picture: Picture) -> None:
    current = picture.current
    picture.groups = connection.execute(
        "SELECT grp, count(*), total(target = ?), "
        f"total(outcome IN ({_words(TROUBLES)})) "
        "FROM device WHERE proved GROUP BY grp ORDER BY count(*) DESC, grp LIMIT ?",
        [current.target if current else "", KINDS],
    ).fetchall()


def _troubles(connection: sqlite3.Connection, picture: Picture) -> None:
    found: dict[tuple[str, str], list[int]] = {}
    rows = connection.execute(
        "SELECT outcome, reason, total(proved), count(*), max(last_seen) FROM device "
        f"WHERE outcome IN ({_words(TROUBLES)}) GROUP BY outcome, reason "
        "ORDER BY total(proved) DESC, count(*) DESC"
    )
    proved = claimed = 0
    for outcome, reason, known, number, newest in rows:
        key = outcome, in_general(reason)
        if key not in found and len(found) >= 100 * KINDS:
            key = outcome, "other reasons"
        entry = found.setdefault(key, [0, 0, 0])
        entry[0] += int(known)
        entry[1] += number - int(known)
        entry[2] = max(entry[2], newest)
        proved, claimed = proved + int(known), claimed + number - int(known)
    kinds = sorted(found.items(), key=lambda item: (-item[1][0], -item[1][1], item[0]))
    picture.troubles = [Trouble(*key, *counts) for key, counts in kinds[:KINDS]]
    picture.troubled = proved, claimed
    where = f"outcome IN ({_words(TROUBLES)})"
    picture.worst = devices_where(connection, where, "proved DESC, last_seen DESC, id")


def in_general(reason: str) -> str:
    """Return a reason without long numbers and digests, so that equal ones meet."""
    return re.sub(r"\b[0-9a-f]{8,}\b|\d+[.,]\d+|\d{3,}", "…", reason)


def _silence(connection: sqlite3.Connection, picture: Picture) -> None:
    cases = " ".join(
        f"WHEN last_seen >= {picture.now - days * DAY:d} THEN {number}"
        for number, (days, _) in enumerate(_SILENCE[:-1])
    )
    rows = dict(
        connection.execute(
            f"SELECT CASE {cases} ELSE {len(_SILENCE) - 1} END, count(*) "
            "FROM device WHERE proved GROUP BY 1"
        )
    )
    picture.silence = [
        (words, rows.get(number, 0)) for number, (_, words) in enumerate(_SILENCE)
    ]
    picture.stale = sum(count for _, count in picture.silence[2:])
    where = f"proved AND last_seen < {picture.now - STALE:d}"
    picture.silent = devices_where(connection, where, "last_seen, id")


def _words(outcomes: Iterable[Outcome]) -> str:
    return ", ".join(f"'{outcome}'" for outcome in outcomes)
