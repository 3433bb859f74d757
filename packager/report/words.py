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


def duration(seconds: float) -> str:
    """Write a time in one or two units, for example ``23 min 17 s``."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.{0 if seconds >= 0.01 else 1}f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3599.5:
        return _two(round(seconds), 60, "min", "s")
    if seconds < 86_370:
        return _two(round(seconds / 60), 60, "h", "min")
    return _two(round(seconds / 3600), 24, "d", "h")


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


def _two(parts: int, size: int, unit: str, part: str) -> str:
    whole, rest = divmod(parts, size)
    return f"{spaced(whole)} {unit}" + (f" {rest} {part}" if rest else "")
