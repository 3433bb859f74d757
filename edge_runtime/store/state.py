# SPDX-License-Identifier: Apache-2.0
"""What a store knows, as plain data; which patches it admits is in admission.py.

No I/O but a look at the clock, for the history.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from edge_runtime.errors import KeyFileError, StoreError
from edge_runtime.formats.json_file import parse_record
from edge_runtime.formats.json_record import Record
from edge_runtime.formats.signing import Trust
from edge_runtime.times import utc
from edge_runtime.trust.keylist import KeyList

SCHEMA, WITH_LIST = 1, 2  # of a state without and with a key list
MAX_HISTORY = 100  # events kept, and targets whose tries are counted
MAX_TRIES = 3  # trials of one release that may be cut off before it is refused
MAX_FORMER = 8  # reverse patches kept
MAX_REASON = 1000  # characters of why something was refused
_MAX_BYTES = 4 * MAX_REASON  # of it in the file, where one may take twelve


@dataclass(frozen=True, slots=True)
class Slot:
    """One complete copy of the weights, or a reverse patch that leads back to them.

    Attributes:
        target: Fingerprint of the weights, hex; names the folder or file too.
        round: The round that made them.
        counter: Their release counter.
        parent: Of a reverse patch: the weights that it leads from.
    """

    target: str
    round: int
    counter: int
    parent: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a store.

    Attributes:
        at: UTC time by the device's own clock, ISO 8601; for people only.
        event: ``installed``, ``updated``, ``rolled back``, ``refused``, ``blocked``,
            ``cut off`` (a trial, by a signal or the clock), ``pinned``,
            ``unpinned``, ``hook failed``, ``keys changed`` (by a key list),
            ``mended`` (the state, from its copy) or ``repaired`` (files, from a
            bundle).
        round: The round that the event led to, or that was refused.
        target: Its fingerprint.
        reason: Why, for a refusal or a failure.
    """

    at: str
    event: str
    round: int
    target: str
    reason: str = ""


_TRIALS = {"refused", "blocked", "cut off"}  # what became of a release that never ran
# No release came in between.
_ASIDE = {"pinned", "unpinned", "hook failed", "mended", "keys changed", "repaired"}


