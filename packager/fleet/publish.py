# SPDX-License-Identifier: Apache-2.0
"""Publish a round: patches and bundle by their hash, then one new head of a channel.

The head is what devices follow, and it is replaced last and only if nobody else
replaced it meanwhile: a publisher that is killed, or loses a race, leaves files that
nothing names, and the channel as it was.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.errors import RoundError, StoreError, TrustError
from edge_runtime.formats.model_folder import Outcome
from edge_runtime.formats.signing import Trust
from edge_runtime.live.proof import public_key
from edge_runtime.store.state import utc
from edge_runtime.sync.head import SHORT, Head, Rollout, SignedHead, Way, read_head
from edge_runtime.trust.root import list_number, read_root
from packager.build import check_counter
from packager.bundles.from_round import build_bundle
from packager.fleet.head import (
    bundle_path,
    head_path,
    named_files,
    patch_path,
    pause_head,
    sign_head,
)
from packager.fleet.place import Place
from packager.fleet.ways import (
    Offered,
    pack_again,
    pack_ways,
    parents_ahead,
    parents_behind,
    useful,
)
from packager.ledger import Ledger, open_ledger
from packager.packed_file import BUNDLE, PATCH, read_facts
from packager.release import Release
from packager.rounds.folder import Parent, RoundFolder, read_init

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

RACES = 20  # how often another publisher may come first
REACH = 8  # releases back, from which the head still lists the cheapest ways


@dataclass(frozen=True, slots=True, kw_only=True)
class Channel:
    """How a channel is to be published.

    Attributes:
        name: Of the channel.
        signers: Whose keys sign patches, bundle and head.
        lifetime_s: How long the head is valid.
        skips: From how many rounds back there are patches beside the recorded one.
        shares: When which share of the devices takes part: permille, and seconds from
            the publication on. Empty: all, at once.
        groups: Devices of these groups only; empty: all.
        pausers: Public keys, hex, that may pause the head.
        former: Public keys, hex, that signed the channel's head instead, before the
            signers were exchanged.
    """

    name: str
    signers: Sequence["Ed25519PrivateKey"] = ()
    lifetime_s: int = 30 * 86_400
    skips: tuple[int, ...] = (2, 4, 8)
    shares: tuple[tuple[int, int], ...] = ()
    groups: tuple[str, ...] = ()
    pausers: tuple[str, ...] = ()
    former: tuple[str, ...] = ()

    @property
    def trust(self) -> Trust:
        """Whose heads this publisher builds on: its own."""
        keys = tuple(dict.fromkeys(public_key(key) for key in self.signers))
        return Trust(keys, max(1, len(keys)))

    def made(self, signed: SignedHead) -> bool:
        """Return whether a head is of this publisher's own making.

        Raises:
            TrustError: It is not, nor of those who signed before.
        """
        if signed.signatures and not self.signers:
            names = ", ".join(signature.key_id for signature in signed.signatures)
            raise TrustError(
                f"the channel's head is signed by {names}, and this one would be by "
                "nobody: devices would refuse it; give the key with --sign"
            )
        try:
            signed.check(self.trust)
        except TrustError:
            if not self.former:
                raise
            signed.check(Trust(self.former, len(self.former)))
            return False
        return True


@dataclass(frozen=True, slots=True)
class Published:
    """What became of a channel.

    Attributes:
        head: What it says now.
        size: Bytes of its head.
        offered: The patches that were packed, and whether each is new there.
        bundle: Bytes of the bundle; 0 where none was made.
        changed: Whether there is a new head.
    """

    head: Head
    size: int
    offered: tuple[tuple[Offered, bool], ...]
    bundle: int
    changed: bool


def read_channel(
    place: Place, channel: Channel
) -> tuple[SignedHead | None, str | None]:
    """Read a channel's head, which must be this publisher's, and the tag of its file.

    Raises:
        HeadError: What lies there is no head.
        TrustError: Somebody else signed it: a new one would lend our name to it.
    """
    found = place.read(head_path(channel.name))
    if found is None:
        return None, None
    signed = read_head(found[0])
    channel.made(signed)
    return signed, found[1]


def publish(
    round_: RoundFolder,
    place: Place,
    channel: Channel,
    *,
    now: int,
    revert: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda _words: None,
) -> Published:
    """Make a round the newest release of a channel.

    Args:
        round_: An updated round.
        place: Where devices look.
        channel: How it is published.
        now: Seconds since 1970.
        revert: Release it although the channel is at a newer round.
        dry_run: Do everything but write.
        say: Told what a person should hear.

    Raises:
        RoundError: It may not become the newest release.
        StoreError: Other publishers came first every time, or the place is damaged.
        HeadError: What lies there is no head.
        TrustError: Another key signed the head.
        OSError: The place cannot be read or written.
    """
    record = round_.record
    if record.outcome is not Outcome.UPDATED:
        raise RoundError(
            f"{round_.name} kept its base: devices have its weights already, there is "
            "nothing to publish"
        )
    with open_ledger(round_.path.absolute().parent, say) as ledger:
        for _ in range(RACES):
            old, tag = read_channel(place, channel)
            counter = _next_counter(
                round_, ledger, old.head if old else None, revert=revert
            )
            offered = pack_ways(
                round_,
                _parents(round_, ledger, old, channel),
                counter=counter,
                signers=channel.signers,
            )
            if _is_again(round_, counter, ledger, old):
                offered.append(
                    pack_again(round_, counter=counter, signers=channel.signers)
                )
            ways = [offer.way for offer in offered]
            if old and channel.made(old):
                ways += _still_good(old.head, round_, counter, ledger)
            bundle = build_bundle(round_, counter=counter, signers=channel.signers)
            starts = _starts(round_, ledger, offered)
            head = _head(round_, counter, ways, starts, bundle.data, channel, old, now)
            head = replace(head, keys=newest_list(place))
            files = {patch_path(o.way): o.packed.data for o in offered}
            files[bundle_path(head)] = bundle.data
            if old and _says_the_same(old.head, head, channel, now):
                if not dry_run:
                    _complete(place, old.head, files, say)
                return Published(
                    old.head, 0, tuple((o, False) for o in offered), 0, False
                )
            _insist_not_halted(round_, counter, old)
            data = sign_head(head, channel.signers)
            if dry_run:
                there = _present(place)
                new = {path: path not in there for path in files}
            else:
                new = {path: place.create(path, files[path]) for path in files}
                # Before the head: what devices may have seen is in the ledger.
                for path, content in files.items():
                    ledger.record(_release(place, path, content, now))
                if not place.swap(head_path(channel.name), data, tag):
                    continue  # another publisher came first
                _complete(place, head, files, say)
            told = tuple((o, new[patch_path(o.way)]) for o in offered)
            return Published(head, len(data), told, len(bundle.data), changed=True)
    raise StoreError(
        f"other publishers changed {place.name}/{head_path(channel.name)} {RACES} "
        "times meanwhile; nothing was published, try again"
    )


def _present(place: Place) -> set[str]:
    return {path for top in ("patches/", "bundles/") for path, _ in place.names(top)}


def _complete(
    place: Place, head: Head, files: Mapping[str, bytes], say: Callable[[str], None]
) -> None:
    """Write again what a head names and somebody removed, before it was named."""
    for path in named_files(head).keys() - _present(place):
        if path not in files:
            say(f"{place.name}/{path}, which the head names, is missing")
        elif place.create(path, files[path]):
            say(f"{place.name}/{path} was missing, and is there again")


def _next_counter(
    round_: RoundFolder, ledger: Ledger, head: Head | None, *, revert: bool
) -> int:
    """Return the release counter: the ledger's, or what the channel makes of it."""
    record = round_.record
    if head and head.model != record.model:
        raise RoundError(
            f"the channel is of model {head.model[:SHORT]}, {round_.name} of "
            f"{record.model[:SHORT]}: give each model a folder of its own with --to"
        )
    if head and head.target == record.target:
        return head.counter
    if head and head.round > record.round and not revert:
        raise RoundError(
            f"the channel is at round {head.round}, which is newer than {round_.name}; "
            "to answer a bad release with older weights: dpu-fleet revert"
        )
    counter = ledger.next_counter(record)
    known = [release.counter for release in ledger.released(record.model)]
    if revert:
        counter = max([counter, *(n + 1 for n in known)])
    if head and counter <= head.counter:
        counter = max([head.counter, *known]) + 1
    check_counter(counter)
    return counter


