# SPDX-License-Identifier: Apache-2.0
"""What may follow a halt: the rollout goes on, or its release is taken back."""

from dataclasses import replace
from pathlib import Path

from edge_runtime.errors import RoundError, RoundNotFoundError, StoreError
from edge_runtime.sync.head import SHORT, Head, SignedHead
from edge_runtime.sync.paths import head_path
from packager.check_proof import known_rounds
from packager.fleet.channel import RACES, Channel, read_channel
from packager.fleet.head import sign_head
from packager.fleet.place import Place
from packager.ledger import read_ledger
from packager.rounds.names import full_name


def resume(place: Place, channel: Channel, *, now: int) -> tuple[Head, bool]:
    """Go on with a paused rollout: the same release under a new head.

    Shares that had begun are as they were; those that were to come come later by as
    long as the pause was.

    Returns:
        The channel's head, and whether it is new: it was paused.

    Raises:
        RoundError: There is no such channel.
        StoreError: Other publishers came first every time.
        HeadError: What lies there is no head.
        TrustError: Another key signed the head.
        OSError: The place cannot be read or written.
    """
    for _ in range(RACES):
        signed, tag = read_channel(place, channel)
        if signed is None:
            raise RoundError(
                f"no channel {channel.name!r} in {place.name}: nothing to resume"
            )
        if signed.pause is None or not signed.is_paused():
            return signed.head, False
        old = signed.head
        # The pauser's clock may say anything: the release key never signed its time.
        halted = min(max(signed.pause.at, old.at), now)
        rollout = old.rollout and replace(
            old.rollout,
            steps=tuple(
                (share, start if start <= halted else start + now - halted)
                for share, start in old.rollout.steps
            ),
        )
        head = replace(
            old,
            version=old.version + 1,
            at=now,
            expires=now + old.expires - old.at,
            rollout=rollout,
        )
        if place.swap(head_path(channel.name), sign_head(head, channel.signers), tag):
            return head, True
    raise StoreError(
        f"{place.name}/{head_path(channel.name)} changed {RACES} times meanwhile"
    )


def release_before(runs: Path, signed: SignedHead) -> str:
    """Return the name of the round that was released before a channel's newest.

    Releases that were themselves taken back are passed over. Where the newest took a
    bad one back already, and was not halted since, it is that itself: the same command
    given twice takes back one release.

    Raises:
        RoundNotFoundError: No run here has the channel's release, or one before it.
        RoundError: The run's ledger is malformed.
    """
    head, rounds = signed.head, known_rounds(runs).by_release
    if (head.model, head.target) not in rounds:
        raise RoundNotFoundError(
            f"no run in {runs} has round {head.round} ({head.target[:SHORT]}), which "
            "the channel is at; give --runs, or the name of the ROUND"
        )
    ledger = read_ledger(rounds[head.model, head.target].parent)
    known = [r for r in ledger.released(head.model) if r.counter < head.counter]
    others = [release for release in known if release.target != head.target]
    last = max(others, key=lambda r: r.counter, default=None)
    if last and last.round > head.round and not signed.is_paused():
        return full_name(rounds[head.model, head.target])
    good = [
        release
        for release in known
        if release.round < head.round
        and (head.model, release.target) in rounds
        and not any(
            newer.counter > release.counter and newer.round < release.round
            for newer in known
        )
    ]
    if not good:
        raise RoundNotFoundError(
            f"nothing was released before round {head.round}; name the ROUND"
        )
    best = max(good, key=lambda r: r.counter)
    return full_name(rounds[head.model, best.target])
