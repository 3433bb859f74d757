# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as people have it: which files hold its weights.

One file, a folder, the index of a folder's shards, or what the Hugging Face cache keeps
(links into a folder of blobs). Never a guess: where two choices are there, both are
named, and whoever calls chooses.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.errors import WeightsError
from edge_runtime.formats.json_file import read_record
from edge_runtime.formats.kinds import Kind, kind_of, refuse_others
from edge_runtime.text import listed
from packager.mapped import MappedFile
from packager.models.safetensors_file import is_safetensors, views
from packager.models.views import View

INDEX_END = ".index.json"
# Of two kinds in one folder the first is taken: the second often is a copy of it.
ENDINGS = ((".safetensors",), (".bin", ".pt", ".pth", ".ckpt"))
NAMES = {".safetensors": "model.safetensors", ".bin": "pytorch_model.bin"}
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.[a-z]+")
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The files of a checkpoint.

    Attributes:
        path: What was given.
        files: That hold tensors, in the order of their names.
        index: What says in which of them each tensor is, if there is such a file.
        places: What it says.
    """

    path: Path
    files: tuple[Path, ...]
    index: Path | None = None
    places: Mapping[str, str] | None = None

    @property
    def is_folder(self) -> bool:
        """Whether it is more than one file."""
        return self.index is not None or len(self.files) > 1


def name_of(path: Path) -> str:
    """Return what to call things that are made of a file or folder."""
    if path.is_dir():
        return path.resolve().name
    name = path.name.removesuffix(INDEX_END)
    return Path(name).stem


def find_checkpoint(path: Path) -> Checkpoint | None:
    """Find the files of a checkpoint; None if it is none, but may be a model.

    Raises:
        OSError: Something cannot be read.
        WeightsError: There is more than one choice, or a file is missing.
    """
    if path.is_dir():
        return _in_folder(_snapshot(path), path)
    if path.name.endswith(INDEX_END) or kind_of(path) is Kind.INDEX:
        return _by_index(path, path)
    if is_safetensors(path) or kind_of(path) is Kind.TORCH:
        return Checkpoint(path, (path,))
    return None


def _snapshot(path: Path) -> Path:
    """Return the snapshot that a folder of the Hugging Face cache keeps."""
    folder = path / "snapshots"
    if not folder.is_dir():
        return path
    found = sorted(p for p in folder.iterdir() if p.is_dir())
    if len(found) == 1:
        return found[0]
    raise WeightsError(
        f"{path} keeps {len(found)} snapshots; give one of them: {_names(found)}"
    )


def _in_folder(folder: Path, path: Path) -> Checkpoint:
    entries = sorted(p for p in folder.iterdir() if not p.is_dir())
    for endings in ENDINGS:
        ours = [p for p in entries if p.suffix in endings]
        indexes = [
            p
            for p in entries
            if any(p.name.endswith(end + INDEX_END) for end in endings)
        ]
        usual = [p for p in ours if p.name in NAMES.values()]
        if indexes:
            return _only_index(indexes, usual, path)
        if ours:
            if endings == ENDINGS[1] and len(ours) > 1 and not _are_shards(ours):
                # Beside a state dict there often is the state of an optimizer.
                ours = usual or ours
                if len(ours) > 1:
                    raise WeightsError(
                        f"{path} holds several PyTorch files ({_names(ours)}); give "
                        "the one with the weights"
                    )
            return _without_index(ours, usual, path)
    raise WeightsError(
        f"{path} holds no checkpoint: expected NAME.safetensors, its shards with or "
        "without an index, or a PyTorch state dict; found "
        f"{_names(entries) or 'no file'}"
    )


def _only_index(indexes: list[Path], usual: list[Path], path: Path) -> Checkpoint:
    known = [p for p in indexes if p.name.removesuffix(INDEX_END) in NAMES.values()]
    chosen = known if len(known) == 1 else indexes
    if len(chosen) > 1:
        raise WeightsError(
            f"{path} holds several indexes ({_names(chosen)}); give one of them"
        )
    found = _by_index(chosen[0], path)
    if others := [p for p in usual if p not in found.files]:
        raise WeightsError(
            f"{path} holds a whole model and shards ({_names([*others, *chosen])}); "
            "give one of them"
        )
    return found


def _without_index(ours: list[Path], usual: list[Path], path: Path) -> Checkpoint:
    matches = [match for p in ours if (match := _SHARD.fullmatch(p.name))]
    if usual and matches:
        raise WeightsError(
            f"{path} holds a whole model and shards ({_names(ours)}); give one "
            "of them, or move it elsewhere"
        )
    sets = {(m[1], int(m[3])) for m in matches}
    if len(sets) > 1 or (matches and len(matches) < len(ours)):
        raise WeightsError(
            f"{path} holds more than one set of shards ({_names(ours)}) and no index; "
            "move one of them elsewhere"
        )
    for name, count in sets:
        there = {int(m[2]) for m in matches}
        if missing := sorted(set(range(1, count + 1)) - there):
            raise WeightsError(
                f"{path} lacks shard {missing[0]} of the {count} of {name}; fetch it"
            )
    files = usual or ours
    for file in files:
        _check_there(file, "")
    return Checkpoint(path, tuple(files))


def _are_shards(files: Sequence[Path]) -> bool:
    return all(_SHARD.fullmatch(p.name) for p in files)


def _by_index(index: Path, path: Path) -> Checkpoint:
    what = f"the index {index}"
    record = read_record(index, "weight_header_bytes", what, WeightsError)
    places = record.record("weight_map")
    names = {name: places.text(name) for name in places.values}
    if not names:
        raise WeightsError(f"{what} names no tensor; fetch it again")
    files = []
    for name in sorted(set(names.values())):
        # An index is somebody's text: it must not lead to other files of this machine.
        if name != Path(name).name or name in ("", ".."):
            raise WeightsError(
                f"{what} names the file {name!r}, expected one beside it without a path"
            )
        files.append(index.parent / name)
        _check_there(files[-1], f", which {index.name} names")
    return Checkpoint(path, tuple(files), index, names)


def _check_there(file: Path, why: str) -> None:
    if file.is_file():
        return
    what = "leads to nothing" if file.is_symlink() else "is not there"
    if file.exists():
        what = "is no ordinary file"
    raise WeightsError(f"{file}{why}, {what}; fetch the checkpoint again")


def _names(paths: Sequence[Path]) -> str:
    return listed([path.name for path in paths], _SHOWN)


def read_views(checkpoint: Checkpoint) -> tuple[dict[str, View], list[str]]:
    """Find every tensor of a checkpoint.

    Returns:
        The tensors by name, and what is to be said of them.

    Raises:
        OSError: A file cannot be read.
        WeightsError: A file is malformed; two of them hold one tensor; or the index
            says something else.
        ConfigError: It is a PyTorch file and torch is not installed.
    """
    found: dict[str, View] = {}
    homes: dict[str, Path] = {}
    notes: list[str] = []
    for file, here in _each(checkpoint, notes):
        for name, view in here.items():
            if name in found:
                raise WeightsError(
                    f"tensor {name!r} lies in {homes[name].name} and in {file.name} of "
                    f"{checkpoint.path}; expected each in one file, give an index or "
                    "one of the files"
                )
            found[name], homes[name] = view, file
    if checkpoint.places is not None:
        _check_places(checkpoint, {n: p.name for n, p in homes.items()})
    return found, notes


def _each(
    checkpoint: Checkpoint, notes: list[str]
) -> Iterator[tuple[Path, dict[str, View]]]:
    for path in checkpoint.files:
        if is_safetensors(path):
            file = MappedFile(path)
            yield path, views(file.data, path, file)
        elif kind_of(path) is Kind.TORCH:
            from packager.models.torch_file import torch_views

            here, more = torch_views(path)
            notes += more
            yield path, here
        else:
            refuse_others(path, (Kind.WEIGHTS, Kind.TORCH))
            raise WeightsError(
                f"{path} is neither a safetensors nor a PyTorch file, or it is "
                "damaged; fetch it again"
            )


def _check_places(checkpoint: Checkpoint, homes: Mapping[str, str]) -> None:
    places = checkpoint.places or {}
    for name in [*places, *homes]:
        stated, found = places.get(name), homes.get(name)
        if stated != found:
            raise WeightsError(
                f"the index {checkpoint.index} has tensor {name!r} in "
                f"{stated or 'no file'}, it is in {found or 'none'}; fetch the "
                "checkpoint again, whole"
            )
