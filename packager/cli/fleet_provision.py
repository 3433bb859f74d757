# SPDX-License-Identifier: Apache-2.0
"""``dpu-fleet provision``: keys and configurations for cards that are flashed."""

import re
from pathlib import Path
from typing import Any

import click

from edge_runtime.commandline import emit, json_option
from edge_runtime.errors import KeyFileError
from edge_runtime.formats.kinds import Kind
from edge_runtime.parameters import FileOf
from edge_runtime.reading import read_bounded
from edge_runtime.text import printable
from packager.cli.fleet_options import channel_option


def _prefix(ctx: click.Context, param: click.Parameter, value: str) -> str:
    from packager.fleet.provision import PREFIX_FORM

    if not re.fullmatch(PREFIX_FORM, value):
        words = f"found {value!r}, expected letters, digits, '.', '_' and '-'"
        raise click.BadParameter(words, ctx, param)
    return value


def _address(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Insist on an address that means the same from wherever a device is started."""
    if value and not re.match(r"(https?|file)://.|/", value):
        words = f"found {value!r}, expected https://, http://, file:// or /FOLDER"
        raise click.BadParameter(words, ctx, param)
    return value


@click.command()
@click.argument("count", metavar="N", type=click.IntRange(1, 1_000_000))
@click.option(
    "-o",
    "--output",
    "folder",
    required=True,
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to; never below a folder that is published.",
)
@click.option(
    "--prefix",
    metavar="NAME",
    default="board",
    show_default=True,
    callback=_prefix,
    help="What their names begin with: board-0001 and so on.",
)
@click.option(
    "--url",
    metavar="URL",
    required=True,
    callback=_address,
    help="Where they look for releases.",
)
@channel_option
@click.option(
    "--group", metavar="NAME", default="", show_default=False, help="Their group."
)
@click.option(
    "--report",
    metavar="URL|DIR|@FILE",
    default="",
    show_default=False,
    callback=_address,
    help="Where they put their reports.",
)
@click.option(
    "--trust",
    "trusted",
    metavar="KEY.pub.pem|N.root.json",
    multiple=True,
    type=FileOf(Kind.PUBLIC_KEY, Kind.KEY_LIST),
    help="A copy for each device, to be trusted there (repeatable).",
)
@click.option(
    "--ca",
    "certificates",
    is_flag=True,
    help="Client certificates too, by an authority of your own in DIR/ca.",
)
@json_option
def provision(  # noqa: PLR0913 - one argument for each option
    count: int,
    *,
    folder: Path,
    prefix: str,
    url: str,
    channel: str,
    group: str,
    report: str,
    trusted: tuple[Path, ...],
    certificates: bool,
    as_json: bool,
) -> None:
    """Make a key and a configuration for each of N devices, to be put on their cards.

    Each has a folder: device.key goes into its store, the rest to /etc/dpu-edge.
    DIR/keys holds the public halves, by which their reports and proofs are checked.
    What is there stays as it is: run again after a cut, or with a larger N.
    """
    from packager.fleet.provision import KEYS, Order
    from packager.fleet.provision import provision as make

    settings = {
        "DPU_URL": url,
        "DPU_CHANNEL": channel,
        "DPU_GROUP": group,
        "DPU_REPORT": report,
    }
    copies = {path.name: _read(path) for path in trusted}
    if len(copies) < len(trusted):
        raise click.UsageError("two files of --trust have the same name; rename one")
    order = Order(
        prefix=prefix, settings=settings, trusted=copies, certificates=certificates
    )
    made = make(folder, count, order)
    record: dict[str, Any] = {
        "folder": str(folder),
        "devices": count,
        "made": made,
        "keys": str(folder / KEYS),
        "authority": str(folder / "ca" / "ca.pem") if certificates else None,
    }
    where = printable(folder)
    what = f"{made[0]} to {made[-1]}" if made else "all were there already"
    lines = [
        f"{len(made)} of {count} devices made in {where}: {what}",
        f"  public keys   {where}/{KEYS}, for check-proof and watch",
        *([f"  web server    {where}/ca/ca.pem"] if certificates else []),
        f"private keys are in {where}: keep it off servers; remove what is on cards",
    ]
    emit(record, as_json=as_json, text="\n".join(lines))


def _read(path: Path) -> bytes:
    return read_bounded(path, "key_list_bytes", str(path), KeyFileError)
