# SPDX-License-Identifier: Apache-2.0
"""The agent: keeps a device at the newest release that a folder of patches leads to.

It looks at the folder and at the store, decides (:mod:`edge_runtime.agent.plan`) and
applies through :class:`edge_runtime.update.device.Device`, as ``dpu-edge apply`` does.
What became of each file is remembered by the file's identity, over restarts too: what
was refused is tried again only when it is another file.
"""

import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from edge_runtime.agent.plan import Decision, Offer, decide, find_chain
from edge_runtime.agent.status import ping, read_status, write_status
from edge_runtime.errors import (
    BackendError,
    BlockedError,
    DpuError,
    HeldError,
    KeyListError,
    ListExpiredError,
    PatchError,
    StoreError,
    TrialCutOffError,
    TrustError,
)
from edge_runtime.files import open_regular
from edge_runtime.formats.header import KNOWN_CRITICAL, VERSION
from edge_runtime.formats.identity import wrong_model
from edge_runtime.formats.patch import open_patch
from edge_runtime.limits import limits
from edge_runtime.store.admission import signers
from edge_runtime.store.state import State
from edge_runtime.trust import list_number, load_list
from edge_runtime.update.device import Device, UpdateResult

BACKOFF_S, MAX_BACKOFF_S = 10.0, 600.0  # before what failed is tried again
# Each try of a release writes all its weights: what this device cannot do is tried four
# times a day in the end. Another file, or a change of the store, is looked at at once.
MAX_BLOCKED_BACKOFF_S = 6 * 3600.0
HEARTBEAT_S = 600.0  # the status is written at least this often
# The device is at fault, or nobody: what failed so is tried again.
BLOCKED = (BackendError, BlockedError, TrialCutOffError)
FAILURES = (StoreError, *BLOCKED, OSError)


@dataclass(slots=True)
class Found:
    """What became of a patch file, as the status file keeps it.

    Attributes:
        identity: Inode, size and times: another file, or other content, has another.
        verdict: What was decided last.
        reason: Why.
        error: The kind of error for which this very file is refused for good.
    """

    identity: list[int]
    verdict: str = ""
    reason: str = ""
    error: str = ""


