# SPDX-License-Identifier: Apache-2.0
"""What follows on the head of a channel when a round is released."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from edge_runtime.errors import RoundError
from edge_runtime.sync.head import PERMILLE, SHORT, Head, Rollout, SignedHead, Way
from edge_runtime.sync.paths import patch_path
from edge_runtime.sync.state import SLIP_S
from edge_runtime.times import utc
from packager.fleet.channel import Channel, newest_list, present
from packager.fleet.head import AHEAD_S, is_fresh
from packager.fleet.place import Place
from packager.fleet.ways import (
    Offered,
    pack_again,
    pack_ways,
    parents_ahead,
    parents_behind,
    useful,
)
from packager.ledger import Ledger
from packager.release_counter import check_counter, next_counter
from packager.rounds.folder import Parent, RoundFolder, read_init

ALL_NOW = ((PERMILLE, 0),)
REACH = 8  # releases back, from which the head still lists the cheapest ways


class Successor:
    """A channel's next release, with the ways to it and the head that names them.

    Attributes:
        counter: Its release counter.
    """

    def __init__(
        self,
        round_: RoundFolder,
        channel: Channel,
        ledger: Ledger,
        old: SignedHead | None,
        *,
        revert: bool,
    ) -> None:
        """Settle the counter.

        Args:
            round_: An updated round.
            channel: How it is published.
            ledger: What was released before.
            old: The channel's head until now, if any.
            revert: Release the round although the channel is at a newer one.

        Raises:
            RoundError: It may not become the newest release.
        """
        self._round, self._channel, self._ledger = round_, channel, ledger
        self._signed, self._old = old, old.head if old else None
        self.counter = self._next_counter(revert=revert)

    def offers(self) -> list[Offered]:
        """Pack the patches that lead to the release.

        Raises:
            RoundError: A round that one leads from is damaged.
            OSError: It cannot be read.
        """
        counter, signers = self.counter, self._channel.signers
        offered = pack_ways(
            self._round, self._parents(), counter=counter, signers=signers
        )
        if self._is_again():
            offered.append(pack_again(self._round, counter=counter, signers=signers))
        return offered

    def head(
        self, offered: Sequence[Offered], bundle: bytes, place: Place, *, now: int
    ) -> Head:
        """Return the head that names the release.

        Args:
            offered: What :meth:`offers` packed.
            bundle: Of the release.
            place: Where it goes.
            now: Seconds since 1970.
        """
        record, before, channel = self._round.record, self._old, self._channel
        ways = [offer.way for offer in offered]
        if self._signed and channel.made(self._signed):
            files, good = present(place), self._still_good(self._signed.head)
            ways += [w for w in good if files.get(patch_path(w.sha256)) == w.size]
        init = read_init(self._round).weights.fingerprint[:SHORT]
        return Head(
            model=record.model,
            channel=channel.name,
            version=max(before.version if before else 0, channel.above) + 1,
            at=now,
            expires=now + channel.lifetime_s,
            counter=self.counter,
            round=record.round,
            target=record.target,
            ways=useful(ways, record.target[:SHORT], init, self._starts(offered)),
            bundle=(len(bundle), hashlib.sha256(bundle).hexdigest()),
            rollout=self._rollout(now),
            pausers=channel.pausers or (before.pausers if before else ()),
            keys=newest_list(place),
        )

    def is_news(self, head: Head) -> bool:
        """Tell whether a head says something new, or the old one is not fresh.

        Nor is it once a share has begun: a device without a clock knows no later time
        than that of the head.
        """
        old = self._old
        if old is None or old.version <= self._channel.above:
            return True
        dated = replace(head, version=old.version, at=old.at, expires=old.expires)
        steps = head.rollout.steps if head.rollout else ()
        has_begun = any(old.at < start <= head.at for _, start in steps)
        left = old.expires - head.at
        return dated != old or has_begun or not is_fresh(left, self._channel.lifetime_s)

    def begin(self, now: int) -> int:
        """Return when shares begin that are to begin now.

        Nothing tells whether this clock is behind or that of the head was ahead. So the
        later time counts, as on devices; a head that is further ahead than these go
        along with was a slip, unless other releases are from after this time too.
        """
        at, record = self._old.at if self._old else now, self._round.record
        known = self._ledger.released(record.model)
        others = [release.at for release in known if release.target != record.target]
        if at > now + SLIP_S and max(others, default="") <= utc(now + AHEAD_S):
            return now
        return max(now, at)

    def _next_counter(self, *, revert: bool) -> int:
        """Return the ledger's counter, or what the channel makes of it."""
        record, head, name = self._round.record, self._old, self._round.name
        if head and head.model != record.model:
            raise RoundError(
                f"the channel is of model {head.model[:SHORT]}, {name} of "
                f"{record.model[:SHORT]}: give each model a folder of its own with --to"
            )
        if head and head.target == record.target:
            return head.counter
        if head and head.round > record.round and not revert:
            raise RoundError(
                f"the channel is at round {head.round}, which is newer than {name}; "
                "to answer a bad release with older weights: dpu-fleet revert"
            )
        releases = self._ledger.released(record.model)
        counter = next_counter(releases, record)
        known = [release.counter for release in releases]
        if revert:
            counter = max([counter, *(n + 1 for n in known)])
        if head and counter <= head.counter:
            counter = max([head.counter, *known]) + 1
        check_counter(counter)
        return counter

    def _goes_back(self) -> bool:
        return self._old is not None and self._old.round > self._round.record.round

    def _parents(self) -> Iterator[Parent]:
        """Yield the weights from which the channel leads to the release."""
        if self._goes_back():
            yield from parents_ahead(self._round, self._ledger)
        yield from parents_behind(self._round, self._ledger, self._channel.skips)

    def _is_again(self) -> bool:
        """Tell whether devices may have the weights under an older counter."""
        record = self._round.record
        before = self._ledger.counter_of(record.model, record.target)
        return self._goes_back() or (before is not None and before < self.counter)

    def _still_good(self, old: Head) -> Iterator[Way]:
        """Yield the ways between earlier releases, for devices that are behind.

        Not those into releases that this one takes back, through which nobody should
        go any more, nor those that lead to its own weights under an older counter.
        """
        record = self._round.record
        left = {
            release.target[:SHORT]
            for release in self._ledger.released(record.model)
            if release.round > record.round
        }
        if self._goes_back():
            left.add(old.target[:SHORT])
        if self.counter != old.counter:
            left.add(record.target[:SHORT])
        yield from (way for way in old.ways if way.target not in left)

    def _starts(self, offered: Sequence[Offered]) -> set[str]:
        """Return the weights for which the head keeps the cheapest ways."""
        record = self._round.record
        known = self._ledger.released(record.model)
        targets = [record.target, *(release.target for release in reversed(known))]
        newest = dict.fromkeys(target[:SHORT] for target in targets)
        return {*list(newest)[:REACH], *(offer.way.parent for offer in offered)}

    def _rollout(self, now: int) -> Rollout | None:
        """Return the rollout; of a release published once more, with its old times."""
        shares, groups = self._channel.shares, self._channel.groups
        old = self._rollout_until_now(now)
        if not shares and not groups:
            return old
        shares = () if shares == ALL_NOW else shares
        if not shares and not groups:
            return None
        if old and old.groups == groups and _apart(old.steps) == _apart(shares):
            return old
        begin = self.begin(now)
        steps = tuple((share, begin + delay) for share, delay in shares)
        return Rollout(str(self.counter), steps, groups)

    def _rollout_until_now(self, now: int) -> Rollout | None:
        """Return the rollout of this very release until now, if it is being rolled out.

        One that began under a clock that was far ahead begins now.
        """
        old = self._old
        if old is None or old.rollout is None or old.counter != self.counter:
            return None
        steps = old.rollout.steps
        ahead = old.at - self.begin(now)
        if ahead > 0 and all(start >= old.at for _, start in steps):
            steps = tuple((share, start - ahead) for share, start in steps)
        return replace(old.rollout, steps=steps)


def _apart(steps: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return shares, and how long after the first of them each begins."""
    return [(share, at - steps[0][1]) for share, at in steps]
