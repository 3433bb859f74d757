# SPDX-License-Identifier: Apache-2.0
"""The releases of a fleet, from its database, and how many devices took them."""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, replace

from edge_runtime.live.report import Outcome


@dataclass(frozen=True, slots=True)
class Release:
    """A release, and what came of it.

    Attributes:
        counter: Its release counter.
        round: Its round.
        target: Its fingerprint.
        at: When it was published.
        patch_bytes: Of the patch from the release before; 0 where nobody knows.
        full_bytes: Of the full weights; 0 where nobody knows.
        withdrawn: Whether a newer release went back behind it.
        took: Devices that proved that they applied it.
    """

    counter: int
    round: int
    target: str
    at: int
    patch_bytes: int
    full_bytes: int
    withdrawn: bool
    took: int = 0

    @property
    def name(self) -> str:
        """What people call it."""
        return f"round {self.round}" + (" (taken back)" if self.withdrawn else "")


def every_release(connection: sqlite3.Connection) -> list[Release]:
    """Return all releases, the newest first; who took them is not counted."""
    rows = connection.execute(
        "SELECT counter, round, target, at, coalesce(patch_bytes, 0), "
        "coalesce(full_bytes, 0), withdrawn > 0 FROM release ORDER BY counter DESC"
    )
    return [Release(*row) for row in rows]


def releases_by_target(connection: sqlite3.Connection) -> dict[str, Release]:
    """Return each release by its weights; of those with equal ones the newest."""
    return {release.target: release for release in reversed(every_release(connection))}


def with_takers(
    connection: sqlite3.Connection, releases: Sequence[Release]
) -> list[Release]:
    """Count for some releases which devices proved that they applied them."""
    took = dict(
        connection.execute(
            "SELECT counter, count(*) FROM (SELECT DISTINCT counter, device "
            "FROM report WHERE proved AND outcome = ? AND counter >= ?) "
            "GROUP BY counter",
            [Outcome.APPLIED, min((r.counter for r in releases), default=0)],
        )
    )
    return [replace(release, took=took.get(release.counter, 0)) for release in releases]
