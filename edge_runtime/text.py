# SPDX-License-Identifier: Apache-2.0
"""One way to show text that somebody else chose.

File names, names in a graph or a weight file, what a program said: whoever chose them
must not move the cursor of a terminal, forge a line, or turn what follows around. So
each character that is not printed as itself is spelled out, as Python spells it.
Commands print everything through here (:mod:`edge_runtime.commandline`); what a table
or a list of lines is made of goes through :func:`printable` piece by piece.
"""

from collections.abc import Sequence
from contextlib import suppress

MAX_SHOWN = 4096  # characters of a single name or reason


def printable(text: object) -> str:
    r"""Return a text of one line that a terminal shows as it is.

    Control characters, line ends, marks that change the direction of writing, lone
    surrogates and all else that is not printable become ``\n``, ``\x1b``, ``\u202e``.
    Of a very long text only the beginning is given.
    """
    return _line(beginning(str(text)))


def beginning(text: str) -> str:
    """Return a text, or of a very long one the beginning, and how long it is."""
    if len(text) <= MAX_SHOWN:
        return text
    return f"{text[:MAX_SHOWN]}... ({len(text)} characters)"


def printable_lines(text: str) -> str:
    """Return the text of a table or report: as :func:`printable`, but lines stay."""
    return "\n".join(map(_line, text.split("\n")))


def printable_message(text: str) -> str:
    """Return a message: its first line, and what follows set in below it.

    So no name in it can pass for a message or a result of its own.
    """
    first, *rest = printable_lines(text).split("\n")
    return "\n".join([first, *("  " + line.removeprefix("  ") for line in rest)])


def listed(names: Sequence[str], most: int) -> str:
    """Return the first few of some names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _line(text: str) -> str:
    # Where the locale has no UTF-8, names come as their bytes: they are read here.
    with suppress(UnicodeEncodeError):  # other lone surrogates
        raw = text.encode("utf-8", "surrogateescape")
        text = raw.decode("utf-8", "surrogateescape")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _spelled(c) for c in text)


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
