# SPDX-License-Identifier: Apache-2.0
"""A document as one HTML page that needs nothing else: no script, no font, no network.

It follows the reader's light or dark setting, prints in black on white, and says every
picture's numbers again in a table.
"""

import re
from collections.abc import Iterator

from packager.report.document import Document, Section, Table
from packager.report.svg import escape

LONG = 40  # characters; a longer cell may break into lines
MARKS = {"well": "\u2713", "look": "!", "act": "\u2715"}
# Series colours are by Okabe and Ito, told apart by colour-blind readers too; c2 and
# c4 are darker on a light ground, where the originals are too pale for thin lines.
COLOURS = """
:root { color-scheme: light dark;
  --ground: #fbfaf8; --card: #ffffff; --ink: #1d2329; --soft: #5d6874;
  --rule: #dfe3e8; --grid: #e9ecef; --on: #ffffff;
  --c1: #0072b2; --c2: #c25700; --c3: #00805f; --c4: #a34d7f; --c5: #6b7580;
  --bad: #b3261e;
  --h0: #f1f3f5; --h1: #deeaf5; --h2: #c5dcef; --h3: #a2c9e6; --h4: #78b0d9;
  --h5: #4f94c8; --h6: #2d78b3; --h7: #145c97; --h8: #063f73;
  --pale: #1d2329; --deep: #ffffff; }
@media (prefers-color-scheme: dark) { :root {
  --ground: #14181d; --card: #1b2127; --ink: #e7ebef; --soft: #98a3af;
  --rule: #303841; --grid: #2a3138; --on: #0d1116;
  --c1: #58b2e8; --c2: #f0a04b; --c3: #35c49b; --c4: #dd93bd; --c5: #78838e;
  --bad: #ff8f85;
  --h0: #20262d; --h1: #18344a; --h2: #1a4360; --h3: #1e567b; --h4: #266c99;
  --h5: #3785b6; --h6: #579fcc; --h7: #83bce0; --h8: #b9dcf3;
  --pale: #e7ebef; --deep: #0d1116; } }
@media print { :root { color-scheme: light;
  --ground: #ffffff; --card: #ffffff; --ink: #000000; --soft: #444444;
  --rule: #bbbbbb; --grid: #dddddd; --on: #ffffff;
  --c1: #0072b2; --c2: #c25700; --c3: #00805f; --c4: #a34d7f; --c5: #6b7580;
  --bad: #b3261e;
  --h0: #f1f3f5; --h1: #deeaf5; --h2: #c5dcef; --h3: #a2c9e6; --h4: #78b0d9;
  --h5: #4f94c8; --h6: #2d78b3; --h7: #145c97; --h8: #063f73;
  --pale: #000000; --deep: #ffffff; }
  * { print-color-adjust: exact; } }
"""
PICTURES = """
svg text { font: 12px system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .axis { fill: var(--soft); font-style: italic; }
svg .strong { fill: var(--ink); font-weight: 600; font-size: 13px; }
svg .on { fill: var(--on); font-weight: 600; }
svg .pale { fill: var(--pale); } svg .deep { fill: var(--deep); }
.grid { stroke: var(--grid); fill: none; }
.line { fill: none; stroke: currentColor; stroke-width: 2.25; stroke-linejoin: round; }
.fill { fill: currentColor; stroke: var(--card); stroke-width: 1; }
.area { fill: currentColor; }
.ring { fill: var(--card); stroke: currentColor; stroke-width: 2; }
.c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); }
.h0 { fill: var(--h0); color: var(--h0); }
.h1 { fill: var(--h1); color: var(--h1); }
.h2 { fill: var(--h2); color: var(--h2); }
.h3 { fill: var(--h3); color: var(--h3); }
.h4 { fill: var(--h4); color: var(--h4); }
.h5 { fill: var(--h5); color: var(--h5); }
.h6 { fill: var(--h6); color: var(--h6); }
.h7 { fill: var(--h7); color: var(--h7); }
.h8 { fill: var(--h8); color: var(--h8); }
"""
STYLE = (
    COLOURS
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 20px; letter-spacing: -.01em;
  overflow-wrap: anywhere; }
