# SPDX-License-Identifier: Apache-2.0
"""The bundle: what a new device is installed from, in one reproducible zip file.

It holds no weights: a device regenerates the init weights and applies the patch that
leads from them to the round. The golden outputs are what the round's weights give in
ONNX Runtime here, so that a device can tell whether its own runtime computes the same.
The layout of the file is in :mod:`edge_runtime.formats.bundle`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import RoundError
from edge_runtime.formats import bundle as layout
from edge_runtime.formats.bundle import read_bundle
from edge_runtime.formats.frames import LEVEL
from edge_runtime.formats.model_folder import GOLDEN_NAME, GRAPH_NAME
from packager.build import PackedPatch, check_budget, pack_round, write_file
from packager.models.onnx_check import check_graph
from packager.rounds.folder import RoundFolder, read_init, read_model_file
from packager.rounds.golden import with_outputs
from packager.signing import carried_keys, sign
from packager.zip_file import Content, encode_bundle

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


@dataclass(frozen=True, slots=True)
class PackedBundle:
    """A finished bundle.

    Attributes:
        data: The bytes of the zip file.
        patch: The patch inside, from the init weights to the round.
        remarks: What the publisher should know of it.
        task: What a model from anybody is for; empty for a round's.
    """

    data: bytes
    patch: PackedPatch
    remarks: tuple[str, ...] = ()
    task: str = ""


def build_bundle(
    round_: RoundFolder,
    *,
    level: int = LEVEL,
    max_size: int | None = None,
    counter: int | None = None,
    signers: Sequence["Ed25519PrivateKey"] = (),
) -> PackedBundle:
    """Build the bundle that installs a round's weights on a new device.

    Args:
        round_: Any updated round.
        level: zstd level of the patch, 1 to 22.
        max_size: Largest bundle in bytes, with its signatures.
        counter: Release counter; by default the one that the round states.
        signers: Whose keys sign it (:mod:`packager.signing`); their public halves go
            in, for devices that are told to trust on first use.

    Raises:
        RoundError: The round made no weights of its own, the run's model folder is
            incomplete, or its graph does not fit the weight file.
        ContractError: The contract is malformed or the golden inputs do not fit it.
        TrialError: Devices would refuse these weights: too few golden labels right,
            or outputs that are not finite.
        StoreError: ONNX Runtime cannot load the graph.
        BudgetError: The bundle is larger than ``max_size``.
    """
    patch = pack_round(round_, read_init(round_), level=level, counter=counter)
    if patch is None:
        raise RoundError(
            f"{round_.path}: its weights are the init weights, there is nothing to "
            "install yet; bundle a later round"
        )
    files = _model_files(round_)
    check_graph(files[GRAPH_NAME], round_.weights.layout)
    files[GOLDEN_NAME] = with_outputs(files, round_.weights)
    files[layout.PATCH_NAME] = patch.data
    manifest = {
        "run": round_.record.run,
        "round": round_.record.round,
        "model": round_.record.model,
        "target": round_.record.target,
    }
    data = finished(manifest, files, signers)
    check_budget(f"the bundle of {round_.name}", len(data), max_size)
    return PackedBundle(data, patch)


def finished(
    manifest: Mapping[str, Any],
    files: Mapping[str, Content],
    signers: Sequence["Ed25519PrivateKey"],
) -> bytes:
    """Return the bytes of a bundle, signed, that devices can read.

    Raises:
        BundleError: None could read it.
    """
    data = encode_bundle(manifest, {**files, **carried_keys(signers)})
    read_bundle(data)
    return sign(data, signers)


def write_bundle(
    round_: RoundFolder, path: str | PathLike[str], *, level: int = LEVEL
) -> PackedBundle:
    """Build a bundle and write it; complete or absent.

    Raises:
        OSError: It cannot be written.
        DpuError: As :func:`build_bundle`.
    """
    bundle = build_bundle(round_, level=level)
    write_file(bundle.data, path)
    return bundle


def _model_files(round_: RoundFolder) -> dict[str, bytes]:
    folder = round_.model_folder
    optional = [name for name in layout.OPTIONAL if (folder / name).exists()]
    names = {*layout.REQUIRED, *optional} - {layout.PATCH_NAME}
    return {name: read_model_file(round_, name) for name in names}
