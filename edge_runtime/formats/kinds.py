# SPDX-License-Identifier: Apache-2.0
"""What a file is, by its first bytes: so that a wrong one is refused by its name.

Nothing here decides whether a file is good: each reader does that itself. What this
module does not know passes, and its reader says what is wrong.
"""

import os
import re
import stat
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

from edge_runtime.errors import (
    BundleError,
    ContractError,
    DpuError,
    KeyFileError,
    KeyListError,
    PatchFormatError,
    ProofError,
    RoundNotFoundError,
    WeightsError,
)
from edge_runtime.formats.header import MAGIC
from edge_runtime.formats.model_folder import MODEL_NAME, RECORD_NAME, list_rounds

# What a folder of weights has in it, beside a model's settings.
_WEIGHT_FILE = re.compile(r".+\.(?:safetensors|bin|pth?|ckpt)(?:\.index\.json)?")
LOOKED_AT = 1 << 16  # bytes; a key list has all of its signatures first


class Kind(Enum):
    """What a file or folder can be: in words, and what takes it."""

    PATCH = "a patch", "'dpu-edge apply' takes it, 'dpu-patch info' shows it"
    BUNDLE = (
        "an installation bundle",
        "'dpu-edge init' takes it, 'dpu-patch info' shows it",
    )
    TORCH = (
        "a PyTorch file",
        "'dpu-pack --base' takes its weights, 'dpu-patch extract' makes a weight file "
        "of them",
    )
    GGUF = "a GGUF file", "save the model as safetensors; no command takes GGUF"
    HDF5 = "an HDF5 file", "export the model as ONNX; no command takes HDF5"
    POINTER = "a pointer of Git LFS", "fetch what it stands for with 'git lfs pull'"
    NPZ = "an .npz file of arrays", "'dpu-edge infer' takes it"
    ZIP = "a zip file", "unpack it first; no command takes it as it is"
    NPY = "an .npy array", "'dpu-edge infer' takes it"
    IMAGE = "an image", "'dpu-edge infer' takes it"
    WEIGHTS = (
        "a weight file (safetensors)",
        "'dpu-edge verify --expect', 'dpu-patch diff' and 'dpu-pack --base' take it",
    )
    ONNX = (
        "an ONNX file",
        "'dpu-pack --base' makes bundles and patches of it, 'dpu-patch extract' its "
        "weight file",
    )
    PUBLIC_KEY = (
        "a public key",
        "'dpu-edge init --trust' and 'dpu-patch verify --key' take it",
    )
    PRIVATE_KEY = (
        "a private key, which stays with its owner",
        "'dpu-patch sign --key' takes it; devices take its public half (NAME.pub.pem)",
    )
    KEY_LIST = (
        "a key list",
        "'dpu-edge trust add' and 'dpu-edge init --trust' take it, 'dpu-patch trust' "
        "changes it",
    )
    PROOF = "a device's proof", "'dpu-patch check-proof' takes it"
    CONTRACT = "a contract", "'dpu-pack --base --bundle --contract' takes it"
    ROUND = (
        "a round folder",
        "'dpu-pack' takes it, and 'dpu-patch' its run, or its weights.safetensors",
    )
    RUN = "a run's folder", "'dpu-pack' and 'dpu-patch report' take it"
    STORE = "a device's store", "give it with --store"
    INDEX = (
        "an index of shards",
        "'dpu-pack --base', 'dpu-patch diff' and 'apply' take what it names",
    )
    SHARDS = (
        "a folder of weight files",
        "'dpu-pack --base', 'dpu-patch diff' and 'apply' take it",
    )

    def __init__(self, words: str, taker: str) -> None:
        self.words, self.taker = words, taker

    @property
    def short(self) -> str:
        """What it is, without the remark that may follow."""
        return self.words.partition(",")[0]


