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
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from edge_runtime.apply import check_model
from edge_runtime.device import Device, Trial, UpdateResult
from edge_runtime.errors import DpuError, HeldError, PatchError, StoreError
from edge_runtime.files import Files
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
        identity: Inode, size and times: another file, or other content, has another.
        verdict: What was decided last.
        reason: Why.
        error: The kind of error for which this very file is refused for good.
        doubted: Whether it could not be opened once, which a download would explain.
        attempts: How often applying it was begun and did not end.
        offer: The patch, once it was found to be whole and trusted.
    """

    identity: list[int]
    verdict: str = ""
    reason: str = ""
    error: str = ""
    doubted: bool = False
    attempts: int = 0
    offer: Offer | None = None

    def record(self) -> dict[str, Any]:
        """Return what a later agent needs to know, as plain data."""
        names = (name for name in self.__slots__ if name != "offer")
        return {name: getattr(self, name) for name in names}


class Agent:
    """Watches one folder for one store. Enter it (``with``) before the first look.

    Attributes:
        report: Where it tells what it does.
        stopping: Whether it was told to stop: it begins no further update.
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
            trial: Called with slot and model folder; raises TrialError.
            clock: Seconds, to tell when to try again.
        """
        self.report = report
        self._root, self._folder, self._remove = root, folder, remove
        self._ping, self._trial, self._clock = ping, trial, clock
        self._files: dict[str, Found] = {}
        self._view: object = None
        self._retry_at, self._delay, self._last_delay = math.inf, 0.0, 0.0
        self.stopping = False
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
            self._stack.close()
            raise StoreError(
                f"another agent is at work for {self._root}; stop it first"
            ) from err
        with suppress(TypeError):  # written by another version: all is looked at again
            self._files = {n: Found(**entry) for n, entry in self.report.files.items()}
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def state(self) -> State:
        """The store's state, as of the last look or update."""
        return self._device.store.state

    def _open(self) -> Device:
        return Device.open(self._root, files=_Files(self._ping), trial=self._try)

    def _try(self, *args: Any, **options: Any) -> None:
        self._ping()
        self._trial(*args, **options)
        self._ping()

    # Looking ------------------------------------------------------------------------

    def look(self) -> bool:
        """Look once, and do what there is to do; report a failure.

        Returns:
            Whether there is news in the status file.

        Raises:
            StoreError: The device's own files are at fault.
            OSError: The folder cannot be read, or the status file not be written.
        """
        self._ping()
        try:
            worked = self._look()
            self.report.succeeded(worked=worked)
            return self._publish()
        except (StoreError, OSError) as err:
            self._retry_later()
            self.report.failed(err)
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
        for name, found in self._files.items():
            if not found.offer and not found.error:
                self._read(name, found)
        held = self._apply_all()
        for name, found in self._files.items():
            if found.offer and not self.stopping:
                self._settle(name, found, found.offer, held)
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
        """Forget what is known of files that are gone, or that are others now."""
        trust = self.state.trust
        # What a refusal depends on beside the file.
        basis = [VERSION, KNOWN_CRITICAL, self.state.model, self.state.init]
        basis += [trust.threshold, *trust.keys]
        former = self._files if basis == self.report.basis else {}
        self.report.basis, self._files = basis, {}
        for name, identity in seen.items():
            found = former.get(name) or Found(identity)
            if found.identity != identity:
                # A file that grows is waited for as one file.
                waits = found.doubted and not found.error
                found = Found(identity, found.verdict if waits else "", found.reason)
            self._files[name] = found

    def _read(self, name: str, found: Found) -> None:
        path = self._folder / name
        try:
            with open_patch(path, trust=self.state.trust) as patch:
                check_model(patch, self.state.model)
                found.offer = Offer(name, patch.size, patch.header)
        except PatchError as err:
            if found.doubted:
                self._refuse(name, found, err)
                return
            # Perhaps the rest of it is still to come: if so, it will have changed.
            found.doubted, self._retry_at = True, self._clock()
            self._note(name, found, Verdict.WAITING, "not a whole patch, or not yet")
        except DpuError as err:
            self._refuse(name, found, err)
        except OSError as err:
            self._retry_later()
            self._note(name, found, Verdict.WAITING, str(err))

    # Deciding and applying ----------------------------------------------------------

    def _apply_all(self) -> str:
        """Apply all that leads to the newest release; return why it is held."""
        while not self.stopping:
            known = self._files.values()
            chain = find_chain(
                self.state, [f.offer for f in known if f.offer and not f.error]
            )
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
            text = f"{MAX_ATTEMPTS} times the agent was ended while it applied this"
            self._refuse(offer.name, found, StoreError(text))
            return
        with suppress(OSError):
            self._publish()
        start = time.monotonic()
        try:
            result = self._device.update(self._folder / offer.name)
        except (StoreError, OSError, HeldError):
            found.attempts = 0
            raise
        except DpuError as err:
            found.attempts = 0
            self._refuse(offer.name, found, err)
            return
        found.attempts = 0
        if result is UpdateResult.APPLIED:
            slot = self.state.active_slot
            found.verdict, found.reason = Verdict.APPLIED, ""
            self.report.applied(
                time.monotonic() - start,
                file=offer.name,
                round=slot.round,
                fingerprint=slot.target,
                bytes=offer.size,
            )

    def _settle(self, name: str, found: Found, offer: Offer, held: str) -> None:
        """Say what becomes of a patch that is not applied now."""
        verdict, reason = judge(self.state, offer.header)
        if verdict is None:
            verdict, reason = Verdict.HELD, held
            if not held:
                verdict = Verdict.WAITING
                reason = (
                    f"it leads from weights {offer.header.parent[:12]}; nothing here "
                    f"leads to them from round {self.state.active_slot.round}"
                )
        if verdict is Verdict.APPLIED:
            found.verdict, found.reason = verdict, reason
        elif not found.error:
            self._note(name, found, verdict, reason)
        if self._remove and found.verdict in (Verdict.APPLIED, Verdict.PASSED):
            (self._folder / name).unlink(missing_ok=True)
            self.report.note("removed", file=name)

    def _refuse(self, name: str, found: Found, err: DpuError) -> None:
        found.error = type(err).__name__
        found.verdict, found.reason = Verdict.REFUSED, str(err)
        self.report.refused(found.error, file=name, reason=str(err))

    def _note(self, name: str, found: Found, verdict: Verdict, reason: str) -> None:
        """Report a decision, unless it is the one that was made before."""
        if (found.verdict, found.reason) != (verdict, reason):
            found.verdict, found.reason = verdict, reason
            number = {"round": found.offer.header.round} if found.offer else {}
            self.report.note(verdict, file=name, **number, reason=reason)

    def _retry_later(self) -> None:
        self._delay = min(max(2 * self._last_delay, BACKOFF_S), MAX_BACKOFF_S)
        self._retry_at = min(self._retry_at, self._clock() + self._delay)

    def _publish(self) -> bool:
        self.report.files = {n: found.record() for n, found in self._files.items()}
        return self.report.publish(self.state)


class _Files(Files):
    """Pings while it writes: a large slot on a slow card is progress, a hang is not."""

    def __init__(self, ping: Callable[[], None]) -> None:
        self._ping = ping

    def write(self, path: Path, chunks: Iterable[bytes | memoryview]) -> None:
        super().write(path, self._pinged(chunks))

    def _pinged(
        self, chunks: Iterable[bytes | memoryview]
    ) -> Iterator[bytes | memoryview]:
        for chunk in chunks:
            yield chunk
            self._ping()
