# SPDX-License-Identifier: Apache-2.0
"""What a key of a recipe may be: each rule with the words that a refusal says it in."""

import math
import re
from collections.abc import Callable
from typing import Any

from edge_runtime.sizes import SIZE_WORDS, is_size

AUTO = "auto"

Rule = tuple[str, Callable[[Any], bool]]  # what is expected, and whether a value is so


def at_least(low: float) -> Rule:
    """Return the rule of a number that has no upper end."""
    return f"at least {low}", lambda value: low <= value


def between(low: float, high: float) -> Rule:
    """Return the rule of a number from one to another, both included."""
    return f"from {low} to {high}", lambda value: low <= value <= high


def one_of(*choices: str) -> Rule:
    """Return the rule of a choice by name."""
    return "one of " + ", ".join(choices), lambda value: value in choices


ANY: Rule = ("", lambda _value: True)
ABOVE_0: Rule = ("above 0, and finite", lambda value: 0 < value < float("inf"))
SHARE: Rule = ("above 0, at most 1", lambda value: 0 < value <= 1)
GRID: Rule = (
    "auto, or a power of two from 2^-24 to 2^24, such as 0.125",
    lambda value: (
        value in ("", AUTO)
        if isinstance(value, str)
        else 2**-24 <= value <= 2**24 and math.frexp(value)[0] == 0.5
    ),
)
SIZE: Rule = (SIZE_WORDS, lambda value: value == "" or is_size(value))
MULTIPLE_OF_64: Rule = ("a multiple of 64", lambda value: value > 0 and value % 64 == 0)
FACTORY: Rule = (
    "package.module:function",
    lambda value: not value or re.fullmatch(r"[\w.]+:\w+", value) is not None,
)


def named_or_own(*names: str) -> Rule:
    """Return the rule of a choice by name, or of a function of your own."""
    words = f"auto, {', '.join(names)}, or package.module:function"
    known = {AUTO, *names}
    return words, lambda v: v in known or (":" in v and FACTORY[1](v))


REINIT: Rule = (
    "auto, never, or a number of rounds",
    lambda value: value in ("auto", "never") or (type(value) is int and value > 0),
)
