# SPDX-License-Identifier: Apache-2.0
"""Distinct states of devices, each asked once through the code that devices run.

A hundred thousand devices are in some dozens of states. What such a state makes of a
head is asked of :mod:`edge_runtime.sync.plan`, :mod:`edge_runtime.agent.plan`,
:mod:`edge_runtime.store.admission` and :mod:`edge_runtime.trust`; only files and trials
are left out.
"""

from dataclasses import dataclass, replace

from edge_runtime.agent.plan import Offer, find_chain
from edge_runtime.errors import DpuError, TrustError
from edge_runtime.formats.header import PatchHeader
from edge_runtime.formats.patch import open_patch
from edge_runtime.store.admission import parent_refusal, refusal
from edge_runtime.store.state import MAX_TRIES, Slot, State
from edge_runtime.sync.head import Way
from edge_runtime.sync.paths import patch_path
from edge_runtime.sync.plan import SyncResult, passed, route, standing
from edge_runtime.sync.route import REQUEST_BYTES
from edge_runtime.times import utc
from edge_runtime.trust import KeyList, first_root
from edge_runtime.update.device import KEPT_SLOTS
from packager.rounds.folder import read_init
from tools.fleet.publisher import Issue, Publisher

LISTS, UNTRUSTED, STUCK = "lists", "untrusted", "stuck"


@dataclass(frozen=True, slots=True)
class Step:
    """A patch that is applied.

    Attributes:
        target: What it leads to.
        done: The state behind it.
        failed: The state if its trial fails.
    """

    target: str
    done: int
    failed: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What a state makes of a head.

    Attributes:
        result: A word of sync's, or that key lists come first, or what is wrong.
        route: The files to fetch.
        size: Their bytes, and those of the requests.
        steps: What the agent applies once they are there.
        lists: The state once the key lists that are there were taken.
    """

    result: str
    route: tuple[Way, ...] = ()
    size: int = 0
    steps: tuple[Step, ...] = ()
    lists: int = -1


class Kinds:
    """All states that occur, by number.

    Attributes:
        states: One example of each.
    """

    def __init__(self, publisher: Publisher) -> None:
        """Begin with the state of a device that was just installed."""
        self.states: list[State] = []
        self._numbers: dict[object, int] = {}
        self._plans: dict[tuple[int, int], Plan] = {}
        self._publisher = publisher
        issue = publisher.issues[0]
        head, init = issue.signed.head, read_init(publisher.rounds[0])
        root = first_root(publisher.lists[0])
        state = State(head.model, init.weights.fingerprint)
        state = state.trusting(KeyList.begin(root, utc(issue.at)))
        slot = Slot(head.target, head.round, head.counter)
        self.installed = self.add(state.activated(slot, "installed"))

    def add(self, state: State) -> int:
        """Return the number of a state; what only people read does not count."""
        lists = state.key_list.root.version if state.key_list else 0
        slots = tuple((slot.target, slot.counter) for slot in state.slots)
        key = (
            slots,
            state.floor,
            state.floor_target,
            tuple(sorted(state.tries)),
            lists,
        )
        if key not in self._numbers:
            self._numbers[key] = len(self.states)
            self.states.append(replace(state, history=()))
        return self._numbers[key]

    def plan(self, number: int, issue: int) -> Plan:
        """Return what a state makes of a head, whether or not it is its turn yet."""
        if (number, issue) not in self._plans:
            self._plans[number, issue] = self._ask(number, issue)
        return self._plans[number, issue]

    def _ask(self, number: int, at: int) -> Plan:
        issue, state = self._publisher.issues[at], self.states[number]
        signed, head = issue.signed, issue.signed.head
        if state.key_list and head.keys > state.key_list.root.version:
            return self._take_lists(state, issue)
        try:
            signed.check(state.trust)
        except TrustError:
            return Plan(UNTRUSTED)
        everybody = replace(head, rollout=None)
        paused = signed.is_paused()
        found = standing(
            state, everybody, paused=paused, device="", group="", now=issue.at
        )
        if found:
            return Plan(found[0])
        return self._fetch(state, issue)

    def _take_lists(self, state: State, issue: Issue) -> Plan:
        size, key_list = 0, state.key_list
        assert key_list  # the caller looked
        for data in self._publisher.lists[key_list.root.version :]:
            key_list = key_list.follow(data, utc(issue.at))
            size += len(data) + REQUEST_BYTES
        return Plan(LISTS, size=size, lists=self.add(state.trusting(key_list)))

    def _fetch(self, state: State, issue: Issue) -> Plan:
        bad = set[str]()
        while True:
            ways = route(state, issue.signed.head, bad)
            if ways is None:
                return Plan(SyncResult.NO_WAY)
            after = state
            for way in ways:
                try:
                    after = passed(after, self._offer(state, way).header)
                except DpuError:
                    bad.add(way.sha256)
                    break
            else:
                break
        steps = tuple(self._apply(state, [self._offer(state, way) for way in ways]))
        size = sum(way.size + REQUEST_BYTES for way in ways)
        reached = self.states[steps[-1].done] if steps else state
        arrived = bool(steps) and reached.active == issue.signed.head.target
        return Plan(SyncResult.FETCHED if arrived else STUCK, ways, size, steps)

    def _offer(self, state: State, way: Way) -> Offer:
        path = patch_path(way.sha256)
        data, _ = self._publisher.place.read(path) or (b"", "")
        with open_patch(data, trust=state.trust) as patch:
            return Offer(way.sha256, patch.size, patch.header)

    def _apply(self, state: State, offers: list[Offer]) -> "list[Step]":
        """Do what an agent does with files, but for the weights themselves."""
        steps = []
        while chain := find_chain(state, offers):
            header = chain[0].header
            if refusal(state, header) or parent_refusal(state, header):
                break
            failed = self.add(state.tried(header.target, MAX_TRIES))
            state = _activated(state, header)
            steps.append(Step(header.target, self.add(state), failed))
        return steps


def _activated(state: State, header: PatchHeader) -> State:
    slot = Slot(header.target, header.round, header.counter)
    state = state.activated(slot, "updated").dated(header.signed_at)
    while len(state.slots) > KEPT_SLOTS:
        state = state.without(state.slots[-1])
    return state
