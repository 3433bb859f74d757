# SPDX-License-Identifier: Apache-2.0
"""``dpu-patch trust``: key lists on the command line."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.commandline import CONTEXT, Group, emit, json_option, say
from edge_runtime.errors import KeyFileError
from edge_runtime.formats.signing import read_public
from edge_runtime.parameters import NewFile
from packager.cli.keys import read_signers
from packager.cli.options import KEY_LIST, PRIVATE_KEY, PUBLIC_KEY
from packager.cli.trust_words import describe_list, key_ids, list_before, read_list

if TYPE_CHECKING:
    from edge_runtime.trust import SignedRoot

_sign = click.option(
    "--sign",
    "signers",
    metavar="KEY.pem",
    multiple=True,
    type=PRIVATE_KEY,
    help="Sign it with this private key at once (repeatable).",
)
_expires = click.option(
    "--expires",
    metavar="2y|DATE",
    default="2y",
    show_default=True,
    help="From when on devices take nothing that was signed later.",
)
_output = click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=NewFile(),
    help="Where to write.  [default: N.root.json, N being its number]",
)


@click.group(cls=Group, context_settings=CONTEXT)
def trust() -> None:
    """Make, change and sign the list of keys that devices trust.

    A list N.root.json is TUF root metadata. Its root keys sign the next list, its
    release keys sign patches and bundles. Keep root keys off the network.
    """


def _thresholds(command: Callable[..., Any]) -> Any:
    for name in ("release", "root"):
        command = click.option(
            f"--{name}-threshold",
            type=click.IntRange(1, 32),
            help=f"How many {name} keys have to sign.  [default: 1, or as before]",
        )(command)
    return command


def _changes(command: Callable[..., Any]) -> Any:
    for role, what in (("release", "releases"), ("root", "lists")):
        for verb, end, key in (("remove", "out", "KEY.pub.pem|ID"), ("add", "in", "")):
            words = f"{'Let this key sign' if end == 'in' else 'Take no more'} {what}"
            command = click.option(
                f"--{verb}-{role}",
                f"{role}_{end}",
                metavar=key or "KEY.pub.pem",
                multiple=True,
                help=f"{words}{'' if end == 'in' else ' of this key'} (repeatable).",
            )(command)
    return command


@trust.command()
@click.option(
    "--root",
    "owners",
    metavar="KEY.pub.pem",
    multiple=True,
    required=True,
    type=PUBLIC_KEY,
    help="A key that signs the next list (repeatable).",
)
@click.option(
    "--release",
    "releases",
    metavar="KEY.pub.pem",
    multiple=True,
    required=True,
    type=PUBLIC_KEY,
    help="A key that signs patches and bundles (repeatable).",
)
@_thresholds
@_expires
@_sign
@_output
@json_option
def init(  # noqa: PLR0913 - one parameter an option
    *,
    owners: tuple[Path, ...],
    releases: tuple[Path, ...],
    root_threshold: int | None,
    release_threshold: int | None,
    expires: str,
    signers: tuple[Path, ...],
    output: Path | None,
    as_json: bool,
) -> None:
    """Make list 1. A fleet that trusts single keys moves over if these sign it too."""
    from packager.key_lists import make_list

    data = make_list(
        [read_public(path) for path in owners],
        [read_public(path) for path in releases],
        _times(expires),
        _by_role(root_threshold, release_threshold),
    )
    _finish(data, signers, output or Path("1.root.json"), None, as_json=as_json)


@trust.command()
@click.argument("old", metavar="N.root.json", type=KEY_LIST)
@_changes
@_thresholds
@_expires
@_sign
@_output
@json_option
def rotate(  # noqa: PLR0913 - one parameter an option
    old: Path,
    *,
    root_in: tuple[str, ...],
    root_out: tuple[str, ...],
    release_in: tuple[str, ...],
    release_out: tuple[str, ...],
    root_threshold: int | None,
    release_threshold: int | None,
    expires: str,
    signers: tuple[Path, ...],
    output: Path | None,
    as_json: bool,
) -> None:
    """Make the list after N.root.json, with other keys or for a longer time."""
    given = read_list(old)
    roles = {"root": given.root.keys, "targets": given.root.releases}
    ins = {"root": root_in, "targets": release_in}
    outs = {"root": root_out, "targets": release_out}
    _follow(
        old,
        given,
        add={role: [_public_key(text, ()) for text in ins[role]] for role in roles},
        remove={
            role: [_public_key(text, keys.keys) for text in outs[role]]
            for role, keys in roles.items()
        },
        thresholds=_by_role(root_threshold, release_threshold),
        options=(expires, signers, output, as_json),
    )


@trust.command()
@click.argument("old", metavar="N.root.json", type=KEY_LIST)
@click.argument("keys", metavar="KEY.pub.pem|ID...", nargs=-1, required=True)
@_expires
@_sign
@_output
@json_option
def revoke(
    old: Path,
    *,
    keys: tuple[str, ...],
    expires: str,
    signers: tuple[Path, ...],
    output: Path | None,
    as_json: bool,
) -> None:
    """Make the list after N.root.json without some keys, in whatever role they are."""
    given = read_list(old)
    roles = {"root": given.root.keys, "targets": given.root.releases}
    known = (*given.root.keys.keys, *given.root.releases.keys)
    gone = {_public_key(text, known) for text in keys}
    if unknown := sorted(gone.difference(known)):
        raise KeyFileError(f"{old} does not name key {key_ids(unknown)}")
    _follow(
        old,
        given,
        add={},
        remove={
            role: [k for k in keys.keys if k in gone] for role, keys in roles.items()
        },
        thresholds={},
        options=(expires, signers, output, as_json),
    )


@trust.command()
@click.argument("path", metavar="N.root.json", type=KEY_LIST)
@click.option(
    "--key",
    "--sign",
    "signers",
    metavar="KEY.pem",
    multiple=True,
    required=True,
    type=PRIVATE_KEY,
    help="Sign with this private key (repeatable).",
)
@json_option
def sign(path: Path, *, signers: tuple[Path, ...], as_json: bool) -> None:
    """Sign a list, in place, beside the signatures that it has.

    Several people sign one after the other, each where their key is.
    """
    from edge_runtime.trust import load_list
    from packager.build import write_file
    from packager.key_lists import sign_list

    keys, names = read_signers(signers)
    data = sign_list(load_list(path), keys)
    write_file(data, path)
    record, text = describe_list(path, data, list_before(path))
    emit(record, as_json=as_json, text=text)
    _tell_idle(record, names)


@trust.command()
@click.argument("path", metavar="N.root.json", type=KEY_LIST)
@json_option
def show(path: Path, *, as_json: bool) -> None:
    """Show a list: its keys, who signed it, and what it still needs.

    The list before it is looked for beside it, under its own name.
    """
    from edge_runtime.trust import load_list

    record, text = describe_list(path, load_list(path), list_before(path))
    emit(record, as_json=as_json, text=text)


def _follow(
    old: Path,
    given: "SignedRoot",
    *,
    add: Mapping[str, Sequence[str]],
    remove: Mapping[str, Sequence[str]],
    thresholds: Mapping[str, int],
    options: tuple[str, tuple[Path, ...], Path | None, bool],
) -> None:
    from edge_runtime.trust import load_list
    from packager.key_lists import change_list

    expires, signers, output, as_json = options
    times, root = _times(expires), given.root
    if times[0] >= root.expires:
        say(
            f"list {root.version} expired {root.expires}: devices that hold it take "
            "this one only on the spot, by 'dpu-edge trust add --lapsed'"
        )
    changes = {"add": add, "remove": remove, "thresholds": thresholds}
    data = change_list(load_list(old), times, **changes)  # type: ignore[arg-type]
    path = output or old.with_name(f"{root.version + 1}.root.json")
    _finish(data, signers, path, given, as_json=as_json)


def _finish(
    data: bytes,
    signers: tuple[Path, ...],
    path: Path,
    before: "SignedRoot | None",
    *,
    as_json: bool,
) -> None:
    from packager.build import write_file
    from packager.key_lists import sign_list

    if path.exists():
        raise FileExistsError(f"{path} exists; a key list is never overwritten")
    keys, names = read_signers(signers)
    if keys:
        data = sign_list(data, keys)
    write_file(data, path)
    record, text = describe_list(path, data, before)
    emit(record, as_json=as_json, text=text)
    _tell_idle(record, names)


def _tell_idle(record: Mapping[str, Any], names: Sequence[str]) -> None:
    """Say which signatures bring a list no further; list 1 may need them all the same.

    Devices move over to it where the single keys that they trust sign it too.
    """
    counted = {n for found in record["signatures"].values() for n in found["signed_by"]}
    for name in names:
        if name not in counted:
            say(
                f"key {name} is no root key of this list, nor of the one before where "
                "that lies beside it: its signature counts for devices that trust this "
                "key alone"
            )


def _public_key(text: str, known: Sequence[str]) -> str:
    """Return the public key of a file, or that which an id names."""
    from edge_runtime.formats.signing import key_id
    from edge_runtime.trust import tuf_key_id

    if re.fullmatch("[0-9a-f]{16}|[0-9a-f]{64}", text) and not Path(text).exists():
        for key in known:
            if text in (key_id(key), tuf_key_id(key), key):
                return key
        raise KeyFileError(f"no key {text} is there; known: {key_ids(known) or 'none'}")
    return read_public(Path(text))


def _times(expires: str) -> tuple[str, str]:
    from packager.key_lists import expiry, today

    issued = today()
    try:
        return issued, expiry(expires, issued)
    except ValueError as err:
        raise click.BadParameter(str(err), param_hint="--expires") from err


def _by_role(root: int | None, release: int | None) -> dict[str, int]:
    given = {"root": root, "targets": release}
    return {role: number for role, number in given.items() if number is not None}
