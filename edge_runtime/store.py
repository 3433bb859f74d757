"""The device's directory: slots, state, history.

::

    STORE/
      state.json              the one commit point
      lock                    held while something is written
      model/                  graph.onnx init.json contract.json golden.npz
      slots/<fingerprint>/    graph.onnx (a second name of the one in model/)
                              weights.safetensors
      current -> slots/...    for people; derived from state.json, never read

ONNX Runtime maps the weight file into memory, so a slot is never written to once it
has its name: new weights are written beside, synced, renamed, and become active when
``state.json`` is replaced. Cut the power at any point and the state names a slot that
is whole.
"""

import fcntl
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from os import PathLike
from pathlib import Path

from edge_runtime.contract import Contract, parse_contract
from edge_runtime.errors import StoreError
from edge_runtime.files import Files
from edge_runtime.init import InitRecipe, read_recipe
from edge_runtime.state import Event, State, decode_state, encode_state
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
        store.files.make_folder(folder)
        store.files.make_folder(store.root / "slots")
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

    def reload(self) -> State:
        """Read ``state.json`` again.

        Raises:
            StoreError: Nothing is installed there, or the state is damaged.
        """
        try:
            data = self._state_path.read_bytes()
        except FileNotFoundError as err:
            raise StoreError(
                f"nothing is installed in {self.root}; run 'dpu-edge --store "
                f"{self.root} init BUNDLE' first"
            ) from err
        self._state = decode_state(data)
        return self._state

    def slot_folder(self, target: str) -> Path:
        """Return the folder of a slot."""
        return self.root / "slots" / target[:_NAME_LENGTH]

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
        """Keep other writers out, and read the state that they left.

        Raises:
            StoreError: Another process is writing.
        """
        self.files.make_folder(self.root)
        with open(self.root / "lock", "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as err:
                raise StoreError(
                    f"another process is updating {self.root}; try again when it is "
                    "done"
                ) from err
            if self._state_path.exists():
                self.reload()
            yield

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
            if not spare:
                raise StoreError(
                    f"{self.root} has {free} bytes free, a new slot needs {needed}; "
                    "free some space and apply the patch again"
                )
            self.commit(self.state.without(spare[-1]))
            self.collect()

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
            DpuError: Whatever ``chunks`` raises; nothing is left behind then.
        """
        folder = self.slot_folder(target)
        part = folder.with_name(folder.name + ".part")
        try:
            self.files.remove(folder)
            self.files.remove(part)
            self.files.make_folder(part)
            self.files.link(self.graph_path, part / GRAPH_NAME)
            self.files.write(part / FILE_NAME, chunks)
            self.files.sync_folder(part)
            self.files.rename(part, folder)
            self.files.sync_folder(folder.parent)
        except BaseException as err:
            with suppress(OSError):
                self.files.remove(part)
            if isinstance(err, OSError):
                raise StoreError(f"cannot write a new slot: {err}") from err
            raise
        return folder

    def commit(self, state: State) -> None:
        """Replace ``state.json``: before this the old state holds, after it the new.

        Raises:
            StoreError: The disk is full or refuses.
        """
        part = self._state_path.with_suffix(".json.part")
        try:
            self.files.write(part, [encode_state(state)])
            self.files.rename(part, self._state_path)
            self.files.sync_folder(self.root)
        except OSError as err:
            with suppress(OSError):
                self.files.remove(part)
            raise StoreError(f"cannot write state.json: {err}") from err
        self._state = state

    @contextmanager
    def tidied(self) -> Iterator[None]:
        """Remove what an update leaves behind, also where it fails."""
        try:
            yield
        except BaseException:
            # By what the disk says: a failed sync can follow a state that is written.
            with suppress(OSError, StoreError):
                self.reload()
                self.collect()
            raise
        # The update counts: tidying up must not turn it into a failure.
        with suppress(OSError):
            self.collect()

    def collect(self) -> None:
        """Remove what the state does not name, and let ``current`` follow it."""
        keep = {self.slot_folder(slot.target).name for slot in self.state.slots}
        for path in sorted((self.root / "slots").iterdir()):
            if path.name not in keep:
                self.files.remove(path)
        active = self.slot_folder(self.state.active)
        self.files.point(self.root / "current", f"slots/{active.name}")

    def skip(self, target: str, event: Event) -> None:
        """Remember a release that failed its trial."""
        skipped = tuple(dict.fromkeys((*self.state.skipped, target)))
        self.commit(replace(self.state, skipped=skipped).noted(event))
