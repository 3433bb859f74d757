# SPDX-License-Identifier: Apache-2.0
"""``dpu-fleet publish``: a round becomes the newest release of a channel."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.commandline import emit, json_option, say
from edge_runtime.errors import RoundError
from edge_runtime.formats.signing import read_public
from packager.cli.fleet_options import Shares, Skips, Span, channel_option, sign_option
from packager.cli.fleet_tuf import follow_head, tuf_option, tuf_text
from packager.cli.keys import read_signers
from packager.cli.options import (
    KEY_LIST,
    PUBLIC_KEY,
    former_option,
    runs_option,
    single_publisher_option,
)

if TYPE_CHECKING:
    from packager.fleet.publish import Published


@click.command()
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
    help="How long devices take the head for the newest; publish again before that, "
    "or to shorten it.",
)
@click.option(
    "--rollout",
    "shares",
    type=Shares(),
    default=None,
    help="Shares of the devices, and when: 1%,10%@24h,100%@48h. A release that is "
    "published again with neither this nor --group keeps both; 100% ends both.  "
    "[default: all, now]",
)
@click.option(
    "--group",
    "groups",
    metavar="NAME",
    multiple=True,
    help="For this group alone (repeatable).",
)
@click.option(
    "--version-after",
    "above",
    metavar="N",
    type=click.IntRange(0),
    default=0,
    show_default=False,
    help="Where a place was lost: the head's version that devices have seen.",
)
@click.option(
    "--pauser",
    "pausers",
    metavar="KEY.pub.pem",
    multiple=True,
    type=PUBLIC_KEY,
    help="Let this key pause the rollout, and do nothing else (repeatable).",
)
@former_option
@click.option(
    "--key-list",
    "lists",
    metavar="N.root.json",
    multiple=True,
    type=KEY_LIST,
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
    above: int,
    pausers: tuple[Path, ...],
    former: tuple[Path, ...],
    lists: tuple[Path, ...],
    revert: bool,
    tuf: Path | None,
    single_publisher: bool,
    dry_run: bool,
    as_json: bool,
    after: int = 0,
) -> None:
    """Make ROUND the newest release of a channel.

    The patches lie under their SHA-256, so they may be cached for ever; the head,
    CHANNEL.head, is the one file that changes.
    """
    from packager.fleet.address import open_place
    from packager.fleet.channel import Channel, add_list, read_lists
    from packager.fleet.publish import publish as publish_round
    from packager.rounds.folder import read_round
    from packager.rounds.names import find_round

    signers, names = read_signers(keys)
    if not signers:
        say("nobody signs this: devices that trust keys will refuse it")
    place = open_place(to, single_publisher=single_publisher, say=say)
    round_ = read_round(find_round(name, runs))
    given = read_lists(place, lists)
    for data in given if not dry_run else ():
        add_list(place, data)
    done = publish_round(
        round_,
        place,
        Channel(
            name=channel,
            signers=signers,
            lifetime_s=expires,
            skips=skip,
            shares=shares or (),
            groups=groups,
            above=above,
            after=after,
            pausers=tuple(map(read_public, pausers)),
            former=tuple(map(read_public, former)),
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
    if done.halted:  # behind TUF, which may have lagged behind the head
        raise RoundError(done.halted)
    emit(record, as_json=as_json, text=text)
    if dry_run and not as_json:
        say("dry run: nothing was written")


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
    from edge_runtime.formats.model_folder import round_name

    head, name = done.head, round_name(done.head.round)
    lines = [
        f"patch   {offer.start} -> {name}  {offer.way.size:>9,} B  "
        + ("new" if new else "there already")
        for offer, new in done.offered
    ]
    if done.bundle:
        lines.append(f"bundle  {name}  {done.bundle:,} B")
    state = f"{done.size} B" if done.changed else "as it was"
    lines.append(f"head    {head.channel}, version {head.version}, {state}")
    return "\n".join(lines)
