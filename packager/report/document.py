# SPDX-License-Identifier: Apache-2.0
"""A report before it is text, Markdown or a page: figures, facts, tables, pictures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from edge_runtime.text import printable

Rows = Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Table:
    """Columns with headings.

    Attributes:
        columns: The headings. The first column is text and names its row; a heading
            that begins with ``<`` (left out) is text too, all others are numbers.
        rows: The cells.
    """

    columns: Sequence[str]
    rows: Rows

    @property
    def headings(self) -> list[str]:
        """The headings as they are shown."""
        return [column.removeprefix("<") for column in self.columns]

    def is_text(self, number: int) -> bool:
        """Say whether a column is text."""
        return number == 0 or self.columns[number].startswith("<")


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a document with a heading.

    Attributes:
        title: The heading.
        text: What to know, in a sentence or two.
        table: The numbers; every picture has one beside it.
        picture: SVG.
        caption: How to read the picture; only shown with it.
        legend: Colours in the picture with their names: 1 to 5, or a step of the heat
            map such as ``"h3"``.
        folded: More tables, each with its name; pages show them when asked.
    """

    title: str
    text: str = ""
    table: Table | None = None
    picture: str = ""
    caption: str = ""
    legend: Sequence[tuple[int | str, str]] = ()
    folded: Sequence[tuple[str, Table]] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """A whole report.

    Attributes:
        title: What it is about, in one line.
        figures: A few numbers that matter most, with what they are.
        facts: Names and values.
        sections: The parts.
        state: Whether all is well: ``"well"``, ``"look"`` or ``"act"``; empty where
            that is not the question.
        lead: What to know or to do first, a sentence or two each.
        made_by: The command that makes it.
    """

    title: str
    figures: Sequence[tuple[str, str]] = ()
    facts: Sequence[tuple[str, str]] = ()
    sections: Sequence[Section] = field(default_factory=list)
    state: str = ""
    lead: Sequence[str] = ()
    made_by: str = "dpu-patch"


def to_text(document: Document) -> str:
    """Return a document as aligned text for a terminal."""
    lines = [printable(document.title)]
    for words in document.lead:
        lines += _wrapped(f"- {printable(words)}", 80, "  ")
    facts = [(printable(name), printable(value)) for name, value in document.facts]
    width = max((len(name) for name, _ in facts), default=0) + 2
    lines += [f"  {name:<{width}}{value}" for name, value in facts]
    for section in document.sections:
        lines += ["", printable(section.title)]
        lines += [f"  {line}" for line in _wrapped(section.text, 78)]
        if section.table:
            lines += [f"  {line}" for line in _aligned(section.table)]
        for name, table in section.folded:
            lines += [f"  {printable(name)}"]
            lines += [f"    {line}" for line in _aligned(table)]
    return "\n".join(lines)


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    from textwrap import wrap

    # Not within the name of a command.
    return wrap(text, width, subsequent_indent=indent, break_on_hyphens=False)


def _aligned(table: Table) -> Iterator[str]:
    rows = [[printable(cell) for cell in row] for row in (table.headings, *table.rows)]
    widths = [max(len(row[number]) for row in rows) for number in range(len(rows[0]))]
    for row in rows:
        cells = [
            f"{cell:<{width}}" if table.is_text(number) else f"{cell:>{width}}"
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def to_markdown(document: Document) -> str:
    """Return a document as Markdown, to paste into a pull request."""
    lines = [f"## {_escape(document.title)}", ""]
    if document.lead:
        lines += [*(f"- {_escape(words)}" for words in document.lead), ""]
    if document.facts:
        lines += pipes(Table(["", "<"], document.facts))
    for section in document.sections:
        lines += ["", f"### {_escape(section.title)}", ""]
        if section.text:
            lines += [_escape(section.text), ""]
        if section.table:
            lines += pipes(section.table)
        for name, table in section.folded:
            lines += ["", f"#### {_escape(name)}", "", *pipes(table)]
    return "\n".join(lines)


def pipes(table: Table) -> Iterator[str]:
    """Yield the lines of a table in Markdown."""
    yield _row(table.headings)
    columns = range(len(table.columns))
    yield _row([":--" if table.is_text(number) else "--:" for number in columns])
    for row in table.rows:
        yield _row([_escape(cell) for cell in row])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    text = printable(text)
    for character in "\\|`*_<>":
        text = text.replace(character, "\\" + character)
    return text
