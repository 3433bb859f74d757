# SPDX-License-Identifier: Apache-2.0
"""Where reports wait until the network side has sent them: ``STORE/outbox``.

The agent writes and removes, the network side only reads: it runs as another user, and
says in a file of its own (:class:`Told`) what is sent. The newest report stays, sent or
not: the agent's memory of what it reported is in it. So many files and bytes are kept;
of more, reports of a day without news go first, then changes, failures last, and of
each kind the oldest first.
"""

import json
import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Self

from edge_runtime.errors import StoreError
from edge_runtime.files import Files
from edge_runtime.formats.json_file import read_record
from edge_runtime.live.report import FAILURES, Outcome
from edge_runtime.times import MAX_SECONDS

OUTBOX = "outbox"
TOLD_NAME = ".sync.told"  # in the agent's folder, which leaves hidden files alone
MOST_FILES, MOST_BYTES = 64, 1 << 20
SCHEMA = 1
_NAME = re.compile(r"([1-9][0-9]{0,17})\.([012])\.json")


class Kind(IntEnum):
    """Priority of a report; lower ones are dropped first."""

    DAILY = 0
    CHANGE = 1
    FAILURE = 2


def kind_of(outcome: Outcome, *, daily: bool) -> Kind:
    """Return how long a report about an outcome is kept."""
    if daily:
        return Kind.DAILY
    return Kind.FAILURE if outcome in FAILURES else Kind.CHANGE


@dataclass(frozen=True, slots=True)
class Waiting:
    """A report in the outbox.

    Attributes:
        n: Its number.
        kind: How long it is kept.
        path: Its file.
        size: Its bytes.
    """

    n: int
    kind: Kind
    path: Path
    size: int


class Outbox:
    """The reports of one store."""

    def __init__(self, store: Path, files: Files | None = None) -> None:
        """Name the folder; it is made for the first report."""
        self.root, self._files = store / OUTBOX, files or Files()

    def waiting(self) -> list[Waiting]:
        """Return all reports, in the order of their numbers.

        Raises:
            OSError: The folder cannot be read.
        """
        found = []
        with suppress(FileNotFoundError):
            for path in self.root.iterdir():
                if name := _NAME.fullmatch(path.name):
                    with suppress(FileNotFoundError):
                        size = path.stat(follow_symlinks=False).st_size
                        kind = Kind(int(name[2]))
                        found.append(Waiting(int(name[1]), kind, path, size))
        return sorted(found, key=lambda report: report.n)

    def add(self, n: int, kind: Kind, data: bytes) -> None:
        """Put a report in, durably; what there is no room for any more goes.

        Raises:
            OSError: The disk refuses.
        """
        if not self.root.is_dir():
            self._files.make_folder(self.root)
        kept = self.waiting()
        count, size = len(kept) + 1, sum(r.size for r in kept) + len(data)
        for report in sorted(kept, key=lambda report: (report.kind, report.n)):
            if count <= MOST_FILES and size <= MOST_BYTES:
                break
            self._files.unlink(report.path)
            count, size = count - 1, size - report.size
        # Whatever the umask: the network side is another user.
        path = self.root / f"{n}.{int(kind)}.json"
        self._files.replace(path, data, mode=0o644)

    def forget(self, sent: Collection[int]) -> None:
        """Remove what is sent, but the newest."""
        for report in self.waiting()[:-1]:
            if report.n in sent:
                self._files.unlink(report.path)

    def sweep(self) -> None:
        """Remove what a killed agent left; only while there is no other one."""
        with suppress(FileNotFoundError):
            for path in self.root.glob(".*.new"):
                self._files.unlink(path)


@dataclass(frozen=True, slots=True)
class Told:
    """Facts that dpu-edge sync gives the agent for its reports; never used to decide.

    Attributes:
        device: The device's id.
        group: The group that it belongs to.
        head: SHA-256 of what is signed in the newest head; empty for none.
        version: Its version.
        counter: Release counter of the release that it names.
        target: Fingerprint of that.
        month_bytes: Bytes on the wire this month.
        seen: Newest signed time, seconds since 1970; 0 for none.
        sent: Numbers of the reports that were sent and are still in the outbox.
    """

    device: str = ""
    group: str = ""
    head: str = ""
    version: int = 0
    counter: int = 0
    target: str = ""
    month_bytes: int = 0
    seen: int = 0
    sent: tuple[int, ...] = ()

    def having_sent(self, sent: Collection[int], present: Collection[int]) -> Self:
        """Return it once more reports were sent; those that are gone are forgotten."""
        both = {*self.sent, *sent} & set(present)
        return replace(self, sent=tuple(sorted(both)))


def read_told(folder: Path) -> Told:
    """Read what the network side tells; where it tells nothing, nothing.

    Raises:
        OSError: It cannot be read.
        StoreError: It is malformed.
    """
    path = folder / TOLD_NAME
    try:
        # Another user's folder: a pipe there would hold the agent for ever.
        record = read_record(path, "state_bytes", str(path), StoreError, regular=True)
    except FileNotFoundError:
        return Told()
    record.schema(SCHEMA)
    return Told(
        record.text("device"),
        record.text("group"),
        record.digest("head", ""),
        record.integer("version"),
        record.integer("counter"),
        record.digest("target", ""),
        record.integer("month_bytes"),
        record.integer("seen", 0, most=MAX_SECONDS),
        tuple(record.integers("sent")),
    )


def write_told(folder: Path, told: Told, files: Files) -> None:
    """Replace what the network side tells; it is told again, so nothing is synced.

    Raises:
        OSError: The disk refuses.
    """
    data = json.dumps({"schema": SCHEMA} | asdict(told)).encode()
    files.replace(folder / TOLD_NAME, data, durable=False)
