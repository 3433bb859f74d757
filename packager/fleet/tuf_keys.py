# SPDX-License-Identifier: Apache-2.0
"""The folder that signs a TUF repository: its keys, its roots, what it signed last.

::

    1.root.json        what devices begin with (dpu-edge sync --tuf-root); public
    root.pem           signs the next root: take it off this machine, and keep a copy
    targets.pem        signs what there is to be had
    snapshot.pem       signs which of that belongs together
    timestamp.pem      signs that this is the newest
    *.pub.pem          their public halves; targets.json and so on: signed last

Private keys are readable for their owner alone and never overwritten. Roots are key
lists as :mod:`edge_runtime.trust` reads them, and ``dpu-patch trust`` shows, signs and
changes them too.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import KeyFileError, StoreError, prefix_errors
from edge_runtime.files import Files
from edge_runtime.formats.signing import load_public, read_public
from edge_runtime.reading import read_key_file
from edge_runtime.times import utc
from edge_runtime.trust import (
    first_root,
    list_number,
    load_list,
    next_root,
    read_root,
    tuf_key_id,
)
from packager.key_lists import change_list, make_list, sign_list
from packager.keys import is_encrypted, load_private, write_key_pair

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

ROOT, ONLINE = "root", ("targets", "snapshot", "timestamp")
ROOT_S = 2 * 365 * 86_400  # how long a root is valid
_LOCK_NAME = ".lock"
Ask = Callable[[Path], str | None]  # for the passphrase of a key


def make_folder(path: Path, *, now: int, passphrase: str | None = None) -> Path:
    """Make the folder: a key for each role, and the first root.

    Args:
        path: The folder, which must not be there.
        now: Seconds since 1970.
        passphrase: Encrypts the keys.

    Returns:
        The first root, for devices.

    Raises:
        OSError: It is there, or cannot be written.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists; keys are never overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    # All or nothing: half a folder could sign nothing, and block the next try.
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        publics = {role: _new_key(part, role, passphrase) for role in (ROOT, *ONLINE)}
        online = {role: [publics[role]] for role in ("snapshot", "timestamp")}
        times = utc(now), utc(now + ROOT_S)
        data = make_list([publics[ROOT]], [publics["targets"]], times, online=online)
        pem = (part / "root.pem").read_bytes()
        data = sign_list(data, [load_private(pem, passphrase)])
        Files().write(part / "1.root.json", [data])
        Files().sync_folder(part)
        Files().rename(part, path)
    except BaseException:
        shutil.rmtree(part)
        raise
    Files().sync_folder(path.parent)
    return path / "1.root.json"


def _new_key(folder: Path, name: str, passphrase: str | None) -> str:
    path = folder / f"{name}.pem"
    public, _ = write_key_pair(path, passphrase)
    for written in (path, public):
        with written.open("rb") as file:
            os.fsync(file.fileno())
    return load_public(public.read_bytes(), str(public))


def rotate(
    path: Path,
    roles: Collection[str],
    *,
    now: int,
    owners: Sequence["Ed25519PrivateKey"] = (),
    passphrase: str | None = None,
) -> Path:
    """Make the next root: new keys for some roles, and a new date.

    Keys of owners (role root) change with ``dpu-patch trust rotate``.

    Args:
        path: The folder.
        roles: Whose keys are exchanged, of ``ONLINE``; none: the root is only renewed.
        now: Seconds since 1970.
        owners: Keys of the root role that sign it; others may sign it later.
        passphrase: Encrypts the new keys.

    Returns:
        The new root.

    Raises:
        OSError: A file cannot be written, or is there.
        KeyListError: The newest root is no key list.
    """
    with TufFolder.open(path, signed=False).locked():
        folder = TufFolder.open(path, signed=False)  # as it is now
        number, roles_now = folder.number + 1, _roles(folder.data)
        old = {
            role: [
                public
                for public in folder.publics
                if tuf_key_id(public) in roles_now[role]["keyids"]
            ]
            for role in roles
        }
        for role in roles:
            if len(old[role]) != len(roles_now[role]["keyids"]):
                raise KeyFileError(
                    f"{path} lacks public keys of role {role}: {role}*.pub.pem of each"
                )
        made = {
            role: [_new_key(path, _free_name(path, f"{role}.{number}"), passphrase)]
            for role in roles
        }
        times = utc(now), utc(now + ROOT_S)
        data = change_list(folder.data, times, add=made, remove=old)
        target = path / f"{number}.root.json"
        Files().replace(target, sign_list(data, owners))
    return target


