# SPDX-License-Identifier: Apache-2.0
"""The folder where patches and key lists arrive, as the agent sees it."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from edge_runtime.formats.json_record import is_digest
from edge_runtime.limits import limits
from edge_runtime.trust import list_number


class PatchFolder:
    """A folder that others put patches and key lists into.

    Attributes:
        path: Where it is.
    """

    def __init__(self, path: Path, log: Callable[..., None]) -> None:
        """Name the folder; ``log`` is told when it holds too many files."""
        self.path, self._log = path, log
        self._is_crowded = False  # and that was told

    def scan(self) -> dict[str, list[int]]:
        """Return the identities of the newest patch files, without opening any.

        Raises:
            OSError: The folder cannot be read.
        """
        seen, most = dict[str, list[int]](), limits().agent_files
        left_out = 0
        with os.scandir(self.path) as entries:
            for entry in entries:
                if not _is_wanted(entry.name):
                    continue
                with suppress(FileNotFoundError):
                    s = entry.stat(follow_symlinks=False)
                    times = s.st_mtime_ns, s.st_ctime_ns
                    seen[entry.name] = [s.st_ino, s.st_size, *times]
                if len(seen) > 2 * most:  # memory for so many, however many come
                    left_out += len(seen) - most
                    seen = _newest(seen, most)
        left_out += max(0, len(seen) - most)
        self._tell_left_out(left_out)
        return dict(sorted(_newest(seen, most).items()))

    def _tell_left_out(self, count: int) -> None:
        if bool(count) != self._is_crowded:
            self._is_crowded = bool(count)
            if count:
                most = limits().agent_files
                reason = f"only the newest {most} files are; remove the others"
                self._log("not looked at", files=count, reason=reason)


def _is_wanted(name: str) -> bool:
    # Transports begin the names of unfinished files with a dot; FAT has capitals.
    is_patch = name.lower().endswith(".dpu")
    is_known = is_patch or is_full(name) or list_number(name) is not None
    return is_known and not name.startswith(".")


def is_full(name: str) -> bool:
    """Return whether a file is a bundle that 'dpu-edge sync' fetched."""
    stem, _, end = name.rpartition(".")
    return end == "zip" and is_digest(stem)


def _newest(seen: dict[str, list[int]], most: int) -> dict[str, list[int]]:
    """Return those of so many files that were changed last, as the kernel says."""
    by_time = sorted(seen.items(), key=lambda item: item[1][-1])
    return dict(by_time[-most:])
