"""The one seam between a store and the disk.

Every change that a store makes to its files goes through the primitive operations
below, so that a test can record them, fail any one of them, and enumerate what a power
cut could leave behind.
"""

import os
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO


class Files:
    """File operations with the durability that each of them promises."""

    # Primitives: one change each, durable only after a sync ------------------------

    def mkdir(self, path: Path) -> None:
        """Create a folder; an existing one is kept."""
        path.mkdir(exist_ok=True)

    def write(
        self, path: Path, chunks: Iterable[bytes | memoryview], *, mode: int = 0o666
    ) -> None:
        """Write a new file; its content is on the disk when this returns.

        The name is durable only after :meth:`sync_folder` on the parent. What had
        the name before is left alone: it may be in use, or have a second name that a
        cut rename left behind. ``mode``, less the umask, is its own from the start.
        """
        self.unlink(path)
        try:
            with open(path, "xb", opener=partial(os.open, mode=mode)) as file:
                for chunk in chunks:
                    at, size = file.tell(), file.write(chunk)
                    if sys.platform == "linux":
                        # There it begins to write what the disk does not have yet, and
                        # keeps it in memory. Less is left to wait for in the end. It is
                        # advice: a sandbox that forbids it must not cost the update.
                        with suppress(OSError):
                            os.posix_fadvise(
                                file.fileno(), at, size, os.POSIX_FADV_DONTNEED
                            )
                file.flush()
                self.sync(file.fileno())
        except OSError as err:
            err.filename = err.filename or str(path)  # a full disk names no file
            raise

    def hardlink(self, source: Path, target: Path) -> None:
        """Give a file a second name."""
        target.hardlink_to(source)

    def symlink(self, link: Path, folder: str) -> None:
        """Create a symbolic link."""
        link.symlink_to(folder, target_is_directory=True)

    def rename(self, source: Path, target: Path) -> None:
        """Rename atomically, replacing a file or link of the target's name."""
        source.replace(target)

    def unlink(self, path: Path) -> None:
        """Remove a file or link, where there is one."""
        path.unlink(missing_ok=True)

    def rmdir(self, path: Path) -> None:
        """Remove an empty folder."""
        path.rmdir()

    def sync(self, handle: int) -> None:
        """Put an open file's content, or an open folder's names, on the disk."""
        os.fsync(handle)

    def open_lock(self, path: Path) -> BinaryIO:
        """Open a file to lock it."""
        return open(path, "ab")

    # Made of them ------------------------------------------------------------------

    def make_folder(self, path: Path) -> None:
        """Create a folder and its parents, durably; an existing one is kept."""
        missing = [parent for parent in path.parents if not parent.is_dir()]
        for folder in (*reversed(missing), path):
            self.mkdir(folder)
            self.sync_folder(folder.parent)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name, or copy it where links are not to be had."""
        try:
            self.hardlink(source, target)
        except OSError:
            # FAT and some network file systems; the graph is small.
            self.write(target, [source.read_bytes()])

    def point(self, link: Path, folder: str) -> None:
        """Make a symbolic link point to a folder beside it, atomically."""
        part = link.with_name(link.name + ".part")
        self.unlink(part)
        self.symlink(part, folder)
        self.rename(part, link)

    def remove(self, path: Path) -> None:
        """Remove a file or a whole folder."""
        if not path.is_dir() or path.is_symlink():
            self.unlink(path)
            return
        for child in sorted(path.iterdir()):
            self.remove(child)
        self.rmdir(path)

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable."""
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self.sync(handle)
        finally:
            os.close(handle)

    def free_bytes(self, path: Path) -> int:
        """Return how many bytes can still be written below ``path``."""
        return shutil.disk_usage(path).free
