# SPDX-License-Identifier: Apache-2.0
"""``dpu-fleet publish --tuf``, ``dpu-fleet renew`` and ``dpu-fleet rotate``."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.commandline import emit, json_option, say
from edge_runtime.times import utc
from packager.cli.fleet_options import Span
from packager.cli.keys import ask_passphrase, read_signers
from packager.cli.options import PRIVATE_KEY, single_publisher_option

if TYPE_CHECKING:
    from edge_runtime.sync.head import Head
    from packager.fleet.place import Place

FOLDER = click.Path(file_okay=False, path_type=Path)


def tuf_option(command: Any) -> Any:
    """Add ``--tuf`` to a command that publishes."""
    return click.option(
        "--tuf",
        metavar="DIR",
        type=FOLDER,
        help="Publish the files as a TUF repository too, signed with the keys in DIR; "
        "made the first time.",
    )(command)


def follow_head(
    place: "Place", path: Path | None, head: "Head", lifetime_s: int
) -> dict[str, Any] | None:
    """Bring a place's TUF repository to a new head, or say that it was not."""
    from packager.fleet.tuf_files import FOLDER as WHERE

    if path is not None:
        return mirror_head(place, path, head, lifetime_s)
    if place.read(f"{WHERE}timestamp.json") is not None:
        say("devices that believe TUF do not learn of it: again with --tuf DIR")
    return None


def mirror_head(
    place: "Place", path: Path, head: "Head | None", lifetime_s: int
) -> dict[str, Any]:
    """Bring a place's TUF repository to a head; return what became of it."""
    from packager.fleet.tuf import mirror
    from packager.fleet.tuf_keys import TufFolder, make_folder

    now = int(time.time())
    if head is not None and not path.exists():
        TufFolder(path, {}, {}).insist_outside(place.name)
        root = make_folder(path, now=now, passphrase=os.environ.get("DPU_PASSPHRASE"))
        say(
            f"{root} is for devices (--tuf-root); take {path}/root.pem off this machine"
        )
    done = mirror(
        place,
        TufFolder.open(path),
        head,
        now=now,
        lifetime_s=lifetime_s,
        ask=ask_passphrase,
    )
    return {
        "changed": done.changed,
        "root": done.root,
        "version": done.version,
        "expires": done.expires,
        "bytes": done.bytes,
    }


def tuf_text(found: dict[str, Any]) -> str:
    """Return what became of a TUF repository, for people."""
    state = f"{found['bytes']} B" if found["changed"] else "as it was"
    until = utc(found["expires"])[:10]
    which = f"version {found['version']}, root {found['root']}"
    return f"tuf     {which}, until {until}, {state}"


@click.command()
@click.argument("to", metavar="URL|DIR")
@click.option(
    "--tuf", metavar="DIR", required=True, type=FOLDER, help="The folder of its keys."
)
@click.option(
    "--expires",
    type=Span(),
    default="30d",
    show_default=True,
    help="How long devices take it for the newest.",
)
@single_publisher_option
@json_option
def renew(
    to: str, *, tuf: Path, expires: int, single_publisher: bool, as_json: bool
) -> None:
    """Renew a TUF repository, and send a new root; what it offers stays as it is.

    Only what is past half of its time, or holds for longer than --expires, is signed
    again. The key of releases is not needed: put it into a timer.
    """
    from packager.fleet.address import open_place

    place = open_place(to, single_publisher=single_publisher, say=say)
    found = mirror_head(place, tuf, None, expires)
    emit({"to": place.name} | found, as_json=as_json, text=tuf_text(found))


@click.command()
@click.argument("path", metavar="DIR", type=FOLDER)
@click.argument(
    "roles",
    metavar="[targets|snapshot|timestamp]...",
    nargs=-1,
    type=click.Choice(["targets", "snapshot", "timestamp"]),
)
@click.option(
    "--key",
    "--sign",
    "keys",
    metavar="ROOT.pem",
    multiple=True,
    type=PRIVATE_KEY,
    help="Sign the new root with this key of the root role (repeatable).",
)
@json_option
def rotate(
    path: Path, roles: tuple[str, ...], *, keys: tuple[Path, ...], as_json: bool
) -> None:
    """Make the next root of a TUF repository, with new keys for some roles.

    Without roles it is only valid for longer. It goes out with the next publication or
    dpu-fleet renew, once dpu-patch trust sign has added what signatures it lacks.
    """
    from packager.fleet.tuf_keys import rotate as rotate_keys

    owners, names = read_signers(keys)
    secret = os.environ.get("DPU_PASSPHRASE")
    now = int(time.time())
    made = rotate_keys(path, set(roles), now=now, owners=owners, passphrase=secret)
    record = {"root": str(made), "roles": sorted(set(roles)), "signed_by": names}
    text = f"{made}: signed by {', '.join(names) or 'nobody'}"
    emit(record, as_json=as_json, text=text)
