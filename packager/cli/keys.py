# SPDX-License-Identifier: Apache-2.0
"""Keys on the command line: ``dpu-patch keygen``, ``dpu-patch sign``, ``--sign``."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_runtime.commandline import emit, json_option, say
from edge_runtime.parameters import NewFile
from edge_runtime.reading import read_key_file
from edge_runtime.text import printable
from packager.cli.options import PRIVATE_KEY, RELEASE

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


@click.command()
@click.argument("path", metavar="KEY.pem", type=NewFile())
@click.option(
    "--encrypt", is_flag=True, help="Ask for a passphrase (or take DPU_PASSPHRASE)."
)
@click.option(
    "--kind",
    type=click.Choice(["ed25519", "p256"]),
    default="ed25519",
    show_default=True,
    help="ed25519 signs for devices, p256 for the OpenSSF Model Signing tool.",
)
@json_option
def keygen(path: Path, *, encrypt: bool, kind: str, as_json: bool) -> None:
    """Make a key: KEY.pem to sign with, KEY.pub.pem for the devices.

    Whoever has KEY.pem can update every device that trusts it: encrypt it, keep it off
    the network, and keep a copy. A key of kind p256 signs provenance only.
    """
    from packager.keys import KeyKind, write_key_pair

    passphrase = _passphrase("New passphrase", confirm=True) if encrypt else None
    if encrypt and not passphrase:
        raise click.UsageError("no passphrase: set DPU_PASSPHRASE, or use a terminal")
    public, name = write_key_pair(path, passphrase, KeyKind(kind))
    emit(
        {
            "private": str(path),
            "public": str(public),
            "key_id": name,
            "kind": kind,
        },
        as_json=as_json,
        text=f"key {name}\n  private  {path}{'' if encrypt else ' (not encrypted)'}"
        f"\n  public   {public}",
    )


@click.command()
@click.argument(
    "paths", metavar="PATCH|BUNDLE...", nargs=-1, required=True, type=RELEASE
)
@click.option(
    "--key",
    "--sign",
    "keys",
    metavar="KEY.pem",
    multiple=True,
    required=True,
    type=PRIVATE_KEY,
    help="Sign with this private key (repeatable).",
)
@click.option(
    "--dated",
    is_flag=True,
    help="Let an unsigned patch say that it is signed now (or at SOURCE_DATE_EPOCH).",
)
@json_option
def sign(
    paths: tuple[Path, ...],
    *,
    keys: tuple[Path, ...],
    dated: bool,
    as_json: bool,
) -> None:
    """Sign patches and bundles, in place, beside the signatures that they have.

    A device with a key list takes a dated patch for signed then, any other for signed
    when it arrives; devices from before key lists refuse a dated one.

    The passphrase of an encrypted key is asked for, or taken from DPU_PASSPHRASE.
    """
    from edge_runtime.errors import prefix_errors
    from packager.ledger import publish_file
    from packager.signing import is_bundle, seconds_now
    from packager.signing import sign as sign_with

    signers, names = read_signers(keys)
    seconds = seconds_now() if dated else None
    signed = []
    for path in paths:
        with prefix_errors(path):
            signed.append((path, sign_with(path.read_bytes(), signers, seconds)))
    for path, data in signed:
        publish_file(data, path, say=say)
        if dated and is_bundle(data):
            say(f"{path} is a bundle, which tells no time: it is signed, not dated")
    emit(
        {"signed": [str(path) for path in paths], "key_ids": names},
        as_json=as_json,
        text="\n".join(
            f"{printable(path)}: signed by {', '.join(names)}" for path in paths
        ),
    )


def read_signers(paths: Sequence[Path]) -> tuple[list["Ed25519PrivateKey"], list[str]]:
    """Read private keys, and ask for the passphrases that they need.

    Returns:
        The keys, and their ids.

    Raises:
        KeyFileError: A file does not hold a private Ed25519 key.
    """
    if not paths:
        return [], []
    from edge_runtime.formats.signing import key_id
    from edge_runtime.live.shared import public_key
    from packager.keys import is_encrypted, load_private

    keys = []
    for path in paths:
        pem = read_key_file(path)
        passphrase = ask_passphrase(path) if is_encrypted(pem) else None
        keys.append(load_private(pem, passphrase, str(path)))
    return keys, sorted({key_id(public_key(key)) for key in keys})


def ask_passphrase(path: Path) -> str | None:
    """Return the passphrase of an encrypted key file, if there is anybody to ask."""
    return _passphrase(f"Passphrase of {path}")


def _passphrase(prompt: str, *, confirm: bool = False) -> str | None:
    """Take a passphrase from DPU_PASSPHRASE, or ask for it on a terminal."""
    given = os.environ.get("DPU_PASSPHRASE")
    if given or not sys.stdin.isatty():
        return given
    asked: str = click.prompt(
        prompt, hide_input=True, confirmation_prompt=confirm, err=True
    )
    return asked
