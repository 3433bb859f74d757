# SPDX-License-Identifier: Apache-2.0
"""Reading from a web server or a folder, with every byte counted.

HTTP is ``urllib3``'s (the extra ``sync``), imported when the first request is made.
"""

import hashlib
import io
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from edge_runtime.errors import SyncError

CHUNK = 16 << 10
TIMEOUT_S = 60.0  # without a byte
# A new connection with TLS: certificates of the usual size, both directions.
HANDSHAKE_BYTES = 2000


@dataclass(slots=True)
class Answer:
    """What a server answers.

    Attributes:
        status: As HTTP has it: 200, 206 for a part, 304 for what is known already.
        tag: The tag of the content; empty where the server gives none.
        size: Bytes of the body, as the server says; None where it does not.
        body: To be read in pieces.
        offset: Where the body begins in the file.
    """

    status: int
    tag: str = ""
    size: int | None = None
    body: Any = None
    offset: int = 0


class Source(Protocol):
    """Where heads and files are read from.

    Attributes:
        spent: Bytes that went over the wire so far, in both directions.
    """

    spent: int

    def get(self, path: str, *, tag: str = "", offset: int = 0) -> Any:
        """Open a file, as a context that gives an :class:`Answer`.

        Args:
            path: Below the address.
            tag: With an offset: only if the content still has it. Without one: only if
                it has not.
            offset: Where to begin.

        Raises:
            SyncError: No answer, or one that says to come later.
        """


class FolderSource:
    """A folder: a stick, or a network drive."""

    def __init__(self, root: Path) -> None:
        """Read below a folder."""
        self.root, self.spent = root, 0

    @contextmanager
    def get(self, path: str, *, tag: str = "", offset: int = 0) -> Iterator[Answer]:
        """Open a file, as a context that gives an :class:`Answer`."""
        try:
            with (self.root / path).open("rb") as file:
                found = _tag_of(file)
                size = file.seek(0, io.SEEK_END)
                if not offset and tag == found:
                    yield Answer(304, found)
                    return
                start = offset if tag in ("", found) and offset <= size else 0
                file.seek(start)
                yield Answer(206 if start else 200, found, size - start, file, start)
        except FileNotFoundError:
            yield Answer(404)


class HttpSource:
    """A web server."""

    def __init__(
        self,
        url: str,
        *,
        ca: str = "",
        cert: str = "",
        key: str = "",
        proxy: str = "",
    ) -> None:
        """Read below an address.

        Args:
            url: ``http://`` or ``https://``.
            ca: File with the certificates to trust; by default the system's.
            cert: File with this device's own certificate.
            key: File with its key.
            proxy: Address of a proxy; by default as the environment says.
        """
        import urllib3

        self.url, self.spent = url.rstrip("/"), 0
        options: dict[str, Any] = {
            "timeout": urllib3.Timeout(connect=30, read=TIMEOUT_S),
            "retries": urllib3.Retry(0, redirect=3, raise_on_redirect=True),
        }
        if ca:
            options["ca_certs"] = ca
        if cert:
            options |= {"cert_file": cert, "key_file": key or cert}
        proxy = proxy or _proxy_for(self.url)
        self._pool: Any = (
            urllib3.ProxyManager(proxy, **options)
            if proxy
            else urllib3.PoolManager(**options)
        )
        self._greeted = False

    @contextmanager
    def get(self, path: str, *, tag: str = "", offset: int = 0) -> Iterator[Answer]:
        """Open a file, as a context that gives an :class:`Answer`."""
        import urllib3

        headers = {"Accept-Encoding": "identity", "User-Agent": "dpu-edge"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if tag:
                headers["If-Range"] = tag
        elif tag:
            headers["If-None-Match"] = tag
        where = f"{self.url}/{path}"
        try:
            found = self._pool.request(
                "GET", where, headers=headers, preload_content=False
            )
        except urllib3.exceptions.HTTPError as err:
            raise SyncError(f"{where}: no answer ({_reason(err)})") from err
        try:
            self._count(where, headers, found)
            yield self._answer(where, found, offset)
        except urllib3.exceptions.HTTPError as err:
            raise SyncError(f"{where}: the answer broke off ({_reason(err)})") from err
        finally:
            # What was not read must not come: the connection ends with it.
            found.close()

    def _answer(self, where: str, found: Any, offset: int) -> Answer:
        length = found.headers.get("Content-Length", "")
        size = int(length) if length.isdecimal() else None
        tag = found.headers.get("ETag", "")
        start = 0
        if found.status == 206:
            start = _start_of(found.headers.get("Content-Range", ""))
            if start != offset:
                raise SyncError(
                    f"{where}: asked for bytes from {offset} on, it sends those from "
                    f"{start} on"
                )
        if found.status >= 500 or found.status == 429:
            raise SyncError(f"{where}: the server says {found.status}, come later")
        return Answer(found.status, tag, size, _Counted(self, found), start)

    def _count(self, where: str, headers: Mapping[str, str], found: Any) -> None:
        sent = sum(len(k) + len(v) + 4 for k, v in headers.items()) + len(where) + 20
        got = sum(len(k) + len(v) + 4 for k, v in found.headers.items()) + 20
        self.spent += sent + got
        if where.startswith("https:") and not self._greeted:
            self.spent += HANDSHAKE_BYTES
            self._greeted = True


class _Counted:
    """A body whose bytes count as they come."""

    def __init__(self, source: HttpSource, answer: Any) -> None:
        self._source, self._answer = source, answer

    def read(self, count: int) -> bytes:
        data: bytes = self._answer.read1(count)
        self._source.spent += len(data)
        return data


def open_source(url: str, **options: str) -> Source:
    """Return what reads an address: ``http://``, ``https://``, ``file://`` or a folder.

    Raises:
        SyncError: It is none of them.
    """
    parts = urlsplit(url)
    if parts.scheme in ("http", "https") and parts.netloc:
        return HttpSource(url, **options)
    if parts.scheme == "file":
        return FolderSource(Path(unquote(parts.path)))
    if "://" not in url:
        return FolderSource(Path(url))
    raise SyncError(f"{url!r} is no address: expected http://, https:// or a folder")


def read_all(answer: Answer, limit: int, what: str, deadline_s: float) -> bytes:
    """Return the whole body of an answer, which may not be over a limit.

    Raises:
        SyncError: It is, or it takes too long.
    """
    if answer.size is not None and answer.size > limit:
        raise SyncError(f"{what} has {answer.size} bytes, {limit} are accepted")
    parts, count, end = [], 0, time.monotonic() + deadline_s
    while data := answer.body.read(CHUNK):
        parts.append(data)
        count += len(data)
        if count > limit:
            raise SyncError(f"{what} has more than {limit} bytes")
        if time.monotonic() > end:
            raise SyncError(f"{what} did not come within {deadline_s:g} s")
    return b"".join(parts)


def _tag_of(file: io.BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _start_of(text: str) -> int:
    unit, _, span = text.partition(" ")
    first = span.partition("-")[0]
    return int(first) if unit == "bytes" and first.isdecimal() else -1


def _proxy_for(url: str) -> str:
    from urllib.request import getproxies, proxy_bypass

    parts = urlsplit(url)
    if proxy_bypass(parts.hostname or ""):
        return ""
    return getproxies().get(parts.scheme, "")


def _reason(error: Exception) -> str:
    found = getattr(error, "reason", None) or error
    return str(found) or type(found).__name__
