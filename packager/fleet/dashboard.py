# SPDX-License-Identifier: Apache-2.0
"""The picture of a fleet as one page that needs nothing else.

Its first line answers whether everything is well; what to do about it stands below.
The page has a bounded size whatever the fleet's, and no script.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

from packager.fleet.device_page import MADE_BY, device_table, history_table
from packager.fleet.devices import HISTORY, SHOWN, Device, history
from packager.fleet.findings import STATES, facts, figures, findings, summary
from packager.fleet.picture import (
    BLOCKED,
    DAY,
    FAILED,
    KINDS,
    SILENT,
    STALE,
    THERE,
    UNDER_WAY,
    Picture,
    take_picture,
)
from packager.report.curves import stacked_areas
from packager.report.document import Document, Section, Table
from packager.report.html import to_html
from packager.report.svg import stacked_bars
from packager.report.words import counted, cut, moment, percent, short_bytes, spaced

_SHADES = ("h8", "h7", "h6", "h5", "h4", "h3")  # of releases, the newest first
_PARTS = ((THERE, 3), (UNDER_WAY, 1), (FAILED, 2), (BLOCKED, 4), (SILENT, 5))


def dashboard(connection: sqlite3.Connection, *, now: int) -> str:
    """Return the page of a fleet.

    Args:
        connection: The database, from
            :func:`~packager.fleet.database.open_database`; it is only read.
        now: Seconds since 1970; ages are counted back from here.
    """
    return to_html(fleet_document(connection, now=now))


def fleet_document(connection: sqlite3.Connection, *, now: int) -> Document:
    """Return what is known of a fleet; arguments as of :func:`dashboard`."""
    with _moment(connection):
        return _document(connection, take_picture(connection, now))


@contextmanager
def _moment(connection: sqlite3.Connection) -> Iterator[None]:
    """Read one state of the database, whatever is collected meanwhile."""
    begun = connection.in_transaction
    if not begun:
        connection.execute("BEGIN")
    try:
        yield
    finally:
        if not begun:
            connection.rollback()


def _document(connection: sqlite3.Connection, picture: Picture) -> Document:
    state, lead = findings(picture)
    sections = [
        *_rollout(picture),
        *_troubles(picture),
        *_silence(picture),
        *_over_time(picture),
        *_who_runs_what(picture),
        *_groups(picture),
        *_bytes(picture),
        *_devices(connection, picture),
    ]
    title = f"{STATES[state]}: {summary(picture)}"
    known = facts(picture)
    return Document(title, figures(picture), known, sections, state, lead, MADE_BY)


# Sections -----------------------------------------------------------------------------


def _over_time(picture: Picture) -> Iterator[Section]:
    if not picture.daily:
        return
    first, last = picture.daily[0][0], picture.now // DAY
    steps = last - first + 1
    found = {target for _, target, _ in picture.daily}
    known = picture.known
    kept = sorted(found & known.keys(), key=lambda target: -known[target].counter)
    kept = kept[: len(_SHADES)]
    shades = dict(zip(kept, _SHADES, strict=False))
    days = {day for day, _, _ in picture.daily}
    rows = {
        target: [0 if first + n in days else None for n in range(steps)]
        for target in ("", *reversed(kept))
    }
    for day, target, devices in picture.daily:
        amounts = rows[target if target in kept else ""]
        amounts[day - first] = (amounts[day - first] or 0) + devices
    if len(found) == len(kept):
        del rows[""]
    series = [
        (
            picture.name_of(target, 0) if target else "older and others",
            shades.get(target, "c5"),
            amounts,
        )
        for target, amounts in rows.items()
    ]
    every = max(1, -(-steps // 5))
    ticks = [(n, _day(first + n)) for n in range(0, steps, every)]
    yield Section(
        "Versions over time",
        "Proved devices by what they ran as each day ended; the last one is today.",
        Table(
            ["day", *(name for name, *_ in series)],
            [
                [_date(first + n), *(_count(row[n]) for *_, row in series)]
                for n in reversed(range(steps))
            ],
        ),
        stacked_areas(
            "Proved devices by the release that they ran, day by day",
            series,
            ticks,
            axes=("day", "devices"),
            form=_whole,
        ),
        "The newest release lies on top, in the strongest colour.",
        [(colour, name) for name, colour, _ in series],
    )


def _who_runs_what(picture: Picture) -> Iterator[Section]:
    if not picture.running:
        return
    rows, bars = [], []
    for target, round_, proved, claimed in picture.running:
        name = picture.name_of(target, round_)
        rows.append([name, target[:12] or "-", _whole(proved), _whole(claimed)])
        if proved:
            bars.append((f"round {round_}" if target else "unclear", proved))
    others = picture.devices - sum(int(p + c) for *_, p, c in picture.running)
    if others:
        rows.append(["all others", "-", spaced(others), ""])
    yield Section(
        "Who runs what",
        "By proof: a key that you know signed what is on the disk and in every live "
        "process, after the head of that release was signed. What others say of "
        "themselves stands in the last column and counts nowhere.",
        Table(["release", "<weights", "devices, by proof", "only claimed"], rows),
        stacked_bars(
            "Proved devices by the release that they run",
            [(name, [("devices", 1, float(n))]) for name, n in bars[:8]],
            _whole,
        )
        if bars
        else "",
    )


def _rollout(picture: Picture) -> Iterator[Section]:
    current = picture.current
    if current is None or not picture.proved:
        return
    counts = picture.progress
    rows = [
        [part, spaced(counts[part]), percent(counts[part], picture.proved, 1)]
        for part, _ in _PARTS
    ]
    yield Section(
        f"On the way to {current.name}",
        f"All {counted(picture.proved, 'device')} that prove what they are. Failed: "
        "the trial refused it or its owner went back.",
        Table(["where they are", "devices", "share"], rows),
        stacked_bars(
            f"Proved devices on their way to {current.name}",
            [
                (
                    current.name,
                    [(p, c, float(counts[p])) for p, c in _PARTS if counts[p]],
                )
            ],
            _whole,
        ),
        "",
        # With the numbers, as a few among thousands make no visible bar.
        [(c, f"{part}: {spaced(counts[part])}") for part, c in _PARTS if counts[part]],
    )


def _groups(picture: Picture) -> Iterator[Section]:
    current = picture.current
    if current and len(picture.groups) > 1:
        yield Section(
            "Groups",
            "" if len(picture.groups) < KINDS else f"The {KINDS} largest.",
            Table(
                ["group", "devices", f"run {current.name}", "share", "with trouble"],
                [
                    [
                        name or "(none)",
                        _whole(number),
                        _whole(there),
                        percent(there, number, 1),
                        _whole(wrong),
                    ]
                    for name, number, there, wrong in picture.groups
                ],
            ),
        )


def _troubles(picture: Picture) -> Iterator[Section]:
    if not picture.troubles:
        return
    proved, claimed = picture.troubled
    more = f", and {spaced(claimed)} without" if claimed else ""
    yield Section(
        "What goes wrong",
        f"What {counted(proved, 'device')} reported last, by proof{more}. Long numbers "
        "and digests are left out of the reasons, so that equal ones meet.",
        Table(
            ["outcome", "<reason", "devices", "only claimed", "<newest"],
            [
                [
                    kind.outcome,
                    cut(kind.reason) or "-",
                    spaced(kind.devices),
                    spaced(kind.claimed),
                    picture.ago(kind.newest),
                ]
                for kind in picture.troubles
            ],
        ),
        folded=[("The newest of them", device_table(picture, picture.worst))],
    )


def _silence(picture: Picture) -> Iterator[Section]:
    if not picture.proved:
        return
    rows = [
        [words, spaced(number), percent(number, picture.proved, 1)]
        for words, number in picture.silence
    ]
    folded = []
    if picture.silent:
        title = f"Silent for longest: {_of(picture.silent, picture.stale)}"
        folded.append((title, device_table(picture, picture.silent)))
    yield Section(
        "Last heard of",
        f"A device reports after every change and once a day; over {STALE // DAY} days "
        "count as silent.",
        Table(["silence", "devices", "share"], rows),
        folded=folded,
    )


def _bytes(picture: Picture) -> Iterator[Section]:
    if not picture.releases:
        return
    sent, full = picture.bytes_sent()
    text = (
        f"Devices counted {short_bytes(picture.month_bytes)} on the wire this month, "
        "headers and polls included. By release: patches "
        f"{short_bytes(sent)}, full weights would have been {short_bytes(full)}. A "
        "device that skipped releases took another patch than the one listed."
    )
    rows = [
        [
            release.name,
            str(release.counter),
            moment(release.at),
            spaced(release.patch_bytes) if release.patch_bytes else "-",
            spaced(release.full_bytes) if release.full_bytes else "-",
            spaced(release.took),
            _saved(*picture.bytes_sent(release)),
        ]
        for release in picture.releases
    ]
    columns = ["release", "counter", "<published", "patch, bytes", "full, bytes"]
    columns += ["devices that applied it", "saved"]
    yield Section("Releases and bytes", text, Table(columns, rows))


def _devices(connection: sqlite3.Connection, picture: Picture) -> Iterator[Section]:
    if not picture.devices:
        return
    whole = picture.devices <= SHOWN
    listed = picture.recent if whole else [*picture.worst, *picture.silent]
    listed = list({device.id: device for device in listed}.values())[:SHOWN]
    folded = [
        (
            f"{device.id}: {device.outcome}, {picture.ago(device.last_seen)}",
            history_table(history(connection, device.id)),
        )
        for device in listed
    ]
    text = f"Below the table, the last {HISTORY} reports of each device."
    if not whole:
        text = (
            f"The {len(picture.recent)} of {spaced(picture.devices)} that were heard "
            f"of last; below, the last {HISTORY} reports of those with trouble and of "
            "the silent ones. Any other: dpu-fleet show DEVICE."
        )
    table = device_table(picture, picture.recent)
    yield Section("Devices", text, table, folded=folded)
    if picture.claims and not whole:
        yield Section(
            "Who proves nothing",
            f"The newest {_of(picture.claims, picture.devices - picture.proved)}.",
            device_table(picture, picture.claims),
        )


def _saved(sent: int, full: int) -> str:
    return short_bytes(full - sent) if sent else "-"


def _of(shown: Sequence[Device], number: int) -> str:
    if len(shown) == number:
        return spaced(number)
    return f"{spaced(len(shown))} of {spaced(number)}"


def _whole(number: float) -> str:
    return spaced(round(number))


def _count(number: int | None) -> str:
    return "-" if number is None else spaced(number)


def _date(day: int) -> str:
    return datetime.fromtimestamp(day * DAY, UTC).strftime("%Y-%m-%d")


def _day(day: int) -> str:
    return datetime.fromtimestamp(day * DAY, UTC).strftime("%-d %b")
