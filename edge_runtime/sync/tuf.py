# SPDX-License-Identifier: Apache-2.0
"""What a channel says by The Update Framework (TUF), with python-tuf's own client.

The client's metadata lie in a folder of their own beside the agent's files. It does not
sync them, and begins anew with whatever a power cut left; so versions that were seen
stand in sync's state too, on the disk before anything is done because of them, and
times are judged by the newest signed time as well. The first root comes from a person
(``--tuf-root``) and stays. python-tuf (the extra ``tuf``) is imported when it is asked.
"""

import hashlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from edge_runtime.errors import SyncError, TrustError
from edge_runtime.files import Files
from edge_runtime.formats.json_file import read_record
from edge_runtime.formats.json_record import Record
from edge_runtime.limits import limits
from edge_runtime.sync.head import SignedHead
from edge_runtime.sync.head_file import read_signed
from edge_runtime.sync.plan import TufStaleError
from edge_runtime.sync.source import Source, read_all
from edge_runtime.times import seconds_of
from edge_runtime.trust.canonical import encode_canonical
from edge_runtime.trust.root import load_list

if TYPE_CHECKING:
    from tuf.ngclient import Updater, UpdaterConfig

FOLDER = ".sync.tuf"  # in the agent's folder, which leaves hidden names alone
PINNED = "pinned.root.json"
ROLES = ("root", "timestamp", "snapshot", "targets")
ROTATIONS = 64  # roots that are taken at one look
_LIMIT = "tuf_bytes"


@dataclass(frozen=True, slots=True)
class Told:
    """What a repository said.

    Attributes:
        signed: What the channel says, without signatures: the repository vouches.
        versions: Of each role's metadata.
        keys: A digest of whose keys counted.
        expires: When the first of them expires, seconds since 1970.
    """

    signed: SignedHead
    versions: Mapping[str, int]
    keys: str
    expires: int


class TufClient:
    """One device and one repository."""

    def __init__(
        self, folder: Path, root: Path | None = None, files: Files | None = None
    ) -> None:
        """Name everything; nothing is read yet.

        Args:
            folder: The agent's folder.
            root: The first root; needed once, then it is kept.
            files: The seam to the disk.
        """
        self.folder, self._root = folder / FOLDER, root
        self._files = files or Files()

    def ask(
        self,
        source: Source,
        channel: str,
        *,
        slowest: float,
        deadline_s: float,
        allow: Callable[[int], None],
    ) -> Told:
        """Ask a repository what a channel says.

        Args:
            source: Where the place lies.
            channel: The channel.
            slowest: Bytes a second that all of it must come with.
            deadline_s: Seconds beside that.
            allow: Raises if so many more bytes may not be spent.

        Raises:
            SyncError: No answer, or none that may be used; later it may be another.
            TufStaleError: Metadata has expired.
            TrustError: It is not signed by whom the root names, or older than before.
            StoreError: Files of this device are at fault.
            HeadError: What the channel says is malformed.
            OSError: The disk refuses.
        """
        from tuf.ngclient import UpdaterConfig

        pinned, most = self._pin(), limit()
        config = UpdaterConfig(
            max_root_rotations=ROTATIONS,
            root_max_length=limits().key_list_bytes,
            snapshot_max_length=most,
            targets_max_length=most,
        )
        accepted = {config.root_max_length, config.timestamp_max_length, most}
        fetcher = _Fetcher(source, slowest, deadline_s, allow, accepted)
        for left in self.folder.glob("tmp*"):  # of a client that was killed
            self._files.unlink(left)
        with _errors():
            self._client(pinned, fetcher, config).refresh()
        # Each of these files was checked before it was written, or read, by refresh.
        records = {role: self._record(role) for role in ROLES}
        return Told(
            _said(records["targets"], channel),
            {role: record.integer("version") for role, record in records.items()},
            _keys(records["root"]),
            min(map(_expiry, records.values())),
        )

    def _pin(self) -> bytes:
        """Return the first root; what a person gives once is kept for ever."""
        path = self.folder / PINNED
        kept = load_list(path) if path.exists() else None
        given = load_list(self._root) if self._root else None
        if kept is None and given is None:
            raise TrustError(
                "this device has no first root of the TUF repository: give it once, "
                "from whom you trust and not from the server: --tuf-root N.root.json"
            )
        if kept is None and given is not None:
            self._files.make_folder(self.folder)
            with _errors():  # nothing is kept that is no root
                self._client(given)
            self._files.replace(path, given)
            kept = given
        if given is not None and kept != given:
            raise TrustError(
                f"{self._root} is another root than the one that was pinned; to begin "
                f"anew, which gives up what was seen, remove {self.folder}"
            )
        return kept or b""

    def _client(
        self,
        root: bytes,
        fetcher: "_Fetcher | None" = None,
        config: "UpdaterConfig | None" = None,
    ) -> "Updater":
        from tuf.ngclient import Updater
        from tuf.ngclient.fetcher import FetcherInterface

        # It asks for nothing else of a fetcher than what ours has.
        given = cast("FetcherInterface", fetcher)
        folder = str(self.folder)
        return Updater(folder, "tuf/", fetcher=given, config=config, bootstrap=root)

    def _record(self, role: str) -> Record:
        path = self.folder / f"{role}.json"
        whole = read_record(path, _LIMIT, f"the TUF metadata {role}", TrustError)
        return whole.record("signed")


