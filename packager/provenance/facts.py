# SPDX-License-Identifier: Apache-2.0
"""What is known of a release: from its files, and from nothing else.

A round folder says most: ``round.json`` states how its weights came to be. A bundle and
a patch know what they lead to and what they hold. What nobody stated stays unsaid.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from edge_runtime.commandline import finite
from edge_runtime.errors import BundleError, ContractError, PatchError, RoundError
from edge_runtime.formats.bundle import (
    MANIFEST_NAME,
    PATCH_NAME,
    open_archive,
    read_bundle,
    read_member,
)
from edge_runtime.formats.header import PatchHeader
from edge_runtime.formats.json_file import parse_record, read_record
from edge_runtime.formats.model_folder import (
    CONTRACT_NAME,
    GOLDEN_NAME,
    GRAPH_NAME,
    INIT_NAME,
    INIT_TENSORS_NAME,
    RECORD_NAME,
    RUN_NAME,
    SELECTION_NAME,
    SUBSPACES_NAME,
    WEIGHTS_NAME,
)
from edge_runtime.formats.patch import open_patch
from edge_runtime.formats.weights import fingerprint_file
from edge_runtime.reading import read_bounded
from packager.rounds.folder import read_round
from packager.signing import is_bundle, open_release

_T = TypeVar("_T")
MODEL_FILES = (
    *(GRAPH_NAME, CONTRACT_NAME, INIT_NAME, INIT_TENSORS_NAME, GOLDEN_NAME, RUN_NAME),
)
# What of round.json tells how the weights were made; each only where it is stated.
STATED = ("method", "ratio", "reinitialised", "samples", "seeds", "config")


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of one release.

    Attributes:
        path: The round folder, bundle or patch.
        kind: ``round``, ``bundle`` or ``patch``.
        run: The run's name, where it is stated.
        round: The round that made the weights.
        counter: Release counter.
        model: Identity of the network, hex.
        parent: Fingerprint that the update leads from, hex.
        target: SHA-256 of the release's ``weights.safetensors``, hex.
        files: SHA-256 of each file that brings the release to a device.
        parts: SHA-256 of each file that the release was made of.
        contract: What goes in and comes out, where it is known.
        record: What ``round.json`` states, where there is one; None for no number.
    """

    path: Path
    kind: str
    run: str | None = None
    round: int
    counter: int
    model: str
    parent: str
    target: str
    files: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)
    contract: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the folder or file, which the provenance files begin with."""
        return self.path.name

    @property
    def subjects(self) -> dict[str, str]:
        """SHA-256 of all that is spoken of: the weights, and what brings them."""
        return {WEIGHTS_NAME: self.target} | dict(sorted(self.files.items()))

    @property
    def stated(self) -> dict[str, Any]:
        """What was stated about how the weights were made."""
        return {name: self.record[name] for name in STATED if name in self.record}


def read_facts(path: str | PathLike[str]) -> Facts:
    """Read a round folder, a bundle or a patch, and check it as for packing.

    Raises:
        OSError: It cannot be read.
        RoundError: The round folder is incomplete or inconsistent.
        BundleError: The bundle is damaged, or contradicts itself.
        PatchError: The patch is damaged.
        ContractError: The contract is malformed.
    """
    path = Path(path).resolve()
    if path.is_dir():
        return _round_facts(path)
    with path.open("rb") as file:
        bundle = is_bundle(file.read(4))
    facts, digest = _steady(path, _bundle_facts if bundle else _patch_facts)
    return replace(facts, files={path.name: digest})


def _steady(path: Path, read: Callable[[Path], _T]) -> tuple[_T, str]:
    """Read a file that may be large; return what was found, and its SHA-256.

    Raises:
        BundleError: It was changed meanwhile.
    """
    digest = fingerprint_file(path)
    found = read(path)
    if fingerprint_file(path) != digest:
        raise BundleError(f"{path} was changed while it was read; try again")
    return found, digest


def _round_facts(path: Path) -> Facts:
    round_ = read_round(path)
    record_path = path / RECORD_NAME
    files = [path / name for name in (RECORD_NAME, SELECTION_NAME, SUBSPACES_NAME)]
    model = [round_.model_folder / name for name in MODEL_FILES]
    record = round_.record
    return Facts(
        path=path,
        kind="round",
        run=record.run,
        round=record.round,
        counter=record.counter,
        model=record.model,
        parent=record.parent,
        target=record.target,
        files=dict(_released(path, record.target)),
        parts={
            file.name: fingerprint_file(file)
            for file in [*files, *model]
            if file.exists()
        },
        contract=_contract(
            read_bounded(
                round_.model_folder / CONTRACT_NAME,
                "contract_bytes",
                CONTRACT_NAME,
                ContractError,
            )
        ),
        # Public JSON has no NaN; a trainer's record may, and is packed all the same.
        record=finite(
            read_record(
                record_path, "record_bytes", str(record_path), RoundError, finite=False
            ).values
        ),
    )


def _released(folder: Path, target: str) -> Iterator[tuple[str, str]]:
    """Yield the files beside a round folder that bring its weights to devices."""
    name = folder.name
    for pattern in (f"{name}.dpu", f"{name}_from_*.dpu", f"{name}.bundle.zip"):
        for path in folder.parent.glob(pattern):
            try:
                found, digest = _steady(path, _headers)
            except (PatchError, BundleError) as err:
                raise type(err)(f"{path}: {err}") from err
            if found.target == target:
                yield path.name, digest


def _headers(path: Path) -> PatchHeader:
    with open_release(path) as patch:
        return patch.header


def _bundle_facts(path: Path) -> Facts:
    bundle = read_bundle(path)
    with open_patch(bundle.patch) as patch:
        header = patch.header
    if (header.model, header.target) != (bundle.model, bundle.target):
        raise BundleError(
            f"{path} states model and target that its patch does not lead to; make "
            "it anew"
        )
    # The manifest that read_bundle just proved: the file is hashed before and after.
    with open_archive(path) as archive:
        manifest = read_member(archive, MANIFEST_NAME, "manifest_bytes")
    stated = parse_record(manifest, "manifest_bytes", MANIFEST_NAME, BundleError)
    return Facts(
        path=path,
        kind="bundle",
        run=stated.text("run", None),
        **_from_header(header),
        parts={
            name: _digest(content)
            for name, content in ({PATCH_NAME: bundle.patch} | bundle.files).items()
        },
        contract=_contract(bundle.files[CONTRACT_NAME]),
    )


def _patch_facts(path: Path) -> Facts:
    return Facts(path=path, kind="patch", **_from_header(_headers(path)))


def _from_header(header: PatchHeader) -> dict[str, Any]:
    names = ("round", "counter", "model", "parent", "target")
    return {name: getattr(header, name) for name in names}


def _contract(data: bytes) -> Mapping[str, Any]:
    contract = parse_record(data, "contract_bytes", CONTRACT_NAME, ContractError)
    for side in ("inputs", "outputs"):
        for entry in contract.records(side) if side in contract else ():
            if not isinstance(entry.values.get("shape"), list):
                raise entry.problem("shape", "a list")
    return contract.values


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
