# SPDX-License-Identifier: Apache-2.0
"""Text and file names in every locale, and standard streams that fail no command.

A stream may be closed, may have no reader any more, and may have an encoding in which
a sign or a file name cannot be written (``LC_ALL=C``).
"""

import codecs
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import TextIO

_HANDLER = "dpu-edge"
# Of Python itself; any other was asked for (PYTHONIOENCODING) and stays.
_DEFAULTS = {"strict", "surrogateescape", "backslashreplace"}
_PLAIN = {"\u2192": "->", "\u00d7": "x", "\u2026": "..."}  # arrow, times, dots
_ASCII = "ascii"


def prepare_streams() -> None:
    """Open what is closed, and let every text be written in every encoding."""
    codecs.register_error(_HANDLER, _write_somehow)
    # Closed streams (``>&-``) are None; no other file may get their numbers.
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors in _DEFAULTS:
            stream.reconfigure(errors=_HANDLER)


def _write_somehow(error: UnicodeError) -> tuple[bytes, int]:
    """Write UTF-8 where the locale says nothing (C), else spell out what it lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    if error.encoding == _ASCII == sys.getfilesystemencoding():
        return signs.encode("utf-8", "surrogateescape"), error.end
    plain = "".join(_PLAIN.get(sign, sign) for sign in signs)
    return plain.encode(_ASCII, "backslashreplace"), error.end


def read_by_nobody(stream: TextIO) -> None:
    """Redirect a stream to /dev/null: its reader is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def unheard(stream: TextIO) -> Iterator[None]:
    """Go on though a stream takes nothing; if its reader is gone, nothing comes back.

    What a full disk did not take stays there, and is tried again with the next line.
    """
    try:
        yield
    except BrokenPipeError:
        read_by_nobody(stream)
    except OSError:
        pass


def give_up_rest(stream: TextIO) -> None:
    """Write what is left of a stream, or drop it: else Python changes the exit code."""
    try:
        stream.flush()
    except OSError:
        read_by_nobody(stream)


def utf8(text: str) -> bytes:
    """Return text for a file; bytes of file names that are no text are marked."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace").encode()


def utf8_path(path: str | os.PathLike[str]) -> str:
    """Return a path as libraries in C++ take it, whatever encoding the locale has.

    Raises:
        UnicodeDecodeError: Its bytes are not UTF-8.
    """
    return os.fsencode(path).decode()
