# SPDX-License-Identifier: Apache-2.0
"""Read a channel back as a device would, and say what is wrong and what to do."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from edge_runtime.errors import DpuError, KeyListError, TrustError
from edge_runtime.formats.bundle import read_bundle
from edge_runtime.formats.header import PatchHeader
from edge_runtime.formats.patch import open_patch
from edge_runtime.formats.signing import Trust
from edge_runtime.limits import limits
from edge_runtime.sync.head import SHORT, SignedHead, Way
from edge_runtime.sync.head_file import read_head
from edge_runtime.sync.paths import bundle_path, head_path, list_path, patch_path
from edge_runtime.sync.route import cheapest
from edge_runtime.times import duration, utc
from edge_runtime.trust.keylist import KeyList
from edge_runtime.trust.root import Root
from edge_runtime.trust.rules import first_root
from packager.fleet.head import AHEAD_S

# Returns a file of at most so many bytes; None where there is none.
Read = Callable[[str, int], bytes | None]
SOON = 4  # a head that has less than this part of its time left is to be renewed


class State(StrEnum):
    """How something is."""

    OK = "ok"
    NOTE = "note"
    WRONG = "wrong"
    UNTRUSTED = "untrusted"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that was looked at.

    Attributes:
        what: In words: the head, a patch, a start.
        state: How it is.
        words: What was found, and what to do about it.
    """

    what: str
    state: State
    words: str


def check_channel(
    read: Read, name: str, trust: Trust | Root, *, now: int
) -> tuple[SignedHead | None, list[Finding]]:
    """Look at all that a channel names.

    Args:
        read: Reads a file of the place.
        name: Of the channel.
        trust: Whose signatures devices insist on, or their key list; without keys no
            signature is looked at.
        now: Seconds since 1970.

    Returns:
        The head, if it can be read, and what was found.

    Raises:
        DpuError: The place gives no answer.
        OSError: It cannot be read.
    """
    data = read(head_path(name), limits().head_bytes)
    if data is None:
        words = "there is none; 'dpu-fleet publish' makes it"
        return None, [Finding("head", State.WRONG, words)]
    try:
        signed = read_head(data)
    except DpuError as err:
        words = f"{err}; publish again, or bring the file back"
        return None, [Finding("head", State.WRONG, words)]
    lists, keys = _check_lists(read, signed.head.keys, trust)
    look = _Channel(read, signed, keys, now)
    head = look.head(name, len(data))
    return signed, [*head, *lists, *look.patches(), *look.bundle(), *look.starts()]


