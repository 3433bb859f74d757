# SPDX-License-Identifier: Apache-2.0
"""How a check or a benchmark ends: it says what was missed, and exits by it."""

import sys
from collections.abc import Iterable
from typing import NoReturn

from edge_runtime.commandline import say


def end(missed: Iterable[object], *, check: bool) -> NoReturn:
    """Say what was missed, and exit: with 1 where something was, and bars are checked.

    Args:
        missed: One line each.
        check: Whether bars are checked.
    """
    lines = [str(line) for line in missed]
    for line in lines:
        say(f"missed: {line}")
    sys.exit(1 if check and lines else 0)
