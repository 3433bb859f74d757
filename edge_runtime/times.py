# SPDX-License-Identifier: Apache-2.0
"""Times as text: UTC in one form, which compares as text and can be written down."""

import time
from calendar import timegm

FORM = "%Y-%m-%dT%H:%M:%SZ"
MAX_SECONDS = 253402300799  # the end of the year 9999


def utc(seconds: float | None = None) -> str:
    """Return a time, or this moment, by the device's own clock, for people."""
    return time.strftime(FORM, time.gmtime(seconds))


def seconds_of(text: str) -> int:
    """Return a time that was written so, in seconds since 1970.

    Raises:
        ValueError: It has another form, or there is no such day.
    """
    return timegm(time.strptime(text, FORM))
