# SPDX-License-Identifier: Apache-2.0
"""What an operator puts on cards: a key and a configuration for each device.

A device's folder appears by one rename, with all that is in it on the disk: a run that
was cut leaves whole devices, and the next one makes those that are missing. Nothing
that is there is ever written again.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from edge_runtime.errors import KeyFileError, StoreError
from edge_runtime.files import Files
from edge_runtime.live.proof import encode_public, read_key
from edge_runtime.reading import read_key_file
from edge_runtime.store.contents import KEY_NAME
from packager.fleet.certificates import (
    Authority,
    make_authority,
    make_client,
    read_authority,
)
from packager.keys import generate_key

CONFIG_NAME, CLIENT_NAME = "device.env", "client.pem"
KEYS, CA = "keys", "ca"
LOCK_NAME = ".provision.lock"
PREFIX_FORM = r"[A-Za-z0-9][A-Za-z0-9._-]{0,47}"
CONFIG_FOLDER = "/etc/dpu-edge"  # on the device; systemd's units read it there


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What the devices of one order have in common.

    Attributes:
        prefix: What their names begin with.
        settings: Variables of their configuration, without those of one device alone.
        trusted: Public keys and key lists that they shall trust, by file name.
        certificates: Whether each gets a client certificate.
    """

    prefix: str = "board"
    settings: Mapping[str, str] = field(default_factory=dict)
    trusted: Mapping[str, bytes] = field(default_factory=dict)
    certificates: bool = False


def provision(
    folder: Path, count: int, order: Order, files: Files | None = None
) -> list[str]:
    """Bring a folder to so many devices.

    Args:
        folder: Where to; below no published tree.
        count: How many devices there shall be in all.
        order: What they have in common; of devices that are there nothing changes.
        files: The seam to the disk.

    Returns:
        The devices that were not there before.

    Raises:
        StoreError: Devices could be served from there to anybody.
        KeyFileError: What lies there is not what this function writes, or a file to
            be trusted has the name of a device's own.
        OSError: The disk refuses.
    """
    files = files or Files()
    insist_private(folder)
    if taken := {KEY_NAME, CONFIG_NAME, CLIENT_NAME} & order.trusted.keys():
        raise KeyFileError(
            f"a file to be trusted is called {min(taken)}, as one that each device "
            "gets of its own: rename it, for example to release.pub.pem"
        )
    config_text(order.prefix, order)  # refused before anything is made
    files.make_folder(folder / KEYS)
    made = []
    with files.locked(folder / LOCK_NAME, wait=True):
        authority = _authority(folder / CA, files) if order.certificates else None
        for number in range(1, count + 1):
            name = f"{order.prefix}-{number:04d}"
            if not (folder / name).exists():
                _make(folder / name, order, authority, files)
                made.append(name)
            elif authority and not (folder / name / CLIENT_NAME).exists():
                raise KeyFileError(
                    f"{folder / name} was made without --ca, and stays as it is; give "
                    "another folder for devices with certificates"
                )
            _publish_key(folder, name, files)
    return made


def insist_private(folder: Path) -> None:
    """Insist that a folder for private keys is in no published tree.

    Raises:
        StoreError: It is below one, or holds one.
    """
    place = folder.resolve()
    for above in (place, *place.parents):
        if head := next(above.glob("*.head"), None):
            raise StoreError(
                f"{folder} is below {above}, where devices read {head.name}: private "
                "keys there would be given out to anybody; give a folder elsewhere"
            )
    if head := next(place.rglob("[!.]*.head"), None):
        raise StoreError(
            f"{folder} holds {head.relative_to(place)}, which is published: private "
            "keys beside it could be given out too; give a folder elsewhere"
        )


def _make(
    folder: Path, order: Order, authority: Authority | None, files: Files
) -> None:
    """Make a device's folder, all at once."""
    with _appearing(folder, files) as part:
        key = generate_key().private_bytes_raw().hex() + "\n"
        files.write(part / KEY_NAME, [key.encode()], mode=0o600)
        if authority:
            client = make_client(authority, folder.name)
            files.write(part / CLIENT_NAME, [client], mode=0o600)
        for name, data in order.trusted.items():
            files.write(part / name, [data])
        config = config_text(folder.name, order)
        files.write(part / CONFIG_NAME, [config.encode()])


@contextmanager
def _appearing(folder: Path, files: Files) -> Iterator[Path]:
    """Give a private folder to fill; once it is full it gets its name."""
    part = folder.with_name(f".{folder.name}.part")
    if part.exists():
        files.remove(part)  # of a run that was cut; nobody was ever given its keys
    files.mkdir(part)
    part.chmod(0o700)
    yield part
    files.sync_folder(part)
    files.rename(part, folder)
    files.sync_folder(folder.parent)


def config_text(device: str, order: Order) -> str:
    """Return a device's configuration: variables, as systemd and shells read them.

    Raises:
        KeyFileError: A value holds what one of the two takes for something else.
    """
    settings = {**order.settings, "DPU_DEVICE": device}
    if order.certificates:
        settings["DPU_CERT"] = f"{CONFIG_FOLDER}/{CLIENT_NAME}"
    for name, value in settings.items():
        if not re.fullmatch(r"[A-Za-z0-9_./:@%?&=,+~{}-]*", value):
            raise KeyFileError(
                f"{name}: found {value!r}, which cannot stand in an environment file; "
                "expected letters, digits and the signs of a URL, percent-encoded"
            )
    lines = (f'{name}="{value}"' for name, value in settings.items() if value)
    return f"# {device}: to {CONFIG_FOLDER}/MODEL.env on its card\n" + "".join(
        f"{line}\n" for line in lines
    )


def _publish_key(folder: Path, name: str, files: Files) -> None:
    """Write the public half of a device's key, where it is not there yet."""
    private, public = folder / name / KEY_NAME, folder / KEYS / f"{name}.pub.pem"
    key = read_key(private)
    if key is None:
        raise KeyFileError(
            f"{private} is missing; remove {folder / name} to begin anew"
        )
    wanted = encode_public(key)
    if not public.exists():
        files.replace(public, wanted)
    elif read_key_file(public) != wanted:
        raise KeyFileError(f"{public} is not the public half of {private}")


def _authority(folder: Path, files: Files) -> Authority:
    """Return the operator's authority; it is made where there is none."""
    public, private = folder / "ca.pem", folder / "ca.key"
    if not folder.exists():
        made = make_authority(f"devices of {folder.resolve().parent.name}")
        with _appearing(folder, files) as part:
            files.write(part / private.name, [made.private_pem], mode=0o600)
            files.write(part / public.name, [made.public_pem])
    return read_authority(
        read_key_file(public),
        read_key_file(private),
        str(folder),
    )
