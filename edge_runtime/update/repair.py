# SPDX-License-Identifier: Apache-2.0
"""Bring a damaged store back to the very files that it should hold.

A bundle has the network and the init recipe, and its patch leads from the init weights
to one round. So it can give back ``model/`` and the weights of that round. What it
cannot give back lies in ``state.json``: release floor, keys, history. Those stay as
they are, and a store that has lost both copies of them is installed anew.

Every file is written beside the damaged one, proved, and gets its name by a rename: cut
at any point, a file is as damaged as it was or whole, and the same command goes on.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from edge_runtime.errors import BundleError, DpuError, WrongModelError, WrongParentError
from edge_runtime.files import naming
from edge_runtime.formats.apply import apply_chunks
from edge_runtime.formats.bundle import Bundle, read_bundle
from edge_runtime.formats.identity import identify, wrong_model
from edge_runtime.formats.init_weights import read_init_spec
from edge_runtime.formats.model_folder import (
    CONTRACT_NAME,
    GOLDEN_NAME,
    GRAPH_NAME,
    INIT_NAME,
    INIT_TENSORS_NAME,
    RUN_NAME,
    WEIGHTS_NAME,
)
from edge_runtime.formats.patch import Patch, open_patch
from edge_runtime.formats.weights import fingerprint_chunks, fingerprint_file
from edge_runtime.reading import Source
from edge_runtime.store.slots import shortage
from edge_runtime.store.state import Slot
from edge_runtime.store.store import Store
from edge_runtime.update.device import Device
from edge_runtime.update.golden import read_golden

# What the identity is computed from, and the init weights from.
_IDENTITY = (GRAPH_NAME, INIT_NAME, INIT_TENSORS_NAME, RUN_NAME)
_CACHED = ("recipe", "contract", "layout")


@dataclass(frozen=True, slots=True)
class Repaired:
    """What became of a store.

    Attributes:
        mended: What was damaged and is whole now, in words.
        dropped: What could not be made again and is given up, in words.
        moved: Whether the device moved on to the bundle's newer round.
    """

    mended: tuple[str, ...]
    dropped: tuple[str, ...] = ()
    moved: bool = False


def find_damage(store: Store) -> dict[str, str]:
    """Look for damage in all that a store holds beside its state; changes nothing.

    Returns:
        What is damaged, as ``model``, ``slot FINGERPRINT`` or ``way FINGERPRINT``,
        with the reason.
    """

    def golden() -> None:
        read_golden((store.model_folder / GOLDEN_NAME).read_bytes())

    found = {}
    if problem := _model_problem(store, store.model_folder):
        found["model"] = problem
    for name, read in (("contract", store.read_contract), ("golden", golden)):
        try:
            read()
        except (OSError, DpuError) as err:
            found[name] = str(err)
    for slot in store.state.slots:
        try:
            store.check_slot(slot.target)
        except (DpuError, OSError) as err:
            found[f"slot {slot.target}"] = str(err)
    for link in store.state.former:
        try:
            with open_patch(store.reverse_path(link.target)):
                pass
        except (DpuError, OSError) as err:
            found[f"way {link.target}"] = str(err)
    return found


def repair(device: Device, source: Source, *, newer: bool = False) -> Repaired:
    """Mend a store with a bundle of its own run.

    Release floor, keys, key list, pin and history stay. Nothing is touched unless the
    bundle is whole, trusted and of this run, and can give what is needed.

    Args:
        device: The device.
        source: The bundle's file, or its bytes.
        newer: Where the active weights are damaged and the bundle is of another round,
            move on to that one, if it may be applied here.

    Raises:
        OSError: A file cannot be read or written.
        BundleError: The bundle is damaged, or contradicts itself.
        TrustError: The keys that this store trusts did not sign it.
        WrongModelError: It is of another network or run.
        WrongParentError: It holds other weights than the active ones, which are lost.
        StoreError: The state is lost, another process is writing, or there is no room.
        DpuError: With ``newer``: as :meth:`Device.update`.
    """
    store = device.store
    with store.lock():  # this alone mends a state.json that has a copy
        content = read_bundle(source, store.state.trust)
        with open_patch(content.patch) as patch:
            _insist_fits(store, content, patch)
            damage = find_damage(store)
            lost = not _has_weights(store, store.state.active)
            is_same = content.target == store.state.active
            if lost and not is_same and not newer:
                raise _other_round(store, patch)
            _sweep(store)
            mended = list(_mend_model(store, content, damage))
            known = fingerprint_file(store.model_folder / CONTRACT_NAME)
            if known != store.state.contract:  # the bundle's now
                store.commit(replace(store.state, contract=known))
            for name in _CACHED:
                store.__dict__.pop(name, None)
            if mended:  # what seemed damaged for its sake may be whole
                damage = find_damage(store)
            done = list(_mend_slots(store, patch, damage))
            mended += [words for is_whole, words in done if is_whole]
            given_up = tuple(words for is_whole, words in done if not is_whole)
        if mended or given_up:
            words = ", ".join((*mended, *(f"without {w}" for w in given_up)))
            state = store.state.noted("repaired", store.state.active_slot, words)
            store.commit(state)
    if lost and not is_same:
        device.take_bundle(source)
        with store.lock():  # else a rollback would lead to what is lost
            for slot in store.state.slots[1:]:
                if not _has_weights(store, slot.target):
                    store.commit(store.state.without(slot))
        return Repaired(tuple(mended), given_up, moved=True)
    device.verify()
    return Repaired(tuple(mended), given_up)


def _insist_fits(store: Store, content: Bundle, patch: Patch) -> None:
    """Insist that a bundle is what it says, and of this store's run."""
    header, state = patch.header, store.state
    content.check(header)
    if error := wrong_model(header, state.model):
        raise WrongModelError(
            f"the bundle is of another network or run ({header.model[:12]}) than this "
            f"store ({state.model[:12]}): nothing was touched",
            expected=header.model,
            actual=state.model,
        ) from error
    with tempfile.TemporaryDirectory() as folder, naming(folder):
        for name, data in content.files.items():
            Path(folder, name).write_bytes(data)
        if problem := _model_problem(store, Path(folder)):
            raise BundleError(f"the bundle contradicts itself: {problem}")
        patch.check(read_init_spec(folder).layout())
    if header.parent != state.init:
        raise BundleError("the bundle's patch does not lead from its init weights")


