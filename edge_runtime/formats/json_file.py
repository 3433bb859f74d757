# SPDX-License-Identifier: Apache-2.0
"""The one reader of JSON: bounded, and typed field by field.

Whoever wrote a file may have written anything. So size, number of values and depth are
looked at before anything is believed; names are given once; numbers are finite; strings
are text that can be written down again. A field that is not what it should be is named,
with what was expected and what was found.

Fields that no reader asks for are left alone: a newer writer may have added them.
"""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Final, Self

from edge_runtime.errors import DpuError
from edge_runtime.files import read_bounded
from edge_runtime.limits import limits

MAX_DEPTH = 32
_MAX_INTEGER = (1 << 64) - 1
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SHOWN = 80  # characters of a value that an error repeats
_REQUIRED: Final = object()
_WORDS = {str: "texts", int: "whole numbers", float: "numbers", type(None): "null"}


class Record:
    """One JSON object, to be read field by field."""

    def __init__(
        self, values: Mapping[str, Any], what: str, error: type[DpuError]
    ) -> None:
        """Wrap an object that :func:`parse_record` checked.

        Args:
            values: Its fields.
            what: What to call it in an error.
            error: What to raise.
        """
        self.values, self.what, self._error = values, what, error

    def __contains__(self, name: str) -> bool:
        """Return whether a field is there."""
        return name in self.values

    def problem(self, name: str, expected: str) -> DpuError:
        """Return the error for a field that is not as expected."""
        found = "nothing"
        if name in self.values:
            value = self.values[name]  # shown in one line of plain characters
            text = repr(value) if isinstance(value, str) else json.dumps(value)
            found = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        return self._error(
            f"{self.what} is malformed: {name!r} is {found}, expected {expected}"
        )

    def schema(self, *known: int) -> int:
        """Return ``schema``.

        Raises:
            DpuError: This runtime does not know it.
        """
        found = self.integer("schema")
        if found not in known:
            raise self._error(
                f"{self.what} has schema {found}, this runtime knows "
                f"{', '.join(map(str, known))}; install a newer dpu-edge"
            )
        return found

    # Single values ------------------------------------------------------------------

    def text(self, name: str, default: Any = _REQUIRED) -> str:
        """Return a field that is text."""
        found: str = self._typed(name, "text", lambda v: isinstance(v, str), default)
        return found

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        """Return a field that is true or false."""
        found: bool = self._typed(
            name, "true or false", lambda v: type(v) is bool, default
        )
        return found

    def integer(
        self,
        name: str,
        default: Any = _REQUIRED,
        *,
        least: int = 0,
        most: int = _MAX_INTEGER,
    ) -> int:
        """Return a field that is a whole number within bounds."""
        expected = f"a whole number from {least} to {most}"
        found: int = self._typed(
            name, expected, lambda v: _whole(v, least, most), default
        )
        return found

    def number(
        self, name: str, default: Any = _REQUIRED, *, finite: bool = True
    ) -> float:
        """Return a field that is a number, and a finite one if it must."""
        fits = _finite if finite else _number
        return float(self._typed(name, "a number", fits, default))

    def digest(self, name: str, default: Any = _REQUIRED) -> str:
        """Return a field that is a SHA-256, or as the default."""

        def fits(value: object) -> bool:
            return value == default or is_digest(value)

        found: str = self._typed(name, "64 hexadecimal digits", fits, default)
        return found

    # What holds others --------------------------------------------------------------

    def texts(self, name: str, default: Any = _REQUIRED) -> list[str]:
        """Return a field that is a list of texts."""
        found: list[str] = self._list(
            name, "a list of texts", lambda v: isinstance(v, str), default
        )
        return found

    def numbers(self, name: str, default: Any = _REQUIRED) -> list[float]:
        """Return a field that is a list of finite numbers."""
        found: list[float] = self._list(name, "a list of numbers", _finite, default)
        return found

    def one_of(self, name: str, known: Collection[str]) -> str:
        """Return a field that is one of some words."""
        found: str = self._typed(
            name, f"one of {', '.join(known)}", partial(_is_in, known), _REQUIRED
        )
        return found

    def matching(self, name: str, pattern: str, expected: str) -> str:
        """Return a field that is text of some form."""
        found = self.text(name)
        if not re.fullmatch(pattern, found):
            raise self.problem(name, expected)
        return found

    def integers(
        self, name: str, *, least: int = 0, most: int = _MAX_INTEGER
    ) -> list[int]:
        """Return a field that is a list of whole numbers."""
        expected = f"a list of whole numbers from {least} to {most}"
        found: list[int] = self._list(
            name, expected, lambda v: _whole(v, least, most), _REQUIRED
        )
        return found

    def items(
        self, name: str, kinds: tuple[type, ...], default: Any = _REQUIRED
    ) -> Any:
        """Return a field that is a list of values of some types."""
        words = " or ".join(_WORDS[kind] for kind in kinds)
        fits = partial(_is_one_of, kinds)
        return self._list(name, f"a list of {words}", fits, default)

    def record(self, name: str) -> Self:
        """Return a field that is an object."""
        found = self._typed(name, "an object", lambda v: isinstance(v, dict), _REQUIRED)
        return self._inner(found, name)

    def records(self, name: str, default: Any = _REQUIRED) -> list[Self]:
        """Return a field that is a list of objects."""
        found = self._list(
            name, "a list of objects", lambda v: isinstance(v, dict), default
        )
        return [self._inner(entry, f"{name}[{n}]") for n, entry in enumerate(found)]

    def members(self) -> Iterator[tuple[str, Self]]:
        """Yield every field, each of which is an object, with its name."""
        for name in self.values:
            yield name, self.record(name)

    def _inner(self, values: Mapping[str, Any], name: str) -> Self:
        return type(self)(values, f"{self.what}, {name!r},", self._error)

    def _typed(self, name: str, expected: str, fits: Any, default: Any) -> Any:
        found = self.values.get(name, default)
        if found is _REQUIRED or not (found is default or fits(found)):
            raise self.problem(name, expected)
        return found

    def _list(self, name: str, expected: str, fits: Any, default: Any) -> Any:
        def fit(found: object) -> bool:
            return isinstance(found, list) and all(map(fits, found))

        return list(self._typed(name, expected, fit, default))


def is_digest(value: object) -> bool:
    """Return whether a value is a SHA-256 in hexadecimal digits."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _is_one_of(kinds: tuple[type, ...], value: object) -> bool:
    return type(value) in kinds


def _is_in(known: Collection[str], value: object) -> bool:
    return isinstance(value, str) and value in known


def _whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and type(value) is int and least <= value <= most


def _number(value: object) -> bool:
    return type(value) is float or _whole(value, -_MAX_INTEGER, _MAX_INTEGER)


def _finite(value: object) -> bool:
    return _number(value) and math.isfinite(value)  # type: ignore[arg-type]


def read_record(
    path: str | PathLike[str],
    limit: str,
    what: str,
    error: type[DpuError],
    *,
    finite: bool = True,
    encodable: bool = True,
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

    Raises:
        OSError: It cannot be read.
        DpuError: It is malformed or over its limit.
    """
    data = read_bounded(Path(path), limit, what, error)
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
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:_SHOWN]!r} is given twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _float(text: str) -> float:
    found = float(text)
    if not math.isfinite(found):
        raise ValueError(f"{text[:_SHOWN]} is no number that a computer has")
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
