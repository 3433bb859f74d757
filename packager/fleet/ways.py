# SPDX-License-Identifier: Apache-2.0
"""The patches that a channel offers: packed for a round, and chosen for its head."""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edge_runtime.errors import RoundError, RoundNotFoundError
from edge_runtime.formats.model_folder import list_rounds, round_name
from edge_runtime.sync.head import SHORT, Way
from edge_runtime.sync.route import cheapest
from packager.build import PackedPatch, header_for, pack_changes, pack_round
from packager.diff import diff
from packager.rounds.folder import Parent, RoundFolder, find_parent, read_init
from packager.rounds.names import named_parent

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from packager.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Offered:
    """A packed way to a release.

    Attributes:
        start: Where it leads from, in words: ``round_04`` or ``init``.
        packed: The patch.
        way: As the head lists it.
    """

    start: str
    packed: PackedPatch
    way: Way


def pack_ways(
    round_: RoundFolder,
    parents: Iterable[Parent],
    *,
    counter: int,
    signers: Sequence["Ed25519PrivateKey"],
) -> list[Offered]:
    """Pack the ways from some weights to a round, one for each of them.

    Args:
        round_: The round.
        parents: The weights that devices may hold.
        counter: Release counter of all of the patches.
        signers: Whose keys sign them.
    """
    found: dict[str, Offered] = {}
    for parent in parents:
        packed = pack_round(round_, parent, counter=counter, signers=signers)
        if packed is not None and packed.header.parent not in found:
            found[packed.header.parent] = Offered(parent.name, packed, way_of(packed))
    return list(found.values())


def pack_again(
    round_: RoundFolder, *, counter: int, signers: Sequence["Ed25519PrivateKey"]
) -> Offered:
    """Pack a patch that changes nothing, and releases a round's weights anew.

    Devices that have them still, active or kept, take the release by a few hundred
    bytes, and with it its counter.
    """
    weights, record = round_.weights, round_.record
    header = header_for(
        weights, weights, model=record.model, round_=record.round, counter=counter
    )
    changes = diff(weights, weights)
    packed = pack_changes(
        weights, weights, header, changes, parent_name=round_.name, signers=signers
    )
    return Offered(round_.name, packed, way_of(packed))


def parents_behind(
    round_: RoundFolder, ledger: "Ledger", skips: Collection[int]
) -> Iterator[Parent]:
    """Yield the weights from which a channel leads to a new round.

    The recorded parent, released rounds that lie further back, and the init weights,
    which every device can regenerate: they bring back one that missed everything.

    Args:
        round_: The round.
        ledger: Knows which rounds were released.
        skips: How many rounds back the others lie.
    """
    yield find_parent(round_)
    number = round_.record.round
    names = [round_name(number - back) for back in sorted(skips) if 0 < back <= number]
    yield from released(round_, ledger, names)
    yield read_init(round_)


def parents_ahead(round_: RoundFolder, ledger: "Ledger") -> Iterator[Parent]:
    """Yield the weights from which a channel goes back to an older round."""
    folders = list_rounds(round_.path.parent)
    number = round_.record.round  # as text, round_100 would lie before round_99
    ahead = [folder.name for folder in folders if int(folder.name[6:]) > number]
    yield from released(round_, ledger, reversed(ahead))


def released(
    round_: RoundFolder, ledger: "Ledger", names: Iterable[str]
) -> Iterator[Parent]:
    """Yield those of some rounds that devices were given and that are still here."""
    for name in names:
        try:
            parent = named_parent(round_, name, round_.path.parent)
        except (RoundError, RoundNotFoundError):
            continue  # taken away, or never meant for devices
        fingerprint = parent.weights.fingerprint
        seen = ledger.counter_of(round_.record.model, fingerprint)
        if seen is not None:
            yield replace(parent, counter=seen)


def way_of(packed: PackedPatch) -> Way:
    """Return how a head lists a patch."""
    header, digest = packed.header, hashlib.sha256(packed.data).hexdigest()
    parent, target = header.parent[:SHORT], header.target[:SHORT]
    return Way(parent, target, len(packed.data), digest)


def useful(
    ways: Iterable[Way], target: str, init: str, starts: Collection[str]
) -> tuple[Way, ...]:
    """Keep the ways that are on the cheapest route from one of some weights.

    Args:
        ways: All that there are; of two from and to the same weights the first counts.
        target: First 12 hexadecimal digits of the release.
        init: The same of the init weights, where every device can begin as well.
        starts: The same of the weights that devices may hold.
    """
    known: dict[tuple[str, str], Way] = {}
    for way in ways:
        known.setdefault((way.parent, way.target), way)
    routes = (cheapest({start, init}, target, known.values()) for start in starts)
    wanted = {way for route in routes if route for way in route}
    return tuple(way for way in known.values() if way in wanted)
