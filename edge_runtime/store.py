"""The device's directory: slots, state, history.

::

    STORE/
      state.json              the one commit point
      state.copy              the same, written before it; read when it is damaged
      lock                    held while something is written
      model/                  graph.onnx init.json contract.json golden.npz
      slots/<fingerprint>/    graph.onnx (a second name of the one in model/)
                              weights.safetensors
      reverse/<fingerprint>.dpu  the way back to weights that have no slot any more
      hooks/                  the owner's programs, see hooks.py
      current -> slots/...    for people; derived from state.json, never read

ONNX Runtime maps the weight file into memory, so a slot is never written to once it
has its name: new weights are written beside, synced, renamed, and become active when
``state.json`` is replaced. Cut the power at any point and the state names a slot that
is whole.
"""

import fcntl
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from os import PathLike
from pathlib import Path

from edge_runtime.contract import Contract, parse_contract
from edge_runtime.errors import StoreError, WeightsError
from edge_runtime.files import Files
from edge_runtime.header import PatchHeader
from edge_runtime.init import InitRecipe, read_recipe
from edge_runtime.reverse import encode_reverse
from edge_runtime.state import Event, Slot, State, decode_state, encode_state
from edge_runtime.weights import (
    FILE_NAME,
    Layout,
    fingerprint_file,
    model_id,
    read_chunks,
    read_layout,
)

GRAPH_NAME = "graph.onnx"
CONTRACT_NAME = "contract.json"
GOLDEN_NAME = "golden.npz"
KEPT_SLOTS = 2
REVERSE_SHARE = 8  # a reverse patch may have one part in this many of a slot's size
SPARE_BYTES = 1 << 20  # left free beside a new slot, for state and directory blocks
_NAME_LENGTH = 32  # of a slot's folder: half a fingerprint is still unique


