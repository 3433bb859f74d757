# SPDX-License-Identifier: Apache-2.0
"""Made-up fleets in a database, of any size and condition, and their page.

    python -m tools.fleet.made_up 3000 -o dashboard.html

The same seed gives the same fleet: a release a week, devices that are silent or fail,
reports that nothing proves. No device runs; of real ones see ``make demo``.
"""

import hashlib
import random
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from edge_runtime.commandline import CONTEXT, Command, say
from packager.fleet.dashboard import dashboard
from packager.fleet.database import DAY_S, Row, add_reports, open_database
from tools.ending import check_parent

NOW = 1_796_169_600  # 2026-12-02
WEEK = 7 * DAY_S
TROUBLES = [
    ("refused", "the trial failed: outputs differ by 0.{n} from the golden ones"),
    ("refused", "accuracy 0.{n}, at least 0.90 is asked for"),
    ("rolled back", "by hand: board {n} answers too slowly"),
    ("blocked", "needs {n} bytes, there are 1024: no space left on /var/lib/dpu"),
    ("cut off", "the trial ended by signal 9"),
]


def target(round_: int) -> str:
    """Return the fingerprint of a round's weights."""
    return hashlib.sha256(b"%d" % round_).hexdigest()


def add_release(
    connection: sqlite3.Connection, counter: int, round_: int, at: int
) -> None:
    """Add a release of usual size."""
    with connection:
        row = (counter, counter, round_, target(round_), at, 9_400, 620_000, 0)
        connection.execute("INSERT INTO release VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)


def row(device: str, n: int, at: int, round_: int, **also: Any) -> Row:
    """Return a proved report of a device that applied a round, or as said."""
    fields: dict[str, Any] = {
        "device": device,
        "n": n,
        "at": at,
        "received": at + 60,
        "head_version": round_,
        "counter": round_,
        "round": round_,
        "target": target(round_),
        "outcome": "applied",
        "reason": "",
        "proved": True,
        "running": target(round_),
        "running_round": round_,
        "running_counter": round_,
        "key_id": hashlib.sha256(device.encode()).hexdigest()[:16],
        "name": "digits",
        "runtime": "0.5.0",
        "month_bytes": 31_337,
    }
    return Row(**fields | also)


def fill(  # noqa: PLR0913 - one for each condition
    connection: sqlite3.Connection,
    devices: int,
    *,
    rounds: int = 5,
    failing: float = 0.002,
    silent: float = 0.01,
    claimed: float = 0.002,
    groups: Sequence[str] = ("", "lab", "roof"),
    seed: int = 3,
    now: int = NOW,
) -> None:
    """Fill a database with a fleet of some condition; a release a week."""
    rng = random.Random(seed)
    for round_ in range(1, rounds + 1):
        add_release(connection, round_, round_, now - (rounds - round_) * WEEK - DAY_S)

    def reports() -> Iterator[Row]:
        for number in range(devices):
            device, group = f"board{number}", groups[number % len(groups)]
            proved = rng.random() >= claimed
            # A silent device ends some weeks ago, whatever it ran then.
            end = now - rng.randrange(4, 40) * DAY_S if rng.random() < silent else now
            for round_ in range(1, rounds + 1):
                came = now - (rounds - round_) * WEEK - DAY_S
                at = came + int(rng.expovariate(1 / (0.15 * DAY_S)))
                if at >= end:
                    continue
                also: dict[str, Any] = {"proved": proved, "group": group}
                if round_ == rounds and rng.random() < failing:
                    outcome, reason = TROUBLES[rng.randrange(len(TROUBLES))]
                    also |= {
                        "outcome": outcome,
                        "reason": reason.format(n=rng.randrange(100, 999)),
                        "running": target(round_ - 1),
                        "running_round": round_ - 1,
                        "running_counter": round_ - 1,
                    }
                yield row(device, round_, at, round_, **also)

    add_reports(connection, reports(), now=now)


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("devices", type=click.IntRange(0))
@click.option(
    "-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path)
)
@click.option("--failing", default=0.004, show_default=True)
@click.option("--silent", default=0.02, show_default=True)
@click.option("--claimed", default=0.002, show_default=True)
def main(
    devices: int, *, output: Path, failing: float, silent: float, claimed: float
) -> None:
    """Make up a fleet and write its page."""
    check_parent(output)
    with (
        tempfile.TemporaryDirectory() as folder,
        open_database(Path(folder) / "fleet.db") as connection,
    ):
        fill(connection, devices, failing=failing, silent=silent, claimed=claimed)
        output.write_text(dashboard(connection, now=NOW))
    say(f"wrote {output}")


if __name__ == "__main__":
    main()
