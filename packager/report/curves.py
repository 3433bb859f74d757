# SPDX-License-Identifier: Apache-2.0
"""Charts with axes over whole numbers such as rounds: lines and columns."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from packager.report.svg import RIGHT, WIDTH, Format, draw, escape, write

LEFT, TOP, BOTTOM = 78, 24, 44  # room around the plot


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart.

    Attributes:
        name: What it is.
        points: x and y.
        colour: 1 to 5, a colour of the page.
        dashed: Whether the line is dashed.
        marks: For each point ``"dot"``, ``"ring"``, ``"diamond"`` or ``""``.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    dashed: bool = False
    marks: Sequence[str] = ()


class Plot:
    """Axes: data to places in the view box, grid lines, labels.

    Attributes:
        low: Lower end of y, as it is scaled.
        high: Upper end.
        height: Of the picture.
        ticks: Values of y with a line and a label.
    """

    def __init__(
        self,
        low: float,
        high: float,
        height: float,
        *,
        log: bool,
        ticks: Sequence[float],
    ) -> None:
        """Name the ends of y."""
        self._scale = math.log10 if log else float
        self.low, self.high = self._scale(low), self._scale(high)
        self.height, self.ticks = height, ticks

    def y(self, value: float) -> float:
        """Return where a value lies, from above."""
        share = (self._scale(value) - self.low) / (self.high - self.low)
        return TOP + (self.height - TOP - BOTTOM) * (1 - share)

    def grid(self, form: Format) -> Iterator[str]:
        """Yield a line and a label for each tick."""
        for tick in self.ticks:
            y = self.y(tick)
            yield f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
            yield write(LEFT - 8, y + 4, form(tick), "end")

    def names(self, x_name: str, y_name: str) -> Iterator[str]:
        """Yield the names of both axes."""
        yield write(
            (LEFT + WIDTH - RIGHT) / 2, self.height - 6, x_name, "middle", "axis"
        )
        middle = (TOP + self.height - BOTTOM) / 2
        yield (
            f'<text class="axis" text-anchor="middle" transform="translate(12 '
            f'{middle:.0f}) rotate(-90)">{escape(y_name)}</text>'
        )


def plot_of(
    low: float, high: float, height: float, *, log: bool, least: float = 0
) -> Plot:
    """Return axes with round numbers at their ends, ``least`` apart or more."""
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        last = max(last, first + 1)
        ticks = [10.0**n for n in range(first, last + 1)]
        return Plot(ticks[0], ticks[-1], height, log=True, ticks=ticks)
    step = max(least, _step((high - low) or abs(high) or 1))
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    ticks = [n * step for n in range(first, last + 1)]
    return Plot(ticks[0], ticks[-1], height, log=False, ticks=ticks)


def _step(span: float) -> float:
    """Return a round number of which four to eight fit into ``span``."""
    power = 10.0 ** math.floor(math.log10(span / 4))
    return next(power * n for n in (1, 2, 5, 10) if span / (power * n) <= 6)


def _columns(values: Sequence[float]) -> dict[float, float]:
    width = (WIDTH - LEFT - RIGHT) / len(values)
    return {value: LEFT + (n + 0.5) * width for n, value in enumerate(values)}


def _round_labels(place: dict[float, float], height: float) -> Iterator[str]:
    every = math.ceil(len(place) / 14)
    for number, (value, x) in enumerate(place.items()):
        if number % every == 0:
            yield write(x, height - BOTTOM + 18, f"{value:g}", "middle")


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    axes: tuple[str, str],
    form: Format,
    log: bool = False,
) -> str:
    """Draw lines over whole numbers such as rounds.

    Args:
        title: What is shown; read aloud.
        series: The lines; at least one point in all.
        axes: Names of x and y.
        form: Puts a value of y into words.
        log: Whether y is logarithmic; then every y must be positive.
    """
    height = 300
    values = [y for line in series for _, y in line.points]
    plot = plot_of(min(values), max(values), height, log=log)
    rounds = sorted({x for line in series for x, _ in line.points})
    place = _columns(rounds)
    parts = [*plot.grid(form), *plot.names(*axes), *_round_labels(place, height)]
    for line in series:
        at = [(place[x], plot.y(y)) for x, y in line.points]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
        dashes = ' stroke-dasharray="5 4"' if line.dashed else ""
        parts.append(f'<path class="line c{line.colour}"{dashes} d="{path}"/>')
        for (x, y), mark, (round_, value) in zip(
            at, line.marks or ["dot"] * len(at), line.points, strict=True
        ):
            words = f"{line.name}, {axes[0]} {round_:g}: {form(value)}"
            parts.append(_mark(x, y, mark, line.colour, words))
    return draw(title, _describe(series, form), height, parts)


def _describe(series: Sequence[Series], form: Format) -> str:
    return ". ".join(
        f"{line.name}: from {form(line.points[0][1])} to {form(line.points[-1][1])}"
        for line in series
        if line.points
    )


def _mark(x: float, y: float, mark: str, colour: int, words: str) -> str:
    title = f"<title>{escape(words)}</title>"
    if mark == "diamond":
        shape = f"M{x:.1f} {y - 7:.1f}l7 7-7 7-7-7z"
        return f'<path class="fill c{colour}" d="{shape}">{title}</path>'
    kind = "ring" if mark == "ring" else "fill"
    radius = 0.1 if not mark else 4
    return (
        f'<circle class="{kind} c{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
        f"{title}</circle>"
    )


def column_chart(
    title: str,
    columns: Sequence[tuple[float, float]],
    *,
    axes: tuple[str, str],
    form: Format,
) -> str:
    """Draw a column over each whole number; a value of 0 leaves a dash on the axis."""
    height = 260
    plot = plot_of(0, max(y for _, y in columns) or 1, height, log=False)
    place = _columns([x for x, _ in columns])
    width = min(56, 0.7 * (WIDTH - LEFT - RIGHT) / len(columns))
    parts = [*plot.grid(form), *plot.names(*axes), *_round_labels(place, height)]
    for x, value in columns:
        top, bottom = plot.y(value), plot.y(0)
        parts.append(
            f'<rect class="fill c1" x="{place[x] - width / 2:.1f}" y="{top - 1:.1f}" '
            f'width="{width:.1f}" height="{bottom - top + 1:.1f}" rx="2">'
            f"<title>{escape(f'{axes[0]} {x:g}: {form(value)}')}</title></rect>"
        )
        if len(columns) <= 8:
            parts.append(write(place[x], top - 6, form(value), "middle"))
    words = ", ".join(f"{axes[0]} {x:g}: {form(value)}" for x, value in columns)
    return draw(title, words, height, parts)


def stacked_areas(
    title: str,
    series: Sequence[tuple[str, str, Sequence[int | None]]],
    ticks: Sequence[tuple[int, str]],
    *,
    axes: tuple[str, str],
    form: Format,
) -> str:
    """Draw amounts on top of each other, a step for each day or the like.

    Args:
        title: What is shown.
        series: Name, colour such as ``"c1"`` or ``"h3"``, and the amount of each step;
            None where nobody knows it.
        ticks: Steps with their labels.
        axes: Names of x and y.
        form: Puts an amount into words.
    """
    height, steps = 280, len(series[0][2])
    known = [n for n in range(steps) if series[0][2][n] is not None]
    total = [sum(amounts[n] or 0 for *_, amounts in series) for n in range(steps)]
    plot = plot_of(0, max(total, default=0) or 1, height, log=False, least=1)
    width = (WIDTH - LEFT - RIGHT) / steps
    parts = [*plot.grid(form), *plot.names(*axes)]
    for step, label in ticks:
        x = LEFT + (step + 0.5) * width
        parts.append(write(x, height - BOTTOM + 18, label, "middle"))
    below = [0] * steps
    for name, colour, amounts in series:
        path = ""
        for n in known:
            top, bottom = plot.y(below[n] + (amounts[n] or 0)), plot.y(below[n])
            below[n] += amounts[n] or 0
            if bottom - top > 0.04:
                # A little wider, so that no line shows between one day and the next.
                x, right = LEFT + n * width, LEFT + (n + 1) * width + 0.2
                path += f"M{x:.1f} {top:.1f}H{right:.1f}V{bottom:.1f}H{x:.1f}z"
        last = form(amounts[known[-1]] or 0) if known else "nothing"
        words = f"<title>{escape(f'{name}: {last} at the end')}</title>"
        parts.append(f'<path class="area {colour}" d="{path}">{words}</path>')
    ends = [(name, [form(a[n] or 0) for n in known]) for name, _, a in series]
    told = "; ".join(f"{name}: from {a[0]} to {a[-1]}" for name, a in ends if a)
    return draw(title, told, height, parts)
