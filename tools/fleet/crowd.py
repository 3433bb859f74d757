# SPDX-License-Identifier: Apache-2.0
"""The crowd of a simulated fleet, hour by hour, in arrays.

An array holds for each device the number of its state (:mod:`tools.fleet.kinds`); what
a state makes of a head is looked up there. Random are the links, the trials and who
lies in a drawer for weeks.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge_runtime.sync.head import PERMILLE, place
from edge_runtime.sync.plan import SyncResult, standing
from packager.fleet.watch import Limit, Standing
from tools.fleet.kinds import LISTS, STUCK, UNTRUSTED, Kinds, Plan
from tools.fleet.publisher import Issue, Publisher

HOUR, DAY = 3600, 24
START = 1_800_000_000
SHARES = ((10, 0), (100, 24 * HOUR), (500, 48 * HOUR), (1000, 72 * HOUR))
# Above TCP, with nginx, as tools/bench/fleet.py counts them: a poll that finds nothing
# new, and what a head costs beside its bytes.
IDLE_BYTES, HEAD_BYTES = 312, 385
# Share of the devices, hours between polls, how often a poll succeeds, bytes an hour.
LINKS = (
    (0.55, 1, 0.98, 1 << 40),  # wired, or LTE
    (0.25, 6, 0.85, 64_000),  # NB-IoT
    (0.15, 12, 0.60, 6_000),  # a gateway that is busy
    (0.05, 24, 0.35, 1_500),  # a satellite now and then
)
ASLEEP, GONE = 0.05, 0.003  # for one to six weeks; for good
FAILS, FAILS_BAD = 0.001, 0.05  # trials that fail, of a release and of the bad one
HALT_AT = Limit(0.02)  # as of 'dpu-fleet watch --halt-at 2%'
REVERT_AFTER = 6  # hours for a person to look at it


@dataclass(slots=True)
class Followed:
    """A release and how it spread.

    Attributes:
        issue: Its head.
        hour: When it was published.
        shares: Share of the devices that are at it or past it, hour by hour.
        awake: The same of those that were not asleep.
        steps: Permille of each step, and the share that the hash really lets in.
        reports: Reports of success, and of failure.
    """

    issue: Issue
    hour: int
    shares: list[float] = field(default_factory=list)
    awake: list[float] = field(default_factory=list)
    steps: list[tuple[int, float]] = field(default_factory=list)
    reports: list[int] = field(default_factory=lambda: [0, 0])


@dataclass(slots=True)
class Counts:
    """What the crowd did.

    Attributes:
        polls: Polls that were answered; lost: those that were not.
        lost: Polls without an answer.
        poll_bytes: Of polls and heads.
        list_bytes: Of key lists.
        patch_bytes: Of patches, with requests.
        dropped_bytes: Of patches that a newer head made useless half-way.
        cuts: Downloads that went on in another hour.
        updates: Changes of release.
        failures: Trials that failed.
        exposed: Devices that ran the bad release.
        stranded: The most devices at once for which no way led to the release.
        early: Devices that took part before their step.
    """

    polls: int = 0
    lost: int = 0
    poll_bytes: int = 0
    list_bytes: int = 0
    patch_bytes: int = 0
    dropped_bytes: int = 0
    cuts: int = 0
    updates: int = 0
    failures: int = 0
    exposed: int = 0
    stranded: int = 0
    early: int = 0


class Crowd:
    """A number of devices and a publisher.

    Attributes:
        counts: What they did.
        followed: The releases, oldest first.
        running: Devices by release counter of their active weights, day by day.
    """

    def __init__(self, publisher: Publisher, devices: int, seed: int) -> None:
        """Install all devices from the publisher's first release."""
        self.publisher, self.kinds = publisher, Kinds(publisher)
        self._rng = rng = np.random.default_rng(seed)
        self.names = [f"device-{number:06d}" for number in range(devices)]
        self.kind = np.full(devices, self.kinds.installed)
        share, period, online, pace = (np.array(x) for x in zip(*LINKS, strict=True))
        link = rng.choice(len(LINKS), devices, p=share)
        self._period, self._online, self._pace = period[link], online[link], pace[link]
        self._next = rng.integers(0, self._period)
        self._seen = np.zeros(devices, int)  # which head
        self._got = np.zeros(devices, int)  # bytes of the route that is fetched
        self._route = np.full(devices, -1)
        self._place = np.zeros(devices, int)  # in the rollout
        self._exposed = np.zeros(devices, bool)
        self.counts, self.followed = Counts(), list[Followed]()
        self.running: list[dict[int, int]] = []
        self._routes: dict[tuple[str, ...], int] = {}
        self._asleep = (np.full(devices, 1 << 30), np.zeros(devices, int))

    def sleep(self, hours: int) -> None:
        """Draw who sleeps when, of so many hours."""
        size, rng = len(self.kind), self._rng
        begin, end = self._asleep
        who = rng.random(size) < ASLEEP
        begin[who] = rng.integers(0, hours, who.sum())
        end[who] = begin[who] + rng.integers(7 * DAY, 42 * DAY, who.sum())
        gone = rng.random(size) < GONE
        begin[gone], end[gone] = rng.integers(0, hours, gone.sum()), 1 << 30

    def awake(self, hour: int) -> NDArray[np.bool_]:
        """Return who has power."""
        begin, end = self._asleep
        return (hour < begin) | (hour >= end)

    def follow(self, issue: Issue, hour: int) -> None:
        """Take note of a new head."""
        if issue.what != "pause":
            self.followed.append(Followed(issue, hour))
        rollout = issue.signed.head.rollout
        if rollout and issue.what == "release":
            self._place[:] = [place(rollout.id, name) for name in self.names]
        self.check_ways()

    def pass_hour(self, hour: int) -> None:
        """Let every device that polls in this hour do so."""
        now, rng, counts = START + hour * HOUR, self._rng, self.counts
        at = len(self.publisher.issues) - 1
        issue = self.publisher.issues[at]
        awake = self.awake(hour)
        asked = np.flatnonzero((self._next <= hour) & awake)
        answered = rng.random(len(asked)) < self._online[asked]
        self._next[asked] = hour + 1  # again soon, unless all is well
        counts.lost += int((~answered).sum())
        asked = asked[answered]
        counts.polls += len(asked)
        is_new = self._seen[asked] != at
        counts.poll_bytes += IDLE_BYTES * int((~is_new).sum())
        counts.poll_bytes += (issue.size + HEAD_BYTES) * int(is_new.sum())
        self._seen[asked] = at
        rollout, kinds = issue.signed.head.rollout, self.kind[asked]
        share = rollout.share(now) if rollout else PERMILLE
        self._next[asked] = hour + self._period[asked]
        for kind in np.unique(kinds):
            plan, devices = self.kinds.plan(int(kind), at), asked[kinds == kind]
            if plan.result == LISTS:
                counts.list_bytes += plan.size * len(devices)
                self.kind[devices], self._next[devices] = plan.lists, hour + 1
            elif plan.result == SyncResult.FETCHED:
                taking = devices[self._place[devices] < share] if rollout else devices
                self._check_turns(int(kind), issue, devices, taking, now)
                self._fetch(plan, taking, hour)
        self._observe(hour, awake)

    def _fetch(self, plan: Plan, devices: NDArray[np.int_], hour: int) -> None:
        counts, rng = self.counts, self._rng
        key = tuple(way.sha256 for way in plan.route)
        number = self._routes.setdefault(key, len(self._routes))
        other = devices[self._route[devices] != number]
        counts.dropped_bytes += int(self._got[other].sum())
        self._got[other], self._route[other] = 0, number
        pace = self._pace[devices] * rng.uniform(0.2, 1.0, len(devices))
        missing = plan.size - self._got[devices]
        came = np.minimum(missing, pace.astype(int))
        self._got[devices] += came
        counts.patch_bytes += int(came.sum())
        whole = came == missing
        counts.cuts += int((~whole).sum())
        self._next[devices[~whole]] = hour + 1
        self._apply(plan, devices[whole])

    def _apply(self, plan: Plan, devices: NDArray[np.int_]) -> None:
        followed = self.followed[-1]
        self._got[devices], self._route[devices] = 0, -1
        for step in plan.steps:
            is_bad = any(
                f.issue.is_bad and f.issue.signed.head.target == step.target
                for f in self.followed
            )
            failed = self._rng.random(len(devices)) < (FAILS_BAD if is_bad else FAILS)
            self.kind[devices[failed]] = step.failed
            self.counts.failures += int(failed.sum())
            followed.reports[1] += int(failed.sum())
            devices = devices[~failed]
            self.kind[devices] = step.done
            self._exposed[devices] |= is_bad
        followed.reports[0] += len(devices)
        self.counts.updates += len(devices)
        self.counts.exposed = int(self._exposed.sum())

    @property
    def is_failing(self) -> bool:
        """Whether the newest release fails too often to go on."""
        worked, failed = self.followed[-1].reports if self.followed else (0, 0)
        return Standing(failed, worked + failed).is_over(HALT_AT)

    # What must hold -----------------------------------------------------------------

    def _check_turns(
        self,
        kind: int,
        issue: Issue,
        devices: NDArray[np.int_],
        taking: NDArray[np.int_],
        now: int,
    ) -> None:
        """Ask the real code for some devices, one by one, whether it is their turn."""
        state, head = self.kinds.states[kind], issue.signed.head
        taken = set(taking[:4].tolist())
        for number in {*devices[:4].tolist(), *taken}:
            name = self.names[number]
            found = standing(state, head, paused=False, device=name, group="", now=now)
            is_taking = number in taken or number in taking
            self.counts.early += (found is None) != is_taking

    def check_ways(self) -> None:
        """Count the devices that could never get to the newest release."""
        lost = self._sum(lambda kind: not self._arrives(kind))
        self.counts.stranded = max(self.counts.stranded, lost)

    def _arrives(self, kind: int) -> bool:
        """Return whether a state gets to the release, if nothing fails any more.

        One whose trial of this very release failed waits for the next; a paused
        release lets nobody in: neither is lost.
        """
        at = len(self.publisher.issues) - 1
        for _ in range(8):
            plan = self.kinds.plan(kind, at)
            if plan.result in (
                SyncResult.CURRENT,
                SyncResult.REFUSED,
                SyncResult.PAUSED,
            ):
                return True
            if plan.result in (UNTRUSTED, STUCK, SyncResult.NO_WAY, SyncResult.HELD):
                return False
            kind = plan.lists if plan.result == LISTS else plan.steps[-1].done
        return False

    def waiting(self) -> int:
        """Return how many devices wait for a newer release, as their trial failed."""
        at = len(self.publisher.issues) - 1
        refused = SyncResult.REFUSED
        return self._sum(lambda kind: self.kinds.plan(kind, at).result == refused)

    def arrived(self) -> int:
        """Return how many devices are at the newest release."""
        counter = self.publisher.issues[-1].signed.head.counter
        return self._sum(lambda kind: self.kinds.states[kind].floor >= counter)

    def _sum(self, holds: Callable[[int], bool]) -> int:
        """Return how many devices are in a state of which something holds."""
        kinds, devices = np.unique(self.kind, return_counts=True)
        pairs = zip(kinds.tolist(), devices.tolist(), strict=True)
        return sum(count for kind, count in pairs if holds(kind))

    def _observe(self, hour: int, awake: NDArray[np.bool_]) -> None:
        size = len(self.kinds.states)
        everybody = np.bincount(self.kind, minlength=size)
        living = np.bincount(self.kind[awake], minlength=size)
        floors = np.array([state.floor for state in self.kinds.states])
        for followed in self.followed:
            there = floors >= followed.issue.signed.head.counter
            followed.shares.append(everybody[there].sum() / len(self.kind))
            followed.awake.append(living[there].sum() / max(1, living.sum()))
            self._note_steps(followed, hour)
        if hour % DAY == 0:
            found = dict[int, int]()
            for state, count in zip(self.kinds.states, everybody, strict=True):
                counter = state.active_slot.counter
                found[counter] = found.get(counter, 0) + int(count)
            self.running.append(found)

    def _note_steps(self, followed: Followed, hour: int) -> None:
        rollout = followed.issue.signed.head.rollout
        if rollout is None or followed is not self.followed[-1]:
            return
        now = START + hour * HOUR
        for share, start in rollout.steps:
            if now - HOUR < start <= now:
                let_in = float((self._place < rollout.share(now)).mean())
                followed.steps.append((share, let_in))
