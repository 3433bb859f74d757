# SPDX-License-Identifier: Apache-2.0
"""How slots come and go: patches make one, others make room for it.

What a store gives up, in this order: kept slots, the oldest first, and then the reverse
patches that lead back to them. The active slot and a patch's parent never go.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from edge_runtime.errors import (
    DpuError,
    PatchError,
    StoreError,
    VerificationError,
    WeightsError,
)
from edge_runtime.files import FULL
from edge_runtime.formats.apply import apply_chunks
from edge_runtime.formats.header import PatchHeader
from edge_runtime.formats.layout import Layout
from edge_runtime.formats.model_folder import WEIGHTS_NAME
from edge_runtime.formats.patch import Patch, open_patch
from edge_runtime.formats.patch_encoder import encode_patch
from edge_runtime.formats.weights import (
    CHUNK_BYTES,
    Weights,
    check_size,
    fingerprint_chunks,
)
from edge_runtime.store.state import Slot, State
from edge_runtime.store.store import Store

SPARE_BYTES = 1 << 20  # left free beside a new slot, for state and directory blocks
REVERSE_SHARE = 8  # a reverse patch may have one part in this many of a slot's size
MAX_CHANGES = 1 << 18  # elements of one: encoding them takes about 16 MB of memory
_LEVEL = 3  # of zstd: a reverse patch is never sent, and a small board is slow


def build_slot(
    store: Store, parent: str, patches: Sequence[Patch], target: str
) -> Path:
    """Write the slot that patches lead to, one after the other; it is not active yet.

    Where there is no room, older slots and ways back are given up for it, but not
    before the patches proved, read without writing, that they lead to the target.

    Args:
        store: The store.
        parent: Fingerprint of the weights that the first patch leads from.
        patches: Open patches.
        target: Fingerprint of the weights that the last one leads to.

    Returns:
        The slot's folder, complete and durable.

    Raises:
        WrongParentError: The store does not have the parent.
        PatchError: A patch contradicts itself or the layout.
        VerificationError: A result is not the promised one, and the parent is right.
        StoreError: The parent is damaged, or there is no room.
        OSError: The disk refuses.
    """
    for patch in patches:
        patch.check(store.layout)
    new = _NewSlot(store, parent, patches, target)
    new.check_parent()
    kept = store.state.slot(target)
    if kept and target != store.state.active:
        # Damaged, or it would not be built: written anew, once no state names it.
        new.prove()
        store.commit(store.state.without(kept))
        store.collect()
    while True:
        lack: StoreError | OSError | None = shortage(store)
        if lack is None:
            try:
                return new.write()
            except OSError as err:
                # Blocks that nobody foresaw, a quota, or all inodes used up.
                if err.errno not in FULL or not store.state.active:
                    raise
                lack = err
                store.collect()  # what was written of it
        new.prove()
        if not _give_up(store, parent, bytes_=isinstance(lack, StoreError)):
            raise lack


def target_slot(store: Store, patch: Patch) -> Path:
    """Return the slot that a patch leads to: kept since a rollback, or built.

    Raises:
        DpuError, OSError: As :func:`build_slot`.
    """
    parent, target = patch.header.parent, patch.header.target
    if store.state.slot(target):
        # It is not applied then; what breaks the format is refused all the same.
        patch.check(store.layout)
        try:
            return store.check_slot(target)
        except StoreError:
            if target == store.state.active:
                raise
    return build_slot(store, parent, [patch], target)


def restore_slot(store: Store, slot: Slot) -> None:
    """Make a slot again from a kept one and reverse patches.

    Raises:
        StoreError: The way back is damaged, there is no room, or the disk refuses.
    """
    start, links = store.state.way_back(slot.target)
    try:
        with ExitStack() as stack:
            paths = (store.reverse_path(link.target) for link in links)
            patches = [stack.enter_context(open_patch(path)) for path in paths]
            build_slot(store, start, patches, slot.target)
        store.check_slot(slot.target)
    except (DpuError, OSError) as err:
        raise StoreError(
            f"the way back to round {slot.round} is not usable: {err}; 'dpu-edge "
            "repair BUNDLE' gives up such ways"
        ) from err


class _NewSlot:
    """What patches lead to. It may be read as often as need be, the same each time."""

    def __init__(
        self, store: Store, parent: str, patches: Sequence[Patch], target: str
    ) -> None:
        self._store, self._parent = store, parent
        self._patches, self._target = patches, target
        self._proved = False

    def check_parent(self) -> None:
        """Insist that the store has the parent."""
        self._store.base(self._parent)

    def write(self) -> Path:
        """Write it, and prove it while it is written."""
        with self._blamed():
            return self._store.stage(self._chunks(), self._target)

    def prove(self) -> None:
        """Prove it without writing it, before anything older is given up for it."""
        if not self._proved:
            with self._blamed():
                deque(self._chunks(), maxlen=0)
            self._proved = True

    def _chunks(self) -> Iterable[bytes | memoryview]:
        chunks = self._store.base(self._parent)
        for patch in self._patches:
            chunks = apply_chunks(chunks, self._store.layout, patch)
        return chunks

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        """Say which of the two is at fault: the patch, or the parent on this disk."""
        try:
            yield
        except (PatchError, VerificationError) as err:
            actual = fingerprint_chunks(self._store.base(self._parent))
            if actual == self._parent:
                raise
            raise StoreError(
                f"the parent on this device is damaged: its SHA-256 is {actual}, "
                f"expected {self._parent}; nothing changed. Run 'dpu-edge rollback' or "
                "'dpu-edge repair BUNDLE'"
            ) from err


def shortage(store: Store) -> StoreError | None:
    """Say what is missing for a new slot; None if there is room."""
    needed = store.layout.file_size + SPARE_BYTES
    if (free := store.files.free_bytes(store.root)) >= needed:
        return None
    return StoreError(
        f"{store.root} has {free} bytes free, a new slot needs {needed}; free some "
        "space and try again"
    )


def _give_up(store: Store, parent: str, *, bytes_: bool) -> bool:
    """Drop the oldest spare slot, or then the ways back; return whether there was one.

    Args:
        store: The store.
        parent: A slot that is still needed, beside the active one.
        bytes_: Whether bytes are missing: then the ways back stay if all of them
            would not be enough.
    """
    state = store.state
    needed = (state.active, parent)
    if spare := [slot for slot in state.slots if slot.target not in needed]:
        store.commit(retire(store, state, spare[-1]))
    elif state.former and not (bytes_ and _ways_are_too_small(store)):
        store.commit(replace(state, former=()))
    else:
        return False
    store.collect()
    return True


def _ways_are_too_small(store: Store) -> bool:
    ways = sum(path.stat().st_size for path in store.root.glob("reverse/*"))
    needed = store.layout.file_size + SPARE_BYTES
    return store.files.free_bytes(store.root) + ways < needed


def retire(store: Store, state: State, slot: Slot) -> State:
    """Return a state without a kept slot, and write the way back if it is small.

    Args:
        store: The store.
        state: A state with other slots beside this one.
        slot: The slot to give up; it is removed once the result is committed.
    """
    parent = next(s for s in reversed(state.slots) if s != slot)
    size = store.layout.file_size
    header = PatchHeader(
        state.model, parent.target, slot.target, slot.round, slot.counter, size
    )
    base, target = (store.slot_folder(s.target) / WEIGHTS_NAME for s in (parent, slot))
    # A convenience: that it cannot be written must not stop an update.
    with suppress(OSError, StoreError, WeightsError, MemoryError):
        data = encode_reverse(store.layout, base, target, header)
        if data and len(data) <= size // REVERSE_SHARE:
            store.add_reverse(slot.target, data)
            return state.without(slot, replace(slot, parent=parent.target))
    return state.without(slot)


def encode_reverse(
    layout: Layout, base: Path, target: Path, header: PatchHeader
) -> bytes | None:
    """Encode the patch from one weight file to another, in bounded memory.

    Args:
        layout: Of both files.
        base: The weight file that the patch leads from.
        target: The one that it leads to.
        header: What the patch is for.

    Returns:
        The patch; None if more than ``MAX_CHANGES`` elements differ.

    Raises:
        OSError: A file cannot be read.
        WeightsError: One is not of this layout.
    """
    for path in (base, target):
        check_size(layout, path.stat().st_size)  # an empty file cannot be mapped
    # Values are read through a mapping: pages that the kernel may take back.
    old, new = (
        Weights(layout, np.memmap(path, np.uint8, "r").data) for path in (base, target)
    )
    changes, total = [], 0
    with open(base, "rb") as before, open(target, "rb") as after:
        before.seek(len(layout.header))
        after.seek(len(layout.header))
        for tensor in layout.tensors:
            found, step = [np.arange(0)], CHUNK_BYTES // tensor.item_size
            for start in range(0, tensor.size, step):
                size = min(step, tensor.size - start) * tensor.item_size
                a, b = (
                    np.frombuffer(file.read(size), f"<u{tensor.item_size}")
                    for file in (before, after)
                )
                found.append(np.flatnonzero(a != b) + start)
                total += len(found[-1])
                if total > MAX_CHANGES:
                    return None
            changes.append(np.concatenate(found))
    return encode_patch(header, changes, old, new, level=_LEVEL)
