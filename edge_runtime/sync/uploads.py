# SPDX-License-Identifier: Apache-2.0
"""Sending reports: at least once, and never in the way of an update.

A report goes where an address says: to a web server by PUT, as
``ADDRESS/reports/DEVICE/N.json``; to an address that was signed beforehand or names its
own place by ``{device}`` and ``{n}``, as it is; or into a folder. What became of it is
said once. A server that says no is asked again after hours, another one after a pause
that grows.
"""

import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from edge_runtime.errors import AddressError, DpuError, SyncError
from edge_runtime.files import Files
from edge_runtime.live.outbox import Waiting
from edge_runtime.reading import read_bounded
from edge_runtime.sync.http import HttpSource

FIRST_WAIT_S, LONGEST_S, REFUSED_S = 10.0, 3600.0, 6 * 3600.0
TURN_S = 120.0  # after that the rest waits for the next look
MOST_REFUSED = 3  # of one turn
HEADER_BYTES = 500  # of a request, for budgets
_LATER = (408, 425, 429)
_THERE = (409, 412)  # a store where nothing is written twice has it already
_FILLED = re.compile(r"\{(device|n)\}")


class Outlet(Protocol):
    """Where reports go to.

    Attributes:
        spent: Bytes that went over the wire so far, in both directions.
    """

    @property
    def spent(self) -> int:
        """Bytes that went over the wire so far, in both directions."""

    def keeps_one(self) -> bool:
        """Tell whether each report replaces the one that was sent before."""

    def put(self, device: str, n: int, data: bytes) -> int:
        """Send a report; return what the server says, as HTTP has it.

        Raises:
            SyncError: No answer.
            OSError: A file cannot be read or written.
        """


class FolderOutlet:
    """A folder: a stick, or a network drive."""

    def __init__(self, root: Path) -> None:
        """Write below a folder, which has to be there."""
        self.root, self._files, self.spent = root, Files(), 0

    def keeps_one(self) -> bool:
        """Tell that each report has a file of its own."""
        return False

    def put(self, device: str, n: int, data: bytes) -> int:
        """Write a report; the same one again is no other."""
        if not self.root.is_dir():  # what is not mounted must not fill this disk
            raise SyncError(f"{self.root} is no folder; is it mounted?")
        folder = self.root / "reports" / device
        self._files.make_folder(folder)
        self._files.replace(folder / f"{n}.json", data)
        return 201


class HttpOutlet:
    """A web server, or an address that was signed beforehand."""

    def __init__(self, address: Callable[[], str], **options: str) -> None:
        """Send to an address.

        Args:
            address: Returns it; one that expires may be another each time.
            options: As :class:`edge_runtime.sync.http.HttpSource` takes them.
        """
        self._address, self._options = address, options
        self._client: HttpSource | None = None

    @property
    def spent(self) -> int:
        """Bytes that went over the wire so far, in both directions."""
        return self._client.spent if self._client else 0

    def keeps_one(self) -> bool:
        """Tell whether the address is the same for each report of a device."""
        try:
            address = self._address()
        except (SyncError, OSError):  # then nothing is sent, which says why
            return False
        return target_of(address, "", 1) == target_of(address, "", 2)

    def put(self, device: str, n: int, data: bytes) -> int:
        """Send a report; return what the server says."""
        address = self._address()
        if self._client is None:
            self._client = HttpSource(address, **self._options)
        return self._client.put(target_of(address, device, n), data)


def target_of(address: str, device: str, n: int) -> str:
    """Return where a report goes to.

    >>> target_of("https://box/digits", "board7", 3)
    'https://box/digits/reports/board7/3.json'
    >>> target_of("https://b.example/r/{device}/{n}.json?sig=x", "board7", 3)
    'https://b.example/r/board7/3.json?sig=x'
    """
    if _FILLED.search(address):
        values = {"device": device, "n": str(n)}
        return _FILLED.sub(lambda found: values[found[1]], address)
    if urlsplit(address).query:
        return address
    return f"{address.rstrip('/')}/reports/{device}/{n}.json"


