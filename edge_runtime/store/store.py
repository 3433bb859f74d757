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

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from edge_runtime.errors import StoreError, WeightsError
from edge_runtime.files import FULL, Files, lock_file, strangers
from edge_runtime.formats.identity import identify
from edge_runtime.formats.init_weights import read_init_spec
from edge_runtime.formats.model_folder import (
    GRAPH_NAME,
    MODEL_FILES,
    MODEL_NAME,
    WEIGHTS_NAME,
)
from edge_runtime.formats.signing import Trust
from edge_runtime.formats.weights import fingerprint_chunks
from edge_runtime.store.contents import StoreContents
from edge_runtime.store.state import State, decode_state, encode_state
from edge_runtime.store.state_file import state_bytes
from edge_runtime.text import printable

# What a store writes and may remove; whatever else lies there is somebody's.
_HALF_OR_WHOLE = "[0-9a-f]{32}(?:[0-9a-f]{32})?"
_OWN = {
    ".": re.compile(
        r"init\.unfinished|current\.old\.part"
        r"|(?:current|state\.json|state\.copy|device\.key|init\.unfinished)\.part"
        r"|\..+\.[0-9a-f]{16}\.part"  # as Files.temporary names them
    ),
    "slots": re.compile(rf"{_HALF_OR_WHOLE}|.+\.part"),
    "reverse": re.compile(rf"{_HALF_OR_WHOLE}\.dpu|.+\.part"),
}
_OLD_CURRENT = "current.old.part"
# An installation begins with this file, so that what it leaves unfinished is known.
_MARK, _MARK_TEXT = "init.unfinished", b"dpu-edge init was begun here\n"
KEY_NAME = "device.key"
_LAID_OUT = (MODEL_NAME, "slots", "reverse", "current", "state.copy")


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


class Store(StoreContents):
    """A device's weights on disk.

    Here is what changes them; paths, checks and all that is only read come from
    :class:`edge_runtime.store.contents.StoreContents`.

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

    def create(self, model: Mapping[str, bytes], trust: Trust, size: int) -> None:
        """Lay a new store out; it counts as installed after the first commit.

        Args:
            model: The files of ``model/``, by name.
            trust: Whose signatures patches will need.
            size: Bytes that a weight file should have.

        Raises:
            StoreError: Something is there already; nothing of it was touched.
            WeightsError: The init recipe is malformed, or gives another size.
        """
        self.insist_free()
        if self._is_unfinished():
            for name in _LAID_OUT:
                self.files.remove(self.root / name)
        else:
            self.files.replace(self.root / _MARK, _MARK_TEXT, suffix=".part")
        folder = self.model_folder
        # The first commit makes the names of these durable.
        for path in (folder, self.root / "slots", self.root / "reverse"):
            self.files.mkdir(path)
        for name, data in model.items():
            self.files.write(folder / name, [data])
        self.files.sync_folder(folder)
        self.recipe = read_init_spec(folder)  # malformed: the bundle is at fault
        self.layout = self.recipe.layout()
        self._check_size(size)
        init = fingerprint_chunks(self.recipe.chunks())
        identity = identify(self.layout.header, model[GRAPH_NAME], folder)
        self.state = State(identity.model, init, trust=trust)

    def insist_free(self) -> None:
        """Insist that a store may be laid out here: nobody's things are in the way.

        An installation that was cut is no obstacle, nor is an empty file system.

        Raises:
            StoreError: A model is installed there, or something else lies there.
        """
        if self._state_path.exists():
            raise StoreError(
                f"{self.root} already holds an installed model; use 'dpu-edge apply' "
                "to update it, or remove the folder to install anew"
            )
        # A key may come with the card, before any model (dpu-fleet provision).
        own, lock = {"lost+found", KEY_NAME}, self.root / "lock"
        if lock.is_file() and not lock.stat().st_size:
            own.add(lock.name)
        own |= {path.name for path in self._own_files() if self._is_begun_mark(path)}
        inside: list[str] = []
        if self._is_unfinished():
            own.update(_LAID_OUT, self._left())
            inside = list(self._put_into())
        if found := ", ".join([*filter(None, [strangers(self.root, own)]), *inside]):
            raise StoreError(
                f"{self.root} is not empty and holds no store: found {found}; give an "
                "empty folder, or one that does not exist"
                + (
                    ". If this store has lost its state.json, copy state.copy to it"
                    if self._copy_path.exists()
                    else ""
                )
            )

    def _is_unfinished(self) -> bool:
        mark = self.root / _MARK
        if not mark.is_file() or mark.stat().st_size != len(_MARK_TEXT):
            return False
        return mark.read_bytes() == _MARK_TEXT

    def _is_begun_mark(self, path: Path) -> bool:
        """Return whether a file is what a cut left of the mark before it had its name.

        Of a name like it, but with something else in it, nobody knows whose it is.
        """
        if _MARK not in path.name or path.suffix != ".part":
            return False
        plain = path.is_file() and not path.is_symlink()
        return plain and path.stat().st_size <= len(_MARK_TEXT)

    def _left(self) -> set[str]:
        """Return names beside the folders that a cut may have left."""
        paths = (path for path in self._own_files() if path.parent == self.root)
        # ``current.part`` leads to a folder, and is none.
        return {
            path.name
            for path in paths
            if path.name == _OLD_CURRENT or path.is_symlink() or not path.is_dir()
        }

    def _put_into(self) -> Iterator[str]:
        """Yield, in words, what somebody else put into an unfinished installation."""
        slots, ways = (
            {
                p.name
                for p in (self.root / name).glob("*")
                if _OWN[name].fullmatch(p.name)
            }
            for name in ("slots", "reverse")
        )
        known: dict[str, Collection[str]] = {
            MODEL_NAME: MODEL_FILES,
            "slots": slots,
            "reverse": ways,
            **{f"slots/{name}": (GRAPH_NAME, WEIGHTS_NAME) for name in sorted(slots)},
        }
        if not (self.root / "current").is_symlink():
            known["current"] = (GRAPH_NAME, WEIGHTS_NAME)  # a copy, made with cp -rL
        for name, own in known.items():
            folder = self.root / name
            if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                yield printable(name)
            elif found := strangers(folder, own):
                yield f"{printable(name)}/ with {found}"

    def _check_size(self, size: int) -> None:
        """Check the size that a recipe asks for, before anything of it is written."""
        stated = self.layout.file_size
        if stated != size:
            raise WeightsError(
                f"the init recipe gives a weight file of {stated} bytes, the patch is "
                f"for one of {size}; make the bundle anew"
            )
        if (free := self.files.free_bytes(self.root)) < stated:
            raise StoreError(
                f"{self.root} has {free} bytes free, a weight file needs {stated}; "
                "free some space and try again"
            )

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
            old = self.root / _OLD_CURRENT
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

    def _own_files(self) -> Iterator[Path]:
        """Yield what a store may have written and may come to remove."""
        for folder, names in _OWN.items():
            for path in (self.root / folder).glob("*"):
                if names.fullmatch(path.name):
                    yield path
