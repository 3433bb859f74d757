# SPDX-License-Identifier: Apache-2.0
"""``dpu-fleet show``: a fleet or one device, from what was collected."""

import sqlite3
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.commandline import emit, json_option, say
from edge_runtime.parameters import NewFile
from packager.cli.options import insist_apart, insist_ending, write_page

if TYPE_CHECKING:
    from packager.report.document import Document

URGENT = 3  # sections that a terminal is told; a page has all of them


@click.command()
@click.argument("device", required=False)
@click.option(
    "--db",
    "path",
    metavar="FILE",
    default="fleet.db",
    show_default=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="What 'dpu-fleet watch' collects into.",
)
@click.option(
    "--most",
    type=click.IntRange(1, 100_000),
    default=100,
    show_default=True,
    help="How many of the device's reports.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE.html",
    type=NewFile(),
    help="Write a page instead.",
)
@json_option
def show(
    device: str | None, *, path: Path, most: int, output: Path | None, as_json: bool
) -> None:
    """Show how a fleet is, or what DEVICE reported."""
    from packager.fleet.database import open_database
    from packager.release import as_text
    from packager.report.document import to_text

    if not path.exists():
        raise click.BadParameter(
            f"{path} is not there; 'dpu-fleet watch' makes it", param_hint="--db"
        )
    insist_apart(output, path)
    if output:
        insist_ending(output, ".html")
    with open_database(path) as connection:
        tell = _fleet if device is None else _device
        document, record = tell(connection, as_text(device or ""), most)
    if output:
        from packager.report.html import to_html

        write_page(to_html(document), output)
        say(f"wrote {output}")
        record |= {"output": str(output)}
    if as_json or not output:
        kept = document.sections[:URGENT]
        short = replace(document, sections=[replace(s, folded=()) for s in kept])
        emit(record, as_json=as_json, text=to_text(short))


def _fleet(
    connection: sqlite3.Connection, _: str, __: int
) -> tuple["Document", dict[str, Any]]:
    from packager.fleet.dashboard import fleet_document
    from packager.fleet.picture import take_picture

    now = int(time.time())
    picture = take_picture(connection, now)
    document = fleet_document(connection, now=now)
    record = {
        "state": document.state,
        "summary": document.title,
        "findings": list(document.lead),
        "devices": picture.devices,
        "proved": picture.proved,
        "silent": picture.stale,
        "newest_report": picture.newest or None,
        "release": picture.current and asdict(picture.current),
        "progress": dict(picture.progress),
    }
    return document, record


def _device(
    connection: sqlite3.Connection, name: str, most: int
) -> tuple["Document", dict[str, Any]]:
    from packager.fleet.device_page import device_document
    from packager.fleet.devices import find_device, history

    document = device_document(connection, name, now=int(time.time()), most=most)
    found = find_device(connection, name)
    if document is None or found is None:
        raise click.UsageError(f"no device {name!r} was ever heard of")
    reports = [asdict(told) for told in history(connection, name, most)]
    return document, asdict(found) | {"reports": reports}
