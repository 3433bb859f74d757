# SPDX-License-Identifier: Apache-2.0
"""What a store holds, and where: paths, state, model files, slots; all read-only."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any

from edge_runtime.errors import ContractError, StoreError, WeightsError
from edge_runtime.files import Files
from edge_runtime.formats.contract import Contract
from edge_runtime.formats.contract_file import parse_contract
from edge_runtime.formats.identity import Identity, Run, identify, read_run
from edge_runtime.formats.init_weights import InitSpec, read_init_spec
from edge_runtime.formats.layout import Layout
from edge_runtime.formats.model_folder import (
    CONTRACT_NAME,
    GRAPH_NAME,
    MODEL_NAME,
    RUN_NAME,
    WEIGHTS_NAME,
)
from edge_runtime.formats.weights import (
    fingerprint_chunks,
    fingerprint_file,
    read_chunks,
)
from edge_runtime.reading import read_bounded
from edge_runtime.store.admission import unknown_parent
from edge_runtime.store.state import Slot, State
from edge_runtime.store.state_file import COPY_NAME, STATE_NAME, read_state

KEY_NAME = "device.key"  # signs proofs
# Earlier runtimes named slots and reverse patches by half a fingerprint. Whoever makes
# a patch chooses its target, and so could choose the name of somebody else's slot.
_OLD_NAME_LENGTH = 32


class StoreContents:
    """What a store holds: where it lies, and whether it is whole. Changes nothing.

    Attributes:
        root: The directory.
        model_folder: What all rounds share, as it came in the bundle.
        files: The seam to the disk.
        state: What ``state.json`` said when it was last read or written.
    """

    state: State

    def __init__(self, root: str | PathLike[str], files: Files | None = None) -> None:
        """Name a store, which need not be there yet; nothing is read."""
        self.root, self.files = Path(root), files or Files()
        self.model_folder = self.root / MODEL_NAME
        self._state_path = self.root / STATE_NAME
        self._copy_path = self.root / COPY_NAME

    def reload(self) -> State:
        """Read ``state.json`` again, or its copy if it is damaged.

        Raises:
            StoreError: Nothing is installed there, or both are damaged.
        """
        self.state = read_state(self.root)
        return self.state

    def stamp(self) -> tuple[int, int]:
        """Return what changes with every commit, at the cost of one ``stat``.

        Raises:
            OSError: Nothing is installed there any more.
        """
        status = self._state_path.stat()
        return status.st_ino, status.st_mtime_ns

    def slot_folder(self, target: str) -> Path:
        """Return the folder of a slot."""
        return self._place("slots", target, "", self.state.slots)

    def reverse_path(self, target: str) -> Path:
        """Return the reverse patch that leads to some weights."""
        return self._place("reverse", target, ".dpu", self.state.former)

    def _place(
        self, folder: str, target: str, suffix: str, known: Iterable[Slot]
    ) -> Path:
        """Return a path in the store; older runtimes named the same by half of it."""
        path = self.root / folder / (target + suffix)
        old = path.with_name(target[:_OLD_NAME_LENGTH] + suffix)
        is_known = any(slot.target == target for slot in known)
        return old if is_known and not path.exists() and old.exists() else path

    def named(self) -> set[Path]:
        """Return the paths that the state names; they may go only after a commit."""
        slots = {self.slot_folder(slot.target) for slot in self.state.slots}
        return slots | {self.reverse_path(link.target) for link in self.state.former}

    # What lies in model/ --------------------------------------------------------------

    @contextmanager
    def own(self) -> Iterator[None]:
        """Blame this device for what is wrong with its ``model`` folder, and no patch.

        Raises:
            StoreError: A file there is malformed, or is not there.
        """
        try:
            yield
        except (ContractError, WeightsError, FileNotFoundError) as err:
            raise self._damaged(f" ({err})") from err

    def _damaged(self, reason: str = "") -> StoreError:
        return StoreError(
            f"{self.model_folder} is damaged{reason}; 'dpu-edge repair BUNDLE' makes "
            "it whole again"
        )

    @cached_property
    def recipe(self) -> InitSpec:
        """What regenerates the init weights."""
        with self.own():
            return read_init_spec(self.model_folder)

    @cached_property
    def contract(self) -> Contract:
        """What goes in and comes out."""
        return self.read_contract()

    def read_contract(self) -> Contract:
        """Read what goes in and comes out.

        Raises:
            OSError: It cannot be read.
            StoreError: It is damaged, or another than was installed.
        """
        with self.own():
            return parse_contract(self._contract())

    def _contract(self) -> bytes:
        path, what = self.model_folder / CONTRACT_NAME, "the contract"
        data = read_bounded(path, "contract_bytes", what, ContractError)
        found, expected = sha256(data).hexdigest(), self.state.contract
        if expected and found != expected:
            raise ContractError(
                f"the SHA-256 of {CONTRACT_NAME} is {found}, expected {expected}"
            )
        return data

    @cached_property
    def layout(self) -> Layout:
        """The layout of every weight file of this model."""
        with self.own():
            return self.recipe.layout()

    @property
    def run(self) -> Run | None:
        """Which run this device was installed from; None where it has no id."""
        with self.own():
            return read_run(self.model_folder)

    def summary(self) -> dict[str, Any]:
        """Return what statuses, logs, metrics and reports say of it, as plain data.

        The state's own summary, and ``name`` where the run has one. The name is for
        people: where it cannot be read, there is none.
        """
        with suppress(OSError, StoreError):
            if (run := self.run) and run.name:
                return self.state.summary() | {"name": run.name}
        return self.state.summary()

    def read_identity(self) -> Identity:
        """Return network and run of this device, computed from the files.

        Raises:
            OSError: A file cannot be read.
            StoreError: One is malformed, or is not there.
        """
        folder = self.model_folder
        with self.own():
            graph = (folder / GRAPH_NAME).read_bytes()
            return identify(self.layout.header, graph, folder)

    def check_model(self) -> None:
        """Insist that the ``model`` folder is of the state's network, run and contract.

        Raises:
            OSError: A file cannot be read.
            StoreError: It is not.
        """
        if self.read_identity().model != self.state.model:
            raise self._damaged()
        with self.own():
            self._contract()

    # Weights --------------------------------------------------------------------------

    def base(self, parent: str) -> Iterable[bytes | memoryview]:
        """Return the bytes of weights that a patch may lead from, in pieces.

        Args:
            parent: Their fingerprint. They are read from a slot or regenerated.

        Raises:
            WrongParentError: The store does not have them.
        """
        if error := unknown_parent(self.state, parent):
            raise error
        if self.state.slot(parent):
            return read_chunks(self.slot_folder(parent) / WEIGHTS_NAME)
        return self.recipe.chunks()

    def _hashed(self, path: Path) -> tuple[str, bytes]:
        """Return a weight file's SHA-256 and its header, of one reading."""
        size, head = len(self.layout.header), bytearray()

        def seen() -> Iterator[memoryview]:
            for chunk in read_chunks(path):
                head.extend(chunk[: max(0, size - len(head))])
                yield chunk

        return fingerprint_chunks(seen()), bytes(head)

    def check_slot(self, target: str) -> Path:
        """Hash a slot's weight file, look at its header and graph; return its folder.

        Raises:
            StoreError: It is missing or damaged.
        """
        folder = self.slot_folder(target)
        path = folder / WEIGHTS_NAME
        try:
            actual, header = self._hashed(path)
            graph = (folder / GRAPH_NAME).read_bytes()
        except OSError as err:
            raise StoreError(f"the slot {target[:12]} cannot be read: {err}") from err
        if actual != target:
            raise StoreError(
                f"{path} is damaged: its SHA-256 is {actual}, expected {target}; run "
                "'dpu-edge repair BUNDLE', or 'dpu-edge rollback'"
            )
        with self.own():
            found = identify(header, graph, self.model_folder)
        if found.model != self.state.model:
            raise StoreError(
                f"{folder / GRAPH_NAME} or model/{RUN_NAME} is damaged or was "
                "exchanged; 'dpu-edge repair BUNDLE' makes it whole again"
            )
        return folder

    def check_current(self) -> None:
        """Insist that ``current``, where it is a copy and no link, is not out of date.

        Raises:
            StoreError: It holds other weights than the active ones.
        """
        link = self.root / "current"
        path = link / WEIGHTS_NAME
        if link.is_symlink() or not path.exists():
            return
        try:
            found = fingerprint_file(path)
        except OSError as err:
            raise StoreError(f"{path} cannot be read: {err}") from err
        if found != self.state.active:
            raise StoreError(
                f"{link} is a copy of other weights ({found[:12]}), expected a link to "
                "the active ones: was this store copied without its links? The next "
                "command that changes the store mends it, for example 'dpu-edge pin "
                "--off'"
            )
