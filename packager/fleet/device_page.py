# SPDX-License-Identifier: Apache-2.0
"""What one device reported; and devices as rows of a table."""

import sqlite3
from collections.abc import Sequence

from packager.fleet.devices import HISTORY, Device, Told, find_device, history
from packager.fleet.picture import Picture
from packager.fleet.releases import releases_by_target
from packager.report.document import Document, Section, Table
from packager.report.words import cut, moment, short_bytes

MADE_BY = "dpu-fleet"


def device_table(picture: Picture, devices: Sequence[Device]) -> Table:
    """Return devices as rows, by their newest report."""
    columns = ["device", "<group", "<runs", "<by proof", "<last heard of"]
    columns += ["<outcome", "<reason"]
    return Table(
        columns,
        [
            [
                device.id,
                cut(device.group) or "-",
                picture.name_of(device.target, device.round),
                "yes" if device.proved else "no",
                picture.ago(device.last_seen),
                device.outcome,
                cut(device.reason) or "-",
            ]
            for device in devices
        ],
    )


def history_table(reports: Sequence[Told]) -> Table:
    """Return a device's reports as rows."""
    columns = ["reported", "<outcome", "<of", "<runs weights", "<by proof", "<reason"]
    return Table(
        columns,
        [
            [
                moment(told.at),
                told.outcome,
                f"round {told.round}",
                told.running[:12] or "unclear",
                "yes" if told.proved else "no",
                cut(told.reason) or "-",
            ]
            for told in reports
        ],
    )


def device_document(
    connection: sqlite3.Connection, name: str, *, now: int, most: int = HISTORY
) -> Document | None:
    """Return what is known of one device; None if it was never heard of.

    Args:
        connection: The fleet's database.
        name: The device.
        now: Seconds since 1970.
        most: How many of its reports are listed.
    """
    device = find_device(connection, name)
    if device is None:
        return None
    picture = Picture(now=now, known=releases_by_target(connection))
    proof = "never" if device.last_proved is None else picture.ago(device.last_proved)
    runs = picture.name_of(device.target, device.round)
    if device.target:
        runs += f", weights {device.target}"
    facts = [
        ("runs", runs),
        ("last heard of", picture.ago(device.last_seen)),
        ("last proof", proof),
        ("first heard of", moment(device.first_seen)),
        ("group", cut(device.group) or "-"),
        ("key", device.key_id + ("" if device.proved else ", not known")),
        ("runtime", cut(device.runtime) or "-"),
        ("this month", f"{short_bytes(device.month_bytes)} on the wire"),
    ]
    table = history_table(history(connection, name, most))
    section = Section("What it reported", "The newest first.", table)
    title = f"{device.id}: {device.outcome}"
    return Document(title, facts=facts, sections=[section], made_by=MADE_BY)
