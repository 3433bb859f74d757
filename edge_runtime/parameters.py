# SPDX-License-Identifier: Apache-2.0
"""Parameters that commands share: files by their kind, spans of time, whom to trust."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edge_runtime.formats.kinds import Kind, refuse_others

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class FileOf(click.Path):
    """A file of some kinds; another kind is refused by its name, before any work."""

    def __init__(self, *kinds: Kind, **how: Any) -> None:
        """Accept files of these kinds, and what nobody recognises.

        Args:
            kinds: What the file may be.
            how: As :class:`click.Path` takes it.
        """
        super().__init__(exists=True, path_type=Path, **{"dir_okay": False} | how)
        self.kinds = kinds

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        """Return the path, or say what is there and which command takes it."""
        path = Path(value)
        if path.is_char_device() or path.is_block_device():
            self.fail(f"{path} is a device, expected a file", param, ctx)
        named = Kind.SHARDS in self.kinds  # of other folders it looks at names alone
        if named or not (self.dir_okay and path.is_dir()):
            refuse_others(path, self.kinds)
        return super().convert(value, param, ctx)


class NewFile(click.Path):
    """The name of a file that is to be written; what ends with / would be a folder."""

    def __init__(self) -> None:
        """Accept any name of a file, whether there is one or not."""
        super().__init__(dir_okay=False, path_type=Path)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        """Return the path; a path forgets how it ended."""
        if str(value).endswith("/"):
            self.fail(f"found {value!r}, expected the name of a file", param, ctx)
        return super().convert(value, param, ctx)


class Seconds(click.FloatRange):
    """A span of time within bounds, by default up to a year: 90, 90s, 10m, 12h, 30d."""

    def __init__(self, least: float, most: float = 366 * 86_400.0) -> None:
        """Accept what is in between."""
        super().__init__(least, most)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        """Return seconds; NaN is within no bounds, though no comparison says so."""
        if span := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd])", str(value)):
            value = float(span[1]) * UNITS[span[2]]
        found = super().convert(value, param, ctx)
        if math.isnan(found):
            self.fail(f"{value} is no number of seconds", param, ctx)
        return found


def trust_options(words: str) -> Callable[[Callable[..., Any]], Any]:
    """Return the options that :func:`edge_runtime.cli.trust.read_trust` reads.

    Args:
        words: What trusting a key means for the command.
    """

    def add(command: Callable[..., Any]) -> Any:
        command = click.option(
            "--threshold",
            type=click.IntRange(1),
            default=1,
            show_default=True,
            help="How many of the trusted keys must sign.",
        )(command)
        return click.option(
            "--trust",
            "keys",
            metavar="KEY.pub.pem|N.root.json",
            multiple=True,
            type=FileOf(Kind.PUBLIC_KEY, Kind.KEY_LIST),
            help=words,
        )(command)

    return add