def _model_problem(store: Store, folder: Path) -> str:
    """Say why a ``model`` folder is not this store's; empty if it is."""
    try:
        recipe = read_init_spec(folder)
        graph = (folder / GRAPH_NAME).read_bytes()
        found = identify(recipe.layout().header, graph, folder).model
        init = fingerprint_chunks(recipe.chunks())
    except (OSError, DpuError) as err:
        return str(err)
    if found != store.state.model:
        return f"graph, recipe and run are of model {found[:12]}"
    if init != store.state.init:
        return f"the recipe gives init weights {init[:12]}"
    return ""


def _mend_model(store: Store, content: Bundle, damage: dict[str, str]) -> Iterator[str]:
    names = [*(_IDENTITY if "model" in damage else ())]
    # Without its SHA-256 a damaged contract may look whole: the bundle's is.
    if "contract" in damage or not store.state.contract:
        names.append(CONTRACT_NAME)
    # Its outputs may be of another round: so it is taken only where there is none.
    names += [GOLDEN_NAME] if "golden" in damage else []
    folder = store.model_folder
    store.files.mkdir(folder)
    for name in names:
        data = content.files.get(name)
        if data is None:
            if (folder / name).exists():
                store.files.remove(folder / name)
                yield f"model/{name}"
            continue
        present = None
        with suppress(OSError):
            present = (folder / name).read_bytes()
        if present != data:
            if (folder / name).is_dir():
                store.files.remove(folder / name)
            store.files.replace(folder / name, data, suffix=".part")
            yield f"model/{name}"
    store.files.sync_folder(folder)


def _mend_slots(
    store: Store, patch: Patch, damage: dict[str, str]
) -> Iterator[tuple[bool, str]]:
    """Mend or give up what is damaged; yield whether it is whole, and what it is."""
    for slot in store.state.slots:
        if f"slot {slot.target}" not in damage:
            continue
        if _has_weights(store, slot.target):
            _write_slot(store, slot, None)
            yield True, f"the graph of round {slot.round}"
        elif slot.target == patch.header.target:
            _write_slot(store, slot, patch)
            yield True, f"the weights of round {slot.round}"
        elif slot.target != store.state.active:
            store.commit(store.state.without(slot))
            yield False, f"the weights of round {slot.round}"
    lost = {name[4:] for name in damage if name.startswith("way ")}
    if lost:
        state = store.state
        kept = tuple(link for link in state.former if link.target not in lost)
        state = replace(state, former=kept)
        # A way may lead over one that is lost.
        useful = tuple(
            link
            for link in state.former
            if state.slot(state.way_back(link.target)[0]) is not None
        )
        store.commit(replace(state, former=useful))
        yield False, f"{len(lost)} ways back"


def _has_weights(store: Store, target: str) -> bool:
    try:
        return fingerprint_file(store.slot_folder(target) / WEIGHTS_NAME) == target
    except OSError:
        return False


def _write_slot(store: Store, slot: Slot, patch: Patch | None) -> None:
    """Write a slot's files beside the damaged ones, and exchange each by a rename.

    Without a patch its graph alone. Predictors go on with the files that they opened.
    """
    if patch and (problem := shortage(store)):
        raise problem
    files, folder = store.files, store.slot_folder(slot.target)
    if folder.is_symlink() or not folder.is_dir():
        files.remove(folder)
        files.mkdir(folder)
        files.sync_folder(folder.parent)
    graph = store.model_folder / GRAPH_NAME
    if not _is_same(graph, folder / GRAPH_NAME):
        with _exchanging(store, folder / GRAPH_NAME) as part:
            files.link(graph, part)
    if patch:
        with _exchanging(store, folder / WEIGHTS_NAME) as part:
            chunks = apply_chunks(store.recipe.chunks(), store.layout, patch)
            files.write(part, chunks)


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.read_bytes() == other.read_bytes()
    except OSError:
        return False


def _sweep(store: Store) -> None:
    """Remove what a repair left that was killed; the names are no store's own."""
    slots = (store.slot_folder(slot.target) for slot in store.state.slots)
    for folder in (store.model_folder, *slots):
        for left in folder.glob("*.part"):
            store.files.unlink(left)


@contextmanager
def _exchanging(store: Store, path: Path) -> Iterator[Path]:
    if path.is_dir():
        store.files.remove(path)
    with store.files.replacing(path, suffix=".part") as part:
        yield part


def _other_round(store: Store, patch: Patch) -> WrongParentError:
    active = store.state.active_slot
    return WrongParentError(
        f"the bundle holds round {patch.header.round}, and this store has lost round "
        f"{active.round} ({active.target[:12]}): give the bundle of that round, or "
        "take the newer release with --newer; nothing was touched",
        expected=active.target,
        actual=patch.header.target,
    )
