# SPDX-License-Identifier: Apache-2.0
"""Charts as inline SVG: no script, no library, colours from the page's style sheet.

Each chart has a title and a description for those who do not see it, and each mark has
a title that browsers show under the pointer. Sizes are in the units of the view box;
the page scales them. Charts with axes are in :mod:`packager.report.curves`.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from html import escape as escape_html

from edge_runtime.text import printable

# Narrow, so that words are legible where a phone shows the whole picture.
WIDTH, RIGHT = 480, 16
LEVELS = 8  # steps of the heat map's colour
Format = Callable[[float], str]


def escape(text: str) -> str:
    """Return text of anybody as a page shows it: no markup, and no direction marks."""
    return escape_html(printable(text))


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
        short = _shortened(name, left)
        out.append(write(left - 10, y + bar / 2 + 4, short, "end", "strong"))
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
                out.append(write(x + width / 2, y + 22, form(size), "middle", "on"))
            elif len(parts) == 1:
                out.append(write(x + width + 6, y + 22, form(size), "start"))
            x += width
        y += bar + 12
    words = "; ".join(
        f"{name}: " + ", ".join(f"{part} {form(size)}" for part, _, size in parts)
        for name, parts in rows
    )
    return draw(title, words, y, out)


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
    left = min(190, 16 + 6.6 * longest)
    count = max(len(values) for _, values in rows)
    width = (WIDTH - left - 4) / count
    width = min(width, 64) if columns else width
    top, cell = (26 if columns else 2), 22
    out = list(_column_names(columns, corner, left, width)) if columns else []
    shares = [v for _, values in rows for v in values if v is not None]
    largest = max(shares) or 1.0
    # Words in all cells or in none.
    wordy = columns and width > 6.6 * max(len(form(share)) for share in shares)
    for line, (name, values) in enumerate(rows):
        y = top + line * (cell + 2)
        out.append(write(left - 10, y + 15, _shortened(name, left), "end"))
        if not columns:
            width = (WIDTH - left - 4) / len(values)
        for number, value in enumerate(values):
            if value is not None:
                level = heat_level(value / largest, log=log)
                place = left + number * width, y, width, cell
                label = f"{name}, {corner} {columns[number]}" if columns else name
                out += _cell(place, level, form(value), label, wordy=bool(wordy))
    words = f"{len(rows)} rows; the largest share is {form(largest)}"
    return draw(title, words, top + len(rows) * (cell + 2), out)


def _column_names(
    names: Sequence[str], corner: str, left: float, width: float
) -> Iterator[str]:
    yield write(left - 10, 16, corner, "end", "axis")
    every = math.ceil(7 * max(map(len, names)) / width)
    for number, name in enumerate(names):
        if number % every == 0:
            yield write(left + (number + 0.5) * width, 16, name, "middle")


def _cell(
    place: tuple[float, float, float, float],
    level: int,
    words: str,
    label: str,
    *,
    wordy: bool,
) -> Iterator[str]:
    x, y, width, height = place
    gap = min(2, width / 30)
    yield (
        f'<rect class="h{level}" x="{x:.1f}" y="{y:.1f}" width="{width - gap:.1f}" '
        f'height="{height}"><title>{escape(f"{label}: {words}")}</title></rect>'
    )
    if wordy:
        style = "deep" if level > LEVELS // 2 else "pale"
        yield write(x + (width - gap) / 2, y + 15, words, "middle", style)


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
            out.append(write(x, bottom + 16, label, "middle"))
    for number, (name, *pair) in enumerate(rows):
        y = number * row + row / 2 + 4
        out.append(write(left - 12, y + 4, name, "end", "strong"))
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
    return draw(title, words, bottom + 24, out)


def _shortened(name: str, room: float) -> str:
    fits = int((room - 14) / 6.4)
    return name if len(name) <= fits else "…" + name[-(fits - 1) :]


def write(x: float, y: float, words: str, anchor: str, style: str = "") -> str:
    """Return words at a place; anchor is start, middle or end."""
    kind = f' class="{style}"' if style else ""
    return (
        f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{escape(words)}</text>"
    )


def draw(title: str, description: str, height: float, parts: Sequence[str]) -> str:
    """Return a finished picture of these parts."""
    # Named by what is in it, so that the same report is the same bytes.
    words = "".join((escape(title), escape(description), *parts))
    number = f"{zlib.crc32(words.encode()):08x}"
    return (
        f'<svg role="img" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'aria-labelledby="t{number} d{number}">'
        f'<title id="t{number}">{escape(title)}</title>'
        f'<desc id="d{number}">{escape(description)}</desc>'
        f"{''.join(parts)}</svg>"
    )