def limit() -> int:
    """Return how large targets may be, and snapshots."""
    return limits().tuf_bytes


class _Fetcher:
    """Fetches metadata as everything else is fetched: counted, bounded, in time."""

    def __init__(
        self,
        source: Source,
        slowest: float,
        deadline_s: float,
        allow: Callable[[int], None],
        accepted: Collection[int],
    ) -> None:
        self._source, self._slowest, self._allow = source, slowest, allow
        self._accepted = accepted
        self._end = time.monotonic() + deadline_s

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """Return a file, which may not be larger."""
        from tuf.api.exceptions import DownloadHTTPError

        left = self._end - time.monotonic()
        if left <= 0:
            raise SyncError(f"{url}: the TUF metadata came too slowly")
        # Of snapshot and targets it is what was signed, else what is accepted at most.
        self._allow(0 if max_length in self._accepted else max_length)
        with self._source.get(url, within=left) as answer:
            if answer.status in (403, 404):
                raise DownloadHTTPError(
                    f"{url}: the server says {answer.status}", answer.status
                )
            if answer.status != 200:
                raise SyncError(f"{url}: the server says {answer.status}")
            data = read_all(answer, max_length, url, left)
        self._end += len(data) / self._slowest
        return data


@contextmanager
def _errors() -> Iterator[None]:
    """Say what python-tuf says in this project's errors."""
    from tuf.api.exceptions import DownloadError, ExpiredMetadataError, RepositoryError

    try:
        yield
    except ExpiredMetadataError as err:
        raise TufStaleError(f"TUF: {err}; nobody knows what is newest") from err
    except RepositoryError as err:
        raise TrustError(f"TUF: {err}") from err
    except DownloadError as err:
        raise SyncError(
            f"{err}; is the address that of the model's own folder, and was it "
            "published with --tuf?",
            permanent=True,
        ) from err


def _said(targets: Record, channel: str) -> SignedHead:
    """Return what a channel says: it stands with the bundle of its release."""
    for _, target in targets.record("targets").members():
        if "custom" in target and channel in (custom := target.record("custom")):
            return read_signed(custom.record(channel).values)
    raise SyncError(
        f"the TUF repository has no channel {channel!r}; publish it with --tuf",
        permanent=True,
    )


def _expiry(signed: Record) -> int:
    """Return when metadata expires; python-tuf has looked at the form."""
    return seconds_of(signed.text("expires"))


def _keys(root: Record) -> str:
    """Return a digest of whose keys count, but those of the root itself."""
    roles = {name: root.record("roles").record(name).values for name in ROLES[1:]}
    return hashlib.sha256(encode_canonical(roles)).hexdigest()
