# SPDX-License-Identifier: Apache-2.0
"""``dpu-fleet prune``: remove what no device needs any more."""

import time
from dataclasses import asdict
from pathlib import Path

import click

from edge_runtime.commandline import emit, json_option, say
from edge_runtime.text import printable
from packager.cli.fleet_options import Span, run_or_ledger
from packager.cli.options import runs_option


@click.command()
@click.argument("url", metavar="URL|DIR")
@click.option(
    "--run",
    "name",
    metavar="RUN",
    help="The run whose ledger tells which releases are the newest.",
)
@runs_option
@click.option(
    "--keep",
    type=click.IntRange(0),
    default=8,
    show_default=True,
    help="Keep what leads to so many of the newest releases of --run.",
)
@click.option(
    "--fleet-db",
    "--db",
    "database",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Keep a cheapest way from all that devices reported to 'dpu-fleet watch'.",
)
@click.option(
    "--grace",
    type=Span(),
    default="24h",
    show_default=True,
    help="Leave younger files: a publisher may be about to name them.",
)
@click.option("--dry-run", is_flag=True, help="Say what would go; remove nothing.")
@json_option
def prune(  # noqa: PLR0913 - one argument for each option
    url: str,
    *,
    name: str | None,
    runs: Path,
    keep: int,
    database: Path | None,
    grace: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove patches and bundles that no device needs any more.

    What the head of any channel names stays, and so do heads, key lists and reports.
    """
    from packager.fleet.address import open_place
    from packager.fleet.prune import prune as prune_place
    from packager.ledger import read_ledger

    place = open_place(url)
    running = _reported(database) if database else {}
    done = prune_place(
        place,
        now=time.time(),
        grace_s=grace,
        releases=read_ledger(run_or_ledger(name, runs)).releases if name else (),
        newest=keep,
        reported=running,
        dry_run=dry_run,
    )
    if not name:
        say("without --run, patches that only earlier heads named are not kept")
    for target in done.stranded:
        say(
            f"{running[target]} devices reported {target[:12]}, and no way leads on "
            "from there: they go by the init weights"
        )
    size = sum(entry.size for entry in done.removed)
    record = {
        "url": place.name,
        "dry_run": dry_run,
        "removed": [asdict(entry) for entry in done.removed],
        "removed_bytes": size,
        "kept_bytes": done.kept,
        "stranded": {target: running[target] for target in done.stranded},
    }
    lines = [f"{entry.size:>12,} B  {printable(entry.path)}" for entry in done.removed]
    verb = "would go" if dry_run else "removed"
    count = f"{len(done.removed)} file{'s' * (len(done.removed) != 1)}"
    lines.append(f"{count}, {size:,} B {verb}; {done.kept:,} B stay")
    emit(record, as_json=as_json, text="\n".join(lines))


def _reported(database: Path) -> dict[str, int]:
    """Return how many devices run what, as far as they reported it."""
    from packager.fleet.database import open_database

    query = "SELECT target, count(*) FROM device WHERE target != '' GROUP BY target"
    with open_database(database) as connection:
        return dict(connection.execute(query))
