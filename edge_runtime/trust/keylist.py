# SPDX-License-Identifier: Apache-2.0
"""A store's record of its key lists, and its trusted clock.

A small board may have no clock that runs without power. So two things together say what
time it is: the newest time that somebody trusted has signed, which the store keeps and
which never goes back, and the board's clock where it is not before that.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

from edge_runtime.formats.json_record import Record, is_digest
from edge_runtime.formats.signing import Trust
from edge_runtime.trust.root import Root
from edge_runtime.trust.rules import next_root

MAX_LISTED = 32  # of a history


@dataclass(frozen=True, slots=True)
class Listed:
    """A key list that was taken once.

    Attributes:
        version: Its number.
        sha256: Of its signed part, hex.
        at: When, by the device's own clock; for people only.
    """

    version: int
    sha256: str
    at: str


@dataclass(frozen=True, slots=True)
class KeyList:
    """The key list of a store.

    Attributes:
        root: What the newest list says.
        seen: The newest signed time; it never goes back. Empty: none was seen yet.
        history: The lists that were taken, oldest first.
    """

    root: Root
    seen: str
    history: tuple[Listed, ...] = ()

    @classmethod
    def begin(cls, root: Root, at: str) -> Self:
        """Return what a store keeps of its first list, taken at this time."""
        return cls(root, root.issued, (Listed(root.version, root.sha256, at),))

    def follow(self, data: bytes, at: str, *, lapsed: bool = False) -> Self:
        """Return what a store keeps once it has taken the next list.

        Args:
            data: The content of the file.
            at: The time by the device's own clock.
            lapsed: As in :func:`edge_runtime.trust.rules.next_root`.

        Raises:
            KeyListError: Damaged, or not a key list.
            TrustError: It may not follow.
        """
        root = next_root(self.root, data, now=self.now(at), lapsed=lapsed)
        entry = Listed(root.version, root.sha256, at)
        return replace(
            self,
            root=root,
            seen=max(self.seen, root.issued),
            history=(*self.history, entry)[-MAX_LISTED:],
        )

    def saw(self, signed: str) -> Self:
        """Return what a store keeps once it took a release that was signed then."""
        return replace(self, seen=max(self.seen, signed))

    def summary(self, clock: str) -> dict[str, Any]:
        """Return what statuses say of it, as plain data."""
        return {
            "version": self.root.version,
            "expires": self.root.expires,
            "expired": self.is_expired(clock),
        }

    def now(self, clock: str) -> str:
        """Return what time it is, given the device's own clock."""
        return max(self.seen, clock)

    def problem(self, clock: str, signed: str = "") -> str:
        """Say that the list expired before something was signed; nothing if not.

        Args:
            clock: The device's own.
            signed: When it was signed; empty where it does not say, which means now.
        """
        root, time = self.root, signed or self.now(clock)
        if time < root.expires:
            return ""
        when = "and this was signed" if signed else "and now it is"
        return (
            f"key list {root.version} expired {root.expires}, {when} {time}; give the "
            f"device {root.version + 1}.root.json with 'dpu-edge trust add'"
        )

    def is_expired(self, clock: str) -> bool:
        """Whether the list has expired, given the device's own clock."""
        return self.now(clock) >= self.root.expires

    @classmethod
    def from_record(cls, record: Record) -> Self:
        """Return a key list from plain data, as :func:`dataclasses.asdict` gave it."""
        root = record.record("root")
        history = tuple(
            Listed(e.integer("version"), e.digest("sha256"), e.text("at"))
            for e in record.records("history")
        )
        found = Root(
            root.integer("version", least=1),
            root.text("expires"),
            root.text("issued"),
            _trust(root.record("keys")),
            _trust(root.record("releases")),
            root.digest("sha256"),
        )
        return cls(found, record.text("seen"), history)


def _trust(record: Record) -> Trust:
    keys, threshold = record.texts("keys"), record.integer("threshold", least=1)
    if not keys or not all(map(is_digest, keys)) or threshold > len(keys):
        raise record.problem("keys", f"{threshold} keys of 64 hexadecimal digits")
    return Trust(tuple(keys), threshold)
