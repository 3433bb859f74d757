# SPDX-License-Identifier: Apache-2.0
"""``dpu-edge sync``: fetch what leads to the newest release of a channel."""

import random
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.cli.network import network_options
from edge_runtime.commandline import emit, emit_line, json_option, say
from edge_runtime.errors import DpuError, SyncError
from edge_runtime.exit_codes import message_of
from edge_runtime.parameters import Seconds
from edge_runtime.sizes import SIZE_WORDS, is_size, parse_size

if TYPE_CHECKING:
    from edge_runtime.sync.sync import Sync, Synced
    from edge_runtime.sync.tuf import TufClient
    from edge_runtime.sync.uploads import Uploads

_FIRST_WAIT_S, _LONGEST_S, _LONGEST_PERMANENT_S = 10.0, 3600.0, 6 * 3600.0


def _budgets(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> dict[str, int]:
    found = {}
    for value in values:
        size, _, span = value.partition("/")
        if span not in ("day", "month") or not is_size(size):
            raise click.BadParameter(
                f"found {value!r}, expected 200KB/day or 2MB/month; sizes are "
                f"{SIZE_WORDS}",
                ctx,
                param,
            )
        found[f"{span}_bytes"] = parse_size(size)
    return found


@click.command()
@click.argument("url", metavar="URL|DIR")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--every",
    envvar="DPU_EVERY",
    show_envvar=True,
    metavar="SPAN",
    type=Seconds(1),
    help="Look again so often, such as 1h or 3600 (seconds), with some jitter; by "
    "default once.",
)
@click.option(
    "--device",
    envvar="DPU_DEVICE",
    show_envvar=True,
    help="This device's id.  [default: /etc/machine-id]",
)
@click.option(
    "--group",
    envvar="DPU_GROUP",
    show_envvar=True,
    default="",
    show_default=False,
    help="The group that this device belongs to.",
)
@click.option(
    "--budget",
    "budgets",
    envvar="DPU_BUDGET",
    show_envvar=True,
    multiple=True,
    metavar="SIZE/day|SIZE/month",
    callback=_budgets,
    help="What it may send and receive (repeatable).",
)
@click.option(
    "--metered",
    envvar="DPU_METERED",
    show_envvar=True,
    is_flag=True,
    help="Only poll: tell of a newer release, fetch nothing.",
)
@click.option(
    "--full",
    envvar="DPU_FULL",
    show_envvar=True,
    type=click.Choice(["never", "ask", "yes"]),
    default="never",
    show_default=True,
    help="Fetch full weights where no patch leads there.",
)
@click.option(
    "--report",
    envvar="DPU_REPORT",
    show_envvar=True,
    default="",
    show_default=False,
    metavar="URL|DIR|@FILE",
    help="Send this device's reports there; FILE holds an address that is a secret.",
)
@network_options
@click.option(
    "--tuf",
    envvar="DPU_TUF",
    show_envvar=True,
    is_flag=True,
    help="Believe the place's TUF repository, not its head.",
)
@click.option(
    "--tuf-root",
    envvar="DPU_TUF_ROOT",
    show_envvar=True,
    metavar="N.root.json",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Its first root, from whom you trust; once, it is kept.  [implies --tuf]",
)
@json_option
@click.pass_obj
def sync(  # noqa: PLR0913 - one argument for each option
    root: Path,
    /,
    url: str,
    folder: Path,
    *,
    channel: str,
    every: float | None,
    device: str | None,
    group: str,
    budgets: dict[str, int],
    metered: bool,
    full: str,
    report: str,
    tuf: bool,
    tuf_root: Path | None,
    as_json: bool,
    **network: str,
) -> None:
    """Fetch what leads to the newest release of a channel into the agent's FOLDER.

    URL is the model's own folder, as dpu-fleet publishes it. Fetched are the patches
    with the fewest bytes from where this device is; what is cut goes on later. It
    applies nothing: that is the agent's part. Options may also come from the
    environment, as dpu-fleet provision writes it.
    """
    from edge_runtime.live.shared import device_id
    from edge_runtime.sync.desk import Full, SyncOptions, insist_on_trust
    from edge_runtime.sync.http import open_source
    from edge_runtime.sync.sync import Sync

    if not folder.is_dir():  # not made here: a stick may not be there
        raise click.BadParameter(
            f"{folder} is no folder; make it first", param_hint="FOLDER"
        )
    insist_on_trust(url, root)
    given = {name: value for name, value in network.items() if value}
    source = open_source(url, **given)
    options = SyncOptions(
        channel=channel,
        device=device or device_id(),
        group=group,
        metered=metered,
        full=Full(full),
        **budgets,
    )
    uploads = _uploads(report, options.device, given) if report else None
    client = _tuf_client(folder, tuf_root) if tuf or tuf_root else None
    looking = Sync(root, folder, source, options, uploads=uploads, tuf=client)
    if every is None:
        record, text = _told(looking.look())
        emit(record, as_json=as_json, text=text)
    else:
        _go_on(looking, every, as_json=as_json)


def _tuf_client(folder: Path, root: Path | None) -> "TufClient":
    from edge_runtime.sync.tuf import TufClient

    return TufClient(folder, root)


def _uploads(report: str, device: str, given: dict[str, str]) -> "Uploads":
    from edge_runtime.live.report import DEVICE_FORM
    from edge_runtime.sync.uploads import Uploads, open_outlet

    if not re.fullmatch(DEVICE_FORM, device):
        raise click.UsageError(
            f"found the device {device!r}; with --report it is a name of letters, "
            "digits, '.', '_' and '-': give --device"
        )
    return Uploads(open_outlet(report, **given), say)


def _told(found: "Synced") -> tuple[dict[str, Any], str]:
    """Return what a look came to, as data and in words."""
    head = found.head
    record: dict[str, Any] = asdict(found) | {"head": head and _summary(head)}
    where = f"{head.channel}: round {head.round}" if head else "nothing known"
    text = f"{where}, {found.result}"
    text += f" ({found.reason})" if found.reason else ""
    text += "".join(f"\n  {name}" for name in found.fetched)
    return record, f"{text}\n  {found.spent} bytes on the wire"


def _summary(head: Any) -> dict[str, Any]:
    names = ("channel", "version", "at", "expires", "counter", "round", "target")
    return {name: getattr(head, name) for name in names}


def _go_on(looking: "Sync", every: float, *, as_json: bool) -> None:
    """Look until nobody reads it; failures wait longer each time, and are told once."""
    wait, told = _FIRST_WAIT_S, ""
    while True:
        try:
            found = looking.look()
        # A full disk, a head that is not trusted or a locked folder too: whoever
        # starts this command again at once would only spend bytes.
        except (DpuError, OSError) as err:
            words = message_of(err)
            if words != told:
                say(words)
            told = words
            is_network = isinstance(err, SyncError) and not err.permanent
            longest = _LONGEST_S if is_network else _LONGEST_PERMANENT_S
            pause, wait = wait, min(2 * wait, longest)
        else:
            if (line := f"{found.result} {found.fetched}") != told:
                record, text = _told(found)
                emit_line(record, as_json=as_json, text=text)
            told, pause, wait = line, every, _FIRST_WAIT_S
        # Many devices that lost their server at once must not come back at once.
        time.sleep(pause * random.uniform(0.8, 1.2))
