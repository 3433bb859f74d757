# SPDX-License-Identifier: Apache-2.0
"""``dpu-fleet``: publish once, and any number of devices catch up."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.commandline import (
    CONTEXT,
    EXIT_CODE_HELP,
    Group,
    emit,
    json_option,
    say,
)
from packager.cli.fleet_check import check
from packager.cli.fleet_init import init
from packager.cli.fleet_options import (
    Shares,
    Skips,
    Span,
    channel_option,
    sign_option,
)
from packager.cli.fleet_provision import provision
from packager.cli.fleet_prune import prune
from packager.cli.fleet_show import show
from packager.cli.fleet_tuf import follow_head, renew, rotate, tuf_option, tuf_text
from packager.cli.fleet_watch import resume, revert, watch
from packager.cli.keys import read_signers
from packager.cli.options import (
    PRIVATE_KEY,
    runs_option,
    single_publisher_option,
)

if TYPE_CHECKING:
    from packager.fleet.publish import Published


@click.group(cls=Group, context_settings=CONTEXT, epilog=EXIT_CODE_HELP)
@click.version_option(package_name="dpu-edge")
def fleet() -> None:
    """Publish releases of a run where any number of devices look for them."""


@fleet.command()
@click.argument("name", metavar="ROUND")
@runs_option
@click.option(
    "--to",
    required=True,
    metavar="URL|DIR",
    help="The model's own folder, or s3://, gs:// or az:// (docs/fleet.md).",
)
@channel_option
@sign_option("Sign patches, bundle and head with this private key (repeatable).")
@click.option(
    "--skip",
    type=Skips(),
    default="2,4,8",
    show_default=True,
    help="Patches from so many rounds back too, for devices that missed some.",
)
@click.option(
    "--expires",
    type=Span(),
    default="30d",
    show_default=True,
    help="How long devices take the head for the newest; publish again before that.",
)
@click.option(
    "--rollout",
    "shares",
    type=Shares(),
    default=None,
    help="Shares of the devices, and when: 1%,10%@24h,100%@48h.  [default: all, now]",
)
@click.option(
    "--group", "groups", multiple=True, help="For this group alone (repeatable)."
)
@click.option(
    "--pauser",
    "pausers",
    metavar="KEY.pub.pem",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Let this key pause the rollout, and do nothing else (repeatable).",
)
@click.option(
    "--former",
    metavar="KEY.pub.pem",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Go on from a head that this key signed, now that others sign (repeatable).",
)
@click.option(
    "--key-list",
    "lists",
    metavar="N.root.json",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Give devices this key list too (repeatable).",
)
@click.option("--revert", is_flag=True, help="Though the channel is at a newer round.")
@tuf_option
@single_publisher_option
@click.option("--dry-run", is_flag=True, help="Do everything but write.")
@json_option
def publish(  # noqa: PLR0913 - one argument for each option
    name: str,
    *,
    runs: Path,
    to: str,
    channel: str,
    keys: tuple[Path, ...],
    skip: tuple[int, ...],
    expires: int,
    shares: tuple[tuple[int, int], ...] | None,
    groups: tuple[str, ...],
    pausers: tuple[Path, ...],
    former: tuple[Path, ...],
    lists: tuple[Path, ...],
    revert: bool,
    tuf: Path | None,
    single_publisher: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make ROUND the newest release of a channel.

    The patches lie under their SHA-256, so they may be cached for ever; the head,
    CHANNEL.head, is the one file that changes.
    """
    from edge_runtime.formats.signing import load_public
    from edge_runtime.trust.root import load_list
    from packager.fleet.address import open_place
    from packager.fleet.channel import Channel, add_list
    from packager.fleet.publish import publish as publish_round
    from packager.rounds.folder import find_round, read_round

    signers, names = read_signers(keys)
    if not signers:
        say("nobody signs this: devices that trust keys will refuse it")
    place = open_place(to, single_publisher=single_publisher, say=say)
    for path in lists if not dry_run else ():
        add_list(place, load_list(path))
    done = publish_round(
        read_round(find_round(name, runs)),
        place,
        Channel(
            name=channel,
            signers=signers,
            lifetime_s=expires,
            skips=skip,
            shares=shares or (),
            groups=groups,
            pausers=tuple(load_public(p.read_bytes(), str(p)) for p in pausers),
            former=tuple(load_public(p.read_bytes(), str(p)) for p in former),
        ),
        now=int(time.time()),
        revert=revert,
        dry_run=dry_run,
        say=say,
    )
    record = _record(done, place.name) | {"signed_by": names, "dry_run": dry_run}
    text = _text(done)
    if not dry_run and (told := follow_head(place, tuf, done.head, expires)):
        record["tuf"] = told
        text += f"\n{tuf_text(told)}"
    emit(record, as_json=as_json, text=text)
    if dry_run and not as_json:
        say("dry run: nothing was written")


@fleet.command()
@click.argument("to", metavar="URL|DIR")
@channel_option
@click.option(
    "--key",
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


def _record(done: "Published", to: str) -> dict[str, Any]:
    head = done.head
    return {
        "to": to,
        "channel": head.channel,
        "version": head.version,
        "counter": head.counter,
        "round": head.round,
        "target": head.target,
        "expires": head.expires,
        "changed": done.changed,
        "head_bytes": done.size,
        "bundle_bytes": done.bundle,
        "patches": [
            {
                "from": offer.start,
                "bytes": offer.way.size,
                "sha256": offer.way.sha256,
                "new": new,
                "listed": offer.way in head.ways,
            }
            for offer, new in done.offered
        ],
    }


def _text(done: "Published") -> str:
    head = done.head
    lines = [
        f"patch   {offer.start} -> round_{head.round:02d}  {offer.way.size:>9,} B  "
        + ("new" if new else "there already")
        for offer, new in done.offered
    ]
    if done.bundle:
        lines.append(f"bundle  round_{head.round:02d}  {done.bundle:,} B")
    state = f"{done.size} B" if done.changed else "as it was"
    return "\n".join(
        [*lines, f"head    {head.channel}, version {head.version}, {state}"]
    )


for _command in (init, provision, check, show, prune, watch, resume, revert):
    fleet.add_command(_command)
for _command in (renew, rotate):
    fleet.add_command(_command)