def open_outlet(address: str, **options: str) -> Outlet:
    """Return what sends reports to an address.

    Args:
        address: ``https://``, ``http://``, ``file://``, a folder; or ``@FILE`` with an
            address in it that is a secret, or expires: it is read each time.
        options: As :class:`edge_runtime.sync.http.HttpSource` takes them.

    Raises:
        AddressError: It is none of them.
    """
    if address.startswith("@"):
        path = Path(address[1:])
        return HttpOutlet(lambda: _address_in(path), **options)
    try:
        parts = urlsplit(address)
    except ValueError as err:
        raise AddressError(f"reports: this is no address: {err}") from None
    if parts.scheme in ("http", "https") and parts.netloc:
        return HttpOutlet(lambda: address, **options)
    if parts.scheme == "file":
        return FolderOutlet(Path(unquote(parts.path)))
    if "://" not in address:
        return FolderOutlet(Path(address))
    raise AddressError(
        f"reports: {parts.scheme}:// is no address for them: expected https://, "
        "http://, a folder, or @FILE with an address in it"
    )


def _address_in(path: Path) -> str:
    data = read_bounded(path, "key_bytes", str(path), SyncError)
    address = data.decode("utf-8", "replace").strip()
    with suppress(ValueError):
        if re.fullmatch(r"https?://[^\s]+", address) and urlsplit(address).hostname:
            return address
    raise SyncError(f"{path} holds no address: expected one line, https://...")


class Uploads:
    """Sends what waits in an outbox, and remembers when to try again."""

    def __init__(
        self,
        outlet: Outlet,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare to send.

        Args:
            outlet: Where to.
            say: Told once what a person should hear.
            clock: Seconds.
        """
        self._outlet, self._say, self._clock = outlet, say, clock
        self._wait, self._not_before, self._told = FIRST_WAIT_S, 0.0, ""
        self._refused: dict[int, float] = {}
        self._sent: set[int] = set()

    @property
    def spent(self) -> int:
        """Bytes that went over the wire so far, in both directions."""
        return self._outlet.spent

    def send(
        self, device: str, waiting: Iterable[Waiting], over: Callable[[int], str]
    ) -> set[int]:
        """Send reports, failures first; whatever goes wrong, they wait.

        Where each one replaces the one before, only the newest is sent, for all.

        Args:
            device: The device's id.
            waiting: The reports.
            over: Says why so many bytes may not be spent now; empty if they may.

        Returns:
            The numbers of those that were sent, by now or before.
        """
        begin, refused, before = self._clock(), 0, len(self._sent)
        if begin < self._not_before:
            return self._sent
        kept, replaced = self._kept(list(waiting))
        for report in sorted(kept, key=lambda r: (-r.kind, r.n)):
            if report.n in self._sent or self._refused.get(report.n, 0.0) > begin:
                continue
            if self._clock() - begin > TURN_S or refused == MOST_REFUSED:
                break
            if reason := over(report.size + HEADER_BYTES):
                self.tell(f"reports wait: {reason}")
                break
            try:
                if not self._send(device, report):
                    refused += 1
                    self._refused[report.n] = begin + REFUSED_S
            except (DpuError, OSError) as err:
                self._not_before = self._clock() + self._wait
                self._wait = min(2 * self._wait, LONGEST_S)
                self.tell(f"reports wait: {err}")
                break
        if refused and len(self._sent) == before:
            self._not_before = begin + REFUSED_S
        if {report.n for report in kept} <= self._sent:
            self._sent |= replaced
        return self._sent

    def _kept(self, waiting: list[Waiting]) -> tuple[list[Waiting], set[int]]:
        """Return what to send, and the numbers of what that replaces."""
        if not self._outlet.keeps_one():
            return waiting, set()
        waiting.sort(key=lambda r: r.n)
        return waiting[-1:], {report.n for report in waiting[:-1]}

    def _send(self, device: str, report: Waiting) -> bool:
        """Send one report; return whether it was taken, or will never be.

        Raises:
            SyncError: Later it may be.
            OSError: It cannot be read, or written.
        """
        path, data = report.path, b""
        with suppress(FileNotFoundError):  # else the agent made room
            data = read_bounded(
                path, "report_bytes", str(path), SyncError, regular=True
            )
        if not data:
            return True
        status = self._outlet.put(device, report.n, data)
        if status in _LATER or status >= 500:
            raise SyncError(f"the server says {status}, come later")
        if taken := status in _THERE or 200 <= status < 300:
            self._sent.add(report.n)
            self._wait, self._told = FIRST_WAIT_S, ""
        else:
            self.tell(f"reports: the server refuses them ({status})")
        return taken

    def tell(self, words: str) -> None:
        """Say what a person should hear, once."""
        if words != self._told:
            self._told = words
            self._say(words)
