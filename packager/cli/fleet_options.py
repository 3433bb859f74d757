# SPDX-License-Identifier: Apache-2.0
"""Options of ``dpu-fleet`` and their types: spans of time, shares, channels, keys."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from edge_runtime.parameters import UNITS
from packager.cli.options import PRIVATE_KEY

Command = TypeVar("Command", bound=Callable[..., Any])

_LONGEST_S = 36_500 * 86_400  # ends in a year that can be written


class Span(click.ParamType[int]):
    """A span of time such as 30d, 12h, 10m or 90s."""

    name = "span"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        """Return it in seconds."""
        found = re.fullmatch(r"([1-9][0-9]{0,6})([smhd])", str(value))
        if found is None:
            self.fail(f"found {value!r}, expected 30d, 12h, 10m or 90s", param, ctx)
        seconds = int(found[1]) * UNITS[found[2]]
        if seconds > _LONGEST_S:
            self.fail(f"found {value}, expected at most 36500d", param, ctx)
        return seconds


class Skips(click.ParamType[tuple[int, ...]]):
    """Numbers with commas: 2,4,8."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        """Return them."""
        if not re.fullmatch(r"([1-9][0-9]{0,3}(,[1-9][0-9]{0,3})*)?", str(value)):
            self.fail(f"found {value!r}, expected numbers such as 2,4,8", param, ctx)
        return tuple(map(int, filter(None, str(value).split(","))))


class Shares(click.ParamType[tuple[tuple[int, int], ...]]):
    """Shares of the devices and when they begin: 1%,10%@24h,100%@48h."""

    name = "shares"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        """Return permille and seconds."""
        found = []
        for part in str(value).split(","):
            share, at, delay = part.partition("@")
            number = re.fullmatch(r"([0-9]{1,3})(?:\.([0-9]))?%", share)
            permille = int(number[1]) * 10 + int(number[2] or 0) if number else 1001
            if permille > 1000:
                words = f"found {part!r}, expected 1%,10%@24h,100%@48h"
                self.fail(words, param, ctx)
            seconds = Span().convert(delay, param, ctx) if at else 0
            found.append((permille, seconds))
        if found != sorted(found) or found != sorted(found, key=lambda step: step[1]):
            self.fail(f"{value!r}: share and time have to grow", param, ctx)
        return tuple(found)


class Name(click.ParamType[str]):
    """The name of a channel."""

    name = "name"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        """Return it."""
        from edge_runtime.sync.head import CHANNEL_FORM

        if not re.fullmatch(CHANNEL_FORM, str(value)):
            self.fail(f"found {value!r}, expected a to z, 0 to 9, - and _", param, ctx)
        return value


channel_option = click.option(
    "--channel",
    type=Name(),
    default="stable",
    show_default=True,
    help="Which channel of the place.",
)


def run_or_ledger(name: str, runs: Path) -> Path:
    """Return the folder of a run, by its path or its name; a ledger alone is enough.

    Raises:
        RoundNotFoundError: There is none.
    """
    from packager.ledger import LEDGER_NAME
    from packager.rounds.names import find_run, named_run

    if (Path(name) / LEDGER_NAME).is_file():
        return find_run(name, runs) or Path(name)
    return named_run(name, runs)


def sign_option(words: str) -> Callable[[Command], Command]:
    """Return ``--sign``, the private keys of releases, with its help."""
    return click.option(
        "--sign",
        "keys",
        metavar="KEY.pem",
        multiple=True,
        type=PRIVATE_KEY,
        help=words,
    )
