# SPDX-License-Identifier: Apache-2.0
"""The agent's reports: one for each change of the store, and one a day.

What there is to report is found in the store's own history, so that a change that was
made by hand, or just before a power cut, is reported too. A device without a key makes
none: they would prove nothing. Whatever goes wrong here costs a report, not an update.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import edge_runtime
from edge_runtime.errors import ProofError, StoreError, told_of
from edge_runtime.formats.json_file import read_record
from edge_runtime.live.entries import read_entries
from edge_runtime.live.outbox import Outbox, Told, kind_of, read_told
from edge_runtime.live.proof import make_proof, read_key
from edge_runtime.live.report import (
    DEVICE_FORM,
    Change,
    Outcome,
    Report,
    changes,
    encode_report,
    newest_change,
)
from edge_runtime.live.shared import device_id
from edge_runtime.store.contents import KEY_NAME
from edge_runtime.store.state import State
from edge_runtime.store.store import Store
from edge_runtime.times import UPTIME_S

DAY_S = 86_400
RETRY_S = 600  # after what went wrong
SETTLE_S = 300  # for live predictors to follow
MOST_AT_ONCE = 8  # changes since the last look that get a report each, the newest ones


class _Last(NamedTuple):
    n: int
    at: int
    change: Change


class Reporter:
    """Puts reports about one store into its outbox."""

    def __init__(
        self,
        folder: Path,
        log: Callable[..., None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Prepare to report.

        Args:
            folder: The agent's folder, where the network side tells what it knows.
            log: Called with the name of an event and its facts.
            clock: Seconds since 1970.
        """
        self._folder, self._log, self._clock = folder, log, clock
        self._last: _Last | None = None
        self._swept, self._problem, self._failed_at = False, "", 0.0

    def report(self, store: Store) -> None:
        """Report what has changed, or that a day has passed; never raise for it."""
        if self._problem and 0 <= self._clock() - self._failed_at < RETRY_S:
            return  # each try reads all the weights
        problem, self._failed_at = "", self._clock()
        try:
            if os.path.lexists(store.root / KEY_NAME):  # a link to nothing is told
                self._report(store)
        except Exception as err:  # noqa: BLE001 - a report is not worth an update
            problem = told_of(err)
        if problem and problem != self._problem:
            self._log("no report", reason=problem)
        self._problem = problem

    def _report(self, store: Store) -> None:
        outbox, now = Outbox(store.root, store.files), int(self._clock())
        if not self._swept:
            outbox.sweep()
            self._last, self._swept = _remembered(outbox), True
        new = list(_unreported(store.state, self._last))[-MOST_AT_ONCE:]
        is_due = self._last is None or not 0 <= now - self._last.at < DAY_S
        if new and not _is_settled(store, new[-1], now):
            return
        if not new and not is_due:
            return
        told = read_told(self._folder)
        outbox.forget(told.sent)
        for change in new or [newest_change(store.state)]:
            # Numbers grow even where the clock goes back, or where it begins anew at
            # each boot and the store was installed anew.
            begin = told.seen if now < UPTIME_S else 0
            n = max(now, begin, 1, self._last.n + 1 if self._last else 0)
            daily = not new
            data = self._encode(store, change, told, n)
            outbox.add(n, kind_of(change.outcome, daily=daily), data)
            self._last = _Last(n, now, change)
            self._log("reported", outcome=change.outcome, report=n)

    def _encode(self, store: Store, change: Change, told: Told, n: int) -> bytes:
        key = read_key(store.root / KEY_NAME)
        if key is None:
            raise ProofError("the device's key is gone; make it with 'device-key'")
        summary = store.summary()
        report = Report(
            device=_name(told.device or device_id()),
            n=n,
            at=int(self._clock()),
            change=replace(change, reason=self._plain(change.reason, store)),
            counter=_counter(store.state, told, change.target),
            head=(told.head, told.version) if told.head else None,
            name=str(summary.get("name", "")),
            group=told.group,
            runtime=edge_runtime.__version__,
            month_bytes=told.month_bytes,
        )
        return encode_report(report, json.loads(make_proof(store, report.nonce)), key)

    def _plain(self, reason: str, store: Store) -> str:
        """Leave out where things lie on this machine: nobody else needs to know."""
        for path, name in ((store.root, "STORE"), (self._folder, "FOLDER")):
            reason = reason.replace(str(path.absolute()), name)
        return reason


def _is_settled(store: Store, change: Change, now: int) -> bool:
    """Return whether live predictors follow a change; they have some minutes for it."""
    with suppress(ValueError):
        since = datetime.fromisoformat(change.since).timestamp()
        if abs(now - since) < SETTLE_S:
            live = (entry.get("fingerprint") for entry in read_entries(store))
            return all(found == store.state.active for found in live)
    return True


def _name(device: str) -> str:
    if not re.fullmatch(DEVICE_FORM, device):
        raise ProofError(
            f"the device is called {device!r}, and a report takes a name of letters, "
            "digits, '.', '_' and '-': give 'dpu-edge sync' another --device"
        )
    return device


def _counter(state: State, told: Told, target: str) -> int:
    known = (*state.slots, *state.former)
    found = [slot.counter for slot in known if slot.target == target]
    return max(found, default=told.counter if target == told.target else 0)


def _unreported(state: State, last: _Last | None) -> Iterator[Change]:
    found = list(changes(state))
    if last is None:
        yield from found[-1:]
        return
    known = [k for k, change in enumerate(found) if change.is_as(last.change)]
    # Not there any more: so much happened since, or the store is another one.
    yield from found[known[-1] + 1 :] if known else found[-1:]


def _remembered(outbox: Outbox) -> _Last | None:
    """Return number and change of the newest report; what cannot be read is none."""
    for report in reversed(outbox.waiting()):
        with suppress(OSError, StoreError):
            record = read_record(
                report.path, "report_bytes", str(report.path), StoreError
            )
            release = record.record("release")
            change = Change(
                record.text("since"),
                Outcome(record.one_of("outcome", list(Outcome))),
                release.integer("round"),
                release.digest("target"),
            )
            return _Last(report.n, record.integer("at"), change)
    return None
