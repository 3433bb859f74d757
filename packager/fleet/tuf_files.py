# SPDX-License-Identifier: Apache-2.0
"""What a place's TUF metadata name, for whoever must not take it away: no signatures.

This needs nothing of the extra ``tuf``.
"""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from edge_runtime.errors import StoreError
from edge_runtime.formats.json_file import parse_record
from edge_runtime.formats.json_record import Record
from edge_runtime.sync.head import Head
from edge_runtime.sync.head_file import read_signed
from packager.fleet.place import Entry, Place

FOLDER = "tuf/"
_ROLE = re.compile(r"[1-9][0-9]*\.(targets|snapshot)\.json")


def told_heads(place: Place) -> tuple[dict[str, Head], set[str]]:
    """Return what channels say by the newest TUF metadata, and the files of these.

    Raises:
        StoreError: They are damaged, or lack a part.
        HeadError: What a channel says is malformed.
        OSError: The place cannot be read.
    """
    heads, files, path = dict[str, Head](), set[str](), f"{FOLDER}timestamp.json"
    if place.read(path) is None:
        return heads, files
    for below in ("snapshot", "targets"):
        meta = _signed(place, path).record("meta").record(f"{below}.json")
        path = f"{FOLDER}{meta.integer('version')}.{below}.json"
        files.add(path)
    for _, target in _signed(place, path).record("targets").members():
        if "custom" in target:
            for name, said in target.record("custom").members():
                heads[name] = read_signed(said.values).head
    return heads, files


def old_metadata(place: Place) -> Iterator[Entry]:
    """Yield the metadata that newer ones may have replaced."""
    for entry in place.entries(FOLDER, deep=False):
        if _ROLE.fullmatch(PurePosixPath(entry.path).name):
            yield entry


def _signed(place: Place, path: str) -> Record:
    found, what = place.read(path), f"{place.name}/{path}"
    if found is None:
        raise StoreError(f"{what} is not there: publish again with --tuf")
    return parse_record(found[0], "tuf_bytes", what, StoreError).record("signed")
