"""The agent: keeps a device at the newest release that a folder of patches leads to.

It looks at the folder and at the store, decides (:mod:`edge_runtime.route`) and applies
through :class:`edge_runtime.device.Device`, as ``dpu-edge apply`` does. What became of
each file is remembered by the file's identity, over restarts too: what was refused is
tried again only when it is another file.
"""

import fcntl
import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from edge_runtime.apply import check_model
from edge_runtime.device import Device, Trial, UpdateResult
from edge_runtime.errors import (
    BackendError,
    DpuError,
    HeldError,
    PatchError,
    StoreError,
)
from edge_runtime.header import KNOWN_CRITICAL, VERSION
from edge_runtime.patch import open_patch
from edge_runtime.report import Report
from edge_runtime.route import Offer, Verdict, find_chain, judge
from edge_runtime.state import State
from edge_runtime.trial import run_trial

BACKOFF_S, MAX_BACKOFF_S = 10.0, 600.0  # before what failed is tried again
MAX_ATTEMPTS = 5  # times that applying one file may end the whole process


@dataclass(slots=True)
class Found:
    """A patch file in the folder, and what became of it.

    Attributes:
        name: Of the file.
        identity: Inode, size and times: another file, or other content, has another.
        verdict: What was decided last.
        reason: Why.
        error: The kind of error for which this very file is refused for good.
        attempts: How often applying it was begun and did not end.
    """

    name: str
    identity: list[int]
    verdict: str = ""
    reason: str = ""
    error: str = ""
    attempts: int = 0


