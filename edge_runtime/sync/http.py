# SPDX-License-Identifier: Apache-2.0
"""Reading from a web server, with every byte counted.

HTTP is ``urllib3``'s (the extra ``sync``), imported when the first request is made.
"""

import re
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

from edge_runtime.errors import SyncError
from edge_runtime.sync.address import origin, part_login, plain_address, proxy_for
from edge_runtime.sync.source import (
    BARRED,
    EXCHANGE_S,
    Answer,
    FolderSource,
    Source,
)
from edge_runtime.sync.wire import Meter, metered_pools

TIMEOUT_S = 60.0  # without a byte
SHORT_BODY = 1 << 10  # of an error page: to read it costs less than a new connection
REDIRECTS = 3
_MAX_TAG = 200  # characters; those that are known have up to a hundred


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

        Raises:
            SyncError: An address is none, or of a kind that nothing is read by.
        """
        import urllib3

        try:
            self.url, self._login = part_login(url.rstrip("/"))
            self.name = plain_address(url)
        except ValueError as err:  # it may be a secret
            raise SyncError(f"this is no address: {err}", permanent=True) from None
        self._meter = Meter()
        options: dict[str, Any] = {
            "timeout": urllib3.Timeout(connect=30, read=TIMEOUT_S),
            "retries": False,
        }
        if ca:
            options["ca_certs"] = ca
        if cert:
            options |= {"cert_file": cert, "key_file": key or cert}
        proxy, login = part_login(proxy_for(self.url, proxy))
        if login:
            options["proxy_headers"] = {"Proxy-Authorization": login}
        self._pool: Any = (
            urllib3.ProxyManager(proxy, **options)
            if proxy
            else urllib3.PoolManager(**options)
        )
        self._pool.pool_classes_by_scheme = metered_pools(self._meter)
        self._late = self._may_be_kept = False

    @property
    def spent(self) -> int:
        """Bytes that went over the wire so far, in both directions."""
        return self._meter.spent

    @contextmanager
    def get(
        self, path: str, *, tag: str = "", offset: int = 0, within: float = EXCHANGE_S
    ) -> Iterator[Answer]:
        """Open a file, as a context that gives an :class:`Answer`."""
        import urllib3

        # Unasked no server packs, and every poll of every device pays for a header.
        skip = urllib3.util.SKIP_HEADER
        headers = {"Accept-Encoding": skip, "User-Agent": "dpu-edge"}
        if self._login:
            headers["Authorization"] = self._login
        if offset:
            headers["Range"] = f"bytes={offset}-"
            # A weak tag never matches there: each cut would begin anew. The file's
            # hash, which is its name, tells parts that do not fit.
            if tag and not tag.startswith("W/"):
                headers["If-Range"] = tag
        elif tag:
            headers["If-None-Match"] = tag
        where = f"{self.name.rstrip('/')}/{path}"  # for messages
        with self._deadline(where, within):
            try:
                found = self._request(f"{self.url}/{path}", where, headers)
            except urllib3.exceptions.HTTPError as err:
                raise SyncError(f"{where}: no answer ({_reason(err)})") from err
            try:
                yield self._answer(where, found, offset)
                if self._late:  # where nothing says how long it is, a cut looks whole
                    raise SyncError(f"{where}: the answer broke off")
            except urllib3.exceptions.HTTPError as err:
                words = f"{where}: the answer broke off ({_reason(err)})"
                raise SyncError(words) from err
            finally:
                with suppress(urllib3.exceptions.HTTPError):
                    self._drain(found)
                # What was not read must not come: the connection ends with it.
                found.close()

    @contextmanager
    def _deadline(self, where: str, within: float) -> Iterator[None]:
        """End an exchange after some time, however slowly its bytes drip.

        Timeouts of sockets count from the last byte, and headers are read whole.
        """
        self._late, timer = False, threading.Timer(within, self._cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        except SyncError as err:
            if self._late:
                raise SyncError(f"{where} did not come within {within:g} s") from err
            raise
        finally:
            timer.cancel()
            self._meter.socket = None

    def _cut(self) -> None:
        self._late, open_ = True, self._meter.socket
        if open_ is not None:
            with suppress(OSError):
                socket.socket.shutdown(open_, socket.SHUT_RDWR)

    def _drain(self, found: Any) -> None:
        """Read the rest of a short answer, so that the connection may be kept."""
        left = found.length_remaining
        if left is not None and left <= SHORT_BODY:
            body = _Body(found)
            while body.read(SHORT_BODY):
                pass

    def put(self, where: str, data: bytes) -> int:
        """Send JSON to an address; return what the server says.

        Raises:
            SyncError: No answer.
        """
        import urllib3

        headers = {"User-Agent": "dpu-edge", "Content-Type": "application/json"}
        request = {"headers": headers, "preload_content": False, "redirect": False}
        try:
            name = str(urlsplit(where).hostname)  # the rest may be a secret
            where, login = part_login(where)
        except ValueError as err:
            raise SyncError(f"this is no address: {err}") from None
        if login:
            headers["Authorization"] = login
        with self._deadline(name, EXCHANGE_S):
            try:
                found = self._pool.request("PUT", where, body=data, **request)
            except urllib3.exceptions.HTTPError as err:
                raise SyncError(f"{name}: no answer ({_reason(err)})") from err
            found.close()
        return int(found.status)

    def _answer(self, where: str, found: Any, offset: int) -> Answer:
        size = _number(found.headers.get("Content-Length", ""))
        tag = found.headers.get("ETag", "")
        if len(tag) > _MAX_TAG or not tag.isascii():
            tag = ""  # the state keeps one for each file
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
        return Answer(found.status, tag, size, _Body(found), start, where)

    def _open(self, url: str, headers: Mapping[str, str]) -> Any:
        """Ask once; and again where a kept connection turns out to have ended.

        A server may close one whenever it likes, also while a request is on its way.
        """
        from urllib3.exceptions import ProtocolError

        ask = partial(
            self._pool.request,
            "GET",
            url,
            headers=headers,
            redirect=False,
            preload_content=False,
            decode_content=False,  # what comes is what counts
        )
        before, was_kept = self._meter.received, self._may_be_kept
        self._may_be_kept = True
        try:
            return ask()
        except ProtocolError:
            if self._late or not was_kept or self._meter.received != before:
                raise
        self._pool.clear()
        return ask()

    def _request(self, url: str, where: str, headers: Mapping[str, str]) -> Any:
        """Follow redirections, but none that leads out of TLS."""
        for _ in range(REDIRECTS + 1):
            found = self._open(url, headers)
            location = found.get_redirect_location()
            if not location:
                return found
            self._drain(found)
            found.close()
            try:
                onward = urljoin(url, location)
                shown = plain_address(onward)
            except ValueError as err:
                raise SyncError(
                    f"{where}: the server sends on to what is no address ({err})"
                ) from err
            if origin(url)[0] == "https" != origin(onward)[0]:
                raise SyncError(
                    f"{where}: the server sends on to {shown}, which anybody on the "
                    "way can change; give the address where the files are",
                    permanent=True,
                )
            if origin(onward) != origin(url):
                headers = {k: v for k, v in headers.items() if k != "Authorization"}
            url = onward
        raise SyncError(
            f"{where}: the {REDIRECTS + 1}th redirection in a row; give the address "
            "where the files are",
            permanent=True,
        )


class _Body:
    """A body that is read as it comes."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def read(self, count: int) -> bytes:
        data: bytes = self._answer.read1(count, decode_content=False)
        return data


