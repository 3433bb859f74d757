# SPDX-License-Identifier: Apache-2.0
"""What the commands that reach a channel share: options, and full weights from it."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.commandline import say
from edge_runtime.formats.kinds import Kind, refuse_others
from edge_runtime.parameters import FileOf

if TYPE_CHECKING:
    from edge_runtime.formats.signing import FirstUse, Trust
    from edge_runtime.store.state import State
    from edge_runtime.sync.source import Source
    from edge_runtime.trust import Root


def _channel(ctx: click.Context, param: click.Parameter, value: str) -> str:
    from edge_runtime.sync.head import CHANNEL_FORM

    if not re.fullmatch(CHANNEL_FORM, value):
        words = f"found {value!r}, expected a to z, 0 to 9, - and _"
        raise click.BadParameter(words, ctx, param)
    return value


_OPTIONS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("ca",), "DPU_CA", "PEM file of CAs that may sign the server's certificate."),
    (("cert",), "DPU_CERT", "PEM file of this device's own certificate."),
    (("key", "cert-key"), "DPU_CERT_KEY", "PEM file of its key, where it is apart."),
    (
        ("proxy",),
        "DPU_PROXY",
        "Proxy, http://[USER:PASSWORD@]HOST:PORT; by default as the environment says.",
    ),
)


def network_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--channel``, and how its server is reached, to a command."""
    for names, variable, words in reversed(_OPTIONS):
        command = click.option(
            *(f"--{name}" for name in names),
            names[0],
            envvar=variable,
            show_envvar=True,
            metavar="URL" if names == ("proxy",) else "FILE",
            default="",
            show_default=False,
            help=words,
        )(command)
    return click.option(
        "--channel",
        envvar="DPU_CHANNEL",
        show_envvar=True,
        default="stable",
        show_default=True,
        callback=_channel,
        help="The channel of the address.",
    )(command)


class BundleOrChannel(FileOf):
    """A bundle's file, or the address of a channel's place: a URL, or a folder."""

    name = "bundle"

    def __init__(self) -> None:
        super().__init__(Kind.BUNDLE)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        """Return a path of a bundle, or the address as text."""
        if "://" in str(value):
            return str(value)
        if Path(value).is_dir():
            if not any(Path(value).glob("*.head")):  # a place, wherever it was put
                refuse_others(Path(value), self.kinds)
            return str(value)
        return super().convert(value, param, ctx)


@contextmanager
def bundle_file(
    source: Path | str, store: Path, channel: str, device: "State", **network: str
) -> Iterator[tuple[Path, "Source | None", list[bytes]]]:
    """Give a bundle's file: as it is, or fetched from a channel and then removed.

    With it come the source, and the key lists that the device has to take first.

    What was cut is kept beside the store, in ``STORE.download``, and goes on when the
    same command is given again.

    Args:
        source: The file, or the address of the channel's place.
        store: Where it will be installed.
        channel: The channel.
        device: Whom the device trusts, and of which model it is.
        network: As :func:`edge_runtime.sync.http.open_source` takes it.
    """
    if isinstance(source, Path):
        yield source, None, []
        return
    from edge_runtime.files import Files
    from edge_runtime.sync.bundle import BundleSync, download_folder
    from edge_runtime.sync.desk import refuse_plain
    from edge_runtime.sync.http import open_source

    refuse_plain(source, device.trust)
    place = open_source(source, **{k: v for k, v in network.items() if v})
    with download_folder(store, Files()) as folder:
        sync = BundleSync(folder, place, channel, device)
        path, signed = sync.fetch()
        spent = f"{place.spent} bytes on the wire"
        say(f"round {signed.head.round} of {channel}: {spent}{sync.note}")
        yield path, place, sync.lists


def newcomer(trust: "Trust | FirstUse | Root") -> "State":
    """Return whom a device without a store trusts, as the network side asks for it."""
    from edge_runtime.formats.signing import Trust
    from edge_runtime.store.state import State
    from edge_runtime.times import utc
    from edge_runtime.trust import KeyList, Root

    if isinstance(trust, Root):
        return State("", "", trust=trust.releases, key_list=KeyList.begin(trust, utc()))
    return State("", "", trust=trust if isinstance(trust, Trust) else Trust())
