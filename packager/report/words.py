# SPDX-License-Identifier: Apache-2.0
"""Numbers in words: bytes, shares, times; names in the order that people expect."""

import re
from datetime import UTC, datetime


def spaced(number: int | str) -> str:
    """Write a number with a space between thousands."""
    return f"{number:,}".replace(",", " ") if isinstance(number, int) else number


def percent(part: float, whole: float, digits: int = 2) -> str:
    """Write a share in percent."""
    return f"{100 * part / whole:.{digits}f} %" if whole else "-"


def times(factor: float, digits: int) -> str:
    """Write a factor with its multiplication sign."""
    return f"{factor:.{digits}f}\u00d7"


def short_bytes(size: float) -> str:
    """Write a size in three digits or so, 1000 bytes to a kB."""
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.{0 if unit == 'B' or size >= 99.95 else 1}f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def counted(number: int, word: str) -> str:
    """Write how many there are of something that takes an s: ``3 devices``."""
    return f"{spaced(number)} {word}{'s' * (number != 1)}"


def cut(text: str, most: int = 160) -> str:
    """Return a text of somebody else in a length that a table bears."""
    return text if len(text) <= most else f"{text[:most]}…"


def moment(at: int) -> str:
    """Write a time since 1970 to the minute."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")


def natural(name: str) -> list[tuple[int, str]]:
    """Return a sorting key by which ``4.weight`` stands before ``11.weight``."""
    parts = re.split(r"(\d+)", name)
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in parts]
