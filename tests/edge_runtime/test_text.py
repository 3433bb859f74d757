# SPDX-License-Identifier: Apache-2.0
"""Text that somebody else chose cannot write on a terminal, or forge a line."""

import json
import subprocess
import sys
import unicodedata

import click
import pytest
from click.testing import CliRunner

from edge_runtime.commandline import Command, emit, progress, say
from edge_runtime.errors import ContractError
from edge_runtime.text import (
    MAX_SHOWN,
    listed,
    printable,
    printable_lines,
    printable_message,
)

CONTROLS = [*range(0x20), *range(0x7F, 0xA0)]
BIDI = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
OTHERS = [0x2028, 0x2029, 0xFEFF, 0xD800, 0xDC80, 0xDFFF, 0xE0001, 0x10FFFF]
HOSTILE = [chr(code) for code in (*CONTROLS, *BIDI, *OTHERS)]
ERASING = "w\x1b[2J\x9b1A\r\u202egpj\udc80"


@pytest.mark.parametrize("character", HOSTILE, ids=ascii)
def test_no_character_reaches_a_terminal_that_is_not_printed_as_itself(character):
    shown = printable(f"a{character}b")
    assert shown.isprintable()
    assert shown == "a" + character.encode("unicode_escape").decode() + "b"
    for line in printable_lines(f"a{character}b").split("\n"):
        assert line.isprintable()


def test_every_character_of_a_dangerous_category_is_spelled_out():
    for code in range(0x110000):
        character = chr(code)
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            assert printable(character) != character


def test_plain_text_of_any_language_stays_as_it_is():
    text = "fc1.weight → Gewicht, 重み, вес, é"
    assert printable(text) == printable_lines(text) == printable_message(text) == text


def test_a_very_long_name_is_cut():
    assert len(printable("x" * 10_000_000)) < MAX_SHOWN + 50


def test_no_line_of_a_message_passes_for_another_message():
    message = "no tensor 'w\nerror: all is lost\nwrote x.dpu'"
    first, *rest = printable_message(message).split("\n")
    assert first == "no tensor 'w"
    assert all(line.startswith("  ") for line in rest)
    assert printable_message("2 problems\n  - a\n  - b") == "2 problems\n  - a\n  - b"


def test_every_way_to_print_is_safe(capsys):
    emit({}, as_json=False, text=f"table {ERASING}\nrow")
    progress(ERASING)
    say(ERASING, label="error: ")
    emit({"name": ERASING}, as_json=True, text="")
    out, err = capsys.readouterr()
    assert all(line.isprintable() for line in out.split("\n"))
    assert r"\x1b[2J\x9b1A\r\u202egpj\udc80" in out
    assert all(line.isprintable() for line in err.split("\n"))
    assert err.startswith(r"error: w\x1b[2J")


class UnforeseenError(Exception):
    """What no exit code is documented for."""


ERRORS = [
    ContractError(f"no input {ERASING}\nerror: forged"),
    OSError(2, "No such file", f"{ERASING}\nforged"),
    click.UsageError(f"No such option {ERASING}"),
    click.BadParameter(f"{ERASING}"),
    UnforeseenError(ERASING),
]


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_every_error_is_printed_safely(error, as_json, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")

    @click.command(cls=Command)
    @click.option("--json", "as_json", is_flag=True)
    def fails(*, as_json):
        raise error

    done = CliRunner().invoke(fails, ["--json"] if as_json else [])
    assert done.exit_code
    lines = done.stderr.split("\n")
    assert [line for line in lines if not line.isprintable()] == []
    assert not [line for line in lines if line.startswith(("forged", "error: forged"))]
    if as_json:
        assert ERASING in json.loads(done.stderr)["message"]
    else:
        assert r"\x9b1A" in done.stderr  # click drops some codes by itself


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_very_long_line_of_an_error_is_cut_and_the_others_stay(options):
    @click.command(cls=Command)
    @click.option("--json", is_flag=True, expose_value=False)
    def fails():
        raise ContractError("\n  - ".join(["two problems", "n" * 20_000_000, "last"]))

    done = CliRunner().invoke(fails, options)
    assert len(done.stderr) < 2 * MAX_SHOWN
    assert "(20000004 characters)" in done.stderr
    assert "- last" in done.stderr


def test_a_hostile_file_name_is_printed_safely_by_the_real_command(tmp_path):
    path = tmp_path / ERASING.encode("utf-8", "surrogateescape").decode(
        "utf-8", "surrogateescape"
    )
    command = [sys.executable, "-m", "edge_runtime", "--store", str(path), "status"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 7
    assert rb"\x1b[2J" in done.stderr
    assert not set(done.stderr) & set(b"\x1b\x9b\r")


def test_of_many_names_the_first_are_listed_and_the_others_counted():
    assert listed([], 2) == ""
    assert listed(["a", "b"], 2) == "a, b"
    assert listed(["a", "b", "c", "d"], 2) == "a, b and 2 more"
