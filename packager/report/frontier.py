# SPDX-License-Identifier: Apache-2.0
"""What accuracy costs in bytes: runs held against full updating, as one picture.

A run is better than another where it loses less and sends less; those that no other is
better than make the frontier.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean, median, stdev

from edge_runtime.errors import RoundError
from packager.report.curves import BOTTOM, LEFT, TOP, plot_of
from packager.report.records import FrontierPoint
from packager.report.svg import RIGHT, WIDTH, draw, write
from packager.report.words import short_bytes, spaced

HEIGHT = 320
FULL = "fu"  # the method that others are held against
LETTER = 7  # width of a letter, as the page draws it
FAR = 4  # times the median loss: what loses more is outside of the picture


@dataclass(frozen=True, slots=True)
class Measured:
    """A run, as far as its place in the picture depends on it.

    Attributes:
        name: Of the run; those of one recipe that differ in ``_seedN`` are one point.
        method: What selected its weights; ``"fu"`` is full updating.
        seed: Of the run, if it is known.
        values: By round, what it is measured by.
        sent: Bytes of its patches, in order.
        lower: Whether lower values are better.
        recipe: Whatever tells its recipe from others, but for the seed.
        path: Where it lies, for words.
    """

    name: str
    method: str | None
    seed: int | None
    values: Mapping[int, float]
    sent: Sequence[int]
    lower: bool = False
    recipe: str = ""
    path: str = ""


def frontier_points(runs: Sequence[Measured]) -> list[FrontierPoint]:
    """Hold runs against full updating of the same seed, round by round.

    Args:
        runs: All runs, those of full updating among them.

    Returns:
        A point for each method, in the order of ``runs``; those without full updating
        of their seed are left out. Recipes of one name, and runs of one recipe and
        seed, are points of their own, which are named by their paths.

    Raises:
        RoundError: Two runs of full updating have the seed of another run.
    """
    full = _full(runs)
    groups: dict[tuple[object, ...], list[Measured]] = {}
    for run in runs:
        theirs = full.get(run.seed)
        if (
            run.method == FULL
            or theirs is None
            or run.values.keys().isdisjoint(theirs.values)
        ):
            continue
        groups.setdefault((_stem(run), run.method, run.recipe), []).append(run)
    points: list[list[Measured]] = []
    for group in groups.values():
        alone = len({run.seed for run in group}) < len(group)
        points += [[run] for run in group] if alone else [group]
    names = Counter(_stem(group[0]) for group in points)
    return [
        _point(
            _stem(group[0])
            if names[_stem(group[0])] == 1
            else ", ".join(run.path for run in group),
            [(_gain(run, full[run.seed]), run.sent) for run in group],
        )
        for group in points
    ]


def _full(runs: Sequence[Measured]) -> Mapping[int | None, Measured]:
    """Return the runs of full updating by seed; of each that others have, just one."""
    found: dict[int | None, Measured] = {}
    others = {run.seed for run in runs if run.method != FULL}
    for run in (run for run in runs if run.method == FULL):
        first = found.setdefault(run.seed, run)
        if first is not run and run.seed in others:
            raise RoundError(
                f"{first.path} and {run.path} are both full updating of seed "
                f"{run.seed}; expected one to hold the others against: leave one out"
            )
    return found


def _stem(run: Measured) -> str:
    return re.sub(r"[_-]?seed\d+$", "", run.name) or run.name


def _gain(run: Measured, full: Measured) -> float:
    """Return how much better than full updating a run is, over common rounds."""
    common = run.values.keys() & full.values
    gain = fmean(run.values[n] - full.values[n] for n in sorted(common))
    return -gain if run.lower else gain


def _point(name: str, found: Sequence[tuple[float, Sequence[int]]]) -> FrontierPoint:
    points = [value for value, _ in found]
    error = stdev(points) / math.sqrt(len(points)) if len(points) > 1 else None
    behind = [fmean(sent[1:]) for _, sent in found if len(sent) > 1]
    return {
        "name": name,
        "runs": len(found),
        "points": fmean(points),
        "error": error,
        # What a device gets again and again; the first one comes once.
        "bytes": round(fmean(behind)) if behind else 0,
        "first_bytes": round(fmean([sent[0] if sent else 0 for _, sent in found])),
        "all_bytes": round(fmean([sum(sent) for _, sent in found])),
    }


def on_the_frontier(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """Return those that no other beats in bytes and accuracy, fewest bytes first."""
    found: list[FrontierPoint] = []
    for point in sorted(points, key=lambda p: (p["bytes"], -p["points"])):
        if not found or point["points"] > found[-1]["points"]:
            found.append(point)
    return found


@dataclass(frozen=True, slots=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "_Box") -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )


def frontier_chart(
    title: str, points: Sequence[FrontierPoint], *, unit: str, factor: float = 1
) -> str:
    """Draw points to full updating over bytes a round, bytes on a logarithmic axis.

    Args:
        title: What is shown.
        points: What :func:`frontier_points` gives; those that sent one patch at most
            are left out.
        unit: What the points are: ``points of accuracy``.
        factor: From the metric to that unit: 100 for per cent.
    """
    points = [point for point in points if point["bytes"]]
    spans = [
        [factor * (p["points"] + side * (p["error"] or 0)) for side in (-1, 0, 1)]
        for p in points
    ]
    # What is far below all others would press them into one line: it is drawn as a
    # ring at the lower edge, with its value.
    floor = FAR * min(0.0, median(value for _, value, _ in spans))
    ends = [0.0, *(end for span in spans if span[1] >= floor for end in span)]
    plot = plot_of(min(ends), max(ends), HEIGHT, log=False)
    x_of = _ByteAxis([point["bytes"] for point in points])
    best = on_the_frontier(points)
    steps = [(x_of(p["bytes"]), plot.y(factor * p["points"])) for p in best]
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in steps)
    parts = [
        *plot.grid(lambda value: f"{value:+.3g}" if value else "0"),
        *x_of.grid(),
        *plot.names("bytes of a patch behind the first", f"{unit} to full updating"),
        f'<path class="line c5" d="M{LEFT} {plot.y(0):.1f}H{WIDTH - RIGHT}"/>',
        f'<path class="line c5" stroke-dasharray="5 4" d="M{line}"/>',
    ]
    at = [
        (x_of(point["bytes"]), plot.y(max(span[1], plot.low)))
        for point, span in zip(points, spans, strict=True)
    ]
    taken = [_Box(x - 6, y - 6, x + 6, y + 6) for x, y in at]
    for point, (low, value, high), (x, y) in zip(points, spans, at, strict=True):
        colour = 1 if point in best else 2
        is_far = value < plot.low
        if not is_far:
            bar = f"M{x:.1f} {plot.y(max(low, plot.low)):.1f}V{plot.y(high):.1f}"
            parts.append(f'<path class="line c{colour}" d="{bar}"/>')
        words = escape(_words(point, factor))
        name = point["name"] + (f" {value:+.1f}" if is_far else "")
        parts += [
            f'<circle class="{"ring" if is_far else "fill"} c{colour}" cx="{x:.1f}" '
            f'cy="{y:.1f}" r="5"><title>{words}</title></circle>',
            _label(name, x, y, taken),
        ]
    words = "; ".join(_words(point, factor) for point in points)
    return draw(title, words, HEIGHT, parts)


class _ByteAxis:
    """From bytes to places, equal steps for equal factors."""

    def __init__(self, sizes: Sequence[int]) -> None:
        # Room for names at both ends.
        self._low = math.log10(min(sizes)) - 0.15
        self._span = math.log10(max(sizes)) + 0.3 - self._low

    def __call__(self, value: float) -> float:
        share = (math.log10(value) - self._low) / self._span
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def grid(self) -> Iterator[str]:
        first, last = math.floor(self._low), math.ceil(self._low + self._span)
        digits = (1, 2, 5) if self._span > 1 else (1, 1.5, 2, 3, 5, 7)
        for mark in (n * 10**e for e in range(max(0, first), last) for n in digits):
            if LEFT <= (x := self(mark)) <= WIDTH - RIGHT:
                yield f'<path class="grid" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>'
                words = short_bytes(mark).replace(".0", "")
                yield write(x, HEIGHT - BOTTOM + 18, words, "middle")


def _label(name: str, x: float, y: float, taken: list[_Box]) -> str:
    """Write a name beside its mark: in the picture, and where no other stands."""
    width = LETTER * len(name)
    places = [(x + 9, y + 4), (x - 9 - width, y + 4)]
    places += [(x - width / 2, y + down) for down in (-11, 19, -24, 32)]
    boxes = [_Box(left, y - 10, left + width, y + 3) for left, y in places]
    inside = [
        box
        for box in boxes
        if box.left >= LEFT
        and box.right <= WIDTH
        and box.bottom <= HEIGHT - BOTTOM + 8  # the axis has words of its own
    ] or boxes
    free = (box for box in inside if not any(map(box.meets, taken)))
    box = next(free, inside[0])
    taken.append(box)
    return write(box.left, box.bottom - 3, name, "start")


def _words(point: FrontierPoint, factor: float) -> str:
    error = f" ± {factor * point['error']:.2f}" if point["error"] is not None else ""
    return (
        f"{point['name']}: {factor * point['points']:+.2f}{error} at "
        f"{short_bytes(point['bytes'])} a round"
    )


def frontier_rows(
    points: Sequence[FrontierPoint], factor: float = 1
) -> Iterator[list[str]]:
    """Yield the rows of a table: name, runs, points, bytes behind, first, all."""
    for point in points:
        error = point["error"]
        yield [
            point["name"],
            str(point["runs"]),
            f"{factor * point['points']:+.2f}"
            + (f" ± {factor * error:.2f}" if error is not None else ""),
            spaced(point["bytes"]),
            spaced(point["first_bytes"]),
            spaced(point["all_bytes"]),
        ]
