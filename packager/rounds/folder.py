# SPDX-License-Identifier: Apache-2.0
"""Read and validate round folders.

The folder is the whole interface between a trainer and this package; its normative
description is in ``docs/round-folder.md``. Nothing in it is believed: fingerprints and
the model's identity are computed again from the bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import (
    PatchFormatError,
    RoundError,
    WeightsError,
)
from edge_runtime.formats.header import PatchHeader
from edge_runtime.formats.identity import identify
from edge_runtime.formats.init_weights import read_init_spec
from edge_runtime.formats.model_folder import (
    GRAPH_NAME,
    MODEL_NAME,
    RECORD_NAME,
    SELECTION_NAME,
    SUBSPACES_NAME,
    WEIGHTS_NAME,
    Outcome,
    list_rounds,
)
from edge_runtime.formats.sections import MAX_COUNTED_BYTES
from edge_runtime.formats.subspace import Term, decode_terms, together
from edge_runtime.formats.weights import Weights
from packager.mapped import map_weights
from packager.rounds.record import RoundRecord, read_record

INIT = "init"  # the init weights' name, where others have round_05


@dataclass(frozen=True, slots=True, eq=False)
class RoundFolder:
    """One validated round folder.

    Attributes:
        path: The folder, named ``round_%02d``.
        record: What the trainer states about it.
        weights: The deployed weights, whole.
        selection: For each selectable tensor its mask, eight elements a byte,
            lowest bit first. Tensors that are not here are the dense part.
        terms: The subspaces that move the parent's tensors before.
    """

    path: Path
    record: RoundRecord
    weights: Weights
    selection: Mapping[str, NDArray[np.uint8]]
    terms: tuple[Term, ...] = ()

    @property
    def name(self) -> str:
        """The folder's name, for example ``round_05``."""
        return self.path.name

    @property
    def model_folder(self) -> Path:
        """The run's model folder: graph, init recipe, contract, golden inputs."""
        return self.path.parent / MODEL_NAME


@dataclass(frozen=True, slots=True, eq=False)
class Parent:
    """The weights that an update leads from.

    Attributes:
        name: ``round_04``, or ``init`` for the init weights.
        weights: The weights, their fingerprint checked.
        counter: Their release counter; None where they were never released.
        model: Identity of their network and run; empty where it is not known.
    """

    name: str
    weights: Weights
    counter: int | None = None
    model: str = ""


def read_round(path: str | PathLike[str]) -> RoundFolder:
    """Read a round folder and check everything in it against everything else.

    Args:
        path: The round folder; its run's ``model`` folder lies beside it.

    Raises:
        RoundError: Incomplete, malformed, inconsistent, or not to be packed.
    """
    folder = real_name(Path(path))
    record = read_record(folder)
    if not record.packable:
        raise RoundError(
            f"{folder}: the trainer marked this round as not packable; its weights, or "
            "those it continues from, were never meant for devices"
        )
    weights = _read(folder / WEIGHTS_NAME)
    selection = _read(folder / SELECTION_NAME)
    terms = _read_terms(folder, len(weights.layout.tensors))
    round_ = RoundFolder(folder, record, weights, selection, terms)
    graph = read_model_file(round_, GRAPH_NAME)
    _check_equal(folder, "target", record.target, weights.fingerprint)
    identity = identify(weights.layout.header, graph, round_.model_folder)
    _check_equal(folder, "model", record.model, identity.model)
    _check_selection(round_)
    return round_


def real_name(folder: Path) -> Path:
    """Return a folder by its own name: "." and ".." do not tell a round's number."""
    return folder.resolve() if folder.name in ("", "..") else folder


def read_model_file(round_: RoundFolder, name: str) -> bytes:
    """Return a file of the run's model folder.

    Raises:
        RoundError: There is none.
    """
    path = round_.model_folder / name
    try:
        return path.read_bytes()
    except FileNotFoundError as err:
        raise RoundError(f"the run is incomplete: {path} is missing") from err


def _read(path: Path) -> Weights:
    try:
        return map_weights(path)
    except FileNotFoundError as err:
        raise RoundError(f"the round is incomplete: {path} is missing") from err
    except WeightsError as err:
        raise RoundError(f"{path}: {err}") from err


def _read_terms(folder: Path, tensors: int) -> tuple[Term, ...]:
    path = folder / SUBSPACES_NAME
    if not path.exists():
        return ()
    with path.open("rb") as file:
        data = file.read(MAX_COUNTED_BYTES + 1)
    try:
        return decode_terms(data, tensors)
    except PatchFormatError as err:
        raise RoundError(f"{path}: {err}") from err


