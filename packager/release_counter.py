# SPDX-License-Identifier: Apache-2.0
"""Which release counter a round gets: on devices it only ever grows."""

from collections.abc import Callable, Sequence

from edge_runtime.errors import RoundError
from edge_runtime.formats.header import MAX_JUMP, RESERVED_COUNTER
from edge_runtime.formats.model_folder import round_name
from packager.release import Release
from packager.rounds.record import RoundRecord


def next_counter(
    known: Sequence[Release],
    record: RoundRecord,
    asked: int | None = None,
    *,
    force: bool = False,
    say: Callable[[str], None] = lambda _words: None,
) -> int:
    """Return the release counter under which a round is packed.

    It belongs to the weights: that of their newest release, or else the round's
    own number. Where an older round was released after that, devices have seen a
    higher one, and the next free one is taken.

    Args:
        known: What was released of the round's model.
        record: Of the round.
        asked: What a person asks for instead.
        force: Take what is asked for, though it is another round's or far ahead.
        say: Told what a person should hear.

    Raises:
        RoundError: No device would take it.
    """
    counters = {release.counter for release in known if release.target == record.target}
    own = max(counters, default=record.counter)
    others = [release for release in known if release.target != record.target]
    newest = max((release.counter for release in known), default=record.counter)
    if asked is None:
        overtaken = any(
            release.counter == own
            or (release.counter > own and release.round < record.round)
            for release in others
        )
        asked = newest + 1 if overtaken else own
    elif not force:
        _check_asked(asked, others, say)
    check_counter(asked, None if force else newest)
    return asked


def _check_asked(
    asked: int, others: Sequence[Release], say: Callable[[str], None]
) -> None:
    if not others:
        return
    newest = max(others, key=lambda release: release.counter)
    for release in others:
        if release.counter == asked:
            raise RoundError(
                f"release {asked} is {round_name(release.round)} already "
                f"({release.file}), and no device that has it would take other "
                f"weights under the same number; give --counter {newest.counter + 1}, "
                "or --force"
            )
    if newest.counter > asked:
        say(
            f"release {asked} is older than {newest.counter} "
            f"({round_name(newest.round)}): devices that have seen that one refuse it"
        )


def check_counter(counter: int, newest: int | None = None) -> None:
    """Insist on a counter that devices take, and that leaves room for later ones.

    Args:
        counter: The release counter.
        newest: The highest that is known to be given out; None lets it be far ahead.

    Raises:
        RoundError: No device would take it.
    """
    if counter >= RESERVED_COUNTER:
        raise RoundError(
            f"release counter {RESERVED_COUNTER} is reserved, as no release could ever "
            "follow it; give a smaller one with --counter"
        )
    if newest is not None and counter > newest + MAX_JUMP:
        raise RoundError(
            f"release counter {counter} is more than {MAX_JUMP} above {newest}, the "
            "newest release that is known: devices would refuse it, or everything "
            f"after it; give --counter {newest + 1}, or --force if it is meant"
        )
