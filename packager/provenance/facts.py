# SPDX-License-Identifier: Apache-2.0
"""What is known of a release: from its files, and from nothing else.

A round folder says most: ``round.json`` states how its weights came to be. A bundle and
a patch know what they lead to and what they hold. What nobody stated stays unsaid.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from edge_runtime.errors import BundleError, ContractError, PatchError, RoundError
from edge_runtime.formats.bundle import (
    MANIFEST_NAME,
    PATCH_NAME,
    open_archive,
    read_bundle,
    read_member,
)
from edge_runtime.formats.header import PatchHeader
from edge_runtime.formats.json_file import parse_record
from edge_runtime.formats.model_folder import (
    CONTRACT_NAME,
    GOLDEN_NAME,
    GRAPH_NAME,
    INIT_NAME,
    INIT_TENSORS_NAME,
    RECORD_NAME,
    RUN_NAME,
    SELECTION_NAME,
    WEIGHTS_NAME,
)
from edge_runtime.formats.patch import open_patch
from packager.rounds.folder import read_round
from packager.signing import is_bundle

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
        record: What ``round.json`` states, where there is one.
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
    data = path.read_bytes()
    return (_bundle_facts if is_bundle(data) else _patch_facts)(path, data)


def _round_facts(path: Path) -> Facts:
    round_ = read_round(path)
    stated = (path / RECORD_NAME).read_bytes()
    files = [path / RECORD_NAME, path / SELECTION_NAME]
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
            file.name: _digest(file.read_bytes())
            for file in [*files, *model]
            if file.exists()
        },
        contract=_contract((round_.model_folder / CONTRACT_NAME).read_bytes()),
        record=parse_record(
            stated, "record_bytes", str(path / RECORD_NAME), RoundError
        ).values,
    )


def _released(folder: Path, target: str) -> Iterator[tuple[str, str]]:
    """Yield the files beside a round folder that bring its weights to devices."""
    name = folder.name
    for pattern in (f"{name}.dpu", f"{name}_from_*.dpu", f"{name}.bundle.zip"):
        for path in folder.parent.glob(pattern):
            data = path.read_bytes()
            try:
                found = _headers(data).target
            except (PatchError, BundleError) as err:
                raise type(err)(f"{path}: {err}") from err
            if found == target:
                yield path.name, _digest(data)


def _headers(data: bytes) -> PatchHeader:
    if is_bundle(data):
        data = read_bundle(data).patch
    with open_patch(data) as patch:
        return patch.header


def _bundle_facts(path: Path, data: bytes) -> Facts:
    bundle = read_bundle(data)
    header = _headers(bundle.patch)
    if (header.model, header.target) != (bundle.model, bundle.target):
        raise BundleError(
            f"{path} states model and target that its patch does not lead to; make "
            "it anew"
        )
    # The manifest that read_bundle just proved, from the same bytes.
    with open_archive(data) as archive:
        manifest = read_member(archive, MANIFEST_NAME, "manifest_bytes")
    stated = parse_record(manifest, "manifest_bytes", MANIFEST_NAME, BundleError)
    return Facts(
        path=path,
        kind="bundle",
        run=stated.text("run", None),
        **_from_header(header),
        files={path.name: _digest(data)},
        parts={
            name: _digest(content)
            for name, content in ({PATCH_NAME: bundle.patch} | bundle.files).items()
        },
        contract=_contract(bundle.files[CONTRACT_NAME]),
    )


def _patch_facts(path: Path, data: bytes) -> Facts:
    digest = _digest(data)
    return Facts(
        path=path,
        kind="patch",
        **_from_header(_headers(data)),
        files={path.name: digest},
    )


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
