# SPDX-License-Identifier: Apache-2.0
"""``dpu-fleet watch``, ``resume`` and ``revert``: how a release does, and what then."""

import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.commandline import emit, emit_line, json_option, say
from edge_runtime.errors import DpuError, RoundError
from edge_runtime.files import Files
from edge_runtime.formats.signing import Trust
from edge_runtime.parameters import NewFile
from edge_runtime.reading import read_key_file
from edge_runtime.times import utc
from packager.cli.fleet_options import Span, channel_option, run_or_ledger, sign_option
from packager.cli.fleet_publish import publish
from packager.cli.fleet_tuf import follow_head, tuf_option
from packager.cli.keys import read_signers
from packager.cli.options import (
    PRIVATE_KEY,
    PUBLIC_KEY,
    former_option,
    insist_apart,
    insist_ending,
    runs_option,
    single_publisher_option,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from packager.fleet.place import Place
    from packager.fleet.watch import Limit


class Percent(click.ParamType[float]):
    """A share such as 2% or 0.5%."""

    name = "share"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        """Return it as a fraction."""
        found = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,3})?)%", str(value))
        if found is None or float(found[1]) > 100:
            self.fail(f"found {value!r}, expected 2% or 0.5%", param, ctx)
        return float(found[1]) / 100


@dataclass(frozen=True, slots=True)
class _Watch:
    """What is watched, and what is done about it."""

    place: "Place"
    channel: str
    trust: Trust
    devices: Path
    database: Path
    page: Path | None
    run: Path | None
    limit: "Limit | None"
    pauser: "Ed25519PrivateKey | None"


@click.command()
@click.argument("url", metavar="URL|DIR")
@channel_option
@click.option(
    "--devices",
    required=True,
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The devices' public keys, DEVICE.pub.pem, as 'dpu-fleet provision' writes.",
)
@click.option(
    "--trust",
    "trusted",
    metavar="KEY.pub.pem",
    multiple=True,
    type=PUBLIC_KEY,
    help="Insist that these keys signed the head (repeatable).",
)
@click.option(
    "--db",
    "database",
    default="fleet.db",
    show_default=True,
    type=NewFile(),
    help="The database: SQLite.",
)
@click.option(
    "-o",
    "--output",
    "page",
    type=NewFile(),
    help="Write the fleet's page too, as 'dpu-fleet show -o' does.",
)
@click.option(
    "--run",
    "name",
    metavar="RUN",
    help="The run whose ledger knows the earlier releases.",
)
@runs_option
@click.option(
    "--halt-at",
    "share",
    type=Percent(),
    help="Pause the channel when a release fails on more of the devices that tried it.",
)
@click.option(
    "--halt-least",
    "least",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="But only once it failed on so many devices.",
)
@click.option(
    "--pause-key",
    metavar="KEY.pem",
    type=PRIVATE_KEY,
    help="The private half of a key that was published with --pauser.",
)
@click.option("--once", is_flag=True, help="Look once, for cron and timers.")
@click.option(
    "--every", type=Span(), default="60s", show_default=True, help="Look so often."
)
@single_publisher_option
@json_option
def watch(  # noqa: PLR0913 - one argument for each option
    url: str,
    *,
    channel: str,
    devices: Path,
    trusted: tuple[Path, ...],
    database: Path,
    page: Path | None,
    name: str | None,
    runs: Path,
    share: float | None,
    least: int,
    pause_key: Path | None,
    once: bool,
    every: int,
    single_publisher: bool,
    as_json: bool,
) -> None:
    """Collect what devices reported, and halt a release that fails.

    Counted are devices whose key is in --devices, each once, by its newest report about
    the channel's release. Everything else is kept apart and triggers nothing.
    """
    from edge_runtime.formats.signing import trust_keys
    from packager.fleet.address import open_place
    from packager.fleet.watch import Limit

    insist_apart(page, database)
    if page:
        insist_ending(page, ".html")
    if (share is None) != (pause_key is None):
        raise click.UsageError("--halt-at and --pause-key go together")
    pems = {str(p): read_key_file(p) for p in trusted}
    signers, _ = read_signers([pause_key] if pause_key else [])
    watched = _Watch(
        open_place(url, single_publisher=single_publisher, say=say),
        channel,
        trust_keys(pems, max(1, len(pems))),
        devices,
        database,
        page,
        run_or_ledger(name, runs) if name else None,
        None if share is None else Limit(share, least),
        signers[0] if signers else None,
    )
    if not trusted:
        say("nobody's signature is asked of the head: give --trust release.pub.pem")
    if once:
        record = _look(watched)
        emit(record, as_json=as_json, text=_words(record))
    else:
        _go_on(watched, every, as_json=as_json)


def _go_on(watched: _Watch, every: int, *, as_json: bool) -> None:
    """Look for ever, until nobody reads it; what fails is said once, and tried again.

    Each time something is new, one line of JSON or a few of text.
    """
    told: object = None
    while True:
        try:
            record = _look(watched)
        except (DpuError, OSError) as err:
            if (words := str(err)) != told:
                say(words)
            told = words
        else:
            state = [record[key] for key in ("version", "tried", "failed", "paused")]
            new = [record[key] for key in ("proved", "unproved", "refused")]
            if state != told or any(new):
                emit_line(record, as_json=as_json, text=_words(record))
            told = state
        time.sleep(every)


