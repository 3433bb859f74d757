# SPDX-License-Identifier: Apache-2.0
"""The agent: keeps a device at the newest release that a folder of patches leads to.

It looks at the folder and at the store, decides (:mod:`edge_runtime.agent.plan`) and
applies through :class:`edge_runtime.update.device.Device`, as ``dpu-edge apply`` does.
What became of each file is remembered by the file's identity, over restarts too: what
was refused is tried again only when it is another file.
"""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from enum import Flag, StrEnum, auto
from pathlib import Path

from edge_runtime.agent.backoff import Backoff
from edge_runtime.agent.decisions import Decisions
from edge_runtime.agent.folder import PatchFolder, is_full
from edge_runtime.agent.plan import Decision, Offer, decide, find_chain
from edge_runtime.agent.reporter import Reporter
from edge_runtime.agent.status import ping, read_status, write_status
from edge_runtime.errors import (
    BackendError,
    BlockedError,
    BundleError,
    HeldError,
    KeyListError,
    ListExpiredError,
    PatchError,
    TrialCutOffError,
    TrialError,
    TrustError,
    VerificationError,
    WrongModelError,
    WrongParentError,
    told_of,
)
from edge_runtime.formats.bundle import read_bundle
from edge_runtime.formats.identity import wrong_model
from edge_runtime.formats.patch import Patch, open_patch
from edge_runtime.reading import open_regular
from edge_runtime.store.state import MAX_REASON, State
from edge_runtime.trust import list_number, load_list
from edge_runtime.update.device import Device, UpdateResult

HEARTBEAT_S = 600.0  # the status is written at least this often
# The device is at fault, or nobody: what failed so is tried again.
BLOCKED = (BackendError, BlockedError, TrialCutOffError)
# What a file itself may be at fault for: it alone is refused for good.
_OF_THE_FILE = (
    *(BundleError, PatchError, WrongModelError, WrongParentError),
    *(TrustError, VerificationError, TrialError),
)


class Outcome(StrEnum):
    """What a look at the folder came to."""

    UNCHANGED = "unchanged"  # since the last look: nothing was done
    DONE = "done"
    RETRY = "retry"  # something cannot be read, or is held for now


class Step(Flag):
    """What opening the new files led to, beside the decision about each of them."""

    NOTHING = 0
    LIST_TAKEN = auto()  # others may sign now: what was refused may be right
    UNFINISHED = auto()  # the rest of a file may still come
    UNREADABLE = auto()  # the disk refuses for now


