# SPDX-License-Identifier: Apache-2.0
"""Is everything well with a fleet, and if not, what is to be done? The first lines."""

from collections.abc import Iterator

from edge_runtime.times import duration
from packager.fleet.picture import (
    BLOCKED,
    DAY,
    FAILED,
    STALE,
    THERE,
    UNDER_WAY,
    Picture,
)
from packager.report.words import counted, moment, percent, short_bytes, spaced

STATES = {"well": "All is well", "look": "Worth a look", "act": "Act now"}
TOO_MANY = 0.02  # of the devices that tried a release failed, and
LEAST = 3  # so many at least, or all: as the halt of dpu-fleet watch
USUAL = 0.01  # of a fleet may be silent at any time
QUIET = 2 * DAY  # no device at all was heard of
OVERDUE = 7 * DAY  # since a release came out


def summary(picture: Picture) -> str:
    """Return in a few words how far a fleet is."""
    current, known = picture.current, counted(picture.proved, "device")
    if not picture.devices:
        return "no device has reported yet"
    if current is None:
        return f"{known} heard of, no release known"
    there = picture.progress[THERE]
    verb = "proves" if there == 1 else "prove"
    return f"{spaced(there)} of {known} {verb} {current.name}"


def findings(picture: Picture) -> tuple[str, list[str]]:
    """Return how things are, a word of ``STATES``, and what to know or to do.

    The gravest stands first.
    """
    if not picture.devices:
        words = (
            "Nothing is known yet: let devices sync with --report, and collect with "
        )
        return "look", [f"{words}dpu-fleet watch."]
    found = [*_failures(picture), *_standstill(picture), *_unknown(picture)]
    order = list(STATES)[::-1]
    found.sort(key=lambda finding: order.index(finding[0]))
    return (found[0][0] if found else "well"), [words for _, words in found]


def _failures(picture: Picture) -> Iterator[tuple[str, str]]:
    failed, current = picture.progress[FAILED], picture.current
    if current and failed:
        share = percent(failed, picture.tried, 1)
        words = (
            f"{spaced(failed)} of {counted(picture.tried, 'device')} ({share}) that "
            f"tried {current.name} failed or went back: "
        )
        enough = failed >= min(LEAST, picture.tried)
        if failed > TOO_MANY * picture.tried and enough:
            halt = "it is paused;" if picture.paused else "halt it (dpu-fleet pause),"
            yield (
                "act",
                f"{words}{halt} read the reasons below, and answer with dpu-fleet "
                "revert or a newer round.",
            )
        else:
            yield "look", f"{words}the reasons are below."
    if blocked := picture.progress[BLOCKED]:
        yield (
            "look",
            f"{counted(blocked, 'device')} cannot try the release now (space, memory, "
            "runtime, a trial that was cut off). What they lack stands below; each "
            "tries again by itself.",
        )
    taken_back = sum(
        int(proved)
        for target, _, proved, _ in picture.running
        if target in picture.known and picture.known[target].withdrawn
    )
    if taken_back:
        words = f"on {counted(taken_back, 'device')}"
        yield "look", f"A release that was taken back still runs {words}."


def _standstill(picture: Picture) -> Iterator[tuple[str, str]]:
    quiet = picture.now - picture.newest
    if quiet > QUIET:
        yield (
            "act",
            f"No device has been heard of for {duration(quiet)}: look whether devices "
            "reach the place, and whether dpu-fleet watch reads the same one.",
        )
    elif picture.stale:
        share = picture.stale / picture.proved
        yield (
            "look" if share > USUAL else "well",
            f"{counted(picture.stale, 'device')} ({percent(share, 1, 1)}) silent for "
            f"more than {STALE // DAY} days: look at power and network there.",
        )
    current, behind = picture.current, picture.progress[UNDER_WAY]
    if current and picture.paused:
        yield (
            "look",
            f"The rollout of {current.name} is paused; {counted(behind, 'device')} not "
            "there yet wait. dpu-fleet resume or a newer release goes on.",
        )
    elif current and behind:
        age = picture.now - current.at
        words = f"{counted(behind, 'device')} heard of since {current.name} came out "
        words += f"{picture.ago(current.at)}, and not there yet"
        if age > OVERDUE:
            yield (
                "look",
                f"{words}: a pin, a byte budget, a rollout step or group that leaves "
                "them out, or an agent that stands still.",
            )
        else:
            yield "well", f"{words}."


def _unknown(picture: Picture) -> Iterator[tuple[str, str]]:
    if len(picture.channels) > 1:
        yield (
            "look",
            f"This database has the channels {', '.join(picture.channels)}, and a "
            f"report names none: all is held against {picture.channels[0]}. Give each "
            "channel a database of its own, dpu-fleet watch --db.",
        )
    if picture.unheard:
        names = ", ".join(picture.unheard_names)
        more = picture.unheard > len(picture.unheard_names)
        yield (
            "well",  # it may lie on the shelf
            f"{counted(picture.unheard, 'device')} whose key is known never reported: "
            f"{names}{', ...' * more}.",
        )
    if claimed := picture.devices - picture.proved:
        yield (
            "look",
            f"Reports of {counted(claimed, 'device')} are signed by no key that is "
            "known, and count nowhere: put the public key (dpu-edge device-key) among "
            "the known ones, or find out who writes there.",
        )


def figures(picture: Picture) -> list[tuple[str, str]]:
    """Return the numbers that matter most."""
    found = [(spaced(picture.proved), "devices, by proof")]
    if claimed := picture.devices - picture.proved:
        found.append((spaced(claimed), "only claimed"))
    if current := picture.current:
        share = percent(picture.progress[THERE], picture.proved, 1)
        found.append((share, f"run {current.name}"))
        found.append((spaced(picture.progress[FAILED]), f"failed at {current.name}"))
    if picture.devices:
        found.append((spaced(picture.stale), f"silent over {STALE // DAY} days"))
    sent, full = picture.bytes_sent()
    if sent:
        found.append((short_bytes(full - sent), "saved by patches"))
    return found


def facts(picture: Picture) -> list[tuple[str, str]]:
    """Return when this was made, and how old the knowledge in it is."""
    found = [("made", f"{moment(picture.now)}; ages are counted from then")]
    if picture.devices:
        found.append(("newest report", picture.ago(picture.newest)))
    if current := picture.current:
        words = f"{current.name}, release counter {current.counter}, weights "
        words += f"{current.target[:12]}, {picture.ago(current.at)}"
        found.append(("newest release", words))
    return found