def _look(watched: _Watch) -> dict[str, Any]:
    from packager.fleet import watch as watching
    from packager.fleet.dashboard import dashboard
    from packager.fleet.database import add_releases, open_database
    from packager.fleet.reports import read_keys
    from packager.ledger import read_ledger

    now, place, channel = int(time.time()), watched.place, watched.channel
    with open_database(watched.database) as connection:
        trust = watched.trust
        signed = watching.look_at_head(connection, place, channel, trust)
        if watched.run:
            known = read_ledger(watched.run).released(signed.head.model)
            add_releases(connection, known, signed.head.model)
        keys = read_keys(watched.devices)
        found = watching.collect(connection, place, keys, now=now)
        # Looked at again: it may have been replaced while reports were read.
        signed = watching.look_at_head(connection, place, channel, trust)
        state, halted = watching.standing(connection, signed), False
        if watched.limit and watched.pauser:
            rest = watched.limit, watched.pauser
            halted = watching.halt(connection, place, signed, *rest, now=now)
        if halted:
            signed = watching.look_at_head(connection, place, channel, trust)
        if watched.page:
            html = dashboard(connection, now=now).encode()
            Files().replace(watched.page, html, durable=False)
    head = signed.head
    return asdict(found) | {
        "at": now,
        "channel": head.channel,
        "version": head.version,
        "counter": head.counter,
        "round": head.round,
        "tried": state.tried,
        "failed": state.failed,
        "halted": halted,
        "paused": signed.is_paused(),
    }


def _words(record: Mapping[str, Any]) -> str:
    tried, failed = record["tried"], record["failed"]
    share = f" ({failed / tried:.1%})" if tried else ""
    state = ", paused" * (record["paused"] and not record["halted"])
    state += ", halted now" * record["halted"]
    lines = [
        f"{record['channel']}, version {record['version']}: round {record['round']} "
        f"was tried by {tried} devices and failed on {failed}{share}{state}",
        f"reports: {record['proved']} new, {record['unchanged']} known, "
        f"{record['unproved']} of nobody known, {record['refused']} refused",
        *(f"  {path}: {reason}" for path, reason in record["reasons"].items()),
    ]
    return "\n".join(lines)


@click.command()
@click.argument("url", metavar="URL|DIR")
@channel_option
@sign_option("The keys that releases are signed with (repeatable).")
@tuf_option
@single_publisher_option
@json_option
def resume(
    url: str,
    *,
    channel: str,
    keys: tuple[Path, ...],
    tuf: Path | None,
    single_publisher: bool,
    as_json: bool,
) -> None:
    """Go on with a paused rollout.

    Shares that were to come come later by as long as the pause was. Devices that had
    reported before no longer count for 'dpu-fleet watch --halt-at'.
    """
    from packager.fleet.address import open_place
    from packager.fleet.after_halt import resume as resume_channel
    from packager.fleet.channel import Channel

    signers, names = read_signers(keys)
    place = open_place(url, single_publisher=single_publisher, say=say)
    own = Channel(name=channel, signers=signers)
    head, changed = resume_channel(place, own, now=(now := int(time.time())))
    words = f"goes on, version {head.version}" if changed else "not paused"
    for share, start in head.rollout.steps if head.rollout else ():
        words += f"; {share / 10:g}% from {utc(start)}" * (start > now)
    record = {"to": place.name, "channel": channel, "changed": changed}
    record |= {"version": head.version, "signed_by": names}
    if told := follow_head(place, tuf, head, own.lifetime_s):
        record["tuf"] = told
    emit(record, as_json=as_json, text=f"{channel}: {words}")


@click.command()
@click.argument("name", metavar="[ROUND]", required=False)
@runs_option
@click.option("--to", required=True, metavar="URL|DIR", help="Where the channel lies.")
@channel_option
@sign_option("The keys that releases are signed with (repeatable).")
@former_option
@click.option("--dry-run", is_flag=True, help="Do everything but write.")
@tuf_option
@single_publisher_option
@json_option
@click.pass_context
def revert(
    context: click.Context,
    /,
    *,
    name: str | None,
    runs: Path,
    to: str,
    channel: str,
    single_publisher: bool,
    **options: Any,
) -> None:
    """Answer a bad release: older weights become a newer release, for all at once.

    Those of ROUND, by default those of the release before. Its counter is right by
    itself, and its groups are those of the bad release.
    """
    from edge_runtime.formats.model_folder import round_name
    from edge_runtime.sync.head_file import read_head
    from edge_runtime.sync.paths import head_path
    from packager.fleet.address import open_place
    from packager.fleet.after_halt import release_before
    from packager.fleet.successor import ALL_NOW

    place = open_place(to, single_publisher=single_publisher, say=say)
    if (found := place.read(head_path(channel))) is None:
        raise RoundError(f"no channel {channel!r} in {place.name}: nothing to revert")
    signed = read_head(found[0])  # whose it is, is for publish to insist on
    head, name = signed.head, name or release_before(runs, signed)
    done = f"{name} is the newest release already; to go back further, name the ROUND"
    news = f"round {head.round} is taken back: {name} becomes the newest release"
    say(done if Path(name).name == round_name(head.round) else news)
    context.invoke(
        publish,
        name=name,
        runs=runs,
        to=to,
        channel=channel,
        revert=True,
        after=head.version,
        shares=ALL_NOW,
        groups=head.rollout.groups if head.rollout else (),
        single_publisher=single_publisher,
        **options,
    )
