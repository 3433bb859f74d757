# SPDX-License-Identifier: Apache-2.0
"""What a check found, and how bad it is."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Health(StrEnum):
    """How something is."""

    OK = "ok"
    NOTE = "note"  # nothing is wrong, and a person may want to know it
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found.

    Attributes:
        check: What was looked at, in a word.
        health: How it is.
        words: What was found.
        todo: What to do about it; empty where nothing is to be done.
    """

    check: str
    health: Health
    words: str
    todo: str = ""


Findings = Iterator[Finding]
