# SPDX-License-Identifier: Apache-2.0
"""``dpu-edge trust``: whose releases this device takes, and how that changes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.commandline import (
    CONTEXT,
    Answer,
    Group,
    emit,
    json_option,
    on_device,
    progress,
)
from edge_runtime.errors import DpuError, add_details, prefix_errors
from edge_runtime.formats.kinds import Kind
from edge_runtime.parameters import FileOf
from edge_runtime.text import printable

if TYPE_CHECKING:
    from edge_runtime.formats.signing import Trust
    from edge_runtime.trust import Root
    from edge_runtime.update.device import Device


@click.group(cls=Group, context_settings=CONTEXT)
def trust() -> None:
    """Show or replace the keys whose releases this device takes."""


@click.command()
@on_device
def show(device: "Device") -> Answer:
    """Show the keys, the key list that names them, and the lists before it."""
    return _shown(device)


def _shown(device: "Device") -> Answer:
    from edge_runtime.times import utc

    state = device.store.state
    record: dict[str, Any] = {"releases": _role(state.trust), "key_list": None}
    lines = [f"releases      {_words(record['releases'])}"]
    if state.key_list is None:
        lines.append(
            "key list      none: these keys stay until 'dpu-edge trust add' takes one"
        )
        return record, "\n".join(lines)
    key_list, now = state.key_list, utc()
    root = key_list.root
    record["key_list"] = key_list.summary(now) | {
        "issued": root.issued or None,
        "sha256": root.sha256,
        "next_list": _role(root.keys),
        "newest_signed_time": key_list.seen or None,
        "now": key_list.now(now),
        "history": [
            {"version": e.version, "sha256": e.sha256, "at": e.at}
            for e in key_list.history
        ],
    }
    lines += [
        f"next list     {_words(record['key_list']['next_list'])}",
        f"key list      {root.version}, issued {root.issued or 'at an unknown time'}",
        f"expires       {root.expires}"
        + ("  EXPIRED: no release is taken" if key_list.is_expired(now) else ""),
        f"signed time   {key_list.seen or 'none seen'}; now is {key_list.now(now)}",
        "history",
        *(f"  {e.at}  list {e.version}  {e.sha256[:12]}" for e in key_list.history),
    ]
    return record, "\n".join(lines)


def _role(trust: "Trust") -> dict[str, Any]:
    from edge_runtime.trust import tuf_key_id

    return {
        "threshold": trust.threshold if trust.keys else 0,
        "keys": [
            {"key_id": name, "public": key, "tuf_key_id": tuf_key_id(key)}
            for name, key in zip(trust.ids, trust.keys, strict=True)
        ],
    }


def _words(role: dict[str, Any]) -> str:
    names = ", ".join(key["key_id"] for key in role["keys"])
    return (
        f"{role['threshold']} of {names}" if names else "anybody's: nothing is checked"
    )


@click.command()
@click.argument(
    "paths",
    metavar="N.root.json...",
    nargs=-1,
    required=True,
    type=FileOf(Kind.KEY_LIST),
)
@click.option(
    "--lapsed",
    is_flag=True,
    help="Take it although the present list expired before it was signed.",
)
@click.option(
    "--trust-on-first-use",
    "first_use",
    is_flag=True,
    help="Take it on a device that trusts nobody so far.",
)
@json_option
@click.pass_obj
def add(
    root: Path, paths: tuple[Path, ...], *, lapsed: bool, first_use: bool, as_json: bool
) -> None:
    """Take key lists, in the order given. A list that is refused changes nothing.

    It ends at the first list that is refused; those before it stay taken. From then on
    the device takes what the keys of the newest list signed, and nothing that only
    other keys signed. 'dpu-patch trust' makes lists.
    """
    from edge_runtime.trust import load_list
    from edge_runtime.update.device import Device

    device = Device.open(root)
    results: list[dict[str, Any]] = []
    for path in paths:
        try:
            with prefix_errors(path.name):
                data = load_list(path)
                result = device.add_list(data, lapsed=lapsed, first_use=first_use)
        except (DpuError, OSError) as err:
            add_details(err, lists=results)  # the keys of these count from now on
            raise
        results.append({"file": str(path), "result": result})
        if not as_json:
            progress(f"{printable(path.name)}: {result}")
    record, text = _shown(device)
    emit({"lists": results} | record, as_json=as_json, text=text)


def read_trust(paths: tuple[Path, ...], threshold: int) -> "Trust | Root":
    """Read whom a new device is to trust: public keys, or one key list.

    Raises:
        UsageError: A key list beside other files, or beside a threshold of its own.
        KeyFileError: A file does not hold a public key.
        KeyListError: A key list is damaged.
        TrustError: A key list is not signed by its own keys.
    """
    from edge_runtime.errors import KeyFileError
    from edge_runtime.formats.kinds import kind_of
    from edge_runtime.formats.signing import trust_keys
    from edge_runtime.reading import read_bounded
    from edge_runtime.trust import first_root, is_list

    files = {
        str(path): read_bounded(path, "key_list_bytes", str(path), KeyFileError)
        for path in paths
    }
    # A damaged list is no PEM file either: its name tells, or what is left of it.
    listed = [
        name
        for name, data in files.items()
        if is_list(data) or kind_of(Path(name)) is Kind.KEY_LIST
    ]
    if not listed:
        return trust_keys(files, threshold)
    if len(files) > 1 or threshold > 1:
        raise click.UsageError(
            "a key list says itself which keys and how many of them: give it alone, "
            "without --threshold"
        )
    with prefix_errors(listed[0]):
        return first_root(files[listed[0]])