@dataclass(frozen=True, slots=True)
class State:
    """The content of ``state.json``, the one commit point of a store.

    Attributes:
        model: Identity of the network.
        init: Fingerprint of the init weights.
        active: Fingerprint of the weights in use; none before the installation.
        floor: Highest release counter ever active; never lowered.
        floor_target: The target of that counter.
        slots: Kept copies, the active one first, then as they were left.
        trust: Whose signatures a patch needs. The keys themselves are here, so that
            they cannot be lost or exchanged apart from the floor.
        history: What happened, oldest first.
        former: Weights that reverse patches lead back to, the newest patch first.
        pinned: Whether updates are held back.
        tries: How often the trial of a target was begun, without a good end so far; as
            often as is allowed where it failed. From then on the target is refused
            until it is forced.
        key_list: Where ``trust`` comes from, and what may replace it; None where
            single keys were trusted when the device was installed, or nobody.
        contract: SHA-256 of ``model/contract.json``; empty where an older runtime
            installed the model, or wrote the state since.
    """

    model: str
    init: str
    active: str = ""
    floor: int = -1
    floor_target: str = ""
    slots: tuple[Slot, ...] = ()
    trust: Trust = field(default_factory=Trust)
    history: tuple[Event, ...] = ()
    former: tuple[Slot, ...] = ()
    pinned: bool = False
    tries: dict[str, int] = field(default_factory=dict)
    key_list: KeyList | None = None
    contract: str = ""

    def expired(self, signed_at: int | None = None) -> str:
        """Say that the key list expired before a release was signed; nothing if not.

        Args:
            signed_at: When it was signed, in seconds since 1970; by default now.
        """
        if self.key_list is None:
            return ""
        signed = "" if signed_at is None else utc(signed_at)
        return self.key_list.problem(utc(), signed)

    @property
    def skipped(self) -> list[str]:
        """The targets that are refused until they are forced."""
        return [t for t, tries in self.tries.items() if tries >= MAX_TRIES]

    @property
    def active_slot(self) -> Slot:
        """The slot in use."""
        return next(slot for slot in self.slots if slot.target == self.active)

    def summary(self) -> dict[str, Any]:
        """Return what statuses, metrics and proofs say of it, as plain data."""
        slot = self.active_slot
        return {
            "model": self.model,
            "round": slot.round,
            "fingerprint": slot.target,
            "release_counter": slot.counter,
            "release_floor": self.floor,
            "pinned": self.pinned,
        }

    def slot(self, target: str) -> Slot | None:
        """Return the kept slot of these weights, if there is one."""
        return next((slot for slot in self.slots if slot.target == target), None)

    @property
    def reachable(self) -> list[Slot]:
        """Every slot that a rollback can lead to, kept or made again."""
        return [s for s in (*self.slots, *self.former) if s.target != self.active]

    @property
    def reach_words(self) -> str:
        """The numbers of the rounds that a rollback can lead to."""
        return ", ".join(str(slot.round) for slot in self.reachable) or "none"

    def earlier(self, round_: int | None = None) -> Slot | None:
        """Return what a rollback leads to.

        Args:
            round_: The round to go to; by default the one released before the active.
        """
        if round_ is not None:
            return next((s for s in self.reachable if s.round == round_), None)
        older = [s for s in self.reachable if s.counter < self.active_slot.counter]
        return max(older, key=lambda slot: slot.counter, default=None)

    def way_back(self, target: str) -> tuple[str, list[Slot]]:
        """Return where the reverse patches that lead to a target begin, and them."""
        links: list[Slot] = []
        # A patch leads from weights that were dropped after it was made, if ever.
        for link in reversed(self.former):
            if link.target == target:
                links.insert(0, link)
                target = link.parent
        return target, links

    def dated(self, signed_at: int | None) -> "State":
        """Return the state that has seen a release that was signed then."""
        if self.key_list is None or signed_at is None:
            return self
        return replace(self, key_list=self.key_list.saw(utc(signed_at)))

    def trusting(self, key_list: KeyList) -> "State":
        """Return the state under a key list: whom it names is trusted, nobody else."""
        root = key_list.root
        state = replace(self, key_list=key_list, trust=root.releases)
        if not self.active:
            return state  # being installed: that is an event of its own
        reason = f"key list {root.version}, until {root.expires}"
        return state.noted("keys changed", self.active_slot, reason)

    def activated(self, slot: Slot, event: str) -> "State":
        """Return the state after a slot became the active one.

        Args:
            slot: The new active slot; it and the former one become the first.
            event: What to call it in the history.
        """
        slot, raised = replace(slot, parent=""), slot.counter > self.floor
        others = (kept for kept in self.slots if kept.target != slot.target)
        return replace(
            self,
            active=slot.target,
            floor=slot.counter if raised else self.floor,
            floor_target=slot.target if raised else self.floor_target,
            slots=(slot, *others),
            former=tuple(link for link in self.former if link.target != slot.target),
            tries={t: n for t, n in self.tries.items() if t != slot.target},
        ).noted(event, slot)

    def was_active(self, target: str) -> bool:
        """Return whether weights were in use here, as far as the history goes back."""
        return any(e.target == target and e.event not in _TRIALS for e in self.history)

    @property
    def blocked(self) -> Event | None:
        """Why this device cannot try a release, if that is how it stands."""
        for event in reversed(self.history):
            if event.event == "blocked":
                return event
            if event.event not in _ASIDE:
                break
        return None

    def tried(self, target: str, times: int = 1) -> "State":
        """Return the state with more tries of a target; the others' stay counted."""
        tries = self.tries | {target: self.tries.get(target, 0) + times}
        return replace(self, tries=dict(list(tries.items())[-MAX_HISTORY:]))

    def noted(self, event: str, slot: Slot, reason: str = "") -> "State":
        """Return the state with one more event, of now, in its history."""
        entry = Event(utc(), event, slot.round, slot.target, _cut(reason))
        return replace(self, history=(*self.history, entry)[-MAX_HISTORY:])

    def noted_once(self, event: str, slot: Slot, reason: str) -> "State":
        """As :meth:`noted`, but in place of such an event that came just before.

        What is tried again and again must not push the rest out of the history.
        """
        reason = _cut(reason)
        last = self.history[-1] if self.history else None
        if last and (last.event, last.target) == (event, slot.target):
            if last.reason == reason:
                return self
            return replace(self, history=self.history[:-1]).noted(event, slot, reason)
        return self.noted(event, slot, reason)

    def without(self, slot: Slot, link: Slot | None = None) -> "State":
        """Return the state without a kept slot.

        Args:
            slot: The slot to give up.
            link: The reverse patch that leads back to it, if there is one.
        """
        slots = tuple(s for s in self.slots if s != slot)
        state = replace(self, slots=slots, former=(*filter(None, [link]), *self.former))
        useful = [s for s in state.former if state.slot(state.way_back(s.target)[0])]
        return replace(state, former=tuple(useful[:MAX_FORMER]))


