# SPDX-License-Identifier: Apache-2.0
"""Options and arguments that several commands share."""

from pathlib import Path
from typing import Any

import click

from edge_runtime.sizes import parse_size

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


class Size(click.ParamType[int]):
    """A number of bytes, as people write it."""

    name = "size"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Return the bytes that a text stands for."""
        try:
            return parse_size(str(value))
        except ValueError as err:
            self.fail(str(err), param, ctx)


runs_option = click.option(
    "--runs",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="DPU_RUNS",
    show_envvar=True,
    default=Path("runs"),
    show_default=True,
    is_eager=True,  # known when a ROUND is completed in the shell
    help="Where names of runs and rounds are looked up.",
)
