# SPDX-License-Identifier: Apache-2.0
"""A fleet of 100,000 devices over 90 days, on bad links.

    python -m tools.simulate_fleet --check -o tools/results/fleet.svg

Heads, patches, key lists, pauses and the release that is taken back are real, made by
``packager`` from rounds of the digits (trained first, about a minute, unless ``--run``
names a run). What a device makes of them is asked of the code that devices run, once
for each distinct state (:mod:`tools.fleet.kinds`); NumPy carries the crowd. Links,
trials and drawers are drawn at random, by ``--seed``.
"""

import math
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from edge_runtime.commandline import CONTEXT, Command, emit, json_option, say
from edge_runtime.sync.head import PERMILLE
from tools.bench.patch import machine
from tools.ending import check_parent, end
from tools.fleet.crowd import DAY, HOUR, REVERT_AFTER, SHARES, START, Crowd, Followed
from tools.fleet.publisher import Publisher, copy_run, train

ROUNDS = 2  # devices start with one, and are given another in the end
WITHIN = 0.01  # of a large fleet, between the share of a step and who it lets in
TIME_BAR_S = 10.0  # 100,000 devices over 14 days
GOALS = 0.5, 0.9, 0.99


@dataclass(frozen=True, slots=True)
class Release:
    """How one release spread.

    Attributes:
        counter: Its release counter.
        round: Its round.
        day: When it was published.
        what: ``release``, ``bad`` or ``revert``.
        hours: Until half, 90 % and 99 % of the devices with power were at it or past
            it; None where that did not happen.
        all_hours: The same of all devices, asleep or not.
        steps: Permille of each rollout step, and the share that it let in.
    """

    counter: int
    round: int
    day: float
    what: str
    hours: tuple[int | None, ...]
    all_hours: tuple[int | None, ...]
    steps: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Simulated:
    """What came of a fleet.

    Attributes:
        devices: How many.
        days: How long.
        releases: How each release spread.
        counts: What the devices did, in sum.
        states: Distinct states of devices.
        full_bytes: What the same updates would be as whole weights.
        arrived: Devices that are at the newest release in the end.
        asleep: Devices without power then.
        waiting: Devices that wait for a newer release, as their trial of it failed.
        running: Devices by active release, day by day.
        seconds: Wall time, without the training.
    """

    devices: int
    days: int
    releases: tuple[Release, ...]
    counts: dict[str, int]
    states: int
    full_bytes: int
    arrived: int
    asleep: int
    waiting: int
    running: tuple[dict[int, int], ...]
    seconds: float

    @property
    def served_bytes(self) -> int:
        """All bytes that went over links."""
        names = ("poll_bytes", "list_bytes", "patch_bytes")
        return sum(self.counts[name] for name in names)

    def missed(self) -> list[str]:
        """Return what does not hold."""
        found = []
        if stranded := self.counts["stranded"]:
            found.append(f"{stranded} devices are stranded, expected none")
        if self.counts["early"]:
            found.append(f"{self.counts['early']} devices took part out of turn")
        for release in self.releases:
            for share, let_in in release.steps:
                allowed = _within(share / PERMILLE, self.devices)
                if abs(let_in - share / PERMILLE) > allowed:
                    found.append(
                        f"release {release.counter}: {let_in:.1%} took part, expected "
                        f"{share / PERMILLE:.1%} within {allowed:.1%}"
                    )
        return found


def _within(share: float, devices: int) -> float:
    """Return how far from a step's share those that it lets in may be.

    Places in a rollout are drawn. In a small fleet chance alone leads further away, but
    beyond four standard deviations and two devices only once in ten thousand steps.
    """
    spread = math.sqrt(share * (1 - share) / devices)
    return max(WITHIN, 4 * spread + 2 / devices)


def simulate(run: Path, *, devices: int, days: int, seed: int) -> Simulated:
    """Let a fleet live.

    Args:
        run: With a few updated rounds; it stays as it is.
        devices: How many.
        days: How long; about every week there is a release, as long as rounds last.
        seed: Of links, trials and drawers.
    """
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fleet-") as name:
        folder = Path(name)
        copy = copy_run(run, folder / "runs", ROUNDS)
        publisher = Publisher(copy, folder / "www", now=START)
        crowd = Crowd(publisher, devices, seed)
        crowd.sleep(days * DAY)
        live(publisher, crowd, days)
        asleep = int((~crowd.awake(days * DAY)).sum())
        waiting, arrived = crowd.waiting(), crowd.arrived()
        # Who sleeps now, or waits for something newer: the next release has to do.
        publisher.release(now=START + days * DAY * HOUR)
        crowd.check_ways()
    counts = asdict(crowd.counts)
    return Simulated(
        devices,
        days,
        tuple(map(_release, crowd.followed)),
        counts,
        len(crowd.kinds.states),
        crowd.counts.updates * publisher.full_bytes,
        arrived,
        asleep,
        waiting,
        tuple(crowd.running),
        time.perf_counter() - begin,
    )