# What a reader raises that wanted one of these and got something else.
_ERRORS: dict[Kind, type[DpuError]] = {
    Kind.PATCH: PatchFormatError,
    Kind.BUNDLE: BundleError,
    Kind.WEIGHTS: WeightsError,
    Kind.ONNX: WeightsError,
    Kind.KEY_LIST: KeyListError,
    Kind.PUBLIC_KEY: KeyFileError,
    Kind.PRIVATE_KEY: KeyFileError,
    Kind.PROOF: ProofError,
    Kind.ROUND: RoundNotFoundError,
}
_STARTS = {
    MAGIC: Kind.PATCH,
    b"GGUF": Kind.GGUF,
    b"\x89HDF\r\n": Kind.HDF5,
    b"version https://git-lfs": Kind.POINTER,
    b"\x93NUMPY": Kind.NPY,
    b"\x89PNG\r\n": Kind.IMAGE,
    b"\xff\xd8\xff": Kind.IMAGE,
    b"GIF8": Kind.IMAGE,
    b"II*\x00": Kind.IMAGE,
    b"MM\x00*": Kind.IMAGE,
}
_FORMS = {
    # The field ir_version, and then a field that a model may have.
    rb"\x08[\x01-\x1f][\x12\x1a\x22\x28\x32\x3a\x42\x72]": Kind.ONNX,
    rb"RIFF....WEBP": Kind.IMAGE,
    rb"[\s\S]{4}[\0-\x0f]\0\0\0\{": Kind.WEIGHTS,
    rb"\s*-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----": Kind.PRIVATE_KEY,
    rb"\s*-----BEGIN PUBLIC KEY-----": Kind.PUBLIC_KEY,
    rb'\s*\{\s*"sign(?:ed|atures)"\s*:': Kind.KEY_LIST,
    rb'\s*\{[\s\S]*"nonce"\s*:': Kind.PROOF,
    rb'\s*\{[\s\S]*"accuracy_floor"\s*:': Kind.CONTRACT,
    rb'\s*\{[\s\S]*"weight_map"\s*:': Kind.INDEX,
    rb"\x80[\x02-\x05]": Kind.TORCH,  # a pickle, as torch wrote it of old
}
# By the first member of a zip file; tools may have put them in any order.
_MEMBERS = {
    rb".*\.npy": Kind.NPZ,
    rb".*data\.pkl|[^/]+/(?:data/.*|code/.*|constants\.pkl|version)": Kind.TORCH,
    rb"bundle\.(json|sig)|(graph\.onnx|patch\.dpu)|(init|contract|run)\.json|keys/.*": (
        Kind.BUNDLE
    ),
    rb"golden\.npz|init\.safetensors": Kind.BUNDLE,
}


def recognise(start: bytes) -> Kind | None:
    """Say what the file is that begins with some bytes; None if nobody knows."""
    if start.startswith(b"PK\x03\x04"):
        length = int.from_bytes(start[26:28], "little")
        return _first(_MEMBERS, start[30 : 30 + length], re.fullmatch) or Kind.ZIP
    known = next((kind for s, kind in _STARTS.items() if start.startswith(s)), None)
    return known or _first(_FORMS, start, re.match)


def _first(forms: dict[bytes, Kind], data: bytes, match: Any) -> Kind | None:
    return next((kind for form, kind in forms.items() if match(form, data)), None)


def kind_of(path: Path) -> Kind | None:
    """Say what a file or folder is; None if nobody knows or it cannot be looked at.

    Only ordinary files are read: what a pipe gives is gone for its reader.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return _folder(path)
        if not stat.S_ISREG(mode):
            return None
        with path.open("rb") as file:
            found = recognise(file.read(LOOKED_AT))
    except (OSError, ValueError):
        return None  # its reader says why
    damaged = found is None and path.name.endswith(".root.json")
    return Kind.KEY_LIST if damaged else found


def _folder(path: Path) -> Kind | None:
    if (path / RECORD_NAME).is_file():
        return Kind.ROUND
    if (path / "state.json").is_file():
        return Kind.STORE
    with os.scandir(path) as entries:
        found = any(_WEIGHT_FILE.fullmatch(entry.name) for entry in entries)
    # Beside a checkpoint there may be a folder of any name.
    if (path / MODEL_NAME).is_dir() and (not found or list_rounds(path)):
        return Kind.RUN
    return Kind.SHARDS if found else None


def _is_empty(path: Path) -> bool:
    with suppress(OSError, ValueError):  # its reader says why
        status = path.stat()
        return stat.S_ISREG(status.st_mode) and not status.st_size
    return False


def refuse_others(path: Path, wanted: Sequence[Kind]) -> None:
    """Refuse a file that is known to be of another kind than the wanted ones.

    Args:
        path: The file or folder.
        wanted: What it should be; the first one's reader gives the exception.

    Raises:
        DpuError: It says what the file is, and which command takes it.
    """
    found = kind_of(path)
    expected = " or ".join(kind.short for kind in wanted)
    error = _ERRORS.get(wanted[0], ContractError)
    if found is None and _is_empty(path):
        raise error(f"{path} is empty (0 bytes), expected {expected}; fetch it again")
    if found is None or found in wanted:
        return
    if found is Kind.ZIP and Kind.BUNDLE in wanted:
        return  # in whatever order its members are
    raise error(f"{path} is {found.words}, expected {expected}; {found.taker}")
