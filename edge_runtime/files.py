"""The one seam between a store and the disk.

Every change that a store makes to its files goes through these few operations, so
that a test can record them, fail any one of them, and enumerate what a power cut could
leave behind.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path


class Files:
    """File operations with the durability that each of them promises."""

    def make_folder(self, path: Path) -> None:
        """Create a folder and its parents; an existing one is kept."""
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, chunks: Iterable[bytes | memoryview]) -> None:
        """Write a new file; its content is on the disk when this returns.

        The name is durable only after :meth:`sync_folder` on the parent.
        """
        with open(path, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name, or copy it where links are not to be had."""
        try:
            target.hardlink_to(source)
        except OSError:
            # FAT and some network file systems; the graph is small.
            self.write(target, [source.read_bytes()])

    def rename(self, source: Path, target: Path) -> None:
        """Rename atomically, replacing a file or link of the target's name."""
        source.replace(target)

    def point(self, link: Path, folder: str) -> None:
        """Make a symbolic link point to a folder beside it, atomically."""
        part = link.with_name(link.name + ".part")
        part.unlink(missing_ok=True)
        part.symlink_to(folder, target_is_directory=True)
        part.replace(link)

    def remove(self, path: Path) -> None:
        """Remove a file or a whole folder."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable."""
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def free_bytes(self, path: Path) -> int:
        """Return how many bytes can still be written below ``path``."""
        return shutil.disk_usage(path).free