def newest_list(place: Place) -> int:
    """Return the number of the newest key list in a place; 0 where there is none."""
    names = (Path(path).name for path, _ in place.names("keys/"))
    return max(filter(None, map(list_number, names)), default=0)


def add_list(place: Place, data: bytes) -> str:
    """Put a key list where devices fetch it; the next publication names it.

    Returns:
        Its path.

    Raises:
        KeyListError: It is no key list.
        StoreError: Another list has its number.
        OSError: It cannot be written.
    """
    path = f"keys/{read_root(data).root.version}.root.json"
    place.create(path, data)
    return path


def _parents(
    round_: RoundFolder, ledger: Ledger, old: SignedHead | None, channel: Channel
) -> Iterator[Parent]:
    """Yield the weights from which a channel leads to its new release."""
    if old and old.head.round > round_.record.round:
        yield from parents_ahead(round_, ledger)
    yield from parents_behind(round_, ledger, channel.skips)


def _is_again(
    round_: RoundFolder, counter: int, ledger: Ledger, old: SignedHead | None
) -> bool:
    """Return whether devices may have the weights under an older counter."""
    record = round_.record
    before = ledger.counter_of(record.model, record.target)
    goes_back = old is not None and old.head.round > record.round
    return goes_back or (before is not None and before < counter)


