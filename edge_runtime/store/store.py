# SPDX-License-Identifier: Apache-2.0
"""The device's directory: slots, state, history.

::

    STORE/
      state.json              the one commit point
      state.copy              the same, written before it; read when it is damaged
      lock                    held while something is written
      model/                  graph.onnx init.json contract.json golden.npz, and
                              run.json where the run has an id
      slots/<fingerprint>/    graph.onnx (a second name of the one in model/)
                              weights.safetensors
      reverse/<fingerprint>.dpu  the way back to weights that have no slot any more
      hooks/                  the owner's programs, see update/hooks.py
      live/                   what live predictors were made from, see live/entries.py
      outbox/                 reports that wait to be sent, see live/outbox.py
      device.key              signs proofs, if there is one, see live/proof.py
      current -> slots/...    for people; derived from state.json, never read

ONNX Runtime maps the weight file into memory, so a slot is never written to once it
has its name: new weights are written beside, synced, renamed, and become active when
``state.json`` is replaced. Cut the power at any point and the state names a slot that
is whole. What is written into a slot, and what makes room for it, is in
:mod:`edge_runtime.store.slots`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from edge_runtime.errors import StoreError
from edge_runtime.files import FULL, Files, lock_file
from edge_runtime.formats.model_folder import (
    GRAPH_NAME,
    WEIGHTS_NAME,
)
from edge_runtime.reading import strangers
from edge_runtime.store.beginning import OLD_CURRENT, Beginning
from edge_runtime.store.state import State, decode_state, encode_state
from edge_runtime.store.state_file import state_bytes


@contextmanager
def exclusive_lock(file: BinaryIO, problem: str) -> Iterator[None]:
    """Hold the lock of an open file, which is closed in the end.

    Raises:
        StoreError: Another process holds it; ``problem`` says so.
        OSError: The file system has no locks.
    """
    with file:
        try:
            lock_file(file, Path(file.name))
        except BlockingIOError as err:
            raise StoreError(problem) from err
        yield


class Store(Beginning):
    """A device's weights on disk.

    Here is what changes them; how a store is laid out comes from
    :class:`edge_runtime.store.beginning.Beginning`, paths, checks and all that is only
    read from :class:`edge_runtime.store.contents.StoreContents`.

    Attributes:
        root: The directory.
        files: The seam to the disk.
        state: What ``state.json`` said when it was last read or written.
    """

    @classmethod
    def open(cls, root: str | PathLike[str], files: Files | None = None) -> "Store":
        """Open an installed store.

        Raises:
            StoreError: Nothing is installed there, or the state is damaged.
        """
        store = cls(root, files)
        if store.root.is_dir() and not store._state_path.exists():
            store.insist_free()  # else 'init' is advised, which would refuse it
        store.reload()
        return store

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other writers out; tidy up what they, or this one, leave behind.

        Raises:
            StoreError: Another process is writing, or the state is damaged.
            OSError: The disk is full or refuses.
        """
        if not self._state_path.exists():
            self.files.make_folder(self.root.absolute())
        lock = self.files.open_lock(self.root / "lock")
        problem = f"another process is updating {self.root}; try again when it is done"
        with exclusive_lock(lock, problem):
            self._settle()
            try:
                yield
            finally:
                # What was done is done: tidying up must not turn it into a failure.
                with suppress(OSError, StoreError):
                    self._settle()

    def stage(self, chunks: Iterable[bytes | memoryview], target: str) -> Path:
        """Write a slot beside the others; it is not active yet.

        Args:
            chunks: The whole weight file; the iterator raises at its end if the bytes
                are not the target's, as :func:`apply_chunks` does.
            target: Its fingerprint.

        Returns:
            The slot's folder, complete and durable.

        Raises:
            OSError: The disk is full or refuses.
            DpuError: Whatever ``chunks`` raises.
        """
        folder = self.root / "slots" / target
        part = folder.with_name(folder.name + ".part")
        self._insist_unnamed(folder)
        self.files.remove(folder)
        self.files.remove(part)
        self.files.mkdir(part)
        self.files.link(self.model_folder / GRAPH_NAME, part / GRAPH_NAME)
        self.files.write(part / WEIGHTS_NAME, chunks)
        self.files.sync_folder(part)
        self.files.rename(part, folder)
        self.files.sync_folder(folder.parent)
        return folder

    def add_reverse(self, target: str, data: bytes) -> None:
        """Write the reverse patch that leads to some weights; no state names it yet.

        Raises:
            StoreError: The state names another one.
            OSError: The disk is full or refuses.
        """
        path = self.root / "reverse" / f"{target}.dpu"
        self._insist_unnamed(path)
        self.files.write(path, [data])
        self.files.sync_folder(path.parent)

    def _insist_unnamed(self, path: Path) -> None:
        if path in self.named():
            raise StoreError(
                f"{path} is in use by this store and cannot be written anew; nothing "
                "changed. This is a bug: please report it"
            )

    def commit(self, state: State) -> None:
        """Replace ``state.json``: before this the old state holds, after it the new.

        Raises:
            OSError: The disk is full or refuses.
        """
        data = encode_state(state)
        try:
            for path in (self._copy_path, self._state_path):
                self.files.replace(path, data, suffix=".part")
        except OSError as err:
            if not self._gives_up_copy(err):
                raise
            # The place of the copy is enough for the state, and that of the state,
            # once it is replaced, for the copy. If not, the next start writes it.
            self.files.replace(self._state_path, data, suffix=".part")
            with suppress(OSError):
                self.files.replace(self._copy_path, data, suffix=".part")
        self.state = state

    def _gives_up_copy(self, err: OSError) -> bool:
        """Remove ``state.copy`` where a full disk needs it; return whether it did.

        Only if it is there, and ``state.json`` is whole.
        """
        if err.errno not in FULL or not self.files.is_full(self.root):
            return False
        try:
            decode_state(state_bytes(self._state_path))
        except (OSError, StoreError):
            return False
        if not self._copy_path.exists():
            return False
        # What decodes may have got its name a moment ago: not before that is durable.
        self.files.sync_folder(self.root)
        self.files.unlink(self._copy_path)
        # An older copy must not come back beside a newer state.
        self.files.sync_folder(self.root)
        return True

    def _settle(self) -> None:
        """Read the state, mend its copy, and remove what a cut left behind."""
        if self._state_path.exists():
            state = self.reload()
            try:
                mended = state_bytes(self._copy_path) == state_bytes(self._state_path)
            except (OSError, StoreError):
                mended = False
            if not mended:
                self._mend(state)
            for folder in (self.root / "slots", self.root / "reverse"):
                # A copy may lack what was empty, and a repaired disk what was lost.
                if not (folder.exists() or folder.is_symlink()):
                    self.files.make_folder(folder)
            self.collect()

    def _mend(self, state: State) -> None:
        try:
            self.commit(state)
        except OSError as err:
            # A full disk: what is about to be done may make room.
            if err.errno not in FULL:
                raise

    def collect(self) -> None:
        """Let ``current`` follow the state, and remove what the state does not name.

        Raises:
            OSError: The disk refuses.
        """
        shown = self._point_current()
        doomed = set(self._own_files()) - self.named() - shown
        if doomed:
            # A state or link that a killed process left may not be durable yet.
            self.files.sync_folder(self.root)
        for path in sorted(doomed):
            self.files.remove(path)

    def _point_current(self) -> set[Path]:
        """Let ``current`` lead to the active slot, where the file system has links.

        Returns:
            What it leads to now: where not one inode is left, it may be another slot.
        """
        wanted = f"slots/{self.slot_folder(self.state.active).name}"
        link = self.root / "current"
        if link.is_symlink() and str(link.readlink()) == wanted:
            return set()
        if link.is_dir() and not link.is_symlink():
            if strangers(link, {GRAPH_NAME, WEIGHTS_NAME}):
                return set()  # somebody's folder
            # A copy of the slot, as 'cp -rL' makes it of a link: it would never move.
            old = self.root / OLD_CURRENT
            self.files.remove(old)
            self.files.rename(link, old)
        try:
            self.files.point(link, wanted)
        except OSError as err:
            # FAT has no links. Where there are, none may outlive its slot.
            if not link.is_symlink():
                return set()
            if err.errno not in FULL:
                raise
            if self._gives_up_copy(err):
                # An inode for the new link, before the old one goes.
                with suppress(OSError):
                    self.files.point(link, wanted)
                with suppress(OSError):
                    data = self._state_path.read_bytes()
                    self.files.replace(self._copy_path, data, suffix=".part")
        return {self.root / link.readlink()}
