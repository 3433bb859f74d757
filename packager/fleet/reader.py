# SPDX-License-Identifier: Apache-2.0
"""Reading what was published: from the place itself, or as devices do, over HTTP."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath

from edge_runtime.errors import SyncError
from edge_runtime.sync.http import open_source
from edge_runtime.sync.source import CHUNK, Source
from packager.fleet.address import open_place
from packager.fleet.place import Place


@dataclass(frozen=True, slots=True)
class Reader:
    """What is published somewhere.

    Attributes:
        name: Of the place, for messages.
        read: Returns a file of at most so many bytes; None where there is none.
        channels: Names of the channels; empty where nobody can list them.
    """

    name: str
    read: Callable[[str, int], bytes | None]
    channels: tuple[str, ...] = ()


def open_reader(url: str) -> Reader:
    """Return what reads an address: as :func:`open_place`, or ``http(s)://``.

    Raises:
        DpuError: It is no address, or the place gives no answer.
        OSError: It cannot be read.
    """
    if url.lower().startswith(("http://", "https://")):
        source = open_source(url)
        return Reader(source.name, lambda path, most: _read_web(source, path, most))
    place = open_place(url)

    def read(path: str, most: int) -> bytes | None:
        found = place.read(path, most)
        return found[0] if found else None

    return Reader(place.name, read, channels(place))


def channels(place: Place) -> tuple[str, ...]:
    """Return the names of the channels in a place."""
    found = (PurePosixPath(entry.path) for entry in place.entries("", deep=False))
    return tuple(
        path.stem
        for path in found
        if path.suffix == ".head" and not path.name.startswith(".")
    )


def _read_web(source: Source, path: str, most: int) -> bytes | None:
    with source.get(path) as answer:
        if answer.status in (404, 410):
            return None
        if answer.status != 200:
            raise SyncError(answer.refusal)
        parts, left = [], most + 1  # one byte more tells a file that is too large
        while left and (data := answer.body.read(min(CHUNK, left))):
            parts.append(data)
            left -= len(data)
        return b"".join(parts)