class _Channel:
    """A channel that is looked at."""

    def __init__(self, read: Read, signed: SignedHead, trust: Trust, now: int) -> None:
        self._read, self._signed, self._head = read, signed, signed.head
        self._trust, self._now = trust, now
        self._good: dict[Way, int] = {}  # and the release counter of each
        self._init = ""

    def head(self, name: str, size: int) -> Iterator[Finding]:
        head = self._head
        words = f"version {head.version}, round {head.round}, {size} B"
        if head.channel != name:
            words = f"it is of channel {head.channel!r}: files were exchanged"
            yield Finding("head", State.WRONG, words)
        else:
            yield Finding("head", State.OK, words)
        yield Finding("signature", *self._signature())
        yield Finding("expiry", *self._expiry())
        if self._signed.is_paused():
            words = "the rollout is paused; resume goes on, revert takes it back"
            yield Finding("rollout", State.NOTE, words)

    def _signature(self) -> tuple[State, str]:
        if not self._trust.keys:
            return State.NOTE, "not looked at: give --trust KEY.pub.pem"
        try:
            found = self._signed.check(self._trust)
        except TrustError as err:
            return State.UNTRUSTED, str(err)
        return State.OK, f"by {', '.join(found)}"

    def _expiry(self) -> tuple[State, str]:
        head, left = self._head, self._head.expires - self._now
        if left <= 0:
            return State.WRONG, (
                f"over for {duration(-left)} (since {utc(head.expires)}): devices "
                "fetch nothing; publish the same round again"
            )
        if left < (head.expires - head.at) / SOON:
            return State.NOTE, f"in {duration(left)}: publish the same round again"
        if (ahead := head.at - self._now) > AHEAD_S:
            return State.NOTE, (
                f"in {duration(left)}: the head is dated {duration(ahead)} from now; "
                "set the clocks, and publish the same round again"
            )
        return State.OK, f"in {duration(left)}"

    def patches(self) -> Iterator[Finding]:
        for way in self._head.ways:
            what = f"patch {way.parent} -> {way.target}"
            data, words = self._fetch(patch_path(way.sha256), way.size, way.sha256)
            if data is None:
                yield Finding(what, State.WRONG, words)
                continue
            try:
                with open_patch(data, trust=self._trust) as patch:
                    header = patch.header
                problem = self._mismatch(way, header)
            except TrustError as err:
                yield Finding(what, State.UNTRUSTED, str(err))
                continue
            except DpuError as err:
                problem = str(err)
            if problem:
                words = f"{problem}; no device takes it, publish a newer round"
                yield Finding(what, State.WRONG, words)
                continue
            self._good[way] = header.counter
            yield Finding(what, State.OK, f"{way.size:,} B")

    def _fetch(self, path: str, size: int, sha256: str) -> tuple[bytes | None, str]:
        data = self._read(path, size)
        if data is None:
            return None, f"{path} is missing; publish the same round again"
        digest = hashlib.sha256(data).hexdigest()
        if (len(data), digest) != (size, sha256):
            found = f"{len(data)} bytes, {digest[:SHORT]}"
            words = f"{path} is damaged ({found}, expected {size}, {sha256[:SHORT]})"
            return None, f"{words}; remove it and publish the same round again"
        return data, ""

    def _mismatch(self, way: Way, header: PatchHeader) -> str:
        """Return in what a patch is not what the head says; empty for nothing."""
        head = self._head
        last = head.target.startswith(way.target)
        wanted = {
            "model": (header.model, head.model),
            "parent": (header.parent[:SHORT], way.parent),
            "target": (header.target, head.target)
            if last
            else (header.target[:SHORT], way.target),
            "counter": (header.counter, head.counter)
            if last
            else (min(header.counter, head.counter), header.counter),
        }
        return "; ".join(
            f"its {name} is {found}, the head says {expected}"
            for name, (found, expected) in wanted.items()
            if found != expected
        )

    def bundle(self) -> Iterator[Finding]:
        head = self._head
        if head.bundle is None:
            words = "there is none, so no device is installed over the link"
            yield Finding("bundle", State.NOTE, words)
            return
        data, words = self._fetch(bundle_path(head.bundle[1]), *head.bundle)
        if data is None:
            yield Finding("bundle", State.WRONG, words)
            return
        try:
            bundle = read_bundle(data, self._trust)
            with open_patch(bundle.patch) as patch:
                header = patch.header
        except TrustError as err:
            yield Finding("bundle", State.UNTRUSTED, str(err))
            return
        except DpuError as err:
            yield Finding("bundle", State.WRONG, f"{err}; publish a newer round")
            return
        found = header.model, header.target, header.counter
        if found != (head.model, head.target, head.counter):
            words = "it is of another release than the head; publish a newer round"
            yield Finding("bundle", State.WRONG, words)
            return
        self._init = header.parent[:SHORT]
        yield Finding("bundle", State.OK, f"{head.bundle[0]:,} B")

    def starts(self) -> Iterator[Finding]:
        """Look for the way from everywhere that the head promises one from."""
        target = self._head.target[:SHORT]
        starts = dict.fromkeys(way.parent for way in self._head.ways)
        if self._init and self._init != target:
            starts.setdefault(self._init)
        for start in starts:
            what = "from init" if start == self._init else f"from {start}"
            route = cheapest({start}, target, self._good)
            if route is None:
                words = "no way leads to the release; publish the same round again"
                yield Finding(what, State.WRONG, words)
                continue
            counters = [self._good[way] for way in route]
            if counters != sorted(counters):
                words = f"releases {counters} one after the other: devices refuse that"
                yield Finding(what, State.WRONG, f"{words}; publish a newer round")
                continue
            size = sum(way.size for way in route)
            count = f"{len(route)} patch{'es' * (len(route) > 1)}"
            yield Finding(what, State.OK, f"{count}, {size:,} B")


def _check_lists(
    read: Read, newest: int, trust: Trust | Root
) -> tuple[list[Finding], Trust]:
    """Follow the key lists of a place, as a device does that has an earlier one."""
    found: list[Finding] = []
    if isinstance(trust, Root):
        now = KeyList.begin(trust, utc())
        for number in range(trust.version + 1, newest + 1):
            what = f"key list {number}"
            data = read(list_path(number), limits().key_list_bytes)
            try:
                if data is None:
                    raise KeyListError("missing; publish it again with --key-list")
                now = now.follow(data, utc())
            except (KeyListError, TrustError) as err:
                found.append(Finding(what, _fault(err), str(err)))
                break
            found.append(Finding(what, State.OK, f"follows list {number - 1}"))
        if problem := now.problem(utc()):
            found.append(Finding("key list", State.UNTRUSTED, problem))
        return found, now.root.releases
    if newest:
        found.append(_newest_list(read, newest))
    return found, trust


def _fault(err: KeyListError | TrustError) -> State:
    return State.UNTRUSTED if isinstance(err, TrustError) else State.WRONG


def _newest_list(read: Read, newest: int) -> Finding:
    """Look at the list that a head names, where nobody says which one came before."""
    what = f"key list {newest}"
    data = read(list_path(newest), limits().key_list_bytes)
    if data is None:
        words = "missing; publish it again with --key-list"
        return Finding(what, State.WRONG, words)
    try:
        first_root(data)
    except (KeyListError, TrustError) as err:
        return Finding(what, _fault(err), str(err))
    words = "signed by its own keys; give --trust N.root.json to follow the chain"
    return Finding(what, State.NOTE, words)
