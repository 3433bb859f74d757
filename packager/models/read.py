# SPDX-License-Identifier: Apache-2.0
"""Models from anybody: an ONNX file or a checkpoint becomes weights and a graph.

A device holds a graph without weights and one canonical weight file. Both are made
here from a file of any exporter, in the same way each time, so that two files of one
network have the same graph and a patch between them is a patch like any other.
"""

import hashlib
from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.errors import WeightsError, WrongModelError
from edge_runtime.formats.frames import LEVEL
from edge_runtime.formats.header import PatchHeader
from edge_runtime.formats.identity import Identity, Run, network_id
from edge_runtime.reading import read_bounded
from edge_runtime.text import listed
from packager.build import PackedPatch, check_budget, header_for, pack_changes
from packager.diff import check_same_tensors, diff
from packager.models.checkpoint import find_checkpoint, name_of, read_views
from packager.models.views import ViewedWeights
from packager.release_counter import check_counter

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

MAX_ROUND = (1 << 32) - 1
COUNTER = "num_batches_tracked"
SHOWN = 6


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """What a device holds for one file.

    Attributes:
        path: The file.
        weights: Its tensors as a canonical weight file.
        graph: The network without weights, as ONNX; empty where it is not known.
        canonical: Whether the file itself is that weight file, byte for byte.
        run: Tells it from other models of the same network, where it was given a name.
        notes: What is to be said of how it was read.
        files: All files that it was read from.
    """

    path: Path
    weights: ViewedWeights
    graph: bytes
    canonical: bool
    run: Run | None = None
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """What to call what is made of it."""
        return name_of(self.path)

    @property
    def model(self) -> str:
        """Identity of network and run, hexadecimal; no weight value is part of it."""
        network = network_id(self.weights.layout.header, self.graph)
        return Identity(network, self.run).model


def read_model(
    path: str | PathLike[str], graph: str | PathLike[str] | None = None
) -> Model:
    """Read an ONNX file, or a checkpoint in any order and with any metadata.

    Args:
        path: An ONNX file; its weights may be inside it or in files beside it. Or a
            safetensors file, a PyTorch state dict, an index of shards, or a folder
            of these.
        graph: For a checkpoint: the graph that reads its tensors.

    Raises:
        OSError: It cannot be read.
        WeightsError: It is neither, is malformed, or holds no weights, or more than one
            set of them; or a graph was given for an ONNX file.
        ConfigError: It is a PyTorch file and torch is not installed.
        RoundError: The graph does not read its weights from that weight file.
        ModuleNotFoundError: It is an ONNX file and ``onnx`` is not installed.
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise WeightsError(f"{path} is no ordinary file, and a model is read from one")
    if (checkpoint := find_checkpoint(path)) is not None:
        found, notes = read_views(checkpoint)
        weights = ViewedWeights(found)
        one = checkpoint.files[0]
        canonical = not checkpoint.is_folder and _is_canonical(one, weights)
        made = Model(path, weights, b"", canonical)
        made = replace(made, notes=tuple(notes), files=checkpoint.files)
        return made if graph is None else _with_graph(made, graph)
    if graph is not None:
        raise WeightsError(f"{path} is not a safetensors file and needs no other graph")
    from packager.models.onnx_split import split_onnx

    graph_bytes, weights = split_onnx(path)
    files = path, *weights.files
    return Model(path, weights, graph_bytes, canonical=False, files=files)


def _is_canonical(path: Path, weights: ViewedWeights) -> bool:
    # Equal headers say that the tensors lie in the same places.
    header = weights.layout.header
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _with_graph(model: Model, path: str | PathLike[str]) -> Model:
    from packager.models.onnx_check import check_graph, weights_read

    graph = read_bounded(Path(path), "member_bytes", fspath(path), WeightsError)
    model = without_counters(model, weights_read(graph, fspath(path)))
    check_graph(graph, model.weights.layout, fspath(path))
    return replace(model, graph=graph)


def without_counters(model: Model, read: Container[str]) -> Model:
    """Leave out how many batches each BatchNorm has seen, but for what is read.

    Training counts them, and no network for inference reads them.

    Args:
        model: Its notes will say what was left out.
        read: Names of tensors that stay whatever they are.
    """
    names = model.weights.layout.by_name
    spare = [n for n in names if n.split(".")[-1] == COUNTER and n not in read]
    if not spare:
        return model
    words = listed([repr(name) for name in spare], SHOWN)
    return replace(
        model,
        weights=model.weights.without(spare),
        canonical=False,
        notes=(*model.notes, f"{model.path}: left out, no weights: {words}"),
    )


def check_same_network(base: Model, target: Model) -> None:
    """Insist that two files are one network with other weights.

    Raises:
        WrongModelError: Tensors or graphs differ; the first difference is named.
    """
    try:
        check_same_tensors(base.weights.layout, target.weights.layout)
    except WrongModelError as err:
        if base.graph and target.graph:
            from packager.models.onnx_words import merged

            layouts = base.weights.layout, target.weights.layout
            err.args = (f"{err}{merged(*layouts, (base.graph, target.graph))}",)
        raise
    if base.graph != target.graph:
        from packager.models.onnx_words import first_difference

        raise WrongModelError(
            f"{base.path} and {target.path} are different networks: "
            f"{first_difference(base.graph, target.graph)}. Only weights travel in a "
            "patch; export both files with the same exporter and settings, or install "
            "the new one with --bundle",
            expected=hashlib.sha256(base.graph).hexdigest(),
            actual=hashlib.sha256(target.graph).hexdigest(),
        )


def pack_models(
    base: Model,
    target: Model,
    *,
    counter: int = 1,
    level: int = LEVEL,
    max_size: int | None = None,
    signers: Sequence["Ed25519PrivateKey"] = (),
) -> PackedPatch | None:
    """Pack the update from one file to another of the same network.

    Args:
        base: What devices hold.
        target: What they shall hold.
        counter: Release counter, higher than that of ``base``; stands for the round
            too, as there is none.
        level: zstd level, 1 to 22.
        max_size: Largest patch in bytes, with its signatures.
        signers: Whose keys sign it (:mod:`packager.signing`).

    Returns:
        The proven patch; None where the weights are equal.

    Raises:
        WrongModelError: The files are of different networks.
        BudgetError: The patch is larger than ``max_size``.
        VerificationError: The patch does not lead to the target: a bug, or bad memory.
    """
    check_same_network(base, target)
    with ThreadPoolExecutor() as pool:  # hash meanwhile: both are read once
        for model in (base, target):
            pool.submit(getattr, model.weights, "fingerprint")
        changes = diff(base.weights, target.weights)
    if base.weights.fingerprint == target.weights.fingerprint:
        return None
    header = header_between(base, target, counter)
    packed = pack_changes(
        base.weights,
        target.weights,
        header,
        changes,
        parent_name=base.path.name,
        level=level,
        signers=signers,
    )
    check_budget(f"the patch to {target.path.name}", len(packed.data), max_size)
    return packed


def header_between(base: Model, target: Model, counter: int) -> PatchHeader:
    """Return the header of a patch between two files of one network.

    Raises:
        RoundError: The counter is the reserved one.
    """
    check_counter(counter)
    return header_for(
        base.weights,
        target.weights,
        model=base.model,
        round_=min(counter, MAX_ROUND),
        counter=counter,
    )
