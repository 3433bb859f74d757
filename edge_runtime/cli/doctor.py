# SPDX-License-Identifier: Apache-2.0
"""``dpu-edge doctor``: what is wrong with this device, and what to do."""

from dataclasses import asdict
from pathlib import Path

import click

from edge_runtime.commandline import emit, json_option
from edge_runtime.exit_codes import UNWELL
from edge_runtime.text import printable


@click.command()
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="The agent's folder.  [default: where the agent looked last]",
)
@json_option
@click.pass_context
def doctor(context: click.Context, folder: Path | None, *, as_json: bool) -> None:
    """Say what is wrong with this device, and what to do about it.

    It looks at clock, space, file system, runtime, keys, hooks, lock, store, units,
    agent, folder and sync, and changes nothing. It ends with 13 if something is wrong.
    """
    from edge_runtime.doctor.examine import examine
    from edge_runtime.doctor.finding import Health

    found = examine(context.obj, folder)
    wrong = [finding for finding in found if finding.health is Health.WRONG]
    lines = []
    for finding in found:
        lines.append(
            f"{finding.health:<5}  {finding.check:<11}  {printable(finding.words)}"
        )
        if finding.todo:
            lines.append(f"{'':<20}-> {printable(finding.todo)}")
    record = {"well": not wrong, "findings": [*map(asdict, found)]}
    emit(record, as_json=as_json, text="\n".join(lines))
    if wrong:
        context.exit(UNWELL)
