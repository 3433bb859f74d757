# SPDX-License-Identifier: Apache-2.0
"""A place as a repository of The Update Framework (TUF): the extra ``tuf``.

::

    tuf/N.root.json        whose keys count; devices begin with one that they were given
    tuf/N.targets.json     the patches and bundles that channels name, where they lie
    tuf/N.snapshot.json    which targets belong to it
    tuf/timestamp.json     which snapshot is the newest; the one file that changes

Targets are the files that :mod:`packager.fleet.publish` wrote, under the names that
they have: there is no second copy. Their names hold their hashes already, so clients
set ``prefix_targets_with_hash=False``. What a channel says stands in the ``custom``
field of its bundle, field by field as in its head, so that no client has to fetch the
head as well. Metadata is compact JSON with consistent snapshots.

What is new is written into the folder of keys first, then here: targets, snapshot,
timestamp, and roots last. So whatever a killed publisher leaves is what clients knew
before or all of the new, and the same command again goes on.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    Metadata,
    MetaFile,
    Root,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from edge_runtime.errors import KeyFileError, RoundError, StoreError, TrustError
from edge_runtime.live.shared import public_key
from edge_runtime.sync.head import SHORT, Head
from edge_runtime.sync.head_file import head_message, read_head, read_signed
from edge_runtime.sync.paths import bundle_path, head_path, patch_path
from packager.build import write_file
from packager.fleet.head import is_fresh
from packager.fleet.place import Place
from packager.fleet.tuf_files import FOLDER
from packager.fleet.tuf_keys import ONLINE, Ask, TufFolder

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

TARGETS_S = 365 * 86_400  # how long targets are valid
RACES = 20  # how often another publisher may come first
_KINDS: dict[str, type[Signed]] = {
    "targets": Targets,
    "snapshot": Snapshot,
    "timestamp": Timestamp,
}


@dataclass(frozen=True, slots=True)
class Mirrored:
    """What became of a repository.

    Attributes:
        changed: Whether anything is new in the place.
        root: Number of the newest root.
        version: Of the timestamp.
        expires: When clients stop to believe in it, seconds since 1970.
        bytes: Of targets, snapshot and timestamp together.
    """

    changed: bool
    root: int
    version: int
    expires: int
    bytes: int


def mirror(
    place: Place,
    folder: TufFolder,
    head: Head | None,
    *,
    now: int,
    lifetime_s: int,
    ask: Ask,
) -> Mirrored:
    """Bring a place's repository to what a channel says; other channels stay.

    Doing it again changes nothing, until half of a file's time is over, or
    it holds for longer than it should.

    Args:
        place: Where the channel's files lie already.
        folder: What signs it.
        head: What the channel says; None only to renew what is there.
        now: Seconds since 1970.
        lifetime_s: How long snapshot and timestamp are valid.
        ask: For the passphrases of keys.

    Raises:
        RoundError: Nothing was published, or the folder is for another model.
        TrustError: Somebody else signed with these keys.
        KeyFileError: The folder lacks a key.
        StoreError: Other publishers came first every time.
        OSError: The place or the folder cannot be read or written.
    """
    folder.insist_outside(place.name)
    with folder.locked():
        folder = TufFolder.open(folder.path)  # it may have been rotated meanwhile
        for attempt in range(RACES):
            made = _Repository(place, folder, now, lifetime_s, ask)
            # After a race everything is signed anew: a number may be somebody else's.
            made.take(head, anew=attempt > 0)
            changed = made.upload()
            if changed is not None:
                return made.outcome(changed=changed)
    raise StoreError(
        f"other publishers changed {place.name}/{FOLDER} {RACES} times meanwhile; try "
        "again"
    )


@dataclass(frozen=True, slots=True)
class _File:
    """Signed metadata and its bytes."""

    metadata: Metadata[Any]
    data: bytes

    @property
    def version(self) -> int:
        return int(self.metadata.signed.version)

    @property
    def below(self) -> MetaFile:
        """What it says of the role below it."""
        signed = self.metadata.signed
        meta = signed.meta["targets.json"] if _is(signed, Snapshot) else None
        found: MetaFile = meta or signed.snapshot_meta
        return found


class _Repository:
    """One try: what is there, what it becomes, and its upload."""

    def __init__(
        self, place: Place, folder: TufFolder, now: int, lifetime_s: int, ask: Ask
    ) -> None:
        self._place, self._folder, self._ask = place, folder, ask
        self._now, self._lifetime_s = now, lifetime_s
        newest = folder.path / f"{folder.number}.root.json"
        self._root = _parse(folder.data, newest, Root).signed
        self._is_new = place.read(f"{FOLDER}{folder.number}.root.json") is None
        self._tag: str | None = None
        # What was signed here counts if it is newer than what the place has.
        self._files = {role: file for role in ONLINE if (file := self._local(role))}
        for role, file in self._remote():
            known = self._files.get(role)
            if known is None or known.version <= file.version:
                self._files[role] = file

    # What is there --------------------------------------------------------------------

    def _local(self, role: str) -> _File | None:
        path = self._folder.path / f"{role}.json"
        if not path.exists():
            return None
        data = path.read_bytes()
        return _File(_parse(data, path, _KINDS[role]), data)

    def _remote(self) -> Iterator[tuple[str, _File]]:
        """Yield what the place has, as far as these keys signed it."""
        path = f"{FOLDER}timestamp.json"
        for role, below in (
            ("timestamp", "snapshot"),
            ("snapshot", "targets"),
            ("targets", ""),
        ):
            found = self._place.read(path)
            if role == "timestamp":
                self._tag = found[1] if found else None
            try:
                file = _File(Metadata.from_bytes(found[0]), found[0]) if found else None
            except RepositoryError:
                return
            if file is None or not self._counts(role, file):
                return
            yield role, file
            if below:
                path = f"{FOLDER}{file.below.version}.{below}.json"

    def _counts(self, role: str, file: _File) -> bool:
        given = file.metadata
        try:
            self._root.verify_delegate(role, given.signed_bytes, given.signatures)
        except (RepositoryError, ValueError):
            return False
        return _is(given.signed, _KINDS[role])

    # What it becomes ------------------------------------------------------------------

    def take(self, head: Head | None, *, anew: bool) -> None:
        """Sign what has to be new, from the targets upward."""
        old = self._files.get("targets")
        if old is None and head is None:
            raise RoundError(
                f"{self._place.name} is no TUF repository yet: dpu-fleet publish --tuf"
            )
        files = old.metadata.signed.targets if old else {}
        wanted = _targets(_records(self._place, files, head))
        self._renew("targets", Targets(targets=wanted), anew or files != wanted)
        for role, kind, name in (
            ("snapshot", Snapshot, "targets"),
            ("timestamp", Timestamp, "snapshot"),
        ):
            lower, known = self._files[name], self._files.get(role)
            meta = MetaFile(lower.version, len(lower.data))
            signed = (
                Snapshot(meta={"targets.json": meta})
                if kind is Snapshot
                else Timestamp(snapshot_meta=meta)
            )
            self._renew(role, signed, anew or known is None or known.below != meta)

    def _renew(self, role: str, signed: Any, has_changed: bool) -> None:
        """Sign metadata anew if it says something new, or is too old."""
        known = self._files.get(role)
        lifetime = TARGETS_S if role == "targets" else self._lifetime_s
        if known and not has_changed and self._counts(role, known):
            left = known.metadata.signed.expires.timestamp() - self._now
            if is_fresh(left, lifetime):
                return
        signed.version = known.version + 1 if known else 1
        signed.expires = datetime.fromtimestamp(self._now + lifetime, UTC)
        metadata = Metadata(signed)
        for key in self._keys(role):
            metadata.sign(CryptoSigner(key), append=True)
        data = metadata.to_bytes(JSONSerializer(compact=True))
        # Before anybody can see it: what is lost here would be signed twice.
        write_file(data, self._folder.path / f"{role}.json")
        self._files[role] = _File(metadata, data)

    def _keys(self, role: str) -> list["Ed25519PrivateKey"]:
        number, needed = self._folder.number, self._root.roles[role].threshold
        keys = list(self._folder.private(role, number, self._ask))
        if len(keys) < needed:
            raise KeyFileError(
                f"{self._folder.path} has {len(keys)} of the {needed} keys of role "
                f"{role} that root {number} asks for; copy {role}*.pem there"
            )
        # Until the new root is out, clients believe the keys of the one before.
        if self._is_new and number - 1 in self._folder.lists:
            known = {public_key(key) for key in keys}
            before = self._folder.private(role, number - 1, self._ask)
            keys += [key for key in before if public_key(key) not in known]
        return keys

    # Its upload -----------------------------------------------------------------------

    def upload(self) -> bool | None:
        """Write what the place lacks; None if another publisher came first."""
        new = False
        try:
            for role in ("targets", "snapshot"):
                file = self._files[role]
                path = f"{FOLDER}{file.version}.{role}.json"
                new |= self._place.create(path, file.data)
        except StoreError:
            return None  # the number is taken
        path, data = f"{FOLDER}timestamp.json", self._files["timestamp"].data
        found = self._place.read(path)
        if found is None or found[0] != data:
            if not self._place.swap(path, data, self._tag):
                return None
            new = True
        for number, data in self._folder.lists.items():
            new |= self._place.create(f"{FOLDER}{number}.root.json", data)
        return new

    def outcome(self, *, changed: bool) -> Mirrored:
        """Return what became of it."""
        expiries = [file.metadata.signed.expires for file in self._files.values()]
        first = min([*expiries, self._root.expires])
        size = sum(len(file.data) for file in self._files.values())
        version = self._files["timestamp"].version
        stamp = int(first.timestamp())
        return Mirrored(changed, self._folder.number, version, stamp, size)


def _parse(data: bytes, path: Path, kind: type[Signed]) -> Metadata[Any]:
    """Return the metadata in a file of the folder of keys.

    Raises:
        StoreError: It is damaged.
    """
    try:
        found = Metadata[Any].from_bytes(data)
        is_right = _is(found.signed, kind)
        problem = "" if is_right else f"it is of type {found.signed.type}"
    except RepositoryError as err:
        problem = str(err)
    if problem:
        raise StoreError(
            f"{path} is damaged ({problem}); copy it back, or take it away: then what "
            "was published last counts"
        )
    return found


def _is(signed: Any, kind: type) -> bool:
    return isinstance(signed, kind)


def _records(
    place: Place, files: Mapping[str, TargetFile], head: Head | None
) -> dict[str, Any]:
    """Return what each channel says, field by field as in its head.

    TUF follows a channel's head, so it is ahead of it only where somebody else signed.
    """
    found: dict[str, Any] = {}
    for target in files.values():
        found |= target.custom or {}
    if head is None:
        return found
    for name, record in found.items():
        other = read_signed(record).head
        if other.model != head.model:
            raise RoundError(
                f"the TUF repository is of model {other.model[:SHORT]}, this release "
                f"of {head.model[:SHORT]}: give each model a folder of its own (--tuf)"
            )
        if name == head.channel and other.version > head.version:
            read = place.read(head_path(name))
            if read is None or read_head(read[0]).head.version < other.version:
                raise TrustError(
                    f"TUF metadata in {place.name} say version {other.version} of "
                    f"{name!r}, its head is older: somebody else has these keys, or "
                    "an old head was put back; exchange keys with 'dpu-fleet rotate'"
                )
            return found  # another publisher was faster
    return found | {head.channel: json.loads(head_message(head))}


def _targets(records: Mapping[str, Any]) -> dict[str, TargetFile]:
    """Return the files that channels name; what a channel says is with its bundle."""
    found: dict[str, TargetFile] = {}
    customs: dict[str, dict[str, Any]] = {}
    for channel, record in sorted(records.items()):
        head = read_signed(record).head
        if head.bundle is None:
            raise RoundError(f"channel {channel!r} has no bundle: publish it again")
        size, sha256 = head.bundle
        bundle = bundle_path(sha256)
        found[bundle] = TargetFile(size, {"sha256": sha256}, bundle)
        customs.setdefault(bundle, {})[channel] = record
        for way in head.ways:
            path = patch_path(way.sha256)
            found[path] = TargetFile(way.size, {"sha256": way.sha256}, path)
    for path, custom in customs.items():
        found[path].unrecognized_fields["custom"] = custom
    return found
