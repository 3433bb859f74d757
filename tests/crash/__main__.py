"""``make test-crash``: everything about crash safety, with counts.

It takes some minutes. Exit code 1 if a promise was broken, or if something could not
run on this machine: what did not run proves nothing.
"""

import sys
import time
from functools import partial

import click

from tests.crash import kills as killing
from tests.crash import world
from tests.crash.disk import read_tree
from tests.crash.explore import (
    Count,
    cut_again,
    cut_power,
    fail_everywhere,
    kill_then_cut,
)
from tests.crash.realdisk import in_namespace
from tests.crash.recording import LIFE, Recording, install
from tests.crash.traced import Forgetful

failed = []


def show(name, bad, seconds, **counts):
    """Print one line of the table."""
    text = ", ".join(f"{value:,} {key}" for key, value in counts.items())
    print(f"{name:45} {text}, {bad} bad  ({seconds:.0f} s)", flush=True)
    if bad:
        failed.append(name)


def explore(folder, name, before, steps):
    """Enumerate the crash states of some steps."""
    recording = record(folder, before, steps)
    for title, cut in (
        ("power cut", cut_power),
        ("killed, then power cut", kill_then_cut),
        ("power cut, and again in the next start", cut_again),
    ):
        count, start = Count(), time.time()
        cut(recording, count)
        report(f"{name}: {title}", count, start, operations=len(recording.files.log))


def report(name, count, start, **counts):
    counts |= {"places": count.points, "states": count.states}
    show(name, count.bad.total(), time.time() - start, **counts)
    for what, times in count.bad.most_common(10):
        print(f"    {times} x {what}")


def fail_operations(folder):
    """Let every operation of every step fail."""
    folder.mkdir()
    count, injected, start, states = Count(), 0, time.time(), [None]
    for step in (install, *LIFE):
        injected += fail_everywhere(step, read_tree(folder), states, count)
        states = Recording(folder, states=states).play(step).states()
    report("every operation fails, then power cut", count, start, failures=injected)


def leave_syncs_out(folder):
    """Leave out each place that syncs; every one must be missed."""
    start, tried, missed = time.time(), 0, []
    for before, steps in (((), (install,)), ((install,), LIFE)):
        for site in record(folder / f"{steps[0].__name__}", before, steps).files.sites:
            files = partial(Forgetful, site=site)
            recording = record(folder / f"{tried}", before, steps, files)
            count = Count(enough=1)
            cut_power(recording, count)
            if not count.bad:
                kill_then_cut(recording, count, files=files, after="rename")
            tried += 1
            if not count.bad:
                missed.append(site)
    show("a sync left out is found out", len(missed), time.time() - start, places=tried)
    for site in missed:
        print(f"    {site}")


def record(base, before, steps, files=Forgetful):
    """Record some steps in a new folder."""
    base.mkdir(parents=True)
    states = Recording(base).play(*before).states() if before else [None]
    return Recording(base, files(base), states).play(*steps)


@click.command()
@click.option("--kills", default=1000, show_default=True)
@click.option("--commands", default=30, show_default=True)
@click.option("--cuts", default=100, show_default=True)
def main(kills, commands, cuts):
    """Prove that a store survives."""
    with world.scratch() as folder:
        explore(folder / "install", "installation", (), (install,))
        explore(folder / "life", "a life", (install,), LIFE)
        fail_operations(folder / "failures")
        leave_syncs_out(folder / "syncs")
        kill_processes(folder, kills, commands)
    start = time.time()
    for name, result in in_namespace(cuts).items():
        if "not run" in result:
            print(f"{name:45} NOT RUN: {result['not run']}")
            failed.append(name)
        else:
            bad = result.pop("bad")
            show(name, bad, time.time() - start, **result)
    if failed:
        sys.exit(f"FAILED: {', '.join(failed)}")
    print("nothing was lost")


def kill_processes(folder, kills, commands):
    """Kill real processes; then let two of them fight over a store."""
    root = folder / "store"
    world.install(root)
    for name, work in (
        ("killed at work", lambda: killing.kill_workers(root, kills)),
        ("dpu-edge apply killed", lambda: killing.kill_commands(folder, commands)),
    ):
        start = time.time()
        counts = vars(work())
        show(name, counts.pop("bad"), time.time() - start, **counts)
    start, floor = time.time(), killing.Device.open(root).store.state.floor
    results = killing.two_writers(root, 100)
    made = killing.Device.open(root).store.state.floor - floor
    lost = sum(done for done, _ in results) - made
    away = sum(refused for _, refused in results)
    counts = {"updates": made, "turned away": away}
    show("two writers", abs(lost), time.time() - start, **counts)


if __name__ == "__main__":
    main()
