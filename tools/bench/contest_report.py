# SPDX-License-Identifier: Apache-2.0
"""A contest for eyes: Markdown and SVG."""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from tools.bench.contest import BARS, Bar, Contest, Entry
from tools.bench.rivals import Kind

NOTES = """\
Every measurement is a process of its own; the tools take turns, each turn in another
order. Each applies twice in a row and the second time counts: what the tool before it
leaves of memory shows (writing the same 56 MB took the kernel of this virtual machine
13 to 240 ms, whoever asked). Medians are given, and of the time to apply also the
fastest, which the bars are about: what else a machine does only adds to it. Applying
does equal work in each: read base and patch, write the target, take its SHA-256, fsync
it; full weights need no base. Times are wall times of that work alone; *start-up* comes
on top: interpreter, imports and exit, or a program's idle run (which its CPU time
includes). Peak memory includes start-up; `<` marks a program that stays below the
process that starts it. Ours is proved while it is made (read back, applied, compared),
the others are not. What takes longer than 2 s to make is made once. Lower is better
everywhere.
"""
# Picture, in pixels.
_LABELS, _CELL, _BAR, _ROW, _TOP = 250, 128, 66, 20, 72
_COLOURS = {
    Kind.OURS: "#0a7d55",
    Kind.DELTA: "#6b7f99",
    Kind.NAIVE: "#98a6b8",
    Kind.FULL: "#c4ccd6",
}
_TIMES_CUT = 2.0  # of our size; longer bars are cut, their number stays


def markdown(
    contests: Sequence[Contest],
    bars: Sequence[Bar],
    machine: dict[str, Any],
    command: str,
) -> str:
    """Return the section "Patches" of the results."""
    lines = ["## Patches", "", "![Size and time to apply](results/patches.svg)", ""]
    lines += [NOTES, f"Command: `{command}`", ""]
    lines += ["Machine: " + ", ".join(f"{k} {v}" for k, v in machine.items()) + ".", ""]
    for contest in contests:
        lines += [*_table(contest), ""]
    lines += ["### Bars", "", "| bar | round | holds | |", "|---|---|---|---|"]
    for bar in bars:
        holds = "yes" if bar.holds else "**NO**"
        lines.append(f"| {bar.bar} | {bar.round} | {holds} | {bar.text} |")
    lines += ["", *(f"*{bar}*: ours is {meaning}.  " for bar, meaning in BARS.items())]
    return "\n".join(lines) + "\n"


def _table(contest: Contest) -> Iterator[str]:
    pair = contest.pair
    yield f"### {pair.name}"
    yield ""
    yield (
        f"{pair.file_size:,} bytes of weights, {pair.changed:,} elements changed"
        + (f"; {pair.note}." if pair.note else ".")
    )
    yield ""
    yield (
        "| | size B | times ours | make s | fastest apply ms | median | CPU ms "
        "| start-up ms | peak making MiB | peak applying MiB |"
    )
    yield "|---|" + "--:|" * 9
    for entry in contest.entries:
        name = f"**{entry.title}**" if entry.kind is Kind.OURS else entry.title
        cells = _cells(entry, contest.ours.size)
        yield f"| {name} | " + " | ".join(cells) + " |"


def _cells(entry: Entry, ours: int) -> list[str]:
    if not entry.make or not entry.apply:
        return [entry.problem, *[""] * 8]
    return [
        f"{entry.size:,}",
        f"{entry.size / ours:.3f}" if ours else "",
        f"{entry.make.work_s:.2f}",
        f"{entry.fastest_s * 1e3:.1f}",
        f"{entry.apply.work_s * 1e3:.1f}",
        f"{entry.apply.cpu_s * 1e3:.1f}",
        f"{entry.apply.startup_s * 1e3:.0f}",
        *(
            ("<" if s.peak_bytes <= s.startup_peak_bytes else "")
            + f"{s.peak_bytes / 2**20:.0f}"
            for s in (entry.make, entry.apply)
        ),
    ]


def replace_section(document: str, section: str) -> str:
    """Put a ``##`` section into a Markdown document, in place of the old one."""
    heading = section.partition("\n")[0] + "\n"
    before, found, after = document.partition(heading)
    if not found:
        return document.rstrip() + "\n\n" + section if document else section
    _, next_heading, rest = after.partition("\n## ")
    return before + section + (next_heading + rest if next_heading else "")


# The picture -------------------------------------------------------------------------


def svg(contests: Sequence[Contest]) -> str:
    """Draw sizes and times, a row for each tool, two columns for each round."""
    entries = contests[0].entries
    width = _LABELS + 2 * _CELL * len(contests) + 10
    height = _TOP + _ROW * len(entries) + 14
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="12" '
        'role="img">',
        "<title>Patch size beside ours, and time to apply: lower is better</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for row, entry in enumerate(entries):
        y = _TOP + _ROW * row + 14
        if row % 2 == 0:
            parts.append(
                f'<rect y="{y - 14}" width="{width}" height="{_ROW}" fill="#f4f6f8"/>'
            )
        weight = ' font-weight="bold"' if entry.kind is Kind.OURS else ""
        parts.append(_text(10, y, entry.title, weight))
    cut = f"size, times ours; bars end at {_TIMES_CUT:g}"
    blocks = ((cut, _size_bars), ("time to apply, ms", _time_bars))
    for block, (title, bars) in enumerate(blocks):
        left = _LABELS + block * _CELL * len(contests)
        parts.append(_text(left, 22, title, ' font-weight="bold"'))
        for column, contest in enumerate(contests):
            x = left + column * _CELL
            run, _, round_ = contest.pair.name.partition("/")
            parts += [_text(x, 44, run), _text(x, 60, round_, ' fill="#667"')]
            parts += bars(contest, x)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, attributes: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"{attributes}>{escape(text)}</text>'


def _size_bars(contest: Contest, x: int) -> Iterator[str]:
    ours = contest.ours.size
    for row, entry in enumerate(contest.entries):
        times = entry.size / ours if ours else 0.0
        share = min(times / _TIMES_CUT, 1.0)
        label = f"{times:.2f}" if times < 10 else f"{times:.0f}"
        yield from _bar(x, row, entry, share, label)


def _time_bars(contest: Contest, x: int) -> Iterator[str]:
    times = [entry.fastest_s for entry in contest.entries]
    longest = max(times) or 1.0
    for row, (entry, work_s) in enumerate(zip(contest.entries, times, strict=True)):
        label = f"{work_s * 1e3:.1f}" if work_s < 0.1 else f"{work_s * 1e3:.0f}"
        yield from _bar(x, row, entry, work_s / longest, label)


def _bar(x: int, row: int, entry: Entry, share: float, label: str) -> Iterator[str]:
    y = _TOP + _ROW * row
    if entry.problem:
        yield _text(x, y + 14, entry.problem.partition(":")[0], ' fill="#998"')
        return
    length = max(1.0, share * _BAR)
    yield (
        f'<rect x="{x}" y="{y + 4}" width="{length:.1f}" height="{_ROW - 8}" '
        f'fill="{_COLOURS[entry.kind]}"/>'
    )
    yield _text(x + round(length) + 4, y + 14, label)