def _newest(seen: dict[str, list[int]], most: int) -> dict[str, list[int]]:
    """Return those of so many files that were changed last, as the kernel says."""
    by_time = sorted(seen.items(), key=lambda item: item[1][-1])
    return dict(by_time[-most:])


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
        self._folder, self._log, self._metrics = folder, log, metrics
        self._clock, self._written_at = clock, -math.inf
        self._failed, self._delay, self._retry_at = False, 0.0, math.inf
        self._crowded = False
        # What the last look saw; None: look in any case.
        self._view: tuple[object, object] | None = None
        status = read_status(self._device.store.root)
        self._last_success = status.get("last_success", 0)
        self._failing = status.get("failing", "")
        self._basis = status.get("basis", [])
        files = status.get("files", {}).items()
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
            BlockedError: This device cannot try them now.
            TrialCutOffError: A trial was cut off.
            OSError: The folder cannot be read, or the status file not be written.
        """
        ping()
        longest = MAX_BACKOFF_S
        try:
            worked = self._look()
            self._last_success = int(time.time())
            if worked and self._failing:
                self._failing = ""
                self._log("recovered")
            if worked or time.monotonic() - self._written_at >= HEARTBEAT_S:
                self._publish()
        except FAILURES as err:
            self._failed = True
            # After a cut-off longer: what killed it may go on for some minutes, and
            # three tries in a row are all that a release has.
            self._delay = (
                MAX_BACKOFF_S if isinstance(err, TrialCutOffError) else self._delay
            )
            longest = (
                MAX_BLOCKED_BACKOFF_S if isinstance(err, BlockedError) else longest
            )
            if self._failing != str(err):  # else it goes on, and was told
                self._failing = str(err)
                self._log("failed", error=type(err).__name__, reason=self._failing)
            with suppress(OSError):
                self._publish()
            raise
        finally:
            if self._failed:
                self._delay = min(max(2 * self._delay, BACKOFF_S), longest)
                self._retry_at = self._clock() + self._delay
                self._failed = False

    def _look(self) -> bool:
        last, self._view = self._view, None  # unknown, if the next line fails
        seen, stamp = self._scan(), self._device.store.stamp()
        self._view = (seen, stamp)
        if self._view == last and self._clock() < self._retry_at:
            return False
        self._device = self._open()
        offers = self._recognise(seen)
        held = self._apply_all(offers)
        for offer in offers:
            if not (self._files[offer.name].error or self.stopping):
                self._decide(offer.name, *decide(self.state, offer.header, held))
        if not self._failed:
            self._delay, self._retry_at = 0.0, math.inf
        return True

    def _scan(self) -> dict[str, list[int]]:
        """Return the identities of the newest patch files, without opening any."""
        seen, most = dict[str, list[int]](), limits().agent_files
        left_out = 0
        with os.scandir(self._folder) as entries:
            for entry in entries:
                # Transports begin the names of unfinished files with a dot.
                name, is_list = entry.name, list_number(entry.name) is not None
                is_patch = name.lower().endswith(".dpu")  # in capitals on FAT
                if name.startswith(".") or not (is_list or is_patch):
                    continue
                with suppress(FileNotFoundError):
                    if entry.is_file(follow_symlinks=False):
                        s = entry.stat(follow_symlinks=False)
                        times = s.st_mtime_ns, s.st_ctime_ns
                        seen[name] = [s.st_ino, s.st_size, *times]
                if len(seen) > 2 * most:  # memory for so many, however many come
                    left_out += len(seen) - most
                    seen = _newest(seen, most)
        left_out += max(0, len(seen) - most)
        self._tell_left_out(left_out)
        return dict(sorted(_newest(seen, most).items()))

    def _tell_left_out(self, count: int) -> None:
        if bool(count) != self._crowded:
            self._crowded = bool(count)
            if count:
                most = limits().agent_files
                reason = f"only the newest {most} files are; remove the others"
                self._log("not looked at", files=count, reason=reason)

    def _recognise(self, seen: dict[str, list[int]]) -> list[Offer]:
        """Take key lists, and open patches that were not refused before."""
        new = self._remember(seen)
        while self._take_lists(new):
            new |= self._remember(seen)  # refused by the keys of before, perhaps
        return [
            offer
            for name in seen
            if list_number(name) is None
            and not self._files[name].error
            and (offer := self._read(name, is_new=name in new))
        ]

    def _remember(self, seen: dict[str, list[int]]) -> set[str]:
        """Forget what is gone or was judged by other rules; return what is new."""
        state = self.state
        # What a refusal depends on beside the file.
        basis = [VERSION, KNOWN_CRITICAL, state.model, state.init]
        basis += [state.trust.threshold, *state.trust.keys]
        basis += [state.key_list.root.sha256] if state.key_list else []
        if basis != self._basis:
            self._basis, self._files = basis, {}
        former, self._files, new = self._files, {}, set()
        for name, identity in seen.items():
            found = former.get(name, Found([]))
            if found.identity != identity:
                new.add(name)
                # A file that grows goes on waiting, without another line in the log.
                verdict = found.verdict if found.verdict == Decision.WAITING else ""
                found = Found(identity, verdict, found.reason)
            self._files[name] = found
        return new

    def _take_lists(self, new: set[str]) -> bool:
        """Take the key lists that follow, in order; return whether there were any."""
        lists = ((list_number(name), name) for name in self._files)
        taken = False
        for number, name in sorted((n, name) for n, name in lists if n is not None):
            key_list, found = self.state.key_list, self._files[name]
            version = key_list.root.version if key_list else 0
            if key_list and number < version:
                self._decide(name, Decision.PASSED, f"older than key list {version}")
            elif key_list and number > version + 1:
                reason = f"key list {version + 1} comes before it"
                self._decide(name, Decision.WAITING, reason)
            elif not found.error:
                taken |= self._take(name, is_new=name in new)
        return taken

    def _take(self, name: str, *, is_new: bool) -> bool:
        """Take a key list, or say why not."""
        ping()
        try:
            try:
                data = load_list(self._folder / name)
            except OSError as err:
                self._failed = True
                self._decide(name, Decision.WAITING, str(err))
                return False
            result = self._device.add_list(data)
        except ListExpiredError as err:
            self._decide(name, Decision.HELD, str(err))
        except (KeyListError, TrustError) as err:
            if isinstance(err, KeyListError) and is_new:
                self._view = None
                self._decide(name, Decision.WAITING, "not a whole key list, or not yet")
            else:
                self._decide(name, Decision.REFUSED, str(err), err)
        else:
            self._decide(name, Decision.APPLIED, "")
            if result is UpdateResult.APPLIED and (keys := self.state.key_list):
                facts = {"list": keys.root.version, "expires": keys.root.expires}
                self._log("applied", file=name, **facts)
            return result is UpdateResult.APPLIED
        return False

    def _read(self, name: str, *, is_new: bool) -> Offer | None:
        """Return what a file offers, unless it is refused, or cannot be read yet."""
        ping()
        try:
            # Not by its name alone: a pipe put there meanwhile would never end.
            file, trust = open_regular(self._folder / name), signers(self.state)
            own = self._device.store.read_identity
            with file, open_patch(file, trust=trust) as patch:
                if error := wrong_model(patch.header, self.state.model, own):
                    raise error
                return Offer(name, patch.size, patch.header)
        except OSError as err:
            self._failed = True
            self._decide(name, Decision.WAITING, str(err))
        except DpuError as err:
            if isinstance(err, PatchError) and is_new:
                # The rest of it may still come: then the next look finds it changed.
                self._view = None
                self._decide(name, Decision.WAITING, "not a whole patch, or not yet")
            else:
                self._decide(name, Decision.REFUSED, str(err), err)
        return None

    # Deciding and applying ----------------------------------------------------------

    def _apply_all(self, offers: list[Offer]) -> str:
        """Apply all that leads to the newest release; return why it is held, if so."""
        while not self.stopping:
            usable = [o for o in offers if not self._files[o.name].error]
            chain = find_chain(self.state, usable)
            if not chain:
                break
            try:
                self._apply(chain[0])
            except (HeldError, ListExpiredError) as err:
                self._failed = True
                return str(err)
        return ""

    def _apply(self, offer: Offer) -> None:
        ping()
        start = time.monotonic()
        try:
            with open_regular(self._folder / offer.name) as file:
                result = self._device.update(file)
        except BLOCKED as err:
            self._decide(offer.name, Decision.BLOCKED, str(err))
            if self._view:  # our own note of it is no news
                self._view = (self._view[0], self._device.store.stamp())
            raise
        except (HeldError, ListExpiredError, *FAILURES):
            raise
        except DpuError as err:
            self._decide(offer.name, Decision.REFUSED, str(err), err)
        else:
            if result is UpdateResult.APPLIED:
                self._applied(offer, round(time.monotonic() - start, 3))

    def _applied(self, offer: Offer, seconds: float) -> None:
        found, slot = self._files[offer.name], self.state.active_slot
        found.verdict, found.reason = Decision.APPLIED, ""
        facts = {"round": slot.round, "fingerprint": slot.target, "bytes": offer.size}
        self._log("applied", file=offer.name, **facts, seconds=seconds)

    def _decide(
        self, name: str, verdict: Decision, reason: str, error: DpuError | None = None
    ) -> None:
        """Report a decision, unless it is the one that was made before."""
        found = self._files[name]
        if (found.verdict, found.reason) == (verdict, reason):
            return
        found.verdict, found.reason = verdict, reason
        facts = {"file": name, "reason": reason}
        if error:
            found.error = facts["error"] = type(error).__name__
        if verdict is not Decision.APPLIED:  # that is told when it happens
            self._log(verdict, **facts)

    def _publish(self) -> None:
        record = {
            "installed": self.state.summary(),
            "last_success": self._last_success,
            "failing": self._failing,
            "basis": self._basis,
            "files": {name: asdict(found) for name, found in self._files.items()},
        }
        write_status(self._device.store.root, record, self._metrics)
        self._written_at = time.monotonic()
