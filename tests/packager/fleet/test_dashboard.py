# SPDX-License-Identifier: Apache-2.0
"""The page of a fleet: is everything well, and if not, what is to be done?"""

import json
import re
import sqlite3
from contextlib import suppress
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from edge_runtime.errors import StoreError
from packager.cli.fleet import fleet
from packager.fleet.dashboard import _moment, dashboard, fleet_document
from packager.fleet.database import DAY_S, add_reports, open_database
from packager.fleet.device_page import device_document
from packager.fleet.devices import SHOWN
from packager.fleet.picture import in_general, take_picture
from tools.fleet.made_up import NOW, WEEK, add_release, fill, row, target

HEAD = (
    "INSERT INTO head(channel, sha256, version, counter, at, paused) "
    "VALUES ('stable', ?, ?, ?, ?, ?)"
)
HOSTILE = "<script>alert(1)</script>\x1b[2J\u202e' \" & |"


@pytest.fixture
def database(tmp_path):
    with open_database(tmp_path / "fleet.db") as connection:
        yield connection


class Page(HTMLParser):
    """What a browser would make of a page, and what it would have to fetch."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.fetched, self.words = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [v for name, v in attrs if name in ("src", "href", "srcset")]
        self.fetched += [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and "style" not in self.open:
            self.words.append(" ".join(data.split()))


def first_line(database, now=NOW):
    document = fleet_document(database, now=now)
    return document.state, document.title


def told(database, now=NOW):
    return "\n".join(fleet_document(database, now=now).lead)


# The first line -----------------------------------------------------------------------


def test_an_empty_fleet_says_what_to_do(database):
    assert first_line(database) == (
        "look",
        "Worth a look: no device has reported yet",
    )
    assert "dpu-fleet watch" in told(database)


def test_a_fleet_that_proves_the_newest_release_is_well(database):
    fill(database, 3, failing=0, silent=0, claimed=0)
    assert first_line(database) == (
        "well",
        "All is well: 3 of 3 devices prove round 5",
    )
    assert told(database) == ""


def test_what_is_only_claimed_is_worth_a_look_and_counts_nowhere(database):
    add_release(database, 1, 1, NOW - DAY_S)
    add_reports(
        database,
        [row("a", 1, NOW, 1), row("b", 1, NOW, 1, proved=False)],
        now=NOW,
    )
    assert first_line(database)[1] == "Worth a look: 1 of 1 device proves round 1"
    assert "1 device are signed by no key" in told(database)
    assert take_picture(database, NOW).running == [(target(1), 1, 1.0, 1.0)]


@pytest.mark.parametrize(
    ("failing", "of", "state"),
    [
        *((0, 100, "well"), (1, 100, "look"), (3, 100, "act"), (100, 100, "act")),
        *((1, 3, "look"), (3, 300, "look"), (1, 1, "act"), (2, 2, "act")),
    ],
)
def test_more_failures_than_two_percent_ask_for_a_halt(database, failing, of, state):
    """Of a few devices, one that fails is no reason yet; all of them are."""
    add_release(database, 1, 1, NOW - DAY_S)
    rows = [row(f"b{n}", 1, NOW - 60, 1) for n in range(of)]
    for n in range(failing):
        rows[n] = row(f"b{n}", 1, NOW - 60, 1, outcome="refused", running=target(0))
    add_reports(database, rows, now=NOW)
    assert first_line(database)[0] == state
    assert ("dpu-fleet pause" in told(database)) == (state == "act")


def test_failures_that_only_somebody_claims_never_ask_for_a_halt(database):
    add_release(database, 1, 1, NOW - DAY_S)
    rows = [row(f"b{n}", 1, NOW, 1) for n in range(10)]
    rows += [
        row(f"c{n}", 1, NOW, 1, outcome="refused", running="", proved=False)
        for n in range(90)
    ]
    add_reports(database, rows, now=NOW)
    assert first_line(database)[0] == "look"
    assert "dpu-fleet pause" not in told(database)


def test_a_failure_that_was_mended_is_none(database):
    add_release(database, 1, 1, NOW - DAY_S)
    failed = row("a", 1, NOW - 60, 1, outcome="refused", running=target(0))
    add_reports(database, [failed], now=NOW)
    assert first_line(database)[0] == "act"
    add_reports(database, [row("a", 2, NOW, 1)], now=NOW)
    assert first_line(database) == ("well", "All is well: 1 of 1 device proves round 1")


def test_a_fleet_that_nobody_heard_of_for_days_is_no_healthy_one(database):
    fill(database, 5, failing=0, silent=0, claimed=0)
    state, _ = first_line(database, now=NOW + 3 * DAY_S)
    assert state == "act"
    assert "No device has been heard of for" in told(database, now=NOW + 3 * DAY_S)


def test_silent_devices_are_counted_and_the_longest_silence_comes_first(database):
    add_release(database, 1, 1, NOW - 50 * DAY_S)
    rows = [row(f"b{n}", 1, NOW - n * DAY_S, 1) for n in range(40)]
    add_reports(database, rows, now=NOW)
    picture = take_picture(database, NOW)
    assert picture.stale == 36
    assert picture.silent[0].id == "b39"
    assert [count for _, count in picture.silence] == [2, 2, 4, 23, 9]
    assert "36 devices (90.0 %) silent" in told(database)


def test_a_release_that_was_taken_back_and_still_runs_is_told(database):
    fill(database, 4, failing=0, silent=0, claimed=0)
    add_release(database, 6, 4, NOW - 60)
    with database:
        database.execute("UPDATE release SET withdrawn = 1 WHERE counter = 5")
    assert "A release that was taken back still runs on 4 devices." in told(database)
    assert first_line(database)[1].endswith("0 of 4 devices prove round 4")


def test_a_rollout_under_way_is_no_fault_until_it_is_overdue(database):
    add_release(database, 1, 1, NOW - 20 * DAY_S)
    add_release(database, 2, 2, NOW - DAY_S)
    rows = [row(f"b{n}", 1, NOW, 1 + n % 2) for n in range(10)]
    add_reports(database, rows, now=NOW)
    assert first_line(database) == (
        "well",
        "All is well: 5 of 10 devices prove round 2",
    )
    assert "5 devices heard of since round 2 came out" in told(database)
    later = NOW + WEEK
    rows = [row(f"b{n}", 2, later, 1 + n % 2) for n in range(10)]
    add_reports(database, rows, now=later)
    assert first_line(database, now=later)[0] == "look"


def test_a_pause_is_told_with_what_goes_on(database):
    add_release(database, 1, 1, NOW - 20 * DAY_S)
    add_release(database, 2, 2, NOW - 10 * DAY_S)
    rows = [row(f"b{n}", 1, NOW, 1 + n % 2) for n in range(10)]
    add_reports(database, rows, now=NOW)
    with database:
        values = [("a" * 64, 1, 1, 0, 1), ("b" * 64, 2, 2, 0, 0)]
        database.executemany(HEAD, values)
    assert "paused" not in told(database)  # an older head was
    with database:
        database.execute("UPDATE head SET paused = 1 WHERE version = 2")
    assert first_line(database)[0] == "look"
    assert "rollout of round 2 is paused; 5 devices not there yet wait" in (
        told(database)
    )
    assert "byte budget" not in told(database)


def test_what_only_a_ledger_knows_is_not_what_devices_should_run(database):
    fill(database, 3, failing=0, silent=0, claimed=0)
    with database:
        values = ("a" * 64, 5, 5, 0, 0)
        database.execute(HEAD, values)
    add_release(database, 6, 6, NOW - 60)
    assert first_line(database)[1] == "All is well: 3 of 3 devices prove round 5"


def test_two_channels_in_one_database_are_told_and_not_mixed_up(database):
    fill(database, 3, failing=0, silent=0, claimed=0)
    add_release(database, 6, 6, NOW - 60)
    with database:
        database.execute(HEAD, ("a" * 64, 5, 5, NOW - 60, 0))
        database.execute(HEAD.replace("stable", "beta"), ("b" * 64, 9, 6, NOW, 0))
    assert first_line(database)[0] == "look"
    assert "channels beta, stable" in told(database)
    assert take_picture(database, NOW).current.round == 6


def test_a_page_shows_one_moment_while_reports_come_in(database, tmp_path):
    fill(database, 3, failing=0, silent=0, claimed=0)
    with _moment(database), open_database(tmp_path / "fleet.db") as other:
        before = take_picture(database, NOW)
        other.execute("PRAGMA busy_timeout = 100")
        with suppress(StoreError, sqlite3.OperationalError):
            add_reports(other, [row("late", 1, NOW, 5)], now=NOW)
        assert take_picture(database, NOW) == before


# The page -----------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [0, 1, 40, 500])
def test_a_page_needs_nothing_else_and_runs_nothing(database, devices):
    fill(database, devices, failing=0.2, silent=0.1, claimed=0.1)
    page = Page(dashboard(database, now=NOW))
    assert page.fetched == []
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert page.tags.count("h1") == 1


def test_nothing_that_a_device_says_becomes_markup_or_moves_a_cursor(database):
    add_release(database, 1, 1, NOW - DAY_S)
    words = {"reason": HOSTILE, "group": HOSTILE, "runtime": HOSTILE, "name": HOSTILE}
    rows = [
        row(HOSTILE + str(n), 1, NOW, 1, outcome="refused", proved=n < 2, **words)
        for n in range(4)
    ]
    add_reports(database, [*rows, row("well", 1, NOW, 1)], now=NOW)
    text = dashboard(database, now=NOW)
    one = device_document(database, HOSTILE + "0", now=NOW)
    assert not re.search(
        "[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text
    )
    assert "script" not in Page(text).tags
    assert any(
        "<script>alert(1)</script>\\x1b[2J\\u202e" in w for w in Page(text).words
    )
    assert one.title.startswith(HOSTILE)


def test_numbers_that_overflow_a_sum_do_not(database):
    add_release(database, 1, 1, NOW - DAY_S)
    most = (1 << 63) - 1
    rows = [row(f"b{n}", 1, NOW, 1, month_bytes=most) for n in range(5)]
    add_reports(database, rows, now=NOW)
    assert take_picture(database, NOW).month_bytes == 5 * 10**15


def test_each_picture_is_xml_with_a_title_and_a_description(database):
    fill(database, 30, failing=0.2, silent=0.1)
    pictures = re.findall("<svg.*?</svg>", dashboard(database, now=NOW), re.DOTALL)
    assert len(pictures) == 3
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        names = [child.tag for child in root[:2]]
        assert names == ["title", "desc"]
        assert all(child.text for child in root[:2])


def test_thousands_of_devices_fit_into_the_page_of_dozens(database):
    fill(database, 3000, rounds=3, failing=0.3, silent=0.3, claimed=0.1)
    page = dashboard(database, now=NOW)
    assert len(page.encode()) < 300_000
    assert "dpu-fleet show DEVICE" in page
    assert page.count("<details><summary>board") == SHOWN


def test_devices_that_all_say_other_things_make_no_larger_page(database):
    add_release(database, 1, 1, NOW - DAY_S)
    rows = [
        row(
            f"{n:064d}",
            1,
            NOW,
            n,
            outcome="refused",
            running=target(n),
            reason=f"{target(n)[:6]} " + "x" * 990,
            group=f"group {n}" * 100,
        )
        for n in range(1500)
    ]
    add_reports(database, rows, now=NOW)
    assert len(dashboard(database, now=NOW).encode()) < 300_000


def test_the_days_of_the_picture_are_those_of_the_database(database):
    fill(database, 20, failing=0, silent=0, claimed=0)
    section = next(
        s
        for s in fleet_document(database, now=NOW).sections
        if s.title == "Versions over time"
    )
    assert section.table.columns == ["day", *(f"round {n}" for n in range(1, 6))]
    assert section.table.rows[0][0] == "2026-12-02"
    (newest,) = database.execute(
        "SELECT devices FROM daily WHERE day = ? AND target = ?",
        (NOW // DAY_S, target(5)),
    ).fetchone()
    assert section.table.rows[0][-1] == str(newest)


def test_equal_reasons_meet_though_their_numbers_differ():
    reasons = ["needs 620184 bytes, 1024 are free", "needs 77120 bytes, 4096 are free"]
    assert len({in_general(reason) for reason in reasons}) == 1
    assert in_general("signal 9") != in_general("signal 11")


def test_a_rollout_that_nothing_is_known_of_shows_no_share(database):
    add_release(database, 1, 1, NOW - DAY_S)
    add_reports(database, [row("a", 1, NOW, 1, proved=False)], now=NOW)
    titles = [s.title for s in fleet_document(database, now=NOW).sections]
    assert "On the way to round 1" not in titles
    assert "Who runs what" in titles


# One device ---------------------------------------------------------------------------


def test_show_tells_of_one_device_and_of_the_fleet(tmp_path, command):
    path = tmp_path / "fleet.db"
    with open_database(path) as connection:
        fill(connection, 60, failing=0, silent=0, claimed=0)
    code, out, _ = command(fleet, "show", "board7", "--db", path)
    assert code == 0
    assert out.startswith("board7: applied\n")
    assert len(re.findall(r"\n  2026-.*applied", out)) == 5
    code, out, _ = command(fleet, "show", "board7", "--db", path, "--json", "--most", 2)
    assert [r["round"] for r in json.loads(out)["reports"]] == [5, 4]
    code, out, _ = command(fleet, "show", "--db", path)
    assert (code, "60 devices" in out.splitlines()[0]) == (0, True)
    record = json.loads(command(fleet, "show", "--db", path, "--json")[1])
    assert (record["proved"], record["release"]["round"]) == (60, 5)
    page = tmp_path / "page.html"
    assert command(fleet, "show", "--db", path, "-o", page)[0] == 0
    assert "<h1" in page.read_text()
    assert command(fleet, "show", "--db", path, "-o", tmp_path / "page.pdf")[0] == 2


def test_show_refuses_an_unknown_device_and_a_file_that_is_no_database(
    tmp_path, command
):
    path = tmp_path / "fleet.db"
    with open_database(path):
        pass
    code, _, err = command(fleet, "show", "nobody", "--db", path)
    assert (code, "no device 'nobody'" in err) == (2, True)
    assert command(fleet, "show", "n\udcff", "--db", path)[0] == 2
    assert command(fleet, "show", "--db", path, "-o", path)[0] == 2
    with open_database(path):
        pass
    path.write_bytes(b"no database at all, and long enough to be looked at" * 30)
    assert command(fleet, "show", "--db", path)[0] == 7
    code, _, err = command(fleet, "show", "--db", tmp_path / "none.db")
    assert (code, "'dpu-fleet watch' makes it" in err) == (2, True)
