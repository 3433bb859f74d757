# SPDX-License-Identifier: Apache-2.0
"""Remove the patches and bundles of a place that nobody needs any more.

Needed is what the head of any channel names, or the newest TUF metadata, what leads to
the newest releases (a device may be fetching by the head before), and a cheapest way
from all weights that devices reported. Young files are left: their publisher may be
about to name them. A publisher that named an old file meanwhile notices that it is
gone, and writes it again.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from edge_runtime.errors import RoundError, StoreError
from edge_runtime.sync.head import SHORT, Head, Way
from edge_runtime.sync.head_file import read_head
from edge_runtime.sync.paths import bundle_path, head_path, patch_path
from edge_runtime.sync.route import cheapest
from packager.fleet.head import named_files
from packager.fleet.place import PROBES, Entry, Place
from packager.fleet.reader import channels
from packager.fleet.tuf_files import old_metadata, told_heads
from packager.packed_file import PATCH
from packager.release import Release

FOLDERS = ("patches/", "bundles/")
# A file of ours, by its hash; and the parts that killed publishers leave in folders.
_PART = re.compile(r"\..+\.[0-9a-f]{16}\.new")
_OURS = re.compile(rf"[0-9a-f]{{64}}\.(dpu|zip)|{_PART.pattern}")


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was removed, or would be.

    Attributes:
        removed: The files.
        kept: Bytes of the patches and bundles that stay.
        stranded: Weights that devices reported and from which no way leads on; they
            need the way from the init weights, or a bundle.
    """

    removed: tuple[Entry, ...]
    kept: int
    stranded: tuple[str, ...]


def prune(
    place: Place,
    *,
    now: float,
    grace_s: float,
    releases: Collection[Release] = (),
    newest: int = 0,
    reported: Collection[str] = (),
    dry_run: bool = False,
) -> Pruned:
    """Remove what nobody needs; heads, key lists and reports are never touched.

    Args:
        place: Where releases were published.
        now: Seconds since 1970.
        grace_s: Files that are younger stay.
        releases: Of the run's ledger; they tell what leads where.
        newest: To how many of the newest of them the patches stay.
        reported: Fingerprints of weights that devices run.
        dry_run: Remove nothing.

    Raises:
        RoundError: There is no channel.
        HeadError: A head cannot be read, so that nobody knows what it names.
        StoreError: A head names a file that is not there any more.
        DpuError: The place gives no answer.
        OSError: It cannot be read or written.
    """
    # Files first, heads after them: a head that is newer names nothing older than it.
    found = list(_candidates(place))
    there = {entry.path for entry in found}
    heads = _heads(place)
    if not heads:
        raise RoundError(
            f"{place.name} has no channel, so nothing tells what is needed there; give "
            "the model's own folder"
        )
    ways, stranded = _reported_ways(heads, _known_ways(releases, there), reported)
    keep = ways | _leading_to_newest(releases, newest) | told_heads(place)[1]
    doomed = [
        entry
        for entry in found
        if entry.path not in keep
        and entry.modified < now - grace_s
        and not _is_named(entry.path, heads)
    ]
    if not dry_run:
        doomed = [entry for entry in doomed if _remove(place, entry.path)]
        _insist_whole(place, {entry.path for entry in doomed})
    gone = {entry.path for entry in doomed}
    kept = sum(entry.size for entry in found if entry.path not in gone)
    return Pruned(tuple(doomed), kept, tuple(stranded))


def _candidates(place: Place) -> Iterator[Entry]:
    """Yield what may be removed at all: files of ours, probes, parts of files."""
    for folder in FOLDERS:
        for entry in place.entries(folder, deep=False):
            if _OURS.fullmatch(PurePosixPath(entry.path).name):
                yield entry
    yield from place.entries(PROBES)
    yield from old_metadata(place)
    for entry in (*place.entries("", deep=False), *place.entries("keys/", deep=False)):
        if _PART.fullmatch(PurePosixPath(entry.path).name):
            yield entry


def _heads(place: Place) -> dict[str, Head]:
    # TUF may still say what heads said before: its publisher may have been killed.
    found = {f"TUF: {name}": head for name, head in told_heads(place)[0].items()}
    for name in channels(place):
        read = place.read(head_path(name))
        if read is not None:
            found[name] = read_head(read[0]).head
    return found


def _is_named(path: str, heads: dict[str, Head]) -> bool:
    return any(path in named_files(head) for head in heads.values())


def _remove(place: Place, path: str) -> bool:
    """Remove a file, unless a publisher has named it since the heads were read."""
    if path.startswith(FOLDERS) and _is_named(path, _heads(place)):
        return False
    place.remove(path)
    return True


def _insist_whole(place: Place, gone: Collection[str]) -> None:
    """Insist that no publisher named what was removed in the same moment."""
    for name, head in _heads(place).items():
        named = sorted(named_files(head).keys() & gone)
        lost = [path for path in named if place.read(path) is None]
        if lost:
            raise StoreError(
                f"{place.name}/{head_path(name)} was published meanwhile and names "
                f"{', '.join(lost)}, removed just now; publish the same round again, "
                "which brings it back"
            )


def _known_ways(releases: Iterable[Release], there: Collection[str]) -> list[Way]:
    """Return the patches of a place that a run's ledger tells about."""
    ways = (
        Way(r.parent[:SHORT], r.target[:SHORT], r.bytes, r.sha256)
        for r in releases
        if r.kind == PATCH
    )
    return [way for way in ways if patch_path(way.sha256) in there]


def _leading_to_newest(releases: Iterable[Release], newest: int) -> set[str]:
    """Return the files of the newest releases."""
    by_counter = sorted(releases, key=lambda release: release.counter, reverse=True)
    targets = list(dict.fromkeys(release.target for release in by_counter))[:newest]
    return {
        patch_path(r.sha256) if r.kind == PATCH else bundle_path(r.sha256)
        for r in by_counter
        if r.target in targets
    }


def _reported_ways(
    heads: dict[str, Head], listed: Iterable[Way], reported: Collection[str]
) -> tuple[set[str], list[str]]:
    """Return the patches of a cheapest way from what devices run to each release."""
    keep, stranded = set[str](), list[str]()
    for start in sorted(set(reported) - {head.target for head in heads.values()}):
        routes = [
            cheapest({start[:SHORT]}, head.target[:SHORT], [*head.ways, *listed])
            for head in heads.values()
        ]
        keep |= {patch_path(way.sha256) for route in routes for way in route or ()}
        if all(route is None for route in routes):
            stranded.append(start)
    return keep, stranded
