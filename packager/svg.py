"""Charts as inline SVG: no script, no library, colours from the page's style sheet.

Each chart has a title and a description for those who do not see it, and each mark has
a title that browsers show under the pointer. Sizes are in the units of the view box;
the page scales them.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 640
LEFT, RIGHT, TOP, BOTTOM = 78, 16, 24, 44  # room around the plot of a line or bar chart
LEVELS = 8  # steps of the heat map's colour


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


Format = Callable[[float], str]


class _Plot:
    """Axes: data to places in the view box, grid lines, labels."""

    def __init__(
        self,
        low: float,
        high: float,
        height: float,
        *,
        log: bool,
        ticks: Sequence[float],
    ) -> None:
        self._scale = math.log10 if log else float
        self.low, self.high = self._scale(low), self._scale(high)
        self.height, self.ticks = height, ticks

    def y(self, value: float) -> float:
        share = (self._scale(value) - self.low) / (self.high - self.low)
        return TOP + (self.height - TOP - BOTTOM) * (1 - share)

    def grid(self, form: Format) -> Iterator[str]:
        for tick in self.ticks:
            y = self.y(tick)
            yield f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
            yield _text(LEFT - 8, y + 4, form(tick), "end")

    def names(self, x_name: str, y_name: str) -> Iterator[str]:
        yield _text(
            (LEFT + WIDTH - RIGHT) / 2, self.height - 6, x_name, "middle", "axis"
        )
        middle = (TOP + self.height - BOTTOM) / 2
        yield (
            f'<text class="axis" text-anchor="middle" transform="translate(12 '
            f'{middle:.0f}) rotate(-90)">{escape(y_name)}</text>'
        )


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
    plot = _plot(min(values), max(values), height, log=log)
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
    return _svg(title, _describe(series, form), height, parts)


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
    plot = _plot(0, max(y for _, y in columns) or 1, height, log=False)
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
        if len(columns) <= 12:
            parts.append(_text(place[x], top - 6, form(value), "middle"))
    words = ", ".join(f"{axes[0]} {x:g}: {form(value)}" for x, value in columns)
    return _svg(title, words, height, parts)


def stacked_bars(
    title: str,
    rows: Sequence[tuple[str, Sequence[tuple[str, int, float]]]],
    form: Format,
) -> str:
    """Draw bars made of parts, below each other and to one scale.

    Args:
        title: What is shown.
        rows: Name of the bar, then name, colour and size of each part.
        form: Puts a size into words.
    """
    left, bar = 96, 34
    longest = max(sum(size for *_, size in parts) for _, parts in rows) or 1
    scale = (WIDTH - left - RIGHT) / longest
    out, y = [], 4.0
    for name, parts in rows:
        out.append(_text(left - 10, y + bar / 2 + 4, name, "end", "strong"))
        x = float(left)
        for part, colour, size in parts:
            width = size * scale
            words = escape(f"{part}: {form(size)}")
            out.append(
                f'<rect class="fill c{colour}" x="{x:.1f}" y="{y:.1f}" '
                f'width="{max(width - 1.5, 0.5):.1f}" height="{bar}" rx="2">'
                f"<title>{words}</title></rect>"
            )
            if width > 7.2 * len(form(size)) + 8:
                out.append(_text(x + width / 2, y + 22, form(size), "middle", "on"))
            x += width
        y += bar + 12
    words = "; ".join(
        f"{name}: " + ", ".join(f"{part} {form(size)}" for part, _, size in parts)
        for name, parts in rows
    )
    return _svg(title, words, y, out)


def heat_map(
    title: str,
    rows: Sequence[tuple[str, Sequence[float | None]]],
    *,
    columns: Sequence[str] = (),
    form: Format,
    corner: str = "",
    log: bool = True,
) -> str:
    """Draw shares as a grid of coloured cells, darker for more.

    Args:
        title: What is shown.
        rows: Name, then a share of 0 to 1 for each column; None is left blank.
        columns: Names of the columns; without them cells have no words in them, and
            each row fills the width.
        form: Puts a share into words.
        corner: What the columns are.
        log: Whether equal steps of the colour are equal factors.
    """
    longest = max(len(name) for name, _ in rows)
    left = min(300, 16 + 6.6 * longest)
    count = max(len(values) for _, values in rows)
    width = (WIDTH - left - 4) / count
    width = min(width, 64) if columns else width
    top, cell = (26 if columns else 2), 22
    out = []
    if columns:
        out.append(_text(left - 10, 16, corner, "end", "axis"))
    for number, name in enumerate(columns):
        if width > 6.5 * len(name) or number % math.ceil(7 * len(name) / width) == 0:
            out.append(_text(left + (number + 0.5) * width, 16, name, "middle"))
    largest = max((v for _, values in rows for v in values if v), default=1.0)
    for line, (name, values) in enumerate(rows):
        y = top + line * (cell + 2)
        out.append(_text(left - 10, y + 15, _shortened(name, left), "end"))
        if not columns:
            width = (WIDTH - left - 4) / len(values)
        for number, value in enumerate(values):
            x = left + number * width
            label = f"{name}, {corner} {columns[number]}" if columns else name
            if value is not None:
                level = heat_level(value / largest, log=log)
                words = escape(f"{label}: {form(value)}")
                gap = 2 if columns else 0.4
                out.append(
                    f'<rect class="h{level}" x="{x:.1f}" y="{y:.1f}" '
                    f'width="{width - gap:.1f}" height="{cell}">'
                    f"<title>{words}</title></rect>"
                )
                if columns and width > 6.6 * len(form(value)):
                    style = "deep" if level > LEVELS // 2 else "pale"
                    middle = x + (width - gap) / 2
                    out.append(_text(middle, y + 15, form(value), "middle", style))
    words = f"{len(rows)} rows; the largest share is {form(largest)}"
    return _svg(title, words, top + len(rows) * (cell + 2), out)


def heat_level(share: float, *, log: bool) -> int:
    """Return a colour: 0 for nothing, up to LEVELS for 1; three decades if ``log``."""
    if not share:
        return 0
    if not log:
        return math.ceil(share * LEVELS)
    return max(1, LEVELS + math.ceil(math.log10(share) * (LEVELS - 1) / 3))


def dumbbells(
    title: str,
    rows: Sequence[tuple[str, float, float]],
    *,
    names: tuple[str, str],
    ticks: Sequence[tuple[float, str]],
    form: Format,
) -> str:
    """Draw two values a row on one logarithmic axis, joined by a line.

    Args:
        title: What is shown.
        rows: Name, then the two values, both positive.
        names: What the first and the second value are.
        ticks: Values with their labels; those outside of the data are left out.
        form: Puts a value into words.
    """
    left, row = 110, 34
    values = [value for _, *pair in rows for value in pair]
    low, high = math.log10(min(values)) - 0.15, math.log10(max(values)) + 0.15
    scale = (WIDTH - left - RIGHT) / (high - low)
    bottom = len(rows) * row + 6
    out = []
    for value, label in ticks:
        if low < math.log10(value) < high:
            x = left + (math.log10(value) - low) * scale
            out.append(f'<path class="grid" d="M{x:.1f} 4V{bottom}"/>')
            out.append(_text(x, bottom + 16, label, "middle"))
    for number, (name, *pair) in enumerate(rows):
        y = number * row + row / 2 + 4
        out.append(_text(left - 12, y + 4, name, "end", "strong"))
        at = [left + (math.log10(value) - low) * scale for value in pair]
        out.append(f'<path class="line c5" d="M{at[0]:.1f} {y}H{at[1]:.1f}"/>')
        for x, value, what, colour in zip(at, pair, names, (1, 2), strict=True):
            words = escape(f"{name}, {what}: {form(value)}")
            out.append(
                f'<circle class="fill c{colour}" cx="{x:.1f}" cy="{y}" r="7">'
                f"<title>{words}</title></circle>"
            )
    words = "; ".join(
        f"{name}: {names[0]} {form(a)}, {names[1]} {form(b)}" for name, a, b in rows
    )
    return _svg(title, words, bottom + 24, out)


# Parts of charts ---------------------------------------------------------------------


def _plot(low: float, high: float, height: float, *, log: bool) -> _Plot:
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        last = max(last, first + 1)
        ticks = [10.0**n for n in range(first, last + 1)]
        return _Plot(ticks[0], ticks[-1], height, log=True, ticks=ticks)
    step = _step((high - low) or abs(high) or 1)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    ticks = [n * step for n in range(first, last + 1)]
    return _Plot(ticks[0], ticks[-1], height, log=False, ticks=ticks)


def _step(span: float) -> float:
    """Return a round number of which four to eight fit into ``span``."""
    power = 10.0 ** math.floor(math.log10(span / 4))
    return next(power * n for n in (1, 2, 5, 10) if span / (power * n) <= 6)


def _columns(values: Sequence[float]) -> dict[float, float]:
    width = (WIDTH - LEFT - RIGHT) / len(values)
    return {value: LEFT + (n + 0.5) * width for n, value in enumerate(values)}


def _round_labels(place: dict[float, float], height: float) -> Iterator[str]:
    every = math.ceil(len(place) / 20)
    for number, (value, x) in enumerate(place.items()):
        if number % every == 0:
            yield _text(x, height - BOTTOM + 18, f"{value:g}", "middle")


def _shortened(name: str, room: float) -> str:
    fits = int((room - 14) / 6.4)
    return name if len(name) <= fits else "…" + name[-(fits - 1) :]


def _text(x: float, y: float, words: str, anchor: str, style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return (
        f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{escape(words)}</text>"
    )


def _svg(title: str, description: str, height: float, parts: Sequence[str]) -> str:
    # Named by what is in it, so that the same report is the same bytes.
    number = f"{zlib.crc32(''.join((title, description, *parts)).encode()):08x}"
    return (
        f'<svg role="img" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'aria-labelledby="t{number} d{number}">'
        f'<title id="t{number}">{escape(title)}</title>'
        f'<desc id="d{number}">{escape(description)}</desc>'
        f"{''.join(parts)}</svg>"
    )