def live(publisher: Publisher, crowd: Crowd, days: int) -> None:
    """Pass the hours, with a release now and then; the middle one is bad."""
    count = min(len(publisher.rounds) - 1, days // 7)  # one is left for the end
    every = max(7, (days - 3) // max(1, count))
    hours = {DAY * (1 + every * n): n for n in range(count)}
    bad = count // 2 if count > 2 else -1
    exchanged = {2, count - 1} if count > 4 else set[int]()
    revert_at = -1
    for hour in range(days * DAY):
        now = START + hour * HOUR
        if hour in hours:
            if hours[hour] in exchanged:
                publisher.rotate(now=now)
            is_bad = hours[hour] == bad
            issue = publisher.release(now=now, shares=SHARES, is_bad=is_bad)
            crowd.follow(issue, hour)
        elif hour == revert_at:
            crowd.follow(publisher.revert(now=now), hour)
        elif publisher.issues[-1].what == "release" and crowd.is_failing:
            crowd.follow(publisher.pause(now=now), hour)
            revert_at = hour + REVERT_AFTER
        crowd.pass_hour(hour)


def _release(followed: Followed) -> Release:
    head = followed.issue.signed.head
    what = "bad" if followed.issue.is_bad else followed.issue.what
    none = (None,) * len(GOALS)  # it was halted
    return Release(
        head.counter,
        head.round,
        followed.hour / DAY,
        what,
        none if what == "bad" else _all_hours(followed.awake),
        none if what == "bad" else _all_hours(followed.shares),
        tuple(followed.steps),
    )


def _all_hours(shares: list[float]) -> tuple[int | None, ...]:
    return tuple(
        next((n + 1 for n, share in enumerate(shares) if share >= goal), None)
        for goal in GOALS
    )


def table(found: Simulated, told: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    counts, per = found.counts, found.devices
    lines = [
        f"{found.devices:,} devices, {found.days} days, {found.states} distinct "
        f"states, {found.seconds:.1f} s.",
        "",
        "| release | round | day | let in by each step | 50 % | 90 % | 99 % of those "
        "with power | 99 % of all |",
        "|---|--:|--:|---|--:|--:|--:|--:|",
    ]
    for r in found.releases:
        name = f"{r.counter}" + (f", {r.what}" if r.what != "release" else "")
        steps = ", ".join(f"{let_in:.2%}" for _, let_in in r.steps) or "all at once"
        hours = [_words(h) for h in (*r.hours, r.all_hours[-1])]
        if r.what == "bad":
            hours = ["halted", "-", "-", "-"]
        lines.append(
            f"| {name} | {r.round} | {r.day:.1f} | {steps} | "
            + " | ".join(hours)
            + " |"
        )
    served, full = found.served_bytes, max(1, found.full_bytes)
    dropped = counts["dropped_bytes"] / 1e6
    facts = {
        "updates": f"{counts['updates']:,}, {counts['updates'] / per:.1f} a device",
        "patches": f"{counts['patch_bytes'] / 1e6:,.0f} MB, "
        f"{counts['patch_bytes'] / max(1, counts['updates']):,.0f} B an update",
        "polls and heads": f"{counts['poll_bytes'] / 1e6:,.0f} MB, "
        f"{counts['polls']:,} polls and {counts['lost']:,} without an answer",
        "key lists": f"{counts['list_bytes'] / 1e6:,.1f} MB",
        "all bytes": f"{served / 1e6:,.0f} MB, {served / per / 1e3:,.0f} kB a device",
        "the same updates as whole weights": f"{full / 1e6:,.0f} MB without a poll: "
        f"{full / max(1, counts['patch_bytes']):.0f} times the patches",
        "downloads that went on in another hour": f"{counts['cuts']:,}",
        "patches that a newer head made useless half-way": f"{dropped:,.1f} MB",
        "trials that failed": f"{counts['failures']:,}",
        "devices that ran the bad release": f"{counts['exposed']:,}, "
        f"{counts['exposed'] / per:.2%}",
        "at the newest release in the end": f"{found.arrived:,} ({found.asleep:,} of "
        f"all have no power then, {found.waiting:,} wait for a newer one, as their "
        "trial failed)",
        "devices that took part out of turn": f"{counts['early']}",
        "stranded at any head, or at the next release": f"{counts['stranded']}",
    }
    lines += ["", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    lines += ["", "Machine: " + ", ".join(f"{k} {v}" for k, v in told.items()) + "."]
    return "\n".join(lines)


def _words(hours: int | None) -> str:
    return (
        "not"
        if hours is None
        else f"{hours} h"
        if hours < 96
        else f"{hours / DAY:.0f} d"
    )


@click.command(cls=Command, context_settings=CONTEXT)
@click.option("--devices", type=click.IntRange(1), default=100_000, show_default=True)
@click.option("--days", type=click.IntRange(7), default=90, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option(
    "--run",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Publish the rounds of this run.  [default: train the digits]",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw which release devices run, as an SVG file.",
)
@click.option("--check", is_flag=True, help="End with 1 if something does not hold.")
@json_option
def main(
    devices: int,
    days: int,
    seed: int,
    run: Path | None,
    output: Path | None,
    *,
    check: bool,
    as_json: bool,
) -> None:
    """Simulate a fleet that follows a channel."""
    check_parent(output)
    with tempfile.TemporaryDirectory(prefix="fleet-run-") as name:
        if run is None:
            say("training the digits, about a minute")
            run = train(Path(name))
        found = simulate(run, devices=devices, days=days, seed=seed)
    told, missed = machine(), found.missed()
    record = asdict(found) | {
        "served_bytes": found.served_bytes,
        "machine": told,
        "missed": missed,
    }
    emit(record, as_json=as_json, text=table(found, told))
    if output:
        from tools.fleet.picture import draw

        output.write_text(draw(found))
    end(missed, check=check)


if __name__ == "__main__":
    main()
