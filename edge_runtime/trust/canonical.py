# SPDX-License-Identifier: Apache-2.0
"""Canonical JSON as OLPC defines it: the bytes over which a key list is signed."""

from typing import Any


def encode_canonical(value: Any) -> bytes:
    """Encode a value as canonical JSON: one value, one sequence of bytes.

    Keys are in order, there is no white space, a string escapes only the quote and the
    backslash, and numbers are integers.

    Args:
        value: Of what :mod:`json` reads: no floating-point number in it.

    Raises:
        ValueError: A number is no integer, or a text has no UTF-8 form.
    """
    return _encode(value).encode()


def _encode(value: Any) -> str:
    match value:
        case str():
            return _text(value)
        case bool() | None:
            return {True: "true", False: "false", None: "null"}[value]
        case int():
            return str(value)
        case list():
            return f"[{','.join(map(_encode, value))}]"
        case dict():
            items = sorted(value.items())
            return f"{{{','.join(f'{_text(k)}:{_encode(v)}' for k, v in items)}}}"
    raise ValueError(f"found {value!r:.40}, expected an integer, text, list or object")


def _text(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