def terms_since(round_: RoundFolder, base: str) -> tuple[Term, ...]:
    """Return the subspaces on the way from some weights to a round.

    Args:
        round_: The round.
        base: Fingerprint of the weights.

    Returns:
        Those of all rounds in between, in order; none where the rounds do not lead from
        there to here, or where there are too many for one patch.

    Raises:
        RoundError: Those of a round in between are malformed.
    """
    updates: dict[str, tuple[Path, str]] = {}
    for folder in list_rounds(round_.path.parent):
        try:
            record = read_record(folder)
        except (RoundError, OSError):
            continue  # told where that round is needed itself
        if record.outcome is Outcome.UPDATED:
            updates.setdefault(record.target, (folder, record.parent))
    tensors = len(round_.weights.layout.tensors)
    found, parent = [round_.terms], round_.record.parent
    while parent != base:
        if parent not in updates:
            return ()
        folder, parent = updates.pop(parent)
        found.append(_read_terms(folder, tensors))
    return together(found[::-1], tensors)


def _check_equal(folder: Path, field: str, stated: str, found: str) -> None:
    if stated != found:
        raise RoundError(
            f"{folder / RECORD_NAME} states {field} {stated}, its files give {found}: "
            "a file was changed after the round was written"
        )


def _check_selection(round_: RoundFolder) -> None:
    path = round_.path / SELECTION_NAME
    for name, mask in round_.selection.items():
        tensor = round_.weights.layout.by_name.get(name)
        if tensor is None:
            raise RoundError(
                f"{path} selects from {name!r}, which {WEIGHTS_NAME} lacks"
            )
        size = (tensor.size + 7) // 8
        if mask.dtype != np.uint8 or mask.shape != (size,):
            raise RoundError(
                f"{path}: the mask of {name!r} is {mask.dtype} {list(mask.shape)}, "
                f"expected uint8 [{size}] for {tensor.size} elements"
            )


def find_parent(round_: RoundFolder) -> Parent:
    """Find the weights that a round's update leads from, by fingerprint.

    Looks among the run's other rounds, then at its init weights.

    Raises:
        RoundError: Nothing in the run has that fingerprint, or what has is damaged.
        WeightsError: The init recipe is malformed.
    """
    unread = []
    for folder in list_rounds(round_.path.parent):
        try:
            record = read_record(folder)
        except (RoundError, OSError) as err:
            unread.append(str(err))  # told only if the parent is nowhere else
            continue
        if folder.name != round_.name and record.target == round_.record.parent:
            return parent_from(read_round(folder))
    init = read_init(round_)
    if init.weights.fingerprint == round_.record.parent:
        return init
    problem = (
        f"{round_.path}: its parent {round_.record.parent} is neither another round of "
        f"{round_.path.parent} nor its init weights; put that round's folder back, or "
        "name another parent with --from"
    )
    raise RoundError("\n  - ".join([problem, *unread]))


def parent_from(round_: RoundFolder) -> Parent:
    """Return a round's deployed weights as the parent of another update."""
    stated = round_.record
    return Parent(round_.name, round_.weights, stated.counter, stated.model)


def read_init(round_: RoundFolder) -> Parent:
    """Return the init weights of a round's run.

    Raises:
        RoundError: The run has no init recipe, or it is for another network.
        WeightsError: The recipe is malformed.
    """
    try:
        weights = read_init_spec(round_.model_folder).generate()
    except FileNotFoundError as err:
        raise RoundError(f"the run is incomplete: {err.filename} is missing") from err
    if weights.layout.header != round_.weights.layout.header:
        raise WeightsError(
            f"the init recipe in {round_.model_folder} describes other tensors than "
            f"{round_.path / WEIGHTS_NAME}"
        )
    return Parent(INIT, weights, model=round_.record.model)


def find_weights(run: Path, header: PatchHeader) -> Weights | None:
    """Find weights of a patch's network in the run whose folder the patch lies in.

    Returns:
        The patch's parent where the run has it, else any weights of the network, else
        None.
    """
    found = None
    for folder in list_rounds(run):
        try:
            record = read_record(folder)
            is_parent = record.target == header.parent
            if is_parent or (record.model == header.model and found is None):
                weights = _read(folder / WEIGHTS_NAME)
                _check_equal(folder, "target", record.target, weights.fingerprint)
                found = weights
        except (RoundError, OSError):
            continue  # a patch can be looked at beside a damaged round
        if is_parent:
            return found
    if found is None:
        return None
    try:
        init = read_init_spec(run / MODEL_NAME).generate()
    except (WeightsError, OSError):
        return found
    return init if init.fingerprint == header.parent else found