class Store:
    """A device's weights on disk.

    Attributes:
        root: The directory.
        files: The seam to the disk.
    """

    def __init__(self, root: Path, state: State | None, files: Files) -> None:
        """Use :meth:`open` or :meth:`create` instead."""
        self.root = root
        self._state = state
        self.files = files

    @classmethod
    def open(cls, root: str | PathLike[str], files: Files | None = None) -> "Store":
        """Open an installed store.

        Raises:
            StoreError: Nothing is installed there, or the state is damaged.
        """
        store = cls(Path(root), None, files or Files())
        store.reload()
        return store

    @classmethod
    def create(
        cls,
        root: str | PathLike[str],
        model: Mapping[str, bytes],
        files: Files | None = None,
    ) -> "Store":
        """Lay out a new store; it counts as installed after the first commit.

        Args:
            root: The directory; created where missing.
            model: The files of ``model/``, by name.
            files: The seam to the disk.

        Raises:
            StoreError: Something is installed there already.
        """
        store = cls(Path(root), None, files or Files())
        if store._state_path.exists():
            raise StoreError(
                f"{root} already holds an installed model; use 'dpu-edge apply' to "
                "update it, or remove the folder to install anew"
            )
        folder = store.root / "model"
        # The first commit makes the names of these durable.
        for path in (folder, store.root / "slots", store.root / "reverse"):
            store.files.mkdir(path)
        for name, data in model.items():
            store.files.write(folder / name, [data])
        store.files.sync_folder(folder)
        return store

    # What is there ------------------------------------------------------------------

    @property
    def state(self) -> State:
        """What ``state.json`` said when it was last read or written.

        Raises:
            StoreError: The installation was cut off before its first commit.
        """
        if self._state is None:
            raise StoreError(f"the installation in {self.root} is not complete")
        return self._state

    @property
    def _state_path(self) -> Path:
        return self.root / "state.json"

    @property
    def _copy_path(self) -> Path:
        return self.root / "state.copy"

    def reload(self) -> State:
        """Read ``state.json`` again, or its copy if it is damaged.

        Raises:
            StoreError: Nothing is installed there, or both are damaged.
        """
        if not self._state_path.exists():
            raise StoreError(
                f"nothing is installed in {self.root}; run 'dpu-edge --store "
                f"{self.root} init BUNDLE' first"
            )
        try:
            self._state = decode_state(self._state_path.read_bytes())
        except (OSError, StoreError):
            # The copy is never older, so its release floor is never lower.
            with suppress(OSError, StoreError):
                state = decode_state(self._copy_path.read_bytes())
                note = event_now("mended", state.active_slot, "state.json was damaged")
                self._state = state.noted(note)
                return self._state
            raise
        return self._state

    def stamp(self) -> tuple[int, int]:
        """Return what changes with every commit, at the cost of one ``stat``.

        Raises:
            OSError: Nothing is installed there any more.
        """
        status = self._state_path.stat()
        return status.st_ino, status.st_mtime_ns

    def slot_folder(self, target: str) -> Path:
        """Return the folder of a slot."""
        return self.root / "slots" / target[:_NAME_LENGTH]

    def reverse_path(self, target: str) -> Path:
        """Return the reverse patch that leads to some weights."""
        return self.root / "reverse" / (target[:_NAME_LENGTH] + ".dpu")

    @property
    def graph_path(self) -> Path:
        """The graph that all slots share."""
        return self.root / "model" / GRAPH_NAME

    @cached_property
    def recipe(self) -> InitRecipe:
        """What regenerates the init weights."""
        return read_recipe(self.root / "model")

    @cached_property
    def contract(self) -> Contract:
        """What goes in and comes out."""
        return parse_contract((self.root / "model" / CONTRACT_NAME).read_text())

    @cached_property
    def layout(self) -> Layout:
        """The layout of every weight file of this model."""
        return self.recipe.layout()

    @cached_property
    def model(self) -> str:
        """The network's identity, computed from the files."""
        return model_id(self.layout.header, self.graph_path.read_bytes())

    def base(self, parent: str) -> Iterable[bytes] | None:
        """Return the bytes of weights that a patch may lead from.

        Args:
            parent: Their fingerprint.

        Returns:
            The weight file in pieces, from a slot or regenerated; None if the store
            does not have them.
        """
        if self._state and self._state.slot(parent):
            return read_chunks(self.slot_folder(parent) / FILE_NAME)
        init = self._state.init if self._state else None
        if init in (None, parent):
            return self.recipe.chunks()
        return None

    def check_slot(self, target: str) -> None:
        """Hash a slot's weight file and look at its header and graph.

        Raises:
            StoreError: It is missing or damaged.
        """
        path = self.slot_folder(target) / FILE_NAME
        try:
            actual = fingerprint_file(path)
            with open(path, "rb") as file:
                header = read_layout(file).header if actual == target else b""
            graph = (path.parent / GRAPH_NAME).read_bytes()
        except OSError as err:
            raise StoreError(f"the slot {target[:12]} cannot be read: {err}") from err
        if actual != target:
            raise StoreError(
                f"{path} is damaged: its SHA-256 is {actual}, expected {target}; run "
                "'dpu-edge rollback', or install the bundle into an empty folder"
            )
        if self._state and model_id(header, graph) != self._state.model:
            raise StoreError(
                f"{path.parent / GRAPH_NAME} is damaged or was exchanged; install the "
                "bundle into an empty folder"
            )

    # Changing it --------------------------------------------------------------------

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other writers out; tidy up what they, or this one, leave behind.

        Raises:
            StoreError: Another process is writing, or the state is damaged.
        """
        if not self._state_path.exists():
            self.files.make_folder(self.root.absolute())
        with self.files.open_lock(self.root / "lock") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as err:
                raise StoreError(
                    f"another process is updating {self.root}; try again when it is "
                    "done"
                ) from err
            self._settle()
            try:
                yield
            finally:
                # What was done is done: tidying up must not turn it into a failure.
                with suppress(OSError, StoreError):
                    self._settle()

    def make_room(self, parent: str) -> None:
        """Drop kept slots until a new one fits.

        Args:
            parent: A slot that is still needed, beside the active one.

        Raises:
            StoreError: There is not enough space even so.
        """
        needed = self.layout.file_size + SPARE_BYTES
        while (free := self.files.free_bytes(self.root)) < needed:
            slots = self._state.slots if self._state else ()
            spare = [s for s in slots if s.target not in (self.state.active, parent)]
            ways = sum(path.stat().st_size for path in self.root.glob("reverse/*"))
            if spare:
                self.commit(self.retire(self.state, spare[-1]))
            elif free + ways >= needed:
                self.commit(replace(self.state, former=()))
            else:
                raise StoreError(
                    f"{self.root} has {free} bytes free, a new slot needs {needed}; "
                    "free some space and apply the patch again"
                )
            self._collect()

    def retire(self, state: State, slot: Slot) -> State:
        """Return a state without a kept slot, and write the way back if it is small.

        Args:
            state: A state with other slots beside this one.
            slot: The slot to give up; it is removed once the result is committed.
        """
        parent = next(s for s in reversed(state.slots) if s != slot)
        size, path = self.layout.file_size, self.reverse_path(slot.target)
        header = PatchHeader(
            state.model, parent.target, slot.target, slot.round, slot.counter, size
        )
        # A convenience: that it cannot be written must not stop an update.
        with suppress(OSError, WeightsError):
            base, target = (self.slot_folder(s.target) for s in (parent, slot))
            data = encode_reverse(
                self.layout, base / FILE_NAME, target / FILE_NAME, header
            )
            if data and len(data) <= size // REVERSE_SHARE:
                self.files.write(path, [data])
                self.files.sync_folder(path.parent)
                return state.without(slot, replace(slot, parent=parent.target))
        return state.without(slot)

    def stage(self, chunks: Iterable[bytes | memoryview], target: str) -> Path:
        """Write a slot beside the others; it is not active yet.

        Args:
            chunks: The whole weight file; the iterator raises at its end if the bytes
                are not the target's, as :func:`apply_chunks` does.
            target: Its fingerprint.

        Returns:
            The slot's folder, complete and durable.

        Raises:
            StoreError: The disk is full or refuses.
            DpuError: Whatever ``chunks`` raises.
        """
        folder = self.slot_folder(target)
        part = folder.with_name(folder.name + ".part")
        try:
            self.files.remove(folder)
            self.files.remove(part)
            self.files.mkdir(part)
            self.files.link(self.graph_path, part / GRAPH_NAME)
            self.files.write(part / FILE_NAME, chunks)
            self.files.sync_folder(part)
            self.files.rename(part, folder)
            self.files.sync_folder(folder.parent)
        except OSError as err:
            raise StoreError(f"cannot write a new slot: {err}") from err
        return folder

    def commit(self, state: State) -> None:
        """Replace ``state.json``: before this the old state holds, after it the new.

        Raises:
            StoreError: The disk is full or refuses.
        """
        data = encode_state(state)
        try:
            for path in (self._copy_path, self._state_path):
                part = path.with_name(path.name + ".part")
                self.files.write(part, [data])
                self.files.rename(part, path)
                self.files.sync_folder(self.root)
        except OSError as err:
            raise StoreError(f"cannot write {path}: {err}") from err
        self._state = state

    def _settle(self) -> None:
        """Read the state, mend its copy, and remove what a cut left behind."""
        if self._state_path.exists():
            state = self.reload()
            try:
                mended = self._copy_path.read_bytes() == self._state_path.read_bytes()
            except OSError:
                mended = False
            if not mended:
                self.commit(state)
            self._collect()

    def _collect(self) -> None:
        """Let ``current`` follow the state, and remove what the state does not name."""
        wanted = f"slots/{self.slot_folder(self.state.active).name}"
        link = self.root / "current"
        if not link.is_symlink() or str(link.readlink()) != wanted:
            try:
                self.files.point(link, wanted)
            except OSError:
                # FAT has no links. Where there are, none may outlive its slot.
                if link.is_symlink():
                    raise
        named = {self.slot_folder(slot.target) for slot in self.state.slots}
        named |= {self.reverse_path(link.target) for link in self.state.former}
        doomed = [
            *self.root.glob("*.part"),
            *(p for p in self.root.glob("slots/*") if p not in named),
            *(p for p in self.root.glob("reverse/*") if p not in named),
        ]
        if doomed:
            # A state or link that a killed process left may not be durable yet.
            self.files.sync_folder(self.root)
        for path in doomed:
            self.files.remove(path)


def event_now(event: str, slot: Slot, reason: str = "") -> Event:
    """Return an entry for the history."""
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return Event(at, event, slot.round, slot.target, reason)
