# SPDX-License-Identifier: Apache-2.0
"""One JSON object, read field by field: each has its type, or an error says so."""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any, Final, Self

from edge_runtime.errors import DpuError

_MAX_INTEGER = (1 << 64) - 1
_DIGEST = re.compile(r"[0-9a-f]{64}")
MAX_SHOWN = 80  # characters of a value that an error repeats
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
            found = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
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
            name, expected, lambda v: is_whole(v, least, most), default
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
            name, expected, lambda v: is_whole(v, least, most), _REQUIRED
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
        what = self.what.removesuffix(",")
        return type(self)(values, f"{what}, {name!r},", self._error)

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


def is_whole(value: object, least: int = 0, most: int = _MAX_INTEGER) -> bool:
    """Return whether a value is a whole number within bounds."""
    return isinstance(value, int) and type(value) is int and least <= value <= most


def _number(value: object) -> bool:
    return type(value) is float or is_whole(value, -_MAX_INTEGER)


def _finite(value: object) -> bool:
    return _number(value) and math.isfinite(value)  # type: ignore[arg-type]
