# SPDX-License-Identifier: Apache-2.0
"""Object stores as places: S3 and its relatives, Google's, Azure's, by ``obstore``.

``If-None-Match: *`` makes a file that never changes, ``If-Match`` replaces a head only
if it is the one that was read. Some stores take such requests and ignore the condition,
so before the first write a place tries it out on an object of its own.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotSupportedError,
    PreconditionError,
)

from edge_runtime.errors import StoreError, SyncError
from packager.fleet.place import PROBES, Entry, Place, insist_same, most_of

if TYPE_CHECKING:
    from obstore.store import ObjectStore

RACES = 20  # how often a file may be removed between two looks at it
RETRIES: Final[Any] = {"max_retries": 4, "retry_timeout": timedelta(seconds=60)}
CLIENT: Final[Any] = {"timeout": "10 min", "connect_timeout": "10 s"}
_KEPT = "public, max-age=31536000, immutable"
_SWAPPED = "public, max-age=60"
_TYPES = {"head": "application/json", "json": "application/json"}
_TYPES |= {"zip": "application/zip"}
_REASON = 300  # characters of what a store says


class ObjectPlace(Place):
    """A prefix in an object store."""

    def __init__(
        self,
        store: "ObjectStore",
        name: str,
        *,
        single_publisher: bool = False,
        say: Callable[[str], None] = lambda _words: None,
    ) -> None:
        """Use a store; nothing is asked of it yet.

        Args:
            store: The prefix in it that is the model's own.
            name: For messages and the ledger, without credentials.
            single_publisher: Go on where the store has no conditional writes.
            say: Told what a person should hear.
        """
        self.name, self._store, self._say = name, store, say
        self._single, self._conditional = single_publisher, None  # type: bool, bool | None

    def read(self, path: str, most: int = -1) -> tuple[bytes, str] | None:
        """Return a file and the tag of its content; None if there is none."""
        most = most if most >= 0 else most_of(path)
        with self._errors("read", path):
            try:
                found = obstore.get(self._store, path)
                if found.meta["size"] <= most:
                    return bytes(found.bytes()), _tag(found.meta)
                part = obstore.get_range(self._store, path, start=0, end=most + 1)
                return bytes(part), _tag(found.meta)
            except FileNotFoundError as err:
                if _no_container(err):
                    raise
                return None

    def create(self, path: str, data: bytes) -> bool:
        """Write a file that is not there yet; False if it is there."""
        for _ in range(RACES):
            if self._is_conditional():
                written = self._put(path, data, "create", _KEPT)
            elif written := self.read(path) is None:
                self._put(path, data, "overwrite", _KEPT)
            if written:
                return True
            found = self.read(path, len(data))
            if found is not None:  # else somebody pruned it just now
                return insist_same(f"{self.name}/{path}", found[0], data)
        raise StoreError(f"{self.name}/{path} comes and goes; is it pruned in a loop?")

    def swap(self, path: str, data: bytes, tag: str | None) -> bool:
        """Replace a file if it still has the tag; False if it has not."""
        if self._is_conditional():
            mode = "create" if tag is None else json.loads(tag)
            if self._put(path, data, mode, _SWAPPED):
                return True
            # A request whose answer was lost is sent again, and then meets itself.
            found = self.read(path)
            return found is not None and found[0] == data
        found = self.read(path)
        if (found and found[1]) != tag:
            return False
        return self._put(path, data, "overwrite", _SWAPPED)

    def entries(self, folder: str, *, deep: bool = True) -> Iterator[Entry]:
        """Yield the files below a folder, by path."""
        prefix = folder.rstrip("/") or None
        with self._errors("list", folder):
            if deep:
                found = [
                    m for batch in obstore.list(self._store, prefix) for m in batch
                ]
            else:
                below = obstore.list_with_delimiter(self._store, prefix)
                found = list(below["objects"])
        for meta in sorted(found, key=lambda meta: meta["path"]):
            changed = meta["last_modified"].timestamp()
            yield Entry(meta["path"], meta["size"], changed, _tag(meta))

    def remove(self, path: str) -> None:
        """Remove a file, where there is one."""
        with self._errors("remove", path):
            try:
                obstore.delete(self._store, path)
            except FileNotFoundError as err:
                if _no_container(err):
                    raise

    def _put(self, path: str, data: bytes, mode: Any, cache: str) -> bool:
        """Write; False if the condition does not hold."""
        kind = _TYPES.get(path.rpartition(".")[2], "application/octet-stream")
        with self._errors("write", path):
            try:
                obstore.put(
                    self._store,
                    path,
                    data,
                    mode=mode,
                    attributes={"Content-Type": kind, "Cache-Control": cache},
                    use_multipart=False,  # its parts know no condition
                )
            except (AlreadyExistsError, PreconditionError):
                return False
        return True

    def _is_conditional(self) -> bool:
        """Return whether the store heeds conditions; asked once, before any write.

        Raises:
            StoreError: It does not, and other publishers are not excluded.
        """
        if self._conditional is None:
            problem = self._probe()
            self._conditional = not problem
            if problem and not self._single:
                raise StoreError(
                    f"{self.name}: {problem}, so of two publishers one could undo what "
                    "the other did, unnoticed; publish to another store, or give "
                    "--single-publisher where there is only one"
                )
            if problem:
                self._say(f"{self.name}: {problem}; see to it that nobody else writes")
        return self._conditional

    def _probe(self) -> str:
        """Try out conditional writes; return what is wrong, or nothing."""
        path = f"{PROBES}{secrets.token_hex(8)}"
        self._say(f"{self.name}: trying out conditional writes on {path}")
        try:
            return self._try_conditions(path)
        except _NoConditionsError:
            return "the store refuses conditional writes"
        finally:
            try:
                self.remove(path)
            except SyncError as err:
                self._say(f"{err}; it does no harm, and 'dpu-fleet prune' removes it")

    def _try_conditions(self, path: str) -> str:
        ignored = "the store ignores the conditions of writes"
        if not self._put(path, b"1", "create", _SWAPPED):
            return "the store says that an object is there that is not"
        if self._put(path, b"2", "create", _SWAPPED):
            return ignored
        found = self.read(path)
        tag = json.loads(found[1]) if found else {}
        if not tag:
            return "the store gives no tags"
        if not self._put(path, b"3", tag, _SWAPPED):
            return "the store takes its own tags for stale ones"
        return ignored if self._put(path, b"4", tag, _SWAPPED) else ""

    @contextmanager
    def _errors(self, done: str, path: str) -> Iterator[None]:
        """Turn the library's errors into ours, without what nobody should read."""
        where = f"{self.name}/{path}".rstrip("/")
        try:
            yield
        except (BaseError, FileNotFoundError, NotImplementedError) as err:
            said = str(err).partition("\n\n")[0]
            unknown = NotSupportedError | NotImplementedError
            if isinstance(err, unknown) or "status code: 501" in said:
                raise _NoConditionsError(f"{where}: {plain(said)}") from None
            raise SyncError(
                f"{where}: cannot {done} it: {plain(said)}{_advice(said)}",
            ) from None


