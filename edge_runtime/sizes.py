# SPDX-License-Identifier: Apache-2.0
"""Sizes as people write them, for every option, recipe and setting of this project.

>>> parse_size("64KB"), parse_size("1.5 MiB"), parse_size("700")
(64000, 1572864, 700)
"""

import re

_UNITS = ("B", "KB", "MB", "GB", "KiB", "MiB", "GiB")
_BYTES = {unit.lower(): 1000**n for n, unit in enumerate(_UNITS[:4])}
_BYTES |= {unit.lower(): 1024**n for n, unit in enumerate(_UNITS[4:], 1)}
_SIZE = re.compile(r"(\d{1,18})(?:\.(\d{1,18}))?\s*([a-z]*)", re.ASCII)

SIZE_WORDS = (
    "a size such as 64KB or 1.5MiB: bytes, or a number of B, KB, MB, GB (1000 each) or "
    "KiB, MiB, GiB (1024 each)"
)


def parse_size(text: str) -> int:
    """Return a size such as ``64KB`` or ``1.5 mib`` in whole bytes, 1 at least.

    Raises:
        ValueError: It is none; the message says what is expected.
    """
    found = _SIZE.fullmatch(text.strip().lower())
    size = 0
    if found and (unit := _BYTES.get(found[3] or "b")):
        part = found[2] or ""  # whole numbers: floats would lose bytes
        size = int(found[1] + part) * unit // 10 ** len(part)
    if not size:
        raise ValueError(f"found {text[:80]!r}, expected {SIZE_WORDS}")
    return size


def is_size(text: str) -> bool:
    """Return whether :func:`parse_size` takes a text."""
    try:
        parse_size(text)
    except ValueError:
        return False
    return True
