# SPDX-License-Identifier: Apache-2.0
"""``make test-crash``: everything about crash safety, with counts.

Exit code 1 if a promise was broken, or if something could not run on this machine:
what did not run proves nothing.
"""

import json
import os
import sys
import time
from pathlib import Path
from unittest import mock

import click

from tests.crash import kills as killing
from tests.crash import world
from tests.crash.disk import read_tree
from tests.crash.explore import (
    Count,
    cut_again,
    cut_power,
    fail_everywhere,
    fail_reads,
    kill_then_cut,
    live,
)
from tests.crash.realdisk import in_namespace
from tests.crash.recording import (
    LIFE,
    TROUBLE,
    Recording,
    install,
    rollback_far,
    update,
)
from tests.crash.traced import Recorder

FULL = (install, update, update, update)  # two slots and two reverse patches
SHARE = 0.2  # of the states of the largest explorations, or they would take an hour


class Report:
    """The table, as it is filled.

    Attributes:
        rows: What was counted, by name.
        failed: Names of what broke a promise, or did not run.
    """

    def __init__(self, *, as_json):
        self.rows, self.failed = {}, []
        self._out = sys.stderr if as_json else sys.stdout
        self._last = time.perf_counter(), _cpu_s()

    def add(self, name, counts):
        """Add one line."""
        now, last = (time.perf_counter(), _cpu_s()), self._last
        times = zip(("seconds", "cpu_seconds"), now, last, strict=True)
        self.rows[name] = counts | {n: round(end - start, 1) for n, end, start in times}
        self._last = now
        if counts.get("bad", 1):
            self.failed.append(name)
        text = ", ".join(
            f"{value:,} {key.replace('_', ' ')}" if key != "not run" else value
            for key, value in counts.items()
            if key != "problems"
        )
        print(f"{name:<42} {text}", flush=True, file=self._out)
        for what, times in counts.get("problems", {}).items():
            print(f"    {times} x {what}", flush=True, file=self._out)

    def explore(self, name, work, *arguments, share=1.0, **options):
        """Add a line for an exploration, of all states or of a share drawn."""
        count = Count(share=share)
        failures = work(*arguments, count, **options)
        counts = {} if failures is None else {"failures": failures}
        counts |= {"places": count.points, "states": count.states}
        counts |= {"states not drawn": count.passed} if share < 1 else {}
        counts |= {"bad": count.bad.total()}
        problems = dict(count.bad.most_common(10))
        self.add(name, counts | ({"problems": problems} if problems else {}))


def _cpu_s():
    """Processor time of this process, and of all that it waited for."""
    times = os.times()
    return sum(times[:4])


def record(base, before, steps, files=Recorder):
    """Record some steps in a new folder."""
    base.mkdir(parents=True)
    states = Recording(base).play(*before).states() if before else [None]
    return Recording(base, files(base), states).play(*steps)


def explore(report, folder):
    """Enumerate what power cuts and kills may leave."""
    installation = record(folder / "install", (), (install,))
    life = record(folder / "life", (install,), LIFE)
    trouble = record(folder / "trouble", (install,), TROUBLE)
    step = record(folder / "step", FULL, (update, rollback_far))
    report.explore("power cut: installation", cut_power, installation)
    report.explore("power cut: updates, rollbacks, refusals", cut_power, life)
    for name, recording in (("update", step), ("installation", installation)):
        report.explore(
            f"killed, then power cut: {name}",
            kill_then_cut,
            recording,
            after="rename",
            share=1 if recording is step else SHARE,
        )
    report.explore(
        "power cut, and again in the next start", cut_again, step, share=SHARE
    )
    report.explore(
        "power cut: little room, retries, damage", cut_power, trouble, share=2 * SHARE
    )


def refuse(report, folder):
    """Let every operation, and every read, of every kind of step fail."""
    for name, work in (
        ("every write, rename, sync ... fails", fail_everywhere),
        ("every read fails", fail_reads),
    ):
        report.explore(name, _each_step, folder / work.__name__, work, share=SHARE)


def _each_step(folder, work, count):
    """Do something to every step of a life, each kind of step once."""
    folder.mkdir()
    total, states, done = 0, [None], set()
    for number, step in enumerate((install, update, update, update, *TROUBLE, *LIFE)):
        # What an update does depends on how full the store is.
        if step not in done or number < 4:
            total += work(step, read_tree(folder), states, count)
        done.add(step)
        states = Recording(folder, states=states).play(step).states()
    return total


def set_clock_back(folder):
    """Each look at the clock shows a day before the one that it showed last."""
    days = iter(range(20_000, 0, -1))
    steps = install, *LIFE, *TROUBLE
    folder.mkdir()
    with mock.patch("time.gmtime", lambda _: real_gmtime(86_400 * next(days))):
        device = live(folder, *steps)
    times = [event.at for event in device.store.state.history]
    return {"steps": len(steps), "bad": int(times != sorted(times, reverse=True))}


real_gmtime = time.gmtime


@click.command()
@click.option("--kills", default=1000, show_default=True)
@click.option("--commands", default=30, show_default=True)
@click.option("--cuts", default=100, show_default=True, help="Of a real disk.")
@click.option(
    "--run",
    type=click.Path(exists=True, path_type=Path),
    help="Take patches of this run; by default one is trained.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(kills, commands, cuts, run, *, as_json):
    """Prove that a store survives."""
    world.sweep()
    report = Report(as_json=as_json)
    options = ["--kills", kills, "--commands", commands]
    done = killing.in_process(*options, *(["--run", run.resolve()] if run else []))
    for name, counts in done.items():
        report.add(name, counts)
    for name, counts in in_namespace(cuts).items():
        report.add(name, counts)
    with world.scratch() as folder:
        report.add("clock set back", set_clock_back(folder / "clock"))
        explore(report, folder)
        refuse(report, folder)
    if as_json:
        print(json.dumps({"schema": 1, "failed": report.failed, "rows": report.rows}))
    if report.failed:
        sys.exit(f"FAILED: {', '.join(report.failed)}")
    print("nothing was lost", file=sys.stderr)


if __name__ == "__main__":
    main()