h1 i { display: inline-block; width: 1.3em; height: 1.3em; border-radius: 50%;
  margin-right: .4em; text-align: center; font-style: normal; line-height: 1.3em;
  color: var(--on); background: var(--mark); }
.well { --mark: var(--c3); } .look { --mark: var(--c2); } .act { --mark: var(--bad); }
.lead { margin: 0 0 24px; padding: 4px 0 4px 34px; max-width: 76ch;
  border-left: 3px solid var(--mark); }
.lead li { margin: 4px 0; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 0 0 4px; }
p { margin: 0 0 16px; color: var(--soft); max-width: 72ch; }
.figures { display: grid; gap: 12px; margin: 0 0 20px;
  grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.figures div { background: var(--card); border: 1px solid var(--rule);
  border-radius: 10px; padding: 14px 16px; }
.figures dt { color: var(--soft); font-size: 13px; }
.figures dd { margin: 0; font-size: 25px; font-weight: 650; letter-spacing: -.01em;
  font-variant-numeric: tabular-nums; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px;
  margin: 0 0 28px; font-size: 14px; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 22px 24px; margin: 0 0 20px; }
figure { margin: 0 0 14px; }
figcaption { color: var(--soft); font-size: 14px; max-width: 640px;
  margin: 6px auto 0; }
svg { display: block; width: 100%; height: auto; max-width: 640px;
  margin: 0 auto; overflow: visible; }
"""
    + PICTURES
    + """
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; list-style: none;
  margin: 0 0 10px; padding: 0; font-size: 14px; justify-content: center; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px;
  background: currentColor; margin-right: 7px; vertical-align: -1px; }
.legend span { color: var(--ink); }
summary { color: var(--soft); font-size: 14px; cursor: pointer; padding: 6px 0;
  overflow-wrap: anywhere; }
summary:hover { color: var(--ink); }
.scroll { overflow: auto; max-height: 430px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; color: var(--soft); font-weight: 500; background: var(--card); }
thead th { position: sticky; top: 0; z-index: 1;
  box-shadow: inset 0 -1px var(--rule); }
th, td { padding: 5px 14px 5px 0; white-space: nowrap; vertical-align: baseline; }
td.long { white-space: normal; min-width: 30ch; overflow-wrap: anywhere; }
tbody th { color: var(--ink); font-weight: 400; position: sticky; left: 0; }
tbody tr + tr > * { border-top: 1px solid var(--grid); }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td:not(.number) { color: var(--soft); padding-left: 14px; }
th:not(:first-child):not(.number) { padding-left: 14px; }
footer { color: var(--soft); font-size: 13px; }
@media (max-width: 640px) { main { padding: 20px 10px; }
  section { padding: 16px 14px; }
  th.long { min-width: 36vw; max-width: 36vw; white-space: normal;
    overflow-wrap: anywhere; }
  svg text { font-size: 14px; } svg .strong { font-size: 15px; } }
@media print { body { font-size: 11px; } main { max-width: none; padding: 0; }
  h1 { font-size: 22px; } h2 { font-size: 15px; }
  h2, section > p { break-after: avoid; }
  section { padding: 10px 14px; } figure, tr, .figures { break-inside: avoid; }
  .facts, figcaption, .legend, table { font-size: 10px; }
  details::details-content { content-visibility: visible; block-size: auto; }
  summary { display: none; }
  .scroll { overflow: visible; max-height: none; } svg { max-width: 480px; } }
"""
)


def to_svg(picture: str) -> str:
    """Return a picture as a file of its own, in the reader's light or dark colours."""
    head, _, rest = picture.partition(">")
    ground = '<rect width="100%" height="100%" fill="var(--card)"/>'
    # Where it is an image, the page's style does not reach it.
    return (
        f'{head} xmlns="http://www.w3.org/2000/svg"><style>{COLOURS}{PICTURES}</style>'
        f"{ground}{rest}\n"
    )


