# SPDX-License-Identifier: Apache-2.0
"""Text, Markdown and pages of documents; charts in them."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from packager.report.curves import Series, column_chart, line_chart, stacked_areas
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
    assert '<th scope="row"' in page
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


# Pages that answer whether all is well ------------------------------------------------


@pytest.fixture
def verdict():
    return Document(
        "Act now: 1 of 3",
        sections=[
            Section(
                "Devices",
                table=Table(["device", "<reason"], [["a", "x" * 60]]),
                folded=[("history of a", Table(["when", "<what"], [["now", EVIL]]))],
            )
        ],
        state="act",
        lead=[f"halt it {EVIL}", "then read"],
        made_by="dpu-fleet",
    )


def test_the_answer_and_what_to_do_stand_first(verdict):
    page = to_html(verdict)
    checker = _Checker()
    checker.feed(page)
    assert checker.open == []
    assert "script" not in checker.tags
    first = page.index('<h1 class="act">')
    assert first < page.index("halt it") < page.index("then read") < page.index("<h2>")
    assert "Made by dpu-fleet." in page
    assert to_text(verdict).splitlines()[1].startswith("- halt it <script>")
    assert "- then read" in to_markdown(verdict)


def test_tables_that_are_folded_away_are_in_every_form(verdict):
    for text in (to_html(verdict), to_text(verdict), to_markdown(verdict)):
        assert "history of a" in text
        assert "alert('x')" in text.replace("&#x27;", "'")


def test_long_cells_may_break_and_short_ones_do_not(verdict):
    page = to_html(verdict)
    assert f'<td class="long">{"x" * 60}' in page
    assert '<th scope="row">a<' in page


@pytest.mark.parametrize("evil", ["\u202e", "\u2066", "\x1b[2J", "\x00", "\ud800"])
def test_no_text_turns_a_page_around_or_is_no_text(evil):
    picture = stacked_bars(evil, [(evil, [(evil, 1, 1.0)])], short_bytes)
    table = Table([evil, "<b"], [[evil, evil]])
    section = Section(evil, evil, table, picture, evil, [(1, evil)], [(evil, table)])
    page = to_html(Document(evil, [(evil, evil)], [(evil, evil)], [section]))
    page.encode()
    assert evil not in page
    ElementTree.fromstring(picture)


def test_no_line_of_prose_ends_within_a_number():
    words = "90 376 of 1 234 567, round 5 of 12"
    kept = "90\u00a0376 of 1\u00a0234\u00a0567, round 5 of 12"
    section = Section(words, words, None, "<svg/>", words, [(1, words)])
    page = to_html(
        Document(words, [(words, "n")], [("n", words)], [section], lead=[words])
    )
    assert page.count(kept) == 7
    assert f"<title>{words}</title>" in page


def test_areas_leave_out_what_nobody_knows_and_count_in_whole_numbers():
    series = [("a", "c5", [1, None, 1]), ("b", "h8", [0, None, 2])]
    picture = stacked_areas(
        "t", series, [(0, "mon")], axes=("day", "n"), form=lambda n: f"{n:g}"
    )
    root = ElementTree.fromstring(picture)
    areas = [e for e in root.iter() if "area" in e.get("class", "")]
    assert [e.get("d").count("M") for e in areas] == [2, 1]
    labels = [e.text for e in root.iter() if e.tag == "text"]
    assert labels[:4] == ["0", "1", "2", "3"]
    assert root[1].text == "a: from 1 to 1; b: from 0 to 2"
    nothing = [("a", "c1", [None])]
    picture = stacked_areas("t", nothing, [], axes=("x", "y"), form=str)
    assert ElementTree.fromstring(picture) is not None


def test_a_bar_that_is_too_small_has_its_number_beside_it():
    rows = [("all", [("n", 1, 90_000.0)]), ("few", [("n", 1, 3.0)])]
    picture = stacked_bars("t", rows, lambda n: f"{n:g}")
    words = [e for e in ElementTree.fromstring(picture).iter() if e.tag == "text"]
    beside = next(e for e in words if e.text == "3")
    assert beside.get("text-anchor") == "start"
    assert float(beside.get("x")) < WIDTH
