# SPDX-License-Identifier: Apache-2.0
"""Publish a round: patches and bundle by their hash, then one new head of a channel.

The head is what devices follow, and it is replaced last and only if nobody else
replaced it meanwhile: a publisher that is killed, or loses a race, leaves files that
nothing names, and the channel as it was.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.errors import RoundError, StoreError
from edge_runtime.formats.model_folder import Outcome
from edge_runtime.sync.head import Head, SignedHead
from edge_runtime.sync.paths import bundle_path, head_path, patch_path
from edge_runtime.times import duration, utc
from packager.bundles.from_round import build_bundle
from packager.fleet.channel import RACES, Channel, present, read_channel
from packager.fleet.head import AHEAD_S, named_files, sign_head
from packager.fleet.place import Place
from packager.fleet.successor import Successor
from packager.fleet.ways import Offered
from packager.ledger import open_ledger, telling
from packager.packed_file import read_facts
from packager.release import Release, as_text, release_of
from packager.rounds.folder import RoundFolder


@dataclass(frozen=True, slots=True)
class Published:
    """What became of a channel.

    Attributes:
        head: What it says now.
        size: Bytes of its head.
        offered: The patches that were packed, and whether each is new there.
        bundle: Bytes of the bundle; 0 where none was made.
        changed: Whether there is a new head.
        halted: Words on a release that was paused, and stays so.
    """

    head: Head
    size: int
    offered: tuple[tuple[Offered, bool], ...]
    bundle: int
    changed: bool
    halted: str = ""


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
        StoreError: Other publishers came first, or the place is damaged.
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
    run = round_.path.absolute().parent
    with open_ledger(run, say) as ledger, telling(ledger, say):
        for _ in range(RACES):
            old, tag = read_channel(place, channel)
            release = Successor(round_, channel, ledger, old, revert=revert)
            if old and (ahead := old.head.at - now) > AHEAD_S:
                say(
                    f"the head is dated {duration(ahead)} from now: set this clock if "
                    f"it is behind; what begins now begins {utc(release.begin(now))}"
                )
            counter, offered = release.counter, release.offers()
            bundle = build_bundle(round_, counter=counter, signers=channel.signers)
            head = release.head(offered, bundle.data, place, now=now)
            files = {patch_path(o.way.sha256): o.packed.data for o in offered}
            digest = hashlib.sha256(bundle.data).hexdigest()
            files[bundle_path(digest)] = bundle.data
            halted = _halted(round_, counter, old)
            # No timer that prolongs a head undoes a halt.
            if old and (halted or not release.is_news(head)):
                if not dry_run:
                    _complete(place, old.head, files, say)
                told = tuple((o, False) for o in offered)
                return Published(old.head, 0, told, 0, changed=False, halted=halted)
            data = sign_head(head, channel.signers)
            if dry_run:
                there = present(place)
                new = {path: path not in there for path in files}
            else:
                new = {path: place.create(path, files[path]) for path in files}
                # Before the head: what devices may have seen is in the ledger.
                for path, content in files.items():
                    ledger.record(_release(place, path, content, now))
                if not place.swap(head_path(channel.name), data, tag):
                    continue  # another publisher came first
                _complete(place, head, files, say)
            told = tuple((o, new[patch_path(o.way.sha256)]) for o in offered)
            return Published(head, len(data), told, len(bundle.data), changed=True)
    raise StoreError(
        f"other publishers changed {place.name}/{head_path(channel.name)} {RACES} "
        "times meanwhile; nothing was published, try again"
    )


def _complete(
    place: Place, head: Head, files: Mapping[str, bytes], say: Callable[[str], None]
) -> None:
    """Write again what a head names and somebody removed, before it was named."""
    for path, _ in named_files(head).items() - present(place).items():
        if path not in files:
            say(f"{place.name}/{path}, which the head names, is missing")
        elif place.create(path, files[path]):
            say(f"{place.name}/{path} was missing, and is there again")


def _halted(round_: RoundFolder, counter: int, old: SignedHead | None) -> str:
    """Say that the release is there already, and paused; nothing if not."""
    if not old or old.head.counter != counter or not old.is_paused():
        return ""
    return (
        f"the rollout of {round_.name} is paused: 'dpu-fleet resume' goes on, "
        "'dpu-fleet revert' takes it back; no new head was published"
    )


def _where(place: Place) -> str:
    """Return a place as the ledger names it, whoever reads that from wherever."""
    is_folder = "://" not in place.name
    return as_text(Path(place.name).absolute()) if is_folder else place.name


def _release(place: Place, path: str, data: bytes, now: int) -> Release:
    return release_of(
        read_facts(data),
        file=Path(path).name,
        to=_where(place),
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        at=utc(now),
    )
