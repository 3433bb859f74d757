# SPDX-License-Identifier: Apache-2.0
"""Times as text: UTC in one form, which compares as text; and how long, in words."""

import time
from calendar import timegm

FORM = "%Y-%m-%dT%H:%M:%SZ"
MAX_SECONDS = 253402300799  # the end of the year 9999
# A clock that shows less began in 1970 at a boot: no board runs for ten years.
UPTIME_S = 10 * 366 * 86_400


def utc(seconds: float | None = None) -> str:
    """Return a time, or this moment, by the device's own clock, for people."""
    return time.strftime(FORM, time.gmtime(seconds))


def seconds_of(text: str) -> int:
    """Return a time that was written so, in seconds since 1970.

    Raises:
        ValueError: It has another form, or there is no such day.
    """
    return timegm(time.strptime(text, FORM))


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


def _two(parts: int, size: int, unit: str, part: str) -> str:
    whole, rest = divmod(parts, size)
    spaced = f"{whole:,}".replace(",", " ")
    return f"{spaced} {unit}" + (f" {rest} {part}" if rest else "")
