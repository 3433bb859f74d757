# SPDX-License-Identifier: Apache-2.0
"""The one reader of JSON: bounded; :mod:`edge_runtime.formats.json_record` has fields.

Whoever wrote a file may have written anything. So size, number of values and depth are
looked at before anything is believed; names are given once; numbers are finite; strings
are text that can be written down again. A field that is not what it should be is named,
with what was expected and what was found.

Fields that no reader asks for are left alone: a newer writer may have added them.
"""

import json
import math
import re
from collections import Counter
from os import PathLike
from pathlib import Path
from typing import Any

from edge_runtime.errors import DpuError
from edge_runtime.formats.json_record import MAX_SHOWN, Record
from edge_runtime.limits import limits
from edge_runtime.reading import read_bounded

MAX_DEPTH = 32


def read_record(
    path: str | PathLike[str],
    limit: str,
    what: str,
    error: type[DpuError],
    *,
    finite: bool = True,
    encodable: bool = True,
    regular: bool = False,
) -> Record:
    """Read a file that holds one JSON object.

    Args:
        path: The file.
        limit: Which of :class:`edge_runtime.limits.Limits` bounds it.
        what: What to call it in an error.
        error: What to raise where it is malformed.
        finite: Whether it may hold none of Python's ``NaN`` and ``Infinity``.
        encodable: Whether it may hold no text that cannot be encoded. File names may
            be such text; nothing else is.
        regular: Whether it must be an ordinary file, as others may put things there.

    Raises:
        OSError: It cannot be read.
        DpuError: It is malformed or over its limit.
    """
    data = read_bounded(Path(path), limit, what, error, regular=regular)
    return parse_record(data, limit, what, error, finite=finite, encodable=encodable)


def parse_record(
    data: bytes | str,
    limit: str,
    what: str,
    error: type[DpuError],
    *,
    finite: bool = True,
    encodable: bool = True,
) -> Record:
    """Parse one JSON object; the rest is as for :func:`read_record`."""
    if problem := limits().problem(limit, len(data), what):
        raise error(problem)
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        values = parse_values(text, finite=finite, encodable=encodable)
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
    except json.JSONDecodeError as err:
        raise error(f"{what} is malformed (not valid JSON: {err})") from err
    except (ValueError, RecursionError) as err:
        raise error(f"{what} is malformed ({err})") from err
    return Record(values, what, error)


def parse_values(text: str, *, finite: bool = True, encodable: bool = True) -> Any:
    """Parse any JSON within bounds.

    Args:
        text: The JSON.
        finite: Whether ``NaN`` and ``Infinity`` are refused.
        encodable: Whether text that cannot be encoded is refused.

    Raises:
        ValueError: Malformed, a name twice, a number that is none, text that cannot be
            encoded, or more than ``MAX_DEPTH`` levels.
        RecursionError: Far more levels than that.
    """
    opened = text.count("[") + text.count("{")
    # Each value takes far more memory than characters.
    if problem := limits().problem("json_values", opened + text.count(","), "it"):
        raise ValueError(problem)
    if opened > MAX_DEPTH:
        _check_depth(text)
    values = json.loads(
        text,
        object_pairs_hook=_once,
        parse_constant=_no_constant if finite else float,
        parse_float=_float,
    )
    # Escapes can spell surrogates, which no file name and no encoder takes.
    if encodable and "\\u" in text:
        _check_text(values)
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"{twice[:MAX_SHOWN]!r} is given twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _float(text: str) -> float:
    found = float(text)
    if not math.isfinite(found):
        raise ValueError(f"{text[:MAX_SHOWN]} is no number that a computer has")
    return found


# Possessive, so that a string without an end is looked at once.
_STRUCTURE = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[][{}]', re.DOTALL)


def _check_depth(text: str) -> None:
    """Count brackets outside of strings, so that a parser never goes deep."""
    depth = 0
    for found in _STRUCTURE.finditer(text):
        first = found[0][0]
        depth += (first in "[{") - (first in "]}")
        if depth > MAX_DEPTH:
            raise ValueError(f"it has more than {MAX_DEPTH} levels")


def _check_text(values: object) -> None:
    """Insist that all text can be encoded."""
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            value.encode()  # UnicodeEncodeError, a ValueError, for a lone surrogate
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.keys()
            waiting += value.values()
