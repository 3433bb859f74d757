# SPDX-License-Identifier: Apache-2.0
"""How a check or a benchmark ends: what it writes, and how it exits."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import click

from edge_runtime.commandline import say


def check_parent(output: Path | None) -> None:
    """Insist on the folder of a file that is written at the end, before the work.

    Raises:
        click.UsageError: There is none.
    """
    if output and not output.parent.is_dir():
        raise click.UsageError(f"{output}: {output.parent} is no folder; make it first")


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
