# SPDX-License-Identifier: Apache-2.0
"""Reports: what became of a release on a device, with the proof of what runs, signed.

::

    {"schema": 1, "device": "board7", "n": 1796169601, "at": 1796169601,
     "outcome": "applied", "reason": "", "since": "2026-12-01T10:00:00Z",
     "head": {"sha256": HEX, "version": 17},
     "release": {"counter": 5, "round": 5, "target": HEX},
     "name": "digits", "group": "lab", "runtime": "0.5.0", "month_bytes": 31337,
     "proof": {...}, "signature": {"key_id": HEX, "value": HEX}}

Canonical JSON as for a proof, which is inside whole and answers with the head's SHA-256
as nonce: so it was made after that head. ``head`` is null where the device follows no
channel, ``proof`` where it would be too long. The signature is over a context of its
own, so that nobody can take a proof that was asked for and give it another outcome.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from edge_runtime.formats.signing import framed, key_id
from edge_runtime.limits import limits
from edge_runtime.live.shared import canonical, public_key
from edge_runtime.store.state import Event, State
from edge_runtime.text import printable

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SCHEMA = 1
CONTEXT = b"dpu device report"
NO_HEAD = "no channel"  # the nonce where there is no head to answer
MAX_REASON = 1000  # characters
DEVICE_FORM = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"  # it names a folder in many places


class Outcome(StrEnum):
    """What became of a release on a device."""

    INSTALLED = "installed"
    APPLIED = "applied"
    ROLLED_BACK = "rolled back"  # by its owner
    REFUSED = "refused"  # its trial failed
    BLOCKED = "blocked"  # this device cannot try it
    CUT_OFF = "cut off"  # its trial crashed or hung: one try, and no verdict


FAILURES = (Outcome.REFUSED, Outcome.ROLLED_BACK)
_OUTCOMES = {
    "installed": Outcome.INSTALLED,
    "updated": Outcome.APPLIED,
    "rolled back": Outcome.ROLLED_BACK,
    "refused": Outcome.REFUSED,
    "blocked": Outcome.BLOCKED,
    "cut off": Outcome.CUT_OFF,
}


@dataclass(frozen=True, slots=True)
class Change:
    """Something that happened to a release on this device.

    Attributes:
        since: When, UTC by the device's own clock, for people.
        outcome: What became of it.
        round: The release's round.
        target: Its fingerprint.
        reason: Why.
    """

    since: str
    outcome: Outcome
    round: int
    target: str
    reason: str = ""

    def is_as(self, other: "Change") -> bool:
        """Tell whether two changes are the same event; a lasting block is one event."""
        same = (self.outcome, self.target) == (other.outcome, other.target)
        return same and (self.outcome is Outcome.BLOCKED or self.since == other.since)


def changes(state: State) -> Iterator[Change]:
    """Yield what happened to releases here, oldest first, as far as it is known."""
    active: Event | None = None
    for event in state.history:
        outcome = _OUTCOMES.get(event.event)
        if outcome is None:
            continue
        about = event
        if outcome is Outcome.ROLLED_BACK:
            about = active or event  # not the release that it went back to
        if outcome is Outcome.CUT_OFF and event.target in state.skipped:
            outcome = Outcome.REFUSED  # that was the last try
        if outcome in (Outcome.INSTALLED, Outcome.APPLIED, Outcome.ROLLED_BACK):
            active = event
        yield Change(event.at, outcome, about.round, about.target, event.reason)


def newest_change(state: State) -> Change:
    """Return what happened last; where the history is lost, what is there now."""
    slot = state.active_slot
    known = Change("", Outcome.INSTALLED, slot.round, slot.target)
    return ([known, *changes(state)])[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a report says, beside the proof.

    Attributes:
        device: The device's id, in the form of ``DEVICE_FORM``.
        n: Grows with each report of the device.
        at: When it was made, seconds since 1970 by the device's clock.
        change: What it is about.
        counter: Release counter of that; 0 where it is not known.
        head: SHA-256 and version of the newest head that was seen; None for none.
        name: Of the run; empty where it has none.
        group: That the device belongs to.
        runtime: Version of this runtime.
        month_bytes: Bytes on the wire this month.
    """

    device: str
    n: int
    at: int
    change: Change
    counter: int = 0
    head: tuple[str, int] | None = None
    name: str = ""
    group: str = ""
    runtime: str = ""
    month_bytes: int = 0

    @property
    def nonce(self) -> str:
        """What the proof in it has to answer."""
        return self.head[0] if self.head else NO_HEAD


def encode_report(
    report: Report, proof: Mapping[str, Any] | None, key: "Ed25519PrivateKey"
) -> bytes:
    """Encode a report and sign it; a proof that makes it too long is left out."""
    change = report.change
    record: dict[str, Any] = {
        name: value
        for name, value in asdict(report).items()
        if name not in ("change", "counter", "head")
    } | {
        "schema": SCHEMA,
        "outcome": change.outcome,
        "reason": printable(change.reason)[:MAX_REASON],
        "since": change.since,
        "head": report.head and {"sha256": report.head[0], "version": report.head[1]},
        "release": {
            "counter": report.counter,
            "round": change.round,
            "target": change.target,
        },
        "proof": proof,
    }
    value = key.sign(framed(CONTEXT, canonical(record))).hex()
    record["signature"] = {"key_id": key_id(public_key(key)), "value": value}
    data = canonical(record)
    if proof is not None and len(data) > limits().report_bytes:
        return encode_report(report, None, key)
    return data
