# SPDX-License-Identifier: Apache-2.0
"""``dpu-fleet init``: the first head of a channel, and what to do after it."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.commandline import json_option, say
from packager.cli.fleet_options import channel_option, sign_option
from packager.cli.fleet_publish import publish
from packager.cli.options import runs_option, single_publisher_option

if TYPE_CHECKING:
    from packager.fleet.place import Place

FIRST = "round_00"


@click.command("init")
@click.argument("to", metavar="URL|DIR")
@click.argument("name", metavar="RUN")
@runs_option
@channel_option
@sign_option("Sign bundle, patches and head with this private key (repeatable).")
@single_publisher_option
@json_option
@click.pass_context
def init(
    context: click.Context,
    /,
    to: str,
    name: str,
    *,
    runs: Path,
    channel: str,
    single_publisher: bool,
    **options: Any,
) -> None:
    """Begin a channel: publish the first round of a run folder, and say what is next.

    What 'dpu-fleet publish RUN/round_00' does, in a place that has no such channel yet.
    """
    from packager.fleet.address import open_place
    from packager.rounds.names import named_run

    run = named_run(name, runs)
    place = open_place(to, single_publisher=single_publisher, say=say)
    _insist_new(place, channel)
    context.invoke(
        publish,
        name=str(run / FIRST),
        runs=runs,
        to=to,
        channel=channel,
        single_publisher=single_publisher,
        **options,
    )
    for line in _next(place.name, run, channel, options["keys"]):
        say(line)


def _insist_new(place: "Place", channel: str) -> None:
    from edge_runtime.sync.head_file import read_head
    from edge_runtime.sync.paths import head_path

    if (found := place.read(head_path(channel))) is not None:
        head = read_head(found[0]).head
        raise FileExistsError(
            f"{place.name} has the channel {channel} already, at version "
            f"{head.version} (round {head.round}): 'dpu-fleet publish' makes the next "
            "one, another --channel begins anew"
        )


def _next(place: str, run: Path, channel: str, keys: tuple[Path, ...]) -> list[str]:
    """Return what comes next, on this machine and on devices."""
    public = [str(key).removesuffix(".pem") + ".pub.pem" for key in keys]
    signs = "".join(f" --sign {shlex.quote(str(key))}" for key in keys)
    trusts = "".join(f" --trust {shlex.quote(Path(key).name)}" for key in public)
    named = "" if channel == "stable" else f" --channel {channel}"
    where, rounds = shlex.quote(place), shlex.quote(f"{run}/round_NN")
    return [
        "next, here, for each new round:",
        f"  dpu-fleet publish {rounds} --to {where}{named}{signs}",
        "next, on each device, with the URL by which devices read this place"
        + (f", and with {', '.join(public)}:" if public else ":"),
        f"  dpu-edge --store STORE init URL{named}{trusts}",
        f"  dpu-edge --store STORE sync URL FOLDER{named} --every 3600",
        "  dpu-edge --store STORE agent FOLDER",
    ]
