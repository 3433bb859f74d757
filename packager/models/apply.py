# SPDX-License-Identifier: Apache-2.0
"""A patch is applied to files, without a device's store: shards become shards.

Each file keeps its header, with its order, metadata and names; only the bytes of
changed elements are others. What was written is read again and hashed before it gets a
name.
"""

import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from errno import ENOSPC
from os import PathLike, fspath
from os.path import realpath
from pathlib import Path

from edge_runtime.errors import (
    ConfigError,
    VerificationError,
    WeightsError,
    WrongParentError,
)
from edge_runtime.files import mode_for
from edge_runtime.formats.apply import apply_weights
from edge_runtime.formats.patch import Patch
from packager.mapped import MappedFile
from packager.models.checkpoint import Checkpoint, find_checkpoint
from packager.models.safetensors_file import is_safetensors, views
from packager.models.staged import StagedFile, check_free, name_file, name_folder
from packager.models.views import View, ViewedWeights


@dataclass(frozen=True, slots=True)
class Applied:
    """What was written.

    Attributes:
        path: The file, or the folder of shards.
        files: The names of the files with tensors.
        size: Bytes of all of them.
        canonical: Whether it is a canonical weight file, whose SHA-256 is the target.
    """

    path: Path
    files: tuple[str, ...]
    size: int
    canonical: bool


def apply_to_files(
    base: Path, patch: Patch, output: str | PathLike[str], *, force: bool = False
) -> Applied:
    """Apply a patch to a safetensors file, or to a folder of shards.

    Args:
        base: The file, the folder, or its index.
        patch: An open patch.
        output: A file; for shards, a folder, which gets the same shards and index. A
            folder too if it ends with ``/``.
        force: Replace what is there. Never a folder with other files in it.

    Raises:
        OSError: The disk refuses, or is too small; nothing is left behind.
        ConfigError: Something is there already.
        WeightsError: The base is malformed, or no safetensors file.
        WrongParentError: The patch leads from other weights.
        PatchError: The patch contradicts itself or the base.
        VerificationError: The result is not the promised one; nothing is left behind.
    """
    checkpoint, ends = _checked(base), fspath(output).endswith("/")
    output = Path(output)
    is_folder = checkpoint.is_folder or (ends and not output.is_dir())
    if not is_folder and output.is_dir():
        output = output / checkpoint.files[0].name
    if output.is_symlink() or output.name in ("", ".."):
        output = Path(realpath(output))  # of what a link leads to the name is free
    if is_folder and output.exists() and output.samefile("."):
        raise ConfigError(
            f"{output} is the current folder, which cannot be replaced as a whole; "
            "give another name"
        )
    names = {path.name: path for path in checkpoint.files}
    if checkpoint.index:
        names[checkpoint.index.name] = checkpoint.index
    check_free(output, names if is_folder else None, force=force)
    mapped = [MappedFile(path) for path in checkpoint.files]
    found = _views(mapped)
    weights = ViewedWeights(found)
    _check_parent(base, weights, patch)
    size = sum(path.stat().st_size for path in names.values())
    _check_room(output, size)
    with ExitStack() as stack:
        parts = {
            n: stack.enter_context(
                StagedFile(output, mode_for(output / n if is_folder else output))
            )
            for n in names
        }
        for file in mapped:
            parts[file.path.name].write_at(_header(file), 0)
        if checkpoint.index:
            name = checkpoint.index.name
            parts[name].write_at(checkpoint.index.read_bytes(), 0)
        _write(apply_weights(weights, patch), weights, found, parts)
        _prove({p.name: parts[p.name].path for p in checkpoint.files}, patch)
        if is_folder:
            name_folder(parts, output, force=force)
        else:
            name_file(parts[checkpoint.files[0].name], output, force=force)
    canonical = not checkpoint.is_folder and _header(mapped[0]) == weights.layout.header
    if is_folder and not checkpoint.is_folder:
        output /= checkpoint.files[0].name
    return Applied(output, tuple(p.name for p in checkpoint.files), size, canonical)


def _checked(base: Path) -> Checkpoint:
    found = find_checkpoint(base)
    odd = [base] if found is None else [p for p in found.files if not is_safetensors(p)]
    if found is None or odd:
        raise WeightsError(
            f"{odd[0]} is no safetensors file, and a patch is applied to those; "
            f"'dpu-patch extract {shlex.quote(str(base))} -o DIR' makes one of it"
        )
    return found


def _views(mapped: list[MappedFile]) -> dict[str, View]:
    found: dict[str, View] = {}
    for file in mapped:
        here = views(file.data, file.path, file)
        if twice := found.keys() & here.keys():
            raise WeightsError(
                f"tensor {min(twice)!r} lies in {file.path} and in another file, "
                "expected it once"
            )
        found |= here
    return found


def _check_parent(base: Path, weights: ViewedWeights, patch: Patch) -> None:
    header, found = patch.header, weights.fingerprint
    if found == header.parent:
        return
    words = f"the patch leads from weights {header.parent[:12]}, {base} holds"
    if found == header.target:
        words += f" {found[:12]}, to which it leads: it was applied already"
    elif weights.layout.file_size != header.file_size:
        words += (
            f" {found[:12]}, a model of {weights.layout.file_size} bytes; the patch is "
            f"for one of {header.file_size}. Give the file that it was made from, or "
            "what devices hold of it ('dpu-patch extract')"
        )
    else:
        words += f" {found[:12]}; apply the patches between them first"
    raise WrongParentError(words, expected=header.parent, actual=found)


def _check_room(output: Path, size: int) -> None:
    free = shutil.disk_usage(output.parent).free
    if free < size:
        reason = f"{size} bytes are needed, {free} are free"
        raise OSError(ENOSPC, reason, str(output.parent))


def _header(file: MappedFile) -> bytes:
    return bytes(file.data[: 8 + int.from_bytes(file.data[:8], "little")])


def _write(
    windows: Iterator[memoryview],
    weights: ViewedWeights,
    found: Mapping[str, View],
    parts: Mapping[str, StagedFile],
) -> None:
    """Write the canonical target to where its tensors lie in the files."""
    tensors = [tensor for tensor in weights.layout.tensors if tensor.size]
    at = number = 0
    for window in windows:
        stop = at + len(window)
        while number < len(tensors) and tensors[number].start < stop:
            tensor = tensors[number]
            view, first = found[tensor.name], max(tensor.start, at)
            last = min(tensor.stop, stop)
            if view.file:
                piece = window[first - at : last - at]
                place = view.start + first - tensor.start
                parts[view.file.path.name].write_at(piece, place)
            if last < tensor.stop:
                break  # the rest of it is in the next window
            number += 1
        at = stop


def _prove(written: Mapping[str, Path], patch: Patch) -> None:
    """Read what was written, and insist on its fingerprint."""
    actual = ViewedWeights(
        _views([MappedFile(p) for p in written.values()])
    ).fingerprint
    if actual != patch.header.target:
        raise VerificationError(
            "the disk gives other bytes than were written; nothing is left of them. "
            "Check the disk",
            expected=patch.header.target,
            actual=actual,
        )
