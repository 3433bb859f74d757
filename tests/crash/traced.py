# SPDX-License-Identifier: Apache-2.0
"""Files that record, refuse or forget single operations."""

import os
import re
import sys
from pathlib import Path

from edge_runtime import files
from edge_runtime.files import Files
from edge_runtime.store.slots import SPARE_BYTES
from tests.crash import world

ROT = b"what was here is not readable any more"


class Traced(Files):
    """Sends every primitive operation through :meth:`do`; foresees every name."""

    def temporary(self, path, suffix):
        return path.with_name(path.name + suffix)

    def do(self, kind, path, *rest, action=lambda: None):
        action()

    def mkdir(self, path):
        if not path.is_dir():
            self.do("mkdir", path, action=lambda: super(Traced, self).mkdir(path))

    def write(self, path, chunks, **options):
        def seen():
            self.do("create", path)
            for chunk in chunks:
                self.do("data", path, bytes(chunk))
                yield chunk

        super().write(path, seen(), **options)

    def open_lock(self, path):
        if not path.exists():
            self.do("touch", path)
        return super().open_lock(path)

    def hardlink(self, source, target):
        link = super().hardlink
        self.do("hardlink", target, source, action=lambda: link(source, target))

    def symlink(self, link, folder):
        symlink = super().symlink
        self.do("symlink", link, folder, action=lambda: symlink(link, folder))

    def rename(self, source, target):
        rename = super().rename
        self.do("rename", source, target, action=lambda: rename(source, target))

    def unlink(self, path):
        if path.exists() or path.is_symlink():
            self.do("unlink", path, action=lambda: super(Traced, self).unlink(path))

    def rmdir(self, path):
        self.do("rmdir", path, action=lambda: super(Traced, self).rmdir(path))

    def sync(self, handle):
        path = Path(f"/proc/self/fd/{handle}").readlink()
        self.do("sync", path, action=lambda: super(Traced, self).sync(handle))


class Recorder(Traced):
    """Writes down what was done, with paths relative to a folder."""

    failed = False  # whether an operation was refused

    def __init__(self, base):
        self.base = base.resolve()
        self.log = []
        self.room = None

    def free_bytes(self, path):
        """Return what is free; with ``room`` for some slots and reverse patches."""
        if self.room is None:
            return super().free_bytes(path)
        slots, reverse = (len(list(path.glob(f"{n}/*"))) for n in ("slots", "reverse"))
        needed = world.INIT.layout.file_size + SPARE_BYTES
        return needed - max(0, reverse - self.room[1]) if slots < self.room[0] else 0

    def rot(self, path):
        """Let a file go bad on its own, as no operation of the store does."""
        path.unlink()
        path.write_bytes(ROT)
        self.log.append(("rot", path.relative_to(self.base), ROT))

    def do(self, kind, path, *rest, action=lambda: None):
        action()
        inside = [
            a.relative_to(self.base) if isinstance(a, Path) else a
            for a in (path, *rest)
        ]
        self.log.append((kind, *inside))


class Careless(Recorder):
    """Never syncs."""

    def sync(self, handle):
        """Promise everything, do nothing."""


class Forgetful(Recorder):
    """Leaves one of the store's syncs out, as if that line had never been written.

    Attributes:
        sites: The places in the code that sync, in words, in the order of first use.
    """

    def __init__(self, base, site=None):
        super().__init__(base)
        self.site = site
        self.sites = {}
        self._last = ""

    def do(self, kind, path, *rest, action=lambda: None):
        super().do(kind, path, *rest, action=action)
        if kind == "rename":
            self._last = f" after {rest[0].name}"

    def sync(self, handle):
        frame = sys._getframe()
        while frame.f_code.co_filename in (__file__, files.__file__):
            frame = frame.f_back
        path = Path(f"/proc/self/fd/{handle}").readlink().relative_to(self.base.parent)
        name = re.sub("[0-9a-f]{64}", "#", "/".join(path.parts[1:]) or "the parent")
        last = self._last if name == "store" else ""
        site = f"{frame.f_code.co_name}: {name}{last}"
        self.sites[site] = self.sites.get(site, 0) + 1
        if site != self.site:
            super().sync(handle)


class Failing(Recorder):
    """Refuses operation number ``first``, and all after it if ``for_good``."""

    def __init__(self, base, first, error, *, for_good=False):
        super().__init__(base)
        self.left, self.error, self.for_good = first, error, for_good

    @property
    def failed(self):
        return self.left < 0

    def do(self, kind, path, *rest, action=lambda: None):
        self.left -= 1
        if self.left == -1 or (self.for_good and self.left < 0):
            if kind == "create":  # reported from within: the file is there
                super().do(kind, path)
            raise OSError(self.error, os.strerror(self.error), str(path))
        super().do(kind, path, *rest, action=action)
