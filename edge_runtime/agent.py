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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_runtime.apply import check_model
from edge_runtime.device import Device, UpdateResult
from edge_runtime.errors import (
    BackendError,
    DpuError,
    HeldError,
    PatchError,
    StoreError,
)
from edge_runtime.header import KNOWN_CRITICAL, VERSION, PatchHeader
from edge_runtime.notify import ping
from edge_runtime.patch import open_patch
from edge_runtime.report import Report
from edge_runtime.route import Offer, Verdict, find_chain, judge
from edge_runtime.state import State

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
        offer: What it holds, once that was read; not kept over a restart.
    """

    name: str
    identity: list[int]
    verdict: str = ""
    reason: str = ""
    error: str = ""
    attempts: int = 0
    offer: Offer | None = None

    def facts(self) -> dict[str, Any]:
        """Return what the status file keeps of it."""
        facts = asdict(self)
        del facts["offer"]
        return facts


@contextmanager
def only_agent(root: Path) -> Iterator[None]:
    """Be the one agent of a store.

    Raises:
        StoreError: It has one already, or nothing is installed there.
        OSError: The store cannot be locked.
    """
    Device.open(root)  # else a lock would be left where there is no store
    with open(root / "agent.lock", "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise StoreError(
                f"another agent is at work for {root}; stop it first"
            ) from err
        yield


class Agent:
    """Watches one folder for one store.

    Attributes:
        stopping: Set it, and no further update is begun.
    """

    def __init__(
        self,
        open_device: Callable[[], Device],
        folder: Path,
        report: Report,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare to watch.

        Args:
            open_device: Opens the device; called anew when the store has changed.
            folder: Where patches arrive.
            report: Where to tell what it does.
            clock: Seconds, to tell when to try again.

        Raises:
            StoreError: Nothing is installed there.
        """
        self.stopping = False
        self._open, self._device = open_device, open_device()
        self._folder, self._report = folder, report
        self._clock, self._retry_at = clock, math.inf
        self._delay = self._last_delay = 0.0
        self._view: object = None
        files = report.record["files"].items()
        self._files = {name: Found(**facts) for name, facts in files}

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
        ping()
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
        for found in self._files.values():
            if found.offer and not self.stopping:
                self._settle(found, found.offer.header, held)
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
            record["basis"], self._files = basis, {}
        former, self._files = self._files, {}
        for name, identity in seen.items():
            found = former.get(name, Found(name, []))
            is_new = found.identity != identity
            if is_new:
                # A file that grows goes on waiting, without another line in the log.
                verdict = found.verdict if found.verdict == Verdict.WAITING else ""
                found = Found(name, identity, verdict, found.reason)
            self._files[name] = found
            if not (found.offer or found.error):
                self._read(found, is_new=is_new)

    def _read(self, found: Found, *, is_new: bool) -> None:
        path, state = self._folder / found.name, self.state
        ping()
        try:
            with open_patch(path, trust=state.trust) as patch:
                check_model(patch, state.model)
                found.offer = Offer(found.name, patch.size, patch.header)
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
            found = self._files.values()
            usable = [f.offer for f in found if f.offer and not f.error]
            chain = find_chain(self.state, usable)
            if not chain:
                break
            try:
                self._apply(self._files[chain[0].name], chain[0].size)
            except HeldError as err:
                self._retry_later()
                return str(err)
        return ""

    def _apply(self, found: Found, size: int) -> None:
        found.attempts += 1
        if found.attempts > MAX_ATTEMPTS:
            text = f"the agent was ended {MAX_ATTEMPTS} times while it applied this"
            self._decide(found, Verdict.REFUSED, text, StoreError())
            return
        # Written before, so that it counts. Not being able to tell is no hindrance.
        with suppress(OSError):
            self._publish()
        ping()
        start = time.monotonic()
        try:
            result = self._device.update(self._folder / found.name)
        except (StoreError, BackendError, OSError, HeldError):
            found.attempts = 0
            raise
        except DpuError as err:
            self._decide(found, Verdict.REFUSED, str(err), err)
        else:
            if result is UpdateResult.APPLIED:
                self._applied(found, size, round(time.monotonic() - start, 3))
        found.attempts = 0

    def _applied(self, found: Found, size: int, seconds: float) -> None:
        found.verdict, found.reason = Verdict.APPLIED, ""
        self._report.counts["patches_applied_total"] += 1
        slot = self.state.active_slot
        facts = {"round": slot.round, "fingerprint": slot.target, "bytes": size}
        self._report.log("applied", file=found.name, **facts, seconds=seconds)

    def _settle(self, found: Found, header: PatchHeader, held: str) -> None:
        """Say what becomes of a patch that is not applied now."""
        verdict, reason = judge(self.state, header)
        if verdict is Verdict.APPLIED:
            found.verdict, found.reason = verdict, reason
        elif not found.error:
            if verdict is None:
                verdict = Verdict.HELD if held else Verdict.WAITING
                reason = held or (
                    f"it leads from weights {header.parent[:12]}; nothing here "
                    f"leads to them from round {self.state.active_slot.round}"
                )
            self._decide(found, verdict, reason)

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
        self._report.log(verdict, **facts)

    # The rest -----------------------------------------------------------------------

    def _retry_later(self) -> None:
        self._delay = min(max(2 * self._last_delay, BACKOFF_S), MAX_BACKOFF_S)
        self._retry_at = min(self._retry_at, self._clock() + self._delay)

    def _publish(self) -> None:
        files = {name: found.facts() for name, found in self._files.items()}
        self._report.record["files"] = files
        self._report.publish(self.state)