class Agent:
    """Watches one folder for one store.

    Attributes:
        stopping: Set it, and no further update is begun.
    """

    def __init__(
        self,
        open_device: Callable[[], Device],
        folder: Path,
        log: Callable[..., None],
        *,
        metrics: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare to watch; what the status file says is remembered.

        Args:
            open_device: Opens the device; called anew when the store has changed.
            folder: Where patches arrive.
            log: Called with the name of an event and its facts.
            metrics: A file for the textfile collector of Prometheus.
            clock: Seconds, to tell when to try again.

        Raises:
            StoreError: Nothing is installed there.
        """
        self.stopping = False
        self._open, self._device = open_device, open_device()
        self._folder, self._log, self._metrics = PatchFolder(folder, log), log, metrics
        self._backoff, self._written_at = Backoff(clock), -math.inf
        # What the last look saw; None: look in any case.
        self._view: tuple[object, object] | None = None
        self._reporter = Reporter(folder, log)
        status = read_status(self._device.store.root)
        self._last_success = status.get("last_success", 0)
        self._failing = status.get("failing", "")
        self._decisions = Decisions(status, log)
        self._decide = self._decisions.decide

    @property
    def state(self) -> State:
        """The store's state, as of the last look or update."""
        return self._device.store.state

    # Looking ------------------------------------------------------------------------

    def look(self) -> None:
        """Look once, do what there is to do, and report.

        Raises:
            DpuError: The device is at fault, or nobody; it is tried again.
            OSError: The folder cannot be read, or the status file not be written.
            Exception: Whatever else, such as that memory ran out; it is told the same.
        """
        ping()
        try:
            outcome = self._look()
            if outcome is Outcome.DONE:
                self._backoff.reset()
            self._report_success(outcome)
        except Exception as err:
            self._backoff.extend(err)
            self._report_failure(err)
            raise
        finally:
            self._reporter.report(self._device.store)
        if outcome is Outcome.RETRY:
            self._backoff.extend()

    def _look(self) -> Outcome:
        last, self._view = self._view, None  # unknown, if the next line fails
        seen, stamp = self._folder.scan(), self._device.store.stamp()
        self._view = (seen, stamp)
        if self._view == last and not self._backoff.is_over:
            return Outcome.UNCHANGED
        self._device = self._open()
        offers, step = self._recognise(seen)
        if Step.UNFINISHED in step:
            self._view = None  # the next look finds the file changed, or judges it
        held = self._apply_all(offers)
        for offer in offers:
            if not (self._decisions.is_refused(offer.name) or self.stopping):
                self._decide(offer.name, *decide(self.state, offer.header, held))
        is_retried = held or Step.UNREADABLE in step
        return Outcome.RETRY if is_retried else Outcome.DONE

    def _report_success(self, outcome: Outcome) -> None:
        worked = outcome is not Outcome.UNCHANGED
        self._last_success = int(time.time())
        if worked and self._failing:
            self._failing = ""
            self._log("recovered")
        if worked or time.monotonic() - self._written_at >= HEARTBEAT_S:
            self._publish()

    def _report_failure(self, error: Exception) -> None:
        reason = told_of(error)[:MAX_REASON]  # it stands in the status file
        if self._failing != reason:  # else it goes on, and was told
            self._failing = reason
            self._log("failed", error=type(error).__name__, reason=self._failing)
        with suppress(OSError):
            self._publish()

    # Opening what is new ------------------------------------------------------------

    def _recognise(self, seen: dict[str, list[int]]) -> tuple[list[Offer], Step]:
        """Take key lists, and open patches that were not refused before."""
        new = self._decisions.follow(seen, self.state)
        step = self._take_lists(new)
        while Step.LIST_TAKEN in step:
            # What the keys of before refused may be right now.
            new |= self._decisions.follow(seen, self.state)
            step = step & ~Step.LIST_TAKEN | self._take_lists(new)
        offers = []
        for name in seen:
            if list_number(name) is None and not self._decisions.is_refused(name):
                found = self._read(name, is_new=name in new)
                if isinstance(found, Offer):
                    offers.append(found)
                else:
                    step |= found
        return offers, step

    def _take_lists(self, new: set[str]) -> Step:
        """Take the key lists that follow, in order."""
        lists = ((list_number(name), name) for name in self._decisions)
        step = Step.NOTHING
        for number, name in sorted((n, name) for n, name in lists if n is not None):
            key_list = self.state.key_list
            version = key_list.root.version if key_list else 0
            if key_list and number < version:
                self._decide(name, Decision.PASSED, f"older than key list {version}")
            elif key_list and number > version + 1:
                reason = f"key list {version + 1} comes before it"
                self._decide(name, Decision.WAITING, reason)
            elif not self._decisions.is_refused(name):
                step |= self._take(name, is_new=name in new)
        return step

    def _take(self, name: str, *, is_new: bool) -> Step:
        """Take a key list, or decide why not."""
        ping()
        try:
            try:
                data = load_list(self._folder.path / name, regular=True)
            except OSError as err:
                self._decide(name, Decision.WAITING, str(err))
                return Step.UNREADABLE
            result = self._device.add_list(data)
        except ListExpiredError as err:
            self._decide(name, Decision.HELD, str(err))
        except (KeyListError, TrustError) as err:
            if isinstance(err, KeyListError) and is_new:
                self._decide(name, Decision.WAITING, "not a whole key list, or not yet")
                return Step.UNFINISHED
            self._decide(name, Decision.REFUSED, str(err), err)
        else:
            self._decide(name, Decision.APPLIED, "")
            if result is UpdateResult.APPLIED and (keys := self.state.key_list):
                facts = {"list": keys.root.version, "expires": keys.root.expires}
                self._log("applied", file=name, **facts)
            if result is UpdateResult.APPLIED:
                return Step.LIST_TAKEN
        return Step.NOTHING

    def _read(self, name: str, *, is_new: bool) -> Offer | Step:
        """Return what a file offers, or decide why it offers nothing."""
        ping()
        try:
            own = self._device.store.read_identity
            with self._open_file(name) as patch:
                if error := wrong_model(patch.header, self.state.model, own):
                    raise error
                return Offer(name, patch.size, patch.header)
        except OSError as err:
            self._decide(name, Decision.WAITING, str(err))
            return Step.UNREADABLE
        except _OF_THE_FILE as err:
            if isinstance(err, PatchError) and is_new:
                self._decide(name, Decision.WAITING, "not a whole patch, or not yet")
                return Step.UNFINISHED
            self._decide(name, Decision.REFUSED, str(err), err)
        return Step.NOTHING

    def _open_file(self, name: str) -> Patch:
        trust = self.state.trust
        # Opened once: a pipe that gets the name meanwhile would never end.
        file = open_regular(self._folder.path / name)
        if is_full(name):  # signed as a whole
            return open_patch(read_bundle(file, trust).patch)
        return open_patch(file, trust=trust)

    # Deciding and applying ----------------------------------------------------------

    def _apply_all(self, offers: list[Offer]) -> str:
        """Apply all that leads to the newest release; return why it is held, if so."""
        while not self.stopping:
            usable = [o for o in offers if not self._decisions.is_refused(o.name)]
            chain = find_chain(self.state, usable)
            if not chain:
                break
            try:
                self._apply(chain[0])
            except (HeldError, ListExpiredError) as err:
                return str(err)
        return ""

    def _apply(self, offer: Offer) -> None:
        ping()
        start = time.monotonic()
        try:
            with open_regular(self._folder.path / offer.name) as file:
                if is_full(offer.name):
                    result = self._device.take_bundle(file)
                else:
                    result = self._device.update(file)
        except BLOCKED as err:
            self._decide(offer.name, Decision.BLOCKED, str(err))
            if self._view:  # our own note of it is no news
                self._view = (self._view[0], self._device.store.stamp())
            raise
        except (HeldError, ListExpiredError):
            raise
        except _OF_THE_FILE as err:
            self._decide(offer.name, Decision.REFUSED, str(err), err)
        else:
            if result is UpdateResult.APPLIED:
                self._applied(offer, round(time.monotonic() - start, 3))

    def _applied(self, offer: Offer, seconds: float) -> None:
        self._decide(offer.name, Decision.APPLIED, "")
        slot = self.state.active_slot
        facts = {"round": slot.round, "fingerprint": slot.target, "bytes": offer.size}
        self._log("applied", file=offer.name, **facts, seconds=seconds)

    def _publish(self) -> None:
        record = {
            "folder": str(self._folder.path.absolute()),
            "installed": self._device.store.summary(),
            "last_success": self._last_success,
            "failing": self._failing,
        } | self._decisions.record()
        write_status(self._device.store.root, record, self._metrics)
        self._written_at = time.monotonic()