def _still_good(
    old: Head, round_: RoundFolder, counter: int, ledger: Ledger
) -> Iterator[Way]:
    """Yield the ways between earlier releases, for devices that are behind.

    Not those into releases that this one takes back, through which nobody should go any
    more, nor those that lead to its own weights under an older counter.
    """
    record = round_.record
    left = {
        release.target[:SHORT]
        for release in ledger.released(record.model)
        if release.round > record.round
    }
    if old.round > record.round:
        left.add(old.target[:SHORT])
    if counter != old.counter:
        left.add(record.target[:SHORT])
    yield from (way for way in old.ways if way.target not in left)


def _starts(
    round_: RoundFolder, ledger: Ledger, offered: Sequence[Offered]
) -> set[str]:
    """Return the weights for which the head keeps the cheapest ways."""
    known = ledger.released(round_.record.model)
    targets = [round_.record.target, *(release.target for release in reversed(known))]
    newest = dict.fromkeys(target[:SHORT] for target in targets)
    return {*list(newest)[:REACH], *(offer.way.parent for offer in offered)}


def _head(  # noqa: PLR0913 - all that a head is made of
    round_: RoundFolder,
    counter: int,
    ways: Sequence[Way],
    starts: set[str],
    bundle: bytes,
    channel: Channel,
    old: SignedHead | None,
    now: int,
) -> Head:
    record, before = round_.record, old.head if old else None
    init = read_init(round_).weights.fingerprint[:SHORT]
    return Head(
        model=record.model,
        channel=channel.name,
        version=before.version + 1 if before else 1,
        at=now,
        expires=now + channel.lifetime_s,
        counter=counter,
        round=record.round,
        target=record.target,
        ways=useful(ways, record.target[:SHORT], init, starts),
        bundle=(len(bundle), hashlib.sha256(bundle).hexdigest()),
        rollout=_rollout(counter, channel, before, now),
        pausers=channel.pausers or (before.pausers if before else ()),
    )


def _rollout(
    counter: int, channel: Channel, before: Head | None, now: int
) -> Rollout | None:
    """Return the rollout of a release; published once more, it keeps its times."""
    if not channel.shares and not channel.groups:
        return None
    steps = tuple((share, now + delay) for share, delay in channel.shares)
    new = Rollout(str(counter), steps, channel.groups)
    old = before.rollout if before else None
    if old and (old.id, old.groups) == (new.id, new.groups):
        begun = [share for share, _ in old.steps]
        if begun == [share for share, _ in steps]:
            return old
    return new


def pause(
    place: Place,
    name: str,
    key: "Ed25519PrivateKey",
    *,
    now: int,
    version: int | None = None,
) -> bool:
    """Halt a channel's rollout, with a key that can do nothing else.

    Args:
        place: Where the channel lies.
        name: The channel.
        key: One of the pausers that its head names.
        now: Seconds since 1970.
        version: Of the head that is meant; a newer one is left alone.

    Returns:
        Whether it is paused now and was not before.

    Raises:
        RoundError: There is no such channel, or its head does not name the key.
        StoreError: Publishers came first every time.
        HeadError: What lies there is no head.
        OSError: The place cannot be read or written.
    """
    for _ in range(RACES):
        found = place.read(head_path(name))
        if found is None:
            raise RoundError(f"no channel {name!r} in {place.name}: nothing to pause")
        signed = read_head(found[0])
        if public_key(key) not in signed.head.pausers:
            raise RoundError(
                f"the head of {name!r} does not name this key: publish with --pauser "
                f"KEY.pub.pem; it names {len(signed.head.pausers)} others"
            )
        if signed.is_paused() or version not in (None, signed.head.version):
            return False
        if place.swap(head_path(name), pause_head(found[0], key, at=now), found[1]):
            return True
    raise StoreError(f"{place.name}/{head_path(name)} changed {RACES} times meanwhile")


def _says_the_same(old: Head, new: Head, channel: Channel, now: int) -> bool:
    """Return whether a new head would say nothing new, and the old one is fresh."""
    dated = replace(new, version=old.version, at=old.at, expires=old.expires)
    return dated == old and old.expires - now > channel.lifetime_s // 2


def _insist_not_halted(
    round_: RoundFolder, counter: int, old: SignedHead | None
) -> None:
    """Insist that no timer which prolongs a head undoes a halt."""
    if old and old.head.counter == counter and old.is_paused():
        raise RoundError(
            f"the rollout of {round_.name} is paused: 'dpu-fleet resume' goes on, "
            "'dpu-fleet revert' takes it back; nothing was published"
        )


def _release(place: Place, path: str, data: bytes, now: int) -> Release:
    facts = read_facts(data)
    header = facts.header
    return Release(
        counter=header.counter,
        round=header.round,
        kind=BUNDLE if path.startswith("bundles/") else PATCH,
        model=header.model,
        parent=header.parent,
        target=header.target,
        signers=facts.signers,
        file=Path(path).name,
        to=place.name,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        at=utc(now),
    )