def _cut(reason: str) -> str:
    """Cut what a hook or a trial said: what is written has to be read again."""
    reason = reason[:MAX_REASON]
    while len(json.dumps(reason)) > _MAX_BYTES:
        reason = reason[: len(reason) * 3 // 4]
    return reason


def encode_state(state: State) -> bytes:
    """Encode a state as the bytes of ``state.json``."""
    record = {"schema": WITH_LIST if state.key_list else SCHEMA} | asdict(state)
    if state.key_list is None:
        del record["key_list"]  # as older runtimes write it, and read it
    if not state.contract:
        del record["contract"]  # likewise; they ignore it where it is
    sealed = record | {"sha256": _digest(record)}
    return json.dumps(sealed, indent=1).encode() + b"\n"


def decode_state(data: bytes) -> State:
    """Decode the bytes of ``state.json``.

    Raises:
        StoreError: Damaged, or written by a newer runtime.
    """
    record = parse_record(data, "state_bytes", "it", _DamagedError, encodable=False)
    values = dict(record.values)
    digest = values.pop("sha256", None)
    if (schema := record.integer("schema")) not in (SCHEMA, WITH_LIST):
        raise StoreError(
            f"state.json has schema {schema}, this runtime knows {SCHEMA} and "
            f"{WITH_LIST}; install a newer dpu-edge"
        )
    # Half an old and half a new state may be good JSON, with a floor of its own.
    if digest != _digest(values):
        raise _DamagedError("its checksum does not match")
    trust, tries = record.record("trust"), record.record("tries")
    try:
        state = State(
            record.digest("model"),
            record.digest("init"),
            record.digest("active"),
            record.integer("floor", least=-1),
            record.digest("floor_target", ""),
            tuple(map(_slot, record.records("slots"))),
            Trust(tuple(trust.texts("keys")), trust.integer("threshold")),
            tuple(map(_event, record.records("history"))),
            tuple(map(_slot, record.records("former"))),
            record.flag("pinned"),
            {target: tries.integer(target) for target in tries.values},
            key_list=KeyList.from_record(record.record("key_list"))
            if schema == WITH_LIST
            else None,
            contract=record.digest("contract", ""),
        )
        # Both raise for what no state of a device says: no such slot, no keys.
        _ = state.active_slot, state.trust.ids
    except (StopIteration, ValueError, KeyFileError) as err:
        raise _DamagedError(repr(err)) from err
    return state


class _DamagedError(StoreError):
    """The state is damaged; the message says what to do."""

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"state.json is damaged ({problem}); restore it from a backup, or install "
            "the bundle again into an empty folder"
        )


def _slot(entry: Record) -> Slot:
    # They name files: anything else could lead out of the store.
    return Slot(
        entry.digest("target"),
        entry.integer("round"),
        entry.integer("counter"),
        entry.digest("parent", ""),
    )


def _event(entry: Record) -> Event:
    return Event(
        entry.text("at"),
        entry.text("event"),
        entry.integer("round"),
        entry.text("target"),
        entry.text("reason", ""),
    )


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()