def open_source(url: str, **options: str) -> Source:
    """Return what reads an address: ``http://``, ``https://``, ``file://`` or a folder.

    Raises:
        SyncError: It is none of them.
    """
    try:
        parts = urlsplit(url)
    except ValueError as err:
        raise SyncError(f"this is no address: {err}", permanent=True) from None
    if parts.scheme in ("http", "https") and parts.netloc:
        if "?" in url or "#" in url:
            raise SyncError(
                f"{plain_address(url)} goes on with '?' or '#', expected a folder's "
                f"address; {BARRED[401]}",
                permanent=True,
            )
        return HttpSource(url, **options)
    if parts.scheme == "file":
        return FolderSource(Path(unquote(parts.path)))
    if "://" not in url:
        return FolderSource(Path(url))
    raise SyncError(f"{url!r} is no address: expected http://, https:// or a folder")


def _start_of(text: str) -> int:
    unit, _, span = text.partition(" ")
    first = _number(span.partition("-")[0])
    return -1 if unit != "bytes" or first is None else first


def _number(text: str) -> int | None:
    # Of thousands of digits Python makes no number.
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def _reason(error: Exception) -> str:
    # Its cause stands behind what it was in the middle of.
    cause = error.args[-1] if error.args else ""
    found = str(cause) or str(error) or type(error).__name__
    # urllib3 begins with its own object, which says nothing more than the address.
    return re.sub(r"^\w+\(host=.*?\): ", "", found)