def _free_name(folder: Path, name: str) -> str:
    """Return a name for keys; a rotation that was cut left some that no root names."""
    names = chain([name], (f"{name}.{n}" for n in count(1)))
    return next(n for n in names if not any(folder.glob(f"{n}*.pem")))


def _roles(data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(data)["signed"]["roles"]
    return found


@dataclass(frozen=True, slots=True)
class TufFolder:
    """What signs a repository.

    Attributes:
        path: The folder.
        lists: The roots by their numbers, oldest first.
        publics: The public keys that lie there, hex, and their private files.
    """

    path: Path
    lists: dict[int, bytes]
    publics: dict[str, Path]

    @classmethod
    def open(cls, path: Path, *, signed: bool = True) -> "TufFolder":
        """Read it.

        Args:
            path: The folder.
            signed: Insist that each root is signed by the one before it and by itself.

        Raises:
            StoreError: No root is there, or one is missing between others.
            KeyListError: What should be a root is none.
            TrustError: A root lacks signatures.
            OSError: A file cannot be read.
        """
        found = {n: p for p in path.iterdir() if (n := list_number(p.name))}
        lists = {number: _read(found[number]) for number in sorted(found)}
        if not lists or max(lists) - min(lists) + 1 != len(lists):
            raise StoreError(
                f"{path} holds root {', '.join(map(str, lists)) or 'none'}, expected "
                "N.root.json without a gap; copy back what is missing"
            )
        if signed:
            with prefix_errors(found[min(lists)]):
                root = first_root(lists[min(lists)])
            for number in list(lists)[1:]:
                with prefix_errors(found[number]):
                    root = next_root(root, lists[number], lapsed=True)
        publics = {}
        for pub in sorted(path.glob("*.pub.pem")):
            key = read_public(pub)
            publics[key] = pub.with_name(pub.name.removesuffix(".pub.pem") + ".pem")
        return cls(path, lists, publics)

    @property
    def number(self) -> int:
        """The newest root's."""
        return max(self.lists)

    @property
    def data(self) -> bytes:
        """The newest root."""
        return self.lists[self.number]

    def private(
        self, role: str, number: int, ask: Ask
    ) -> Iterator["Ed25519PrivateKey"]:
        """Yield the keys of a role, as a root names them, that lie here."""
        named = _roles(self.lists[number])[role]["keyids"]
        for public, path in self.publics.items():
            if tuf_key_id(public) in named and path.exists():
                pem = read_key_file(path)
                secret = ask(path) if is_encrypted(pem) else None
                yield load_private(pem, secret, str(path))

    def locked(self) -> AbstractContextManager[None]:
        """Hold the folder for one publisher on this machine."""
        return Files().locked(self.path / _LOCK_NAME, wait=True)

    def insist_outside(self, place: str) -> None:
        """Insist that nobody can fetch it from a place that is a folder.

        Raises:
            KeyFileError: It lies in that folder.
        """
        if "://" not in place and self.path.resolve().is_relative_to(
            Path(place).resolve()
        ):
            raise KeyFileError(
                f"{self.path} lies in {place}, which is given out: keys stay outside"
            )


def _read(path: Path) -> bytes:
    with prefix_errors(path):
        data = load_list(path)
        read_root(data)
    return data
