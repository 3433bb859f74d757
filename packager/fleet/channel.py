# SPDX-License-Identifier: Apache-2.0
"""A channel as its publisher knows it: who signs its head, and who may halt it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.errors import RoundError, StoreError, TrustError, prefix_errors
from edge_runtime.formats.signing import Trust
from edge_runtime.live.shared import public_key
from edge_runtime.sync.head import SignedHead
from edge_runtime.sync.head_file import read_head
from edge_runtime.sync.paths import head_path, list_path
from edge_runtime.trust.root import list_number, load_list, read_root
from edge_runtime.trust.rules import first_root, next_root
from packager.fleet.head import pause_head
from packager.fleet.place import Place

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

RACES = 20  # how often another publisher may come first


@dataclass(frozen=True, slots=True, kw_only=True)
class Channel:
    """How a channel is to be published.

    Attributes:
        name: Of the channel.
        signers: Whose keys sign patches, bundle and head.
        lifetime_s: How long the head is valid.
        skips: From how many rounds back there are patches beside the recorded one.
        shares: When which share of the devices takes part: permille, and seconds from
            the publication on. Empty, as the groups are too: as it was where this
            release is being rolled out; else all, at once.
        groups: Devices of these groups only; empty: all.
        above: Version that devices have seen, where the place was lost.
        after: Version of the head to follow; another one is left alone. 0: any.
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
    above: int = 0
    after: int = 0
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
        given = [signature.key_id for signature in signed.signatures]
        if given and not self.signers:
            raise TrustError(
                f"the channel's head is signed by {', '.join(given)}, and this one "
                "would be by nobody: devices would refuse it; give the key with --sign"
            )
        if set(given).issuperset(self.trust.ids):
            signed.check(self.trust)
            return True
        former = Trust(self.former, max(1, len(self.former)))
        if not former.keys or not set(given).issuperset(former.ids):
            raise TrustError(
                f"the channel's head is signed by {', '.join(given) or 'nobody'}, "
                f"expected {', '.join((former if former.keys else self.trust).ids)}; "
                "give those that signed it with --sign, or, where others sign now, "
                "with --former (of 'publish' and 'revert')"
            )
        signed.check(former)
        return False


def read_channel(
    place: Place, channel: Channel
) -> tuple[SignedHead | None, str | None]:
    """Read a channel's head, which must be this publisher's, and the tag of its file.

    Raises:
        HeadError: What lies there is no head.
        TrustError: Somebody else signed it: a new one would lend our name to it.
        StoreError: It is another one than the channel shall go on from.
    """
    found = place.read(head_path(channel.name))
    if found is None:
        return None, None
    signed = read_head(found[0])
    channel.made(signed)
    if channel.after not in (0, signed.head.version):
        raise StoreError(
            f"the channel went on to round {signed.head.round} meanwhile; nothing was "
            "published: see whether that one is to be replaced too"
        )
    return signed, found[1]


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


def present(place: Place) -> dict[str, int]:
    """Return the patches and bundles in a place, with their sizes."""
    return dict(file for top in ("patches/", "bundles/") for file in place.names(top))


def newest_list(place: Place) -> int:
    """Return the number of the newest key list in a place; 0 where there is none."""
    names = (Path(path).name for path, _ in place.names("keys/"))
    return max(filter(None, map(list_number, names)), default=0)


def read_lists(place: Place, paths: Sequence[Path]) -> list[bytes]:
    """Read key lists that devices shall be given, and write nothing yet.

    Each must follow the one before it, where that is among them or in the place.

    Raises:
        KeyListError: One is no key list.
        TrustError: One lacks signatures, so that no device would take it.
        OSError: It cannot be read.
    """
    found: dict[int, bytes] = {}
    for path in sorted(paths, key=lambda path: list_number(path.name) or 0):
        with prefix_errors(path):
            data = load_list(path)
            number = read_root(data).root.version
            there = place.read(list_path(number - 1))
            before = found.get(number - 1) or (there and there[0])
            if before:
                next_root(read_root(before).root, data, lapsed=True)
            else:
                first_root(data)
            found[number] = data
    return list(found.values())


def add_list(place: Place, data: bytes) -> str:
    """Put a key list where devices fetch it; the next publication names it.

    One that is there may get more signatures, which devices may ask for.

    Returns:
        Its path.

    Raises:
        KeyListError: It is no key list.
        StoreError: Another list has its number.
        OSError: It cannot be written.
    """
    given = read_root(data)
    path = list_path(given.root.version)
    if (there := place.read(path)) is None:
        place.create(path, data)
        return path
    with prefix_errors(f"remove {place.name}/{path} and publish again"):
        known = read_root(there[0])
    old, new = known.signatures.items(), given.signatures.items()
    if known.message != given.message or not (new <= old or old <= new):
        raise StoreError(
            f"{place.name}/{path} is another list {given.root.version}, which devices "
            "may have: 'dpu-patch trust sign' that one, or 'rotate' it to the next"
        )
    if old < new and not place.swap(path, data, there[1]):
        raise StoreError(f"{place.name}/{path} changed meanwhile; try again")
    return path
