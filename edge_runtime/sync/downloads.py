# SPDX-License-Identifier: Apache-2.0
"""Bring files into the agent's folder, byte by byte only once, and remove them again.

What lies there is trusted by its hash alone: what is damaged meanwhile comes anew. A
file that is not whole lies beside the others under a hidden name, and goes on where it
was cut.
"""

import hashlib
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from edge_runtime.errors import DpuError, SyncError
from edge_runtime.formats.json_record import is_digest
from edge_runtime.limits import limits
from edge_runtime.reading import open_regular
from edge_runtime.sync.desk import Desk
from edge_runtime.sync.head import SHORT, Head, Way
from edge_runtime.sync.head_file import read_head
from edge_runtime.sync.paths import bundle_path, patch_path
from edge_runtime.sync.source import CHUNK, EXCHANGE_S, Answer, UnusableError
from edge_runtime.sync.state import read_kept


class Downloads(Desk):
    """The files of a channel, in the agent's folder."""

    def _shun(self, name: str) -> None:
        self._state = replace(self._state, bad=(*self._state.bad, name))

    def _fetch(self, way: Way) -> None:
        """Bring a file into the folder.

        Raises:
            UnusableError: The place has it not, or not as the head says.
            SyncError: No answer, or the link broke: later it goes on.
        """
        if problem := limits().problem("patch_bytes", way.size, "the patch"):
            raise UnusableError(problem)
        part, path = self._part(way), self._path(way)
        for _ in range(2):  # after what a cut or a cache spoiled, one clean try
            self._download(way)
            if self._is_whole(part, way):
                self._files.rename(part, path)
                self._files.sync_folder(self._folder)
                self._fetched.append(path.name)
                return
        raise UnusableError(
            f"{_remote(way)} is damaged at the server: its SHA-256 is not what the "
            "head says; 'dpu-fleet check' tells what to do"
        )

    def _is_whole(self, path: Path, way: Way) -> bool:
        """Return whether a file lies there whole; what else has its name is removed."""
        try:
            with open_regular(path) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == way.sha256:
                    return True
        except FileNotFoundError:
            return False
        except OSError:
            pass  # a bad sector, or no file at all: as good as damaged
        self._files.remove(path)
        return False

    def _download(self, way: Way) -> None:
        """Go on with a file where it was cut; in the end the part has its size."""
        path, offset = _remote(way), self._part_size(way)
        if offset == way.size:
            return
        tag = self._state.tags.get(way.sha256, "") if offset else ""
        within = EXCHANGE_S + way.size / self._options.slowest
        with self._source.get(path, tag=tag, offset=offset, within=within) as answer:
            if answer.status == 416:
                self._files.unlink(self._part(way))
                raise UnusableError(f"{path}: the server has less than this device")
            if answer.status not in (200, 206):
                raise UnusableError(f"{answer.refusal}; publish again, or prune less")
            if answer.size is not None and answer.offset + answer.size != way.size:
                raise UnusableError(
                    f"{path} has {answer.offset + answer.size} bytes, {way.size} "
                    "were said"
                )
            tags = dict(self._state.tags) | {way.sha256: answer.tag}
            self._state = replace(self._state, tags=tags)
            self._receive(way, answer, time.monotonic() + within)

    def _receive(self, way: Way, answer: Answer, end: float) -> None:
        with self._part(way).open("r+b" if answer.offset else "wb") as file:
            count = file.seek(answer.offset)
            try:
                while data := answer.body.read(min(CHUNK, way.size - count + 1)):
                    count += len(data)
                    if count > way.size:
                        raise UnusableError(
                            f"{_remote(way)} has more than {way.size} bytes"
                        )
                    file.write(data)
                    if time.monotonic() > end:
                        raise SyncError(
                            f"{_remote(way)} comes with less than "
                            f"{self._options.slowest:g} bytes a second"
                        )
            finally:
                file.flush()
                self._files.sync(file.fileno())
        if count < way.size:
            raise SyncError(f"{_remote(way)} broke off at {count} bytes")

    def _path(self, way: Way) -> Path:
        return self._folder / Path(_remote(way)).name

    def _part(self, way: Way) -> Path:
        return self._folder / f".{way.sha256}.part"

    def _part_size(self, way: Way) -> int:
        try:
            size = self._part(way).stat().st_size
        except FileNotFoundError:
            return 0
        return size if size <= way.size else 0

    def _prune(self, route: Collection[Way]) -> None:
        """Remove what was fetched and is on no way any more; nothing of others."""
        kept = {self._path(way) for way in route}
        for path in self._own():
            if path not in kept:
                self._files.unlink(path)

    def _own(self) -> list[Path]:
        """Return what was fetched and lies in the agent's sight."""
        files = [*self._folder.glob("*.dpu"), *self._folder.glob("*.zip")]
        return [p for p in files if is_digest(p.stem) and not p.is_dir()]

    def _set_aside(self) -> None:
        """Take what was fetched out of the agent's sight, until it may be applied.

        A halt must reach files that are here already. They stay as whole parts, so
        that no byte comes twice when the rollout goes on.
        """
        for path in self._own():
            self._files.rename(path, self._folder / f".{path.stem}.part")
            self._files.sync_folder(self._folder)

    def _forget_others(self) -> None:
        """Remove parts of files that no head asks for any more."""
        wanted = set[str]()
        with suppress(OSError, DpuError):
            head = read_head(read_kept(self._folder)).head
            wanted = {way.sha256 for way in all_ways(head)}
        for path in self._folder.glob(".*.part"):
            name = path.name[1:-5]
            if is_digest(name) and name not in wanted:
                self._files.unlink(path)
        tags = {k: v for k, v in self._state.tags.items() if k in wanted}
        self._state = replace(self._state, tags=tags)


def bundle_way(head: Head) -> Way | None:
    """Return full weights as a way that leads from anywhere; None without a bundle."""
    return head.bundle and Way("", head.target[:SHORT], *head.bundle)


def all_ways(head: Head) -> list[Way]:
    """Return the ways that a head names, full weights too."""
    return [*head.ways, *filter(None, [bundle_way(head)])]


def _remote(way: Way) -> str:
    """Return where a file lies in the channel's place."""
    return patch_path(way.sha256) if way.parent else bundle_path(way.sha256)