class _NoConditionsError(SyncError):
    """The store does not know what was asked for."""


def _tag(meta: Any) -> str:
    """Return what identifies a version of an object, as obstore takes it back."""
    known = {key: meta.get(key) for key in ("e_tag", "version")}
    return json.dumps({key: value for key, value in known.items() if value})


def _no_container(err: FileNotFoundError) -> bool:
    """Return whether the bucket itself is missing."""
    return any(word in str(err) for word in ("NoSuchBucket", "ContainerNotFound"))


def plain(said: str) -> str:
    """Return what a store says, on one line and without credentials."""
    code = re.search(r"<Code>(\w+)</Code>", said)
    line = said.partition("<")[0].strip(" :\n")
    line = re.sub(r"(\w+://)[^\s/@]*@", r"\1", line)
    line = re.sub(r"\?[^\s\"']*", "", " ".join(line.split()))
    return line[:_REASON] + (f" ({code[1]})" if code else "")


def _advice(said: str) -> str:
    found = re.search(r"status code: (\d+)", said)
    status = found[1] if found else ""
    # The service of a cloud's machines that gives credentials to them, asked last.
    if status in ("401", "403") or "169.254.169.254" in said:
        return (
            "; give credentials that may do this by the environment "
            "(AWS_ACCESS_KEY_ID and so on)"
        )
    return "; is there such a bucket?" if status == "404" else ""