class Agent:
    """Watches one folder for one store. Enter it (``with``) before the first look.

    Attributes:
        stopping: Set it, and no further update is begun.
    """

    def __init__(
        self,
        root: Path,
        folder: Path,
        report: Report,
        *,
        remove: bool = False,
        ping: Callable[[], None] = lambda: None,
        trial: Trial = run_trial,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare to watch.

        Args:
            root: The store.
            folder: Where patches arrive.
            report: Where to tell what it does.
            remove: Remove patches that are applied, or passed by newer ones.
            ping: Called whenever there is progress, during an update too.
            trial: Called as :func:`edge_runtime.trial.run_trial`.
            clock: Seconds, to tell when to try again.
        """
        self.stopping = False
        self._root, self._folder, self._report = root, folder, report
        self._remove, self._ping, self._trial = remove, ping, trial
        self._clock, self._retry_at = clock, math.inf
        self._delay = self._last_delay = 0.0
        self._view: object = None
        self._files: dict[str, Found] = {}
        self._offers: dict[str, Offer] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Become the one agent of this store.

        Raises:
            StoreError: Nothing is installed there, or it has an agent already.
            OSError: The store cannot be locked.
        """
        self._device = self._open()
        lock = self._stack.enter_context(open(self._root / "agent.lock", "ab"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise StoreError(
                f"another agent is at work for {self._root}; stop it first"
            ) from err
        files = self._report.record["files"].items()
        self._files = {name: Found(**facts) for name, facts in files}
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def state(self) -> State:
        """The store's state, as of the last look or update."""
        return self._device.store.state

    # Looking ------------------------------------------------------------------------

    def look(self) -> None:
        """Look once, do what there is to do, and report.

        Raises:
            StoreError: The device's own files are at fault.
            BackendError: No runtime here can try new weights.
            OSError: The folder cannot be read, or the status file not be written.
        """
        self._ping()
        try:
            worked = self._look()
            self._report.succeed(worked=worked)
            if worked or self._report.is_old:
                self._publish()
        except (StoreError, BackendError, OSError) as err:
            self._retry_later()
            self._report.fail(err)
            with suppress(OSError):
                self._publish()
            raise

    def _look(self) -> bool:
        last, self._view = self._view, None  # unknown, if the next line fails
        seen, stamp = self._scan(), self._device.store.stamp()
        self._view = (seen, stamp)
        if self._view == last and self._clock() < self._retry_at:
            return False
        self._retry_at = math.inf
        self._last_delay, self._delay = self._delay, 0.0
        self._device = self._open()
        self._recognise(seen)
        held = self._apply_all()
        for name, offer in self._offers.items():
            if not self.stopping:
                self._settle(self._files[name], offer, held)
        return True

    def _scan(self) -> dict[str, list[int]]:
        """Return the identities of the patch files, without opening any."""
        seen = {}
        with os.scandir(self._folder) as entries:
            for entry in entries:
                # Transports begin the names of unfinished files with a dot.
                if entry.name.startswith(".") or not entry.name.endswith(".dpu"):
                    continue
                with suppress(FileNotFoundError):
                    if entry.is_file(follow_symlinks=False):
                        s = entry.stat(follow_symlinks=False)
                        times = s.st_mtime_ns, s.st_ctime_ns
                        seen[entry.name] = [s.st_ino, s.st_size, *times]
        return dict(sorted(seen.items()))

    def _recognise(self, seen: dict[str, list[int]]) -> None:
        """Open what is new, and forget what is gone."""
        state, record = self.state, self._report.record
        # What a refusal depends on beside the file.
        basis = [VERSION, KNOWN_CRITICAL, state.model, state.init]
        basis += [state.trust.threshold, *state.trust.keys]
        if basis != record["basis"]:
            record["basis"], self._files, self._offers = basis, {}, {}
        former, self._files = self._files, {}
        offers, self._offers = self._offers, {}
        for name, identity in seen.items():
            found = former.get(name, Found(name, []))
            is_new = found.identity != identity
            if is_new:
                # A file that grows goes on waiting, without another line in the log.
                verdict = found.verdict if found.verdict == Verdict.WAITING else ""
                found = Found(name, identity, verdict, found.reason)
            self._files[name] = found
            if name in offers and not is_new:
                self._offers[name] = offers[name]
            elif not found.error:
                self._read(found, is_new=is_new)

    def _read(self, found: Found, *, is_new: bool) -> None:
        path, state = self._folder / found.name, self.state
        self._ping()
        try:
            with open_patch(path, trust=state.trust) as patch:
                check_model(patch, state.model)
                offer = Offer(found.name, patch.size, patch.header)
                self._offers[found.name] = offer
        except PatchError as err:
            if is_new:
                # The rest of it may still come: then the next look finds it changed.
                self._retry_at = self._clock()
                self._decide(found, Verdict.WAITING, "not a whole patch, or not yet")
            else:
                self._decide(found, Verdict.REFUSED, str(err), err)
        except DpuError as err:
            self._decide(found, Verdict.REFUSED, str(err), err)
        except OSError as err:
            self._retry_later()
            self._decide(found, Verdict.WAITING, str(err))

    # Deciding and applying ----------------------------------------------------------

    def _apply_all(self) -> str:
        """Apply all that leads to the newest release; return why it is held, if so."""
        while not self.stopping:
            usable = [o for n, o in self._offers.items() if not self._files[n].error]
            chain = find_chain(self.state, usable)
            if not chain:
                break
            try:
                self._apply(self._files[chain[0].name], chain[0])
            except HeldError as err:
                self._retry_later()
                return str(err)
        return ""

    def _apply(self, found: Found, offer: Offer) -> None:
        found.attempts += 1
        if found.attempts > MAX_ATTEMPTS:
            text = f"the agent was ended {MAX_ATTEMPTS} times while it applied this"
            self._decide(found, Verdict.REFUSED, text, StoreError())
            return
        # Written before, so that it counts. Not being able to tell is no hindrance.
        with suppress(OSError):
            self._publish()
        self._ping()
        start = time.monotonic()
        try:
            result = self._device.update(self._folder / offer.name)
        except (StoreError, BackendError, OSError, HeldError):
            found.attempts = 0
            raise
        except DpuError as err:
            self._decide(found, Verdict.REFUSED, str(err), err)
        else:
            if result is UpdateResult.APPLIED:
                self._count(found, offer, time.monotonic() - start)
        found.attempts = 0

    def _count(self, found: Found, offer: Offer, seconds: float) -> None:
        slot, counts = self.state.active_slot, self._report.counts
        found.verdict, found.reason = Verdict.APPLIED, ""
        counts["patches_applied_total"] += 1
        counts["apply_seconds"] = round(counts["apply_seconds"] + seconds, 3)
        self._report.note(
            "applied",
            file=offer.name,
            round=slot.round,
            fingerprint=slot.target,
            bytes=offer.size,
            seconds=round(seconds, 3),
        )

    def _settle(self, found: Found, offer: Offer, held: str) -> None:
        """Say what becomes of a patch that is not applied now."""
        verdict, reason = judge(self.state, offer.header)
        if verdict is Verdict.APPLIED:
            found.verdict, found.reason = verdict, reason
        elif not found.error:
            if verdict is None:
                verdict = Verdict.HELD if held else Verdict.WAITING
                reason = held or (
                    f"it leads from weights {offer.header.parent[:12]}; nothing here "
                    f"leads to them from round {self.state.active_slot.round}"
                )
            self._decide(found, verdict, reason)
        if self._remove and found.verdict in (Verdict.APPLIED, Verdict.PASSED):
            (self._folder / found.name).unlink(missing_ok=True)
            self._report.note("removed", file=found.name)

    def _decide(
        self, found: Found, verdict: Verdict, reason: str, error: DpuError | None = None
    ) -> None:
        """Report a decision, unless it is the one that was made before."""
        if (found.verdict, found.reason) == (verdict, reason):
            return
        found.verdict, found.reason = verdict, reason
        facts = {"file": found.name, "reason": reason}
        if error:
            found.error = facts["error"] = type(error).__name__
            refused = self._report.counts["patches_refused_total"]
            refused[found.error] = refused.get(found.error, 0) + 1
        self._report.note(verdict, **facts)

    # The rest -----------------------------------------------------------------------

    def _retry_later(self) -> None:
        self._delay = min(max(2 * self._last_delay, BACKOFF_S), MAX_BACKOFF_S)
        self._retry_at = min(self._retry_at, self._clock() + self._delay)

    def _publish(self) -> None:
        files = {name: asdict(found) for name, found in self._files.items()}
        self._report.record["files"] = files
        self._report.publish(self.state)

    def _open(self) -> Device:
        return Device.open(self._root, trial=self._try)

    def _try(self, *args: Any, **options: Any) -> None:
        self._ping()
        self._trial(*args, **options)
        self._ping()
