# SPDX-License-Identifier: Apache-2.0
"""Options and arguments that several commands share."""

from pathlib import Path

import click

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

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