def to_html(document: Document) -> str:
    """Return a document as a self-contained HTML page."""
    title = escape(document.title)
    return "".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            # Nothing may be fetched and nothing may run, whatever a tensor is called.
            '<meta http-equiv="Content-Security-Policy" content="default-src '
            "'none'; style-src 'unsafe-inline'\">\n",
            f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n",
            *_heading(document),
            *_figures(document),
            *_facts(document),
            *(part for section in document.sections for part in _section(section)),
            f"<footer>Made by {escape(document.made_by)}.</footer>\n",
            "</main>\n</body>\n</html>\n",
        ]
    )


def _prose(text: str) -> str:
    """Return text that breaks into lines, but within no number such as ``90 376``."""
    return re.sub(r"(?<=\d) (?=\d{3}(?!\d))", "\u00a0", escape(text))


def _heading(document: Document) -> Iterator[str]:
    title = _prose(document.title)
    if document.state:
        mark = MARKS[document.state]
        yield f'<h1 class="{document.state}"><i aria-hidden="true">{mark}</i>'
        yield f"{title}</h1>\n"
    else:
        yield f"<h1>{title}</h1>\n"
    if document.lead:
        yield f'<ul class="lead {document.state}">\n'
        yield from (f"<li>{_prose(words)}</li>\n" for words in document.lead)
        yield "</ul>\n"


def _figures(document: Document) -> Iterator[str]:
    if document.figures:
        yield '<dl class="figures">\n'
        for value, label in document.figures:
            yield f"<div><dt>{escape(label)}</dt><dd>{_prose(value)}</dd></div>\n"
        yield "</dl>\n"


def _facts(document: Document) -> Iterator[str]:
    if document.facts:
        yield '<dl class="facts">\n'
        for name, value in document.facts:
            yield f"<dt>{escape(name)}</dt><dd>{_prose(value)}</dd>\n"
        yield "</dl>\n"


def _section(section: Section) -> Iterator[str]:
    yield f"<section>\n<h2>{escape(section.title)}</h2>\n"
    if section.text:
        yield f"<p>{_prose(section.text)}</p>\n"
    if section.picture:
        yield "<figure>\n"
        yield from _legend(section)
        yield f"{section.picture}\n"
        if section.caption:
            yield f"<figcaption>{_prose(section.caption)}</figcaption>\n"
        yield "</figure>\n"
    if section.table and section.table.rows:
        # Where there is no picture, the table is what the section says.
        yield "<details>" if section.picture else "<details open>"
        yield f"<summary>Table, {_rows(section.table)}</summary>\n"
        yield from _table(section.table, section.title)
        yield "</details>\n"
    for name, table in section.folded:
        yield f"<details><summary>{escape(name)}</summary>\n"
        yield from _table(table, name)
        yield "</details>\n"
    yield "</section>\n"


def _rows(table: Table) -> str:
    count = len(table.rows)
    return f"{count} row{'s' * (count != 1)}"


def _legend(section: Section) -> Iterator[str]:
    if section.legend:
        yield '<ul class="legend">'
        for colour, name in section.legend:
            kind = colour if isinstance(colour, str) else f"c{colour}"
            yield f'<li class="{kind}"><i></i><span>{_prose(name)}</span></li>'
        yield "</ul>\n"


def _table(table: Table, title: str) -> Iterator[str]:
    kinds = [
        "" if table.is_text(n) else ' class="number"' for n in range(len(table.columns))
    ]
    # What scrolls must be reachable without a mouse.
    yield '<div class="scroll" role="region" tabindex="0" '
    yield f'aria-label="{escape(title)}: table"><table aria-label="{escape(title)}">\n'
    yield "<thead><tr>"
    for heading, kind in zip(table.headings, kinds, strict=True):
        yield f'<th scope="col"{kind}>{escape(heading)}</th>'
    yield "</tr></thead>\n<tbody>\n"
    for name, *cells in table.rows:
        long = ' class="long"' if len(name) > LONG // 2 else ""
        yield f'<tr><th scope="row"{long}>{escape(name)}</th>'
        for cell, kind in zip(cells, kinds[1:], strict=True):
            kind = kind or (' class="long"' if len(cell) > LONG else "")
            yield f"<td{kind}>{escape(cell)}</td>"
        yield "</tr>\n"
    yield "</tbody></table></div>\n"
