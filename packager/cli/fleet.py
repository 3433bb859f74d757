# SPDX-License-Identifier: Apache-2.0
"""``dpu-fleet``: publish once, and any number of devices catch up."""

import time
from pathlib import Path

import click

from edge_runtime.commandline import CONTEXT, Group, emit, json_option, say
from edge_runtime.exit_codes import EXIT_CODE_HELP
from packager.cli.fleet_check import check
from packager.cli.fleet_init import init
from packager.cli.fleet_options import channel_option
from packager.cli.fleet_provision import provision
from packager.cli.fleet_prune import prune
from packager.cli.fleet_publish import publish
from packager.cli.fleet_show import show
from packager.cli.fleet_tuf import renew, rotate
from packager.cli.fleet_watch import resume, revert, watch
from packager.cli.keys import read_signers
from packager.cli.options import PRIVATE_KEY, single_publisher_option


@click.group(cls=Group, context_settings=CONTEXT, epilog=EXIT_CODE_HELP)
@click.version_option(package_name="dpu-edge")
def fleet() -> None:
    """Publish releases of a run where any number of devices look for them."""


@fleet.command()
@click.argument("to", metavar="URL|DIR")
@channel_option
@click.option(
    "--key",
    "--sign",
    "key",
    metavar="KEY.pem",
    required=True,
    type=PRIVATE_KEY,
    help="The private half of a key that was published with --pauser.",
)
@single_publisher_option
@json_option
def pause(
    to: str, *, channel: str, key: Path, single_publisher: bool, as_json: bool
) -> None:
    """Halt a rollout: no device begins this release any more.

    It goes on by 'resume', or with a newer release. The key of releases is not needed.
    """
    from packager.fleet.address import open_place
    from packager.fleet.channel import pause as pause_channel

    (signer,), _ = read_signers([key])
    place = open_place(to, single_publisher=single_publisher, say=say)
    changed = pause_channel(place, channel, signer, now=int(time.time()))
    text = f"{channel}: " + ("paused" if changed else "paused already")
    record = {"to": place.name, "channel": channel, "changed": changed}
    emit(record, as_json=as_json, text=text)


for _command in (
    *(init, provision, publish, check, show, prune, watch, resume, revert),
    *(renew, rotate),
):
    fleet.add_command(_command)
