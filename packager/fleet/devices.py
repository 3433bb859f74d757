# SPDX-License-Identifier: Apache-2.0
"""The devices of a fleet, from its database, and what one of them told."""

import sqlite3
from dataclasses import dataclass
from typing import Any

SHOWN = 50  # devices in one list
HISTORY = 20  # reports of one device


@dataclass(frozen=True, slots=True)
class Device:
    """A device, by its newest report; the fields are those of the database."""

    id: str
    group: str
    round: int
    target: str
    outcome: str
    reason: str
    last_seen: int
    proved: bool
    runtime: str = ""
    first_seen: int = 0
    last_proved: int | None = None
    month_bytes: int = 0
    key_id: str = ""


@dataclass(frozen=True, slots=True)
class Told:
    """One report of a device, as its history shows it."""

    at: int
    outcome: str
    round: int
    target: str
    reason: str
    running: str
    proved: bool


def devices_where(
    connection: sqlite3.Connection, where: str, order: str, *values: Any
) -> list[Device]:
    """Return devices by a condition and an order in SQL: as many as one list shows."""
    rows = connection.execute(
        "SELECT id, grp, round, target, outcome, reason, last_seen, proved > 0, "
        "runtime, first_seen, last_proved, month_bytes, key_id FROM device "
        f"WHERE {where} ORDER BY {order} LIMIT {SHOWN}",
        values,
    )
    return [Device(*row) for row in rows]


def find_device(connection: sqlite3.Connection, name: str) -> Device | None:
    """Return one device; None if it was never heard of."""
    found = devices_where(connection, "id = ?", "id", name)
    return found[0] if found else None


def history(
    connection: sqlite3.Connection, name: str, most: int = HISTORY
) -> list[Told]:
    """Return what a device told, the newest first."""
    rows = connection.execute(
        "SELECT at, outcome, round, target, reason, running, proved FROM report "
        "WHERE device = ? ORDER BY n DESC LIMIT ?",
        [name, most],
    )
    return [Told(*row) for row in rows]
