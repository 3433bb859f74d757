# SPDX-License-Identifier: Apache-2.0
"""What the network side of a device remembers, in a file of its own.

The floors are what protects: a head that is older than one that was taken, or another
one of the same version, is refused, also after a power cut. So the file is on the disk
before anything is done because of a head.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

from edge_runtime.errors import HeadError, StoreError
from edge_runtime.files import Files
from edge_runtime.formats.json_file import read_record
from edge_runtime.formats.json_record import Record
from edge_runtime.reading import read_bounded
from edge_runtime.sync.head import SignedHead
from edge_runtime.times import MAX_SECONDS, UPTIME_S, utc

SLIP_S = 90 * 86_400  # more than the clocks of two honest publishers are apart
SCHEMA, TUF_SCHEMA = 1, 2  # the second only with what it is for
STATE_NAME = ".sync.json"  # in the agent's folder, which leaves hidden files alone
HEAD_NAME = ".sync.head"


@dataclass(frozen=True, slots=True)
class SyncState:
    """The state of one device's network side.

    Attributes:
        channel: The channel that it follows.
        version: Of the newest head that was taken: older ones are refused.
        digest: SHA-256 of what was signed in it.
        seen: Newest signed time, seconds since 1970. It goes back only where the
            newest head says that an earlier one was dated far too late, by a slip:
            else no head to come would ever be fresh again.
        paused: Whether that head was paused once: it stays so.
        tag: The server's tag of the head, for conditional requests.
        checked: When the server last answered, by the device's own clock.
        spent: Bytes on the wire, by day (2026-11-28).
        tags: The server's tags of files that are not whole yet, by SHA-256.
        bad: SHA-256 of files, and names of key lists, that are of no use under this
            head: the store would never take them.
        result: What the last look ended with; ``failed`` for an error.
        reason: More about it, for people; may be empty.
        source: Where the channel lies, without credentials.
        day_bytes: What may be spent a day; None for any.
        month_bytes: The same a month.
        waits: Looks since a poll that were over budget under a clock that is wrong.
        tuf: Newest version of each role's TUF metadata; empty without TUF.
        tuf_keys: A digest of whose keys counted then.
        tuf_expires: Until when TUF vouches for the head; 0 where its own date holds.
    """

    channel: str = ""
    version: int = 0
    digest: str = ""
    seen: int = 0
    paused: bool = False
    tag: str = ""
    checked: int = 0
    spent: Mapping[str, int] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    bad: tuple[str, ...] = ()
    result: str = ""
    reason: str = ""
    source: str = ""
    day_bytes: int | None = None
    month_bytes: int | None = None
    waits: int = 0
    tuf: Mapping[str, int] = field(default_factory=dict)
    tuf_keys: str = ""
    tuf_expires: int = 0

    def took(self, signed: SignedHead, tag: str) -> Self:
        """Return the state once a head was taken."""
        head, is_new = signed.head, signed.sha256 != self.digest
        follows = head.version > self.version > 0  # on this channel
        slipped = follows and head.at < self.seen - SLIP_S
        return replace(
            self,
            channel=head.channel,
            version=head.version,
            digest=signed.sha256,
            seen=head.at if slipped else max(self.seen, head.at),
            paused=signed.is_paused() or (self.paused and not is_new),
            tag=tag,
            bad=() if is_new else self.bad,
        )

    def anew(self, seen: int = 0) -> Self:
        """Return the state without the floors of heads."""
        empty = type(self)(spent=self.spent, seen=seen)
        return replace(empty, tuf=self.tuf, tuf_keys=self.tuf_keys)

    def day(self, clock: float) -> str:
        """Return the day that bytes are counted to, such as 2026-11-28.

        A clock that stands before a signed time is wrong, so that time counts. One that
        begins anew at each boot counts on from it: else no day would ever end there.
        """
        begin = self.seen if clock < min(self.seen, UPTIME_S) else 0
        return utc(min(max(begin + int(clock), self.seen), MAX_SECONDS))[:10]

    def spending(self, day: str, count: int) -> Self:
        """Return the state once so many bytes went over the wire on a day."""
        spent = dict(self.spent)
        spent[day] = spent.pop(day, 0) + count
        # Two months: that is as far as any budget looks back. The latest written, as a
        # clock that was set back must not make a day's bytes the oldest.
        return replace(self, spent=dict([*spent.items()][-62:]))

    def spent_in(self, begin: str) -> int:
        """Return the bytes of the days whose text begins so: a day, or a month."""
        return sum(n for day, n in self.spent.items() if day.startswith(begin))


def read_sync_state(folder: Path) -> SyncState:
    """Read the state; a device that has none yet begins anew.

    Raises:
        StoreError: It is malformed. To begin anew is for a person to decide: it gives
            the floors up.
        OSError: It cannot be read.
    """
    path = folder / STATE_NAME
    try:
        record = read_record(path, "state_bytes", str(path), StoreError, regular=True)
    except FileNotFoundError:
        return SyncState()
    with_tuf = record.schema(SCHEMA, TUF_SCHEMA) == TUF_SCHEMA
    tuf = record.record("tuf") if with_tuf else None
    spent, tags = record.record("spent"), record.record("tags")
    return SyncState(
        record.text("channel"),
        record.integer("version"),
        record.text("digest"),
        min(record.integer("seen"), MAX_SECONDS),
        record.flag("paused"),
        record.text("tag"),
        record.integer("checked"),
        {day: spent.integer(day) for day in spent.values},
        {name: tags.text(name) for name in tags.values},
        tuple(record.texts("bad")),
        record.text("result", ""),
        record.text("reason", ""),
        record.text("source", ""),
        _budget(record, "day_bytes"),
        _budget(record, "month_bytes"),
        record.integer("waits", 0),
        {role: tuf.integer(role) for role in tuf.values} if tuf else {},
        record.text("tuf_keys") if with_tuf else "",
        record.integer("tuf_expires") if with_tuf else 0,
    )


def read_kept(folder: Path) -> bytes:
    """Return the file of the newest head that was taken.

    Raises:
        OSError: It cannot be read.
        HeadError: It is larger than any head.
    """
    path = folder / HEAD_NAME
    return read_bounded(path, "head_bytes", str(path), HeadError, regular=True)


def _budget(record: Record, name: str) -> int | None:
    return None if record.values.get(name) is None else record.integer(name)


def write_sync_state(folder: Path, state: SyncState, files: Files) -> None:
    """Replace the state, durably.

    Raises:
        OSError: The disk refuses; the old state stands.
    """
    values = {"schema": TUF_SCHEMA} | asdict(state)
    if not state.tuf:
        values["schema"] = SCHEMA
        del values["tuf"], values["tuf_keys"], values["tuf_expires"]
    files.replace(folder / STATE_NAME, json.dumps(values).encode())
