"""Files that record, refuse or forget single operations."""

import os
from pathlib import Path

from edge_runtime.files import Files


class Traced(Files):
    """Sends every primitive operation through :meth:`do`."""

    def do(self, kind, path, *rest, action=lambda: None):
        raise NotImplementedError

    def mkdir(self, path):
        if not path.is_dir():
            self.do("mkdir", path, action=lambda: super(Traced, self).mkdir(path))

    def write(self, path, chunks):
        def seen():
            for chunk in chunks:
                self.do("data", path, bytes(chunk))
                yield chunk

        self.do("create", path)
        super().write(path, seen())

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

    def __init__(self, base):
        self.base = base.resolve()
        self.log = []

    def do(self, kind, path, *rest, action=lambda: None):
        action()
        inside = [
            a.relative_to(self.base) if isinstance(a, Path) else a
            for a in (path, *rest)
        ]
        self.log.append((kind, *inside))


class Forgetful(Recorder):
    """Leaves out one sync, counted from 0, as a store with a bug would."""

    def __init__(self, base, which):
        super().__init__(base)
        self.which = which
        self.left_out = None

    def sync(self, handle):
        if self.which == 0:
            self.left_out = Path(f"/proc/self/fd/{handle}").readlink()
        else:
            super().sync(handle)
        self.which -= 1


class Failing(Recorder):
    """Refuses operation number ``first``, and all after it if ``for_good``."""

    def __init__(self, base, first, error, *, for_good=False):
        super().__init__(base)
        self.left, self.error, self.for_good = first, error, for_good

    def do(self, kind, path, *rest, action=lambda: None):
        self.left -= 1
        if self.left == -1 or (self.for_good and self.left < 0):
            raise OSError(self.error, os.strerror(self.error), str(path))
        super().do(kind, path, *rest, action=action)
