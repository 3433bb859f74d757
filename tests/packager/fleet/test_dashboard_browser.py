# SPDX-License-Identifier: Apache-2.0
"""The page of a fleet in a real browser, headless: nothing overflows, nothing runs."""

import json
import re
import shutil
import subprocess

import pytest

from packager.fleet.dashboard import dashboard
from packager.fleet.database import DAY_S, add_reports, open_database
from tools.fleet.made_up import NOW, add_release, fill, row

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chrome"))), None)
pytestmark = [
    pytest.mark.fleet,
    pytest.mark.skipif(BROWSER is None, reason="not run: no chromium here"),
]
HOSTILE = "<script>document.title='mine'</script><img src=x onerror=alert(1)>"
WIDTHS = (320, 390, 768, 1100)  # CSS pixels: phones, a tablet, a desk
# The pages run no script; what is around them measures them.
MEASURE = """
<meta charset="utf-8"><title>waiting</title><body><script>
const pages = PAGES, widths = WIDTHS, found = [];
let left = pages.length * widths.length;
for (const page of pages) for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:800px;border:0`;
  frame.onload = () => {
    const shown = frame.contentDocument, root = shown.documentElement;
    for (const open of [false, true]) {
      if (open) for (const d of shown.querySelectorAll("details")) d.open = true;
      if (root.scrollWidth > root.clientWidth)
        found.push([page, width, open, root.scrollWidth]);
    }
    if (shown.querySelector("script, img")) found.push([page, "markup"]);
    if (shown.title === "mine") found.push([page, "ran"]);
    // What scrolls within the page is reached by keyboard.
    for (const e of shown.querySelectorAll("*"))
      if (e.scrollWidth > e.clientWidth + 1 && e.tabIndex < 0 &&
          ["auto", "scroll"].includes(getComputedStyle(e).overflowX))
        found.push([page, width, e.tagName]);
    if (!--left) document.title = "done " + JSON.stringify(found);
  };
  frame.src = page;
  document.body.append(frame);
}
</script>
"""


def hostile(connection):
    """Names and words as long as may be, without a place to break them."""
    add_release(connection, 1, 1, NOW - DAY_S)
    words = {"reason": HOSTILE + "x" * 900, "group": "W" * 1000, "outcome": "refused"}
    rows = [row(f"{n:W>64}", 1, NOW, 1, proved=n < 6, **words) for n in range(12)]
    add_reports(connection, [*rows, row("w" * 64, 1, NOW, 1)], now=NOW)


FLEETS = {
    "empty": lambda connection: fill(connection, 0, rounds=0),
    "one": lambda connection: fill(connection, 1, rounds=1),
    "three": lambda connection: fill(connection, 3, groups=("",)),
    "mixed": lambda connection: fill(connection, 40, failing=0.3, silent=0.3),
    "failing": lambda connection: fill(connection, 30, failing=1),
    "large": lambda connection: fill(connection, 3000, failing=0.1, claimed=0.1),
    "hostile": hostile,
}


def test_no_page_is_wider_than_its_window(tmp_path):
    for name, make in FLEETS.items():
        with open_database(tmp_path / f"{name}.db") as connection:
            make(connection)
            page = dashboard(connection, now=NOW)
        (tmp_path / f"{name}.html").write_text(page)
    pages = json.dumps([f"{name}.html" for name in FLEETS])
    frame = MEASURE.replace("PAGES", pages).replace("WIDTHS", json.dumps(WIDTHS))
    (tmp_path / "frame.html").write_text(frame)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    flags += ["--allow-file-access-from-files", "--virtual-time-budget=60000"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [BROWSER, *flags, (tmp_path / "frame.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (title,) = re.findall("<title>(.*?)</title>", done.stdout)
    assert title == "done []"
