# SPDX-License-Identifier: Apache-2.0
"""``dpu-patch trust``: key lists on the command line."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.commandline import CONTEXT, Answer, Group, emit, json_option, say
from edge_runtime.errors import KeyFileError
from packager.cli.keys import read_signers
from packager.cli.options import KEY_LIST, PRIVATE_KEY, PUBLIC_KEY

if TYPE_CHECKING:
    from edge_runtime.formats.signing import Trust
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
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path)
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
            help=f"How many {name} keys have to sign.",
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
@click.option("--add-root", "root_in", metavar="KEY.pub.pem", multiple=True)
@click.option("--remove-root", "root_out", metavar="KEY.pub.pem|ID", multiple=True)
@click.option("--add-release", "release_in", metavar="KEY.pub.pem", multiple=True)
@click.option(
    "--remove-release", "release_out", metavar="KEY.pub.pem|ID", multiple=True
)
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
    given = _read(old)
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
    given = _read(old)
    roles = {"root": given.root.keys, "targets": given.root.releases}
    known = (*given.root.keys.keys, *given.root.releases.keys)
    gone = {_public_key(text, known) for text in keys}
    if unknown := sorted(gone.difference(known)):
        raise KeyFileError(f"{old} does not name key {_ids(unknown)}")
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

    data = sign_list(load_list(path), read_signers(signers)[0])
    write_file(data, path)
    record, text = _describe(path, data, _list_before(path))
    emit(record, as_json=as_json, text=text)


@trust.command()
@click.argument("path", metavar="N.root.json", type=KEY_LIST)
@json_option
def show(path: Path, *, as_json: bool) -> None:
    """Show a list: its keys, who signed it, and what it still needs.

    The list before it is looked for beside it, under its own name.
    """
    from edge_runtime.trust import load_list

    record, text = _describe(path, load_list(path), _list_before(path))
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
    if signers:
        data = sign_list(data, read_signers(signers)[0])
    write_file(data, path)
    record, text = _describe(path, data, before)
    emit(record, as_json=as_json, text=text)


def _describe(path: Path, data: bytes, before: "SignedRoot | None") -> Answer:
    """Say what is in a list, who signed it, and who has to sign it yet."""
    from edge_runtime.formats.signing import key_id
    from edge_runtime.trust import read_root
    from edge_runtime.trust.rules import missing

    given = read_root(data)
    root = given.root
    wanted = {"own": root.keys} | ({"former": before.root.keys} if before else {})
    record: dict[str, Any] = {
        "file": str(path),
        "version": root.version,
        "issued": root.issued or None,
        "expires": root.expires,
        "roots": list(root.keys.ids),
        "root_threshold": root.keys.threshold,
        "releases": list(root.releases.ids),
        "release_threshold": root.releases.threshold,
        "signatures": {
            whose: {
                "signed_by": [key_id(key) for key in given.signers(keys)],
                "missing": missing(given, keys),
            }
            for whose, keys in wanted.items()
        },
    }
    lines = [
        f"{path}: key list {root.version}, expires {root.expires}",
        f"  next list  {_words(root.keys)}",
        f"  releases   {_words(root.releases)}",
    ]
    for whose, found in record["signatures"].items():
        names = ", ".join(found["signed_by"]) or "nobody"
        list_ = root.version if whose == "own" else root.version - 1
        need = f"; needs {found['missing']} more" if found["missing"] else ""
        lines.append(f"  signed     by {names} of list {list_}'s root keys{need}")
    return record, "\n".join(lines)


def _words(trust: "Trust") -> str:
    return f"{trust.threshold} of {', '.join(trust.ids)}"


def _list_before(path: Path) -> "SignedRoot | None":
    """Read the list before this one, where it lies beside it."""
    version = _read(path).root.version
    beside = path.with_name(f"{version - 1}.root.json")
    return _read(beside) if beside.is_file() else None


def _read(path: Path) -> "SignedRoot":
    from edge_runtime.trust import load_list, read_root
    from packager.build import prefix_errors

    with prefix_errors(path):
        return read_root(load_list(path))


def read_public(path: Path) -> str:
    """Read a public key file; return its 32 raw bytes in hex.

    Raises:
        KeyFileError: It is none.
        OSError: It cannot be read.
    """
    from edge_runtime.files import read_bounded
    from edge_runtime.formats.signing import load_public

    pem = read_bounded(path, "key_bytes", str(path), KeyFileError)
    return load_public(pem, str(path))


def _public_key(text: str, known: Sequence[str]) -> str:
    """Return the public key of a file, or that which an id names."""
    from edge_runtime.formats.signing import key_id
    from edge_runtime.trust import tuf_key_id

    if re.fullmatch("[0-9a-f]{16}|[0-9a-f]{64}", text) and not Path(text).exists():
        for key in known:
            if text in (key_id(key), tuf_key_id(key), key):
                return key
        raise KeyFileError(f"no key {text} is there; known: {_ids(known) or 'none'}")
    return read_public(Path(text))


def _ids(keys: Sequence[str]) -> str:
    from edge_runtime.formats.signing import key_id

    return ", ".join(key_id(key) for key in keys)


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
