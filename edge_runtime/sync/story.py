# SPDX-License-Identifier: Apache-2.0
"""Both halves of a device as one story: what runs, what is newest, what is missing.

The store tells what runs, the agent's status file what became of the files, and the
network side's state what the channel says; here they are put together, read-only.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edge_runtime.agent.status import TOLD
from edge_runtime.errors import HeadError, StoreError
from edge_runtime.store.state import State
from edge_runtime.store.store import Store
from edge_runtime.sync.head import Head
from edge_runtime.sync.head_file import read_head
from edge_runtime.sync.plan import SyncResult, route
from edge_runtime.sync.state import (
    HEAD_NAME,
    STATE_NAME,
    SyncState,
    read_kept,
    read_sync_state,
)
from edge_runtime.sync.sync import FAILED
from edge_runtime.text import printable
from edge_runtime.times import utc

QUIET_S = 1800  # an agent writes its status every ten minutes
_UNITS = (("day", 86_400), ("hour", 3600), ("minute", 60), ("second", 1))


@dataclass(frozen=True, slots=True)
class Known:
    """What the network side of a device knows.

    Attributes:
        folder: The agent's folder; None where nobody says which it is.
        state: Of the network side; None where there is none.
        head: The newest head that it took; None where there is none.
        problem: Why it cannot be read; empty where it can.
    """

    folder: Path | None = None
    state: SyncState | None = None
    head: Head | None = None
    problem: str = ""


def read_known(folder: Path | None) -> Known:
    """Read what the network side keeps in the agent's folder; nothing is changed.

    Args:
        folder: The agent's folder, if that is known.
    """
    if folder is None:
        return Known()
    try:
        if not (folder / STATE_NAME).exists():
            return Known(folder)
        state = read_sync_state(folder)
        if not state.digest:
            return Known(folder, state)
        signed = read_head(read_kept(folder))
    except (OSError, StoreError, HeadError) as err:
        return Known(folder, problem=str(err))
    if signed.sha256 != state.digest:
        problem = f"{folder / HEAD_NAME} is not the head that was taken"
        return Known(folder, state, problem=problem)
    expires = state.tuf_expires or signed.head.expires
    return Known(folder, state, replace(signed.head, expires=expires))


def tell(
    store: Store, agent: Mapping[str, Any], known: Known, now: float | None = None
) -> dict[str, Any]:
    """Return the story as data; ``summary`` is its one line for people.

    Args:
        store: The device's store.
        agent: What :func:`edge_runtime.agent.status.read_status` says.
        known: From :func:`read_known`.
        now: Seconds since 1970; by default this moment.
    """
    now, state, sync = time.time() if now is None else now, store.state, known.state
    missing, reason = _missing(state, agent, known, now)
    record: dict[str, Any] = {
        "missing": missing,
        "reason": reason,
        "folder": known.folder and str(known.folder),
        "newest": known.head and _release(known.head),
    }
    if sync:
        day = sync.day(now)
        record |= {
            "source": sync.source,
            "channel": sync.channel,
            "checked": utc(sync.checked) if sync.checked else None,
            "age_s": int(now) - sync.checked if sync.checked else None,
            "stale": bool(known.head and max(now, sync.seen) >= known.head.expires),
            "last_look": {"result": sync.result, "reason": sync.reason},
            "bytes": {"day": sync.spent_in(day), "month": sync.spent_in(day[:7])},
            "budget": {"day": sync.day_bytes, "month": sync.month_bytes},
        }
    return record | {"summary": _summary(store, record)}


def _release(head: Head) -> dict[str, Any]:
    names = ("version", "counter", "round", "target", "at", "expires")
    return {name: getattr(head, name) for name in names}


def _missing(
    state: State, agent: Mapping[str, Any], known: Known, now: float
) -> tuple[str, str]:
    """Say what is missing to the newest release, in a word, and why."""
    head, sync = known.head, known.state
    if head is None or sync is None:
        words = "no 'dpu-edge sync' fills the folder of this device's agent"
        if sync:
            words = f"the last look {sync.result}: {sync.reason}"
        return "unknown", known.problem or words
    if state.floor >= head.counter:
        if head.target == state.active:
            return "nothing", ""
        words = f"this device went back from release {state.floor}, or knows a newer"
        return "held", f"{words} one than the channel"
    if state.pinned:
        return "held", "updates are pinned; 'dpu-edge pin --off' allows them"
    if head.target in state.skipped:
        return "refused", "it failed its trial here; a newer release comes by itself"
    if (blocked := state.blocked) and blocked.target == head.target:
        return "blocked", blocked.reason
    if here := _lying_here(state, head, known.folder):
        return "not applied yet", _why_not_applied(agent, here, now)
    return _words_of(sync)


def _lying_here(state: State, head: Head, folder: Path | None) -> list[str]:
    """Return the files that lead to the newest release, where all of them are here."""
    ways = (w for w in head.ways if folder and (folder / f"{w.sha256}.dpu").exists())
    full = f"{head.bundle[1]}.zip" if head.bundle else ""
    if full and folder and (folder / full).exists():
        return [full]
    return [
        f"{way.sha256}.dpu"
        for way in route(state, replace(head, ways=tuple(ways))) or ()
    ]


def _why_not_applied(agent: Mapping[str, Any], files: list[str], now: float) -> str:
    if not agent:
        return "it lies here, and no agent has looked yet: is one running?"
    for name in files:
        found = agent["files"].get(name)
        if found and found["verdict"] in TOLD:
            return f"it lies here, and the agent says: {found['reason']}"
    if agent["failing"]:
        return f"it lies here, and the agent fails: {agent['failing']}"
    quiet = now - agent["last_success"]
    if quiet > QUIET_S:
        return (
            f"it lies here, and no agent has looked for {span(quiet)}: is one running?"
        )
    return "it lies here; the agent looks soon"


def _words_of(sync: SyncState) -> tuple[str, str]:
    if sync.result == SyncResult.FETCHED:
        return "not here", "what was fetched is gone; the next look fetches it again"
    if sync.result == FAILED:
        return FAILED, sync.reason
    return sync.result or "not here", sync.reason


def _summary(store: Store, record: Mapping[str, Any]) -> str:
    installed = store.summary()
    name, newest = installed.get("name", ""), record["newest"]
    runs = f"runs round {installed['round']}"
    line = f"{printable(name)}: {runs}" if name else runs
    if newest is None:
        return f"{line}; nothing tells what is newest: {printable(record['reason'])}"
    known = f"known {age(record['age_s'])}" + (" (stale)" if record["stale"] else "")
    if record["missing"] == "nothing":
        return f"{line}, the newest release, {known}"
    reason = printable(record["reason"] or record["missing"])
    return f"{line}; round {newest['round']} is the newest, {known}: {reason}"


def story_lines(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the rest of the story, for people."""
    if "source" not in record:
        return
    spent, budget = record["bytes"], record["budget"]
    month = f"{spent['month']} bytes this month"
    if budget["month"] is not None:
        month += f" of {budget['month']}"
    if budget["day"] is not None:
        month += f", {spent['day']} today of {budget['day']}"
    look = record["last_look"]
    place = f"{record['channel']} at {record['source']}"
    yield f"channel        {printable(place)}"
    yield f"last look      {printable(look['result']) or 'unknown'}; {month}"


def age(seconds: float | None) -> str:
    """Return how long ago something was, in words."""
    if seconds is None:
        return "at an unknown time"
    if seconds < 0:
        return "at a time that is still to come by this clock"
    return f"{span(seconds)} ago"


def span(seconds: float) -> str:
    """Return a span of time in words, in its largest unit."""
    unit, size = next((u for u in _UNITS if seconds >= u[1]), _UNITS[-1])
    count = int(seconds // size)
    return f"{count} {unit}{'' if count == 1 else 's'}"
