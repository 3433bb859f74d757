# SPDX-License-Identifier: Apache-2.0
"""Text, Markdown and pages of documents; charts in them."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from packager.report.curves import Series, column_chart, line_chart
from packager.report.document import Document, Section, Table, to_markdown, to_text
from packager.report.html import to_html
from packager.report.svg import WIDTH, dumbbells, heat_level, heat_map, stacked_bars
from packager.report.words import short_bytes

EVIL = "<script>alert('x')</script> | & \"quoted\" `code` *"


@pytest.fixture
def document():
    """A document that has everything, with a name that tries to break out of it."""
    picture = stacked_bars("Parts", [("a", [(EVIL, 1, 10.0)])], short_bytes)
    return Document(
        "A report",
        figures=[("5.5 kB", "patch")],
        facts=[("model", "ab" * 32), ("evil", EVIL)],
        sections=[
            Section(
                "What changed",
                "Some words about it.",
                Table(["tensor", "<type", "changed"], [[EVIL, "F32", "1 234"]]),
                picture,
                "How to read it.",
                [(1, EVIL)],
            ),
            Section("Nothing", "", Table(["a", "b"], [])),
        ],
    )


def test_text_aligns_names_left_and_numbers_right(document):
    lines = to_text(document).splitlines()
    assert lines[0] == "A report"
    assert lines[1] == "  model  " + "ab" * 32
    head = next(line for line in lines if line.startswith("  tensor"))
    row = lines[lines.index(head) + 1]
    assert row.endswith("F32     1 234")
    assert len(head) == len(row)


def test_paragraphs_fit_a_terminal_of_80_columns():
    text = to_text(Document("A", sections=[Section("B", "some words " * 40)]))
    assert 75 < max(map(len, text.splitlines())) <= 80


def test_markdown_has_tables_that_no_name_breaks(document):
    lines = to_markdown(document).splitlines()
    assert lines[0] == "## A report"
    head = lines.index("| tensor | type | changed |")
    assert lines[head + 1] == "| :-- | :-- | --: |"
    row = lines[head + 2]
    assert row.replace("\\|", "").count("|") == 4
    assert "<script>" not in row


class _Checker(HTMLParser):
    VOID = frozenset({"meta", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_page_is_well_formed_and_needs_nothing_else(document):
    page = to_html(document)
    checker = _Checker()
    checker.feed(page)
    assert checker.open == []
    assert not {"script", "link", "img", "iframe", "object"} & set(checker.tags)
    assert not any(name in ("src", "href") for name, _ in checker.attributes)
    assert not any(name.startswith("on") for name, _ in checker.attributes)
    assert "url(" not in page
    assert "http:" not in page
    assert "https:" not in page


def test_a_page_has_titles_labels_and_a_table_beside_each_picture(document):
    page = to_html(document)
    assert "<title>A report</title>" in page
    assert '<html lang="en">' in page
    assert page.count('<svg role="img"') == 1
    assert '<table aria-label="What changed">' in page
    assert '<th scope="row">' in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_the_same_document_gives_the_same_page(document):
    assert to_html(document) == to_html(document)


CHARTS = {
    "line": lambda: line_chart(
        "Lines",
        [
            Series(
                "a", [(0, 1.0), (1, 2.0), (3, 2.5)], 1, marks=["ring", "diamond", ""]
            ),
            Series("b", [(1, 5.0)], 2, dashed=True),
        ],
        axes=("round", "y"),
        form=str,
    ),
    "constant": lambda: line_chart(
        "Constant", [Series("a", [(0, 96.0)], 1)], axes=("x", "y"), form=str
    ),
    "zero": lambda: line_chart(
        "Zero", [Series("a", [(0, 0.0), (1, 0.0)], 1)], axes=("x", "y"), form=str
    ),
    "log": lambda: line_chart(
        "Log",
        [Series("a", [(0, 10.0), (1, 1e6)], 1)],
        axes=("x", "y"),
        form=short_bytes,
        log=True,
    ),
    "power": lambda: line_chart(
        "A power of ten",
        [Series("a", [(0, 100.0)], 1)],
        axes=("x", "y"),
        form=str,
        log=True,
    ),
    "columns": lambda: column_chart(
        "Columns", [(0, 10.0), (1, 0.0)], axes=("round", "bytes"), form=short_bytes
    ),
    "empty columns": lambda: column_chart(
        "Nothing", [(0, 0.0)], axes=("round", "bytes"), form=short_bytes
    ),
    "many columns": lambda: column_chart(
        "Many", [(n, n + 1.0) for n in range(60)], axes=("x", "y"), form=str
    ),
    "stacked": lambda: stacked_bars("Stacked", [("a", [("x", 1, 0.0)])], short_bytes),
    "heat": lambda: heat_map(
        "Heat",
        [("a" * 90, [0.5, None]), ("b", [0.0, 1e-9])],
        columns=["0", "1"],
        form=str,
    ),
    "strips": lambda: heat_map("Strips", [("a", [0.0] * 48), ("b", [1.0])], form=str),
    "dumbbells": lambda: dumbbells(
        "Times", [("a", 0.5, 1e7)], names=("x", "y"), ticks=[(1, "1 s")], form=str
    ),
}


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_is_xml_inside_its_box_with_title_and_description(name):
    root = ElementTree.fromstring(CHARTS[name]())
    width, height = map(float, root.get("viewBox").split()[2:])
    title, description = root[0], root[1]
    assert (title.tag, description.tag) == ("title", "desc")
    assert root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
    assert title.text
    for mark in root.iter():
        x, y = float(mark.get("x", mark.get("cx", 0))), float(mark.get("y", 0))
        assert -0.1 <= x <= width + 0.1, ElementTree.tostring(mark)
        assert -0.1 <= y <= height + 0.1, ElementTree.tostring(mark)
        if mark.tag == "rect":
            right, bottom = x + float(mark.get("width")), y + float(mark.get("height"))
            assert x < right <= width + 0.1
            assert y < bottom <= height + 0.1


def test_marks_say_what_they_are():
    root = ElementTree.fromstring(CHARTS["columns"]())
    titles = [mark.text for mark in root.iter("title")]
    assert "round 0: 10 B" in titles


def test_colours_are_zero_for_nothing_and_full_for_the_largest():
    for log in (True, False):
        assert heat_level(0, log=log) == 0
        assert heat_level(1, log=log) == 8
        levels = [heat_level(10**-n, log=log) for n in range(12)]
        assert levels == sorted(levels, reverse=True)
        assert min(levels) == 1


def test_a_picture_is_as_narrow_as_the_screen_and_its_words_stay_large(document):
    page = to_html(document)
    assert "min-width: 480px" not in page  # the page scrolled sideways on a phone
    assert f'viewBox="0 0 {WIDTH} ' in page
    assert "width: 100%" in page
    # 390 points less the margins of page and card, for WIDTH units of 14 a letter.
    (size,) = re.findall(
        r"max-width: 640px\).*?svg text { font-size: (\d+)px", page, re.S
    )
    assert int(size) * (390 - 2 * 10 - 2 * 15) / WIDTH > 9


def test_tables_wait_behind_their_pictures_and_are_open_where_they_are_alone():
    table = Table(["name", "n"], [["a", "1"], ["b", "2"]])
    drawn = Section("Drawn", "", table, picture="<svg></svg>")
    page = to_html(Document("A", sections=[drawn, Section("Alone", "", table)]))
    first, second = page.split("<h2>")[1:]
    assert "<details><summary>Table, 2 rows</summary>" in first
    assert "<details open>" in second
    assert page.count("</details>") == 2
    assert "details::details-content { content-visibility: visible" in page  # printed
