# SPDX-License-Identifier: Apache-2.0
"""What heads and files are read from, and a folder as such a source."""

import io
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edge_runtime.errors import SyncError
from edge_runtime.reading import open_regular

CHUNK = 16 << 10
EXCHANGE_S = 120.0  # for an answer, unless the caller says what it is worth
BARRED = {
    401: "give user and password (https://USER:PASSWORD@HOST/...), or --cert",
    403: "this device may not read there (user and password, or --cert?), or nothing "
    "is there",
    407: "the proxy wants user and password: http://USER:PASSWORD@HOST:PORT",
}


class UnusableError(SyncError):
    """One file cannot be had from a place as it is; others may be, and do."""

    def __init__(self, message: str) -> None:
        super().__init__(message, permanent=True)


@dataclass(slots=True)
class Answer:
    """What a server answers.

    Attributes:
        status: As HTTP has it: 200, 206 for a part, 304 for what is known already.
        tag: The tag of the content; empty where the server gives none.
        size: Bytes of the body, as the server says; None where it does not.
        body: To be read in pieces.
        offset: Where the body begins in the file.
        where: The whole address, for messages.
    """

    status: int
    tag: str = ""
    size: int | None = None
    body: Any = None
    offset: int = 0
    where: str = ""

    @property
    def refusal(self) -> str:
        """What to say of a status that brings nothing."""
        if "://" not in self.where:
            return f"{self.where} is not there"
        words = f"{self.where}: the server says {self.status}"
        return f"{words}; {BARRED[self.status]}" if self.status in BARRED else words


class Source(Protocol):
    """Where heads and files are read from."""

    @property
    def name(self) -> str:
        """The address as people may see it, without credentials."""

    @property
    def spent(self) -> int:
        """Bytes that went over the wire so far, in both directions."""

    def get(
        self, path: str, *, tag: str = "", offset: int = 0, within: float = EXCHANGE_S
    ) -> Any:
        """Open a file, as a context that gives an :class:`Answer`.

        Args:
            path: Below the address.
            tag: With an offset: only if the content still has it. Without one: only if
                it has not.
            offset: Where to begin.
            within: Seconds for all of it, from the first byte of its headers on.

        Raises:
            UnusableError: This file cannot be read there.
            SyncError: No answer, or one that says to come later.
        """


class FolderSource:
    """A folder: a stick, or a network drive.

    It gives no tags: to make one, a file would be read before its size is looked at.
    """

    def __init__(self, root: Path) -> None:
        """Read below a folder."""
        self.root, self.name, self.spent = root, str(root), 0

    @contextmanager
    def get(
        self,
        path: str,
        *,
        tag: str = "",
        offset: int = 0,
        within: float = EXCHANGE_S,  # noqa: ARG002 - nobody can interrupt a disk
    ) -> Iterator[Answer]:
        """Open a file, as a context that gives an :class:`Answer`."""
        where = self.root / path
        with ExitStack() as stack:
            try:
                # A link may lead to the file, but not to a pipe, or to a device.
                real = Path(os.path.realpath(where))
                file = stack.enter_context(open_regular(real))
                size = file.seek(0, io.SEEK_END)
            except FileNotFoundError:
                answer = Answer(404, where=str(where))
            except OSError as err:
                raise UnusableError(f"{where} cannot be read: {err.strerror}") from err
            else:
                start = offset if not tag and offset <= size else 0
                file.seek(start)
                answer = Answer(206 if start else 200, "", size - start, file, start)
            yield answer


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
