# SPDX-License-Identifier: Apache-2.0
"""A state dict of PyTorch -> tensors, without running anything that is in the file.

The file is read by ``torch.load(weights_only=True)`` and in no other way, whatever it
holds; tensors are mapped where the file can be. torch is imported here alone, and only
once such a file was given: whoever packs needs none otherwise.
"""

import math
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from errno import EINVAL
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.errors import MALFORMED, ConfigError, WeightsError, how_to_install
from edge_runtime.formats.layout import PACKED_BITS
from edge_runtime.formats.weights import CHUNK_BYTES
from edge_runtime.streams import utf8_path
from edge_runtime.text import listed
from packager.models.views import REPEATS, View

if TYPE_CHECKING:
    import torch  # noqa: TID251

# Where trainers put the weights when they save more than those.
NESTED = ("state_dict", "model_state_dict", "model", "module")
# What else they save may hold tensors, but no weights that a device could run.
_TRAINING = re.compile(
    "(optim|lr_|sched|scaler|rng|random|callbacks|loops|amp).*|.*optimizer.*"
    "|.*_extra_state"
)
_TYPES = {
    "complex64": "C64",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
    "float32": "F32",
    "int32": "I32",
    "uint32": "U32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int16": "I16",
    "uint16": "U16",
    "float4_e2m1fn_x2": "F4",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save up to 1.5
_SAVE = "load it where it was made and write torch.save(model.state_dict(), FILE)"
_SHOWN = 6
# What readers of zip files and pickles raise where the bytes make no sense.
_FAULTS = (RuntimeError, EOFError, AssertionError, struct.error, *MALFORMED)


def torch_views(path: Path) -> tuple[dict[str, View], list[str]]:
    """Find the tensors of a state dict.

    Args:
        path: What ``torch.save`` wrote.

    Returns:
        The tensors by name, and what is to be said of them: what was left out.

    Raises:
        OSError: The file cannot be read.
        WeightsError: It is damaged, holds more than tensors, or none, or several sets
            of them; or a tensor is of a kind that no weight file holds.
        ConfigError: torch is not installed.
    """
    maps = _check_form(path)
    state, notes = _state_dict(_load(path, maps=maps), path)
    size, taken, found = path.stat().st_size, 0, {}
    for name, tensor in state.items():
        found[name] = _view(name, tensor, path, size)
        taken += found[name].raw.nbytes
        if taken > REPEATS * size:
            raise WeightsError(
                f"the tensors of {path}, up to {name!r}, repeat its values to {taken} "
                f"bytes, more than {REPEATS} times what it has; save them with .clone()"
            )
    return found, notes


def _check_form(path: Path) -> bool:
    """Refuse what torch.save did not write; return whether it can be mapped."""
    with path.open("rb") as file:
        start = file.read(len(_LEGACY))
    if start == _LEGACY:
        return False
    if not start.startswith(b"PK"):
        raise WeightsError(
            f"{path} is a pickle that torch.save did not write, expected a state dict; "
            f"{_SAVE}"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_sums(archive)
    except (zipfile.BadZipFile, OSError, *_FAULTS) as err:
        # A place before the start of the file is no place either.
        if isinstance(err, OSError) and err.errno != EINVAL:
            raise
        raise WeightsError(
            f"{path} is a truncated or damaged PyTorch file ({err}); fetch it again"
        ) from err
    inner = {info.filename.partition("/")[2] for info in members}
    if "constants.pkl" in inner:
        raise WeightsError(
            f"{path} is a TorchScript archive, which holds a program; expected a state "
            f"dict: {_SAVE}"
        )
    if "data.pkl" not in inner:
        raise WeightsError(
            f"{path} is a zip file without a state dict in it (data.pkl); {_SAVE}"
        )
    # Mapped as they lie there, compressed bytes would pass for tensors.
    if packed := [i.filename for i in members if i.compress_type != zipfile.ZIP_STORED]:
        raise WeightsError(
            f"{path} was compressed by another program ({packed[0]!r}), so its tensors "
            "cannot be mapped; unpack it and fetch the file that torch.save wrote"
        )
    return True


def _check_sums(archive: zipfile.ZipFile) -> None:
    """Read every stored member against its checksum, which torch does not look at.

    Without one (``torch.serialization.set_crc32_options``) it is zero.
    """
    for info in archive.infolist():
        if info.CRC and info.compress_type == zipfile.ZIP_STORED:
            with archive.open(info) as member:
                while member.read(CHUNK_BYTES):
                    pass


def _load(path: Path, *, maps: bool) -> Any:
    try:
        import torch  # noqa: TID251
    except ModuleNotFoundError as err:
        raise ConfigError(
            f"{path} is a PyTorch file, and torch, which reads it, is not installed; "
            f"{how_to_install('checkpoints')}. Or give the weights as safetensors"
        ) from err
    try:
        utf8_path(path)
    except UnicodeDecodeError as err:
        raise WeightsError(
            f"{path} has a name that is not UTF-8, by which torch cannot open it; "
            "rename it"
        ) from err
    try:
        with warnings.catch_warnings():
            # Of old pickle protocols; what torch cannot read it refuses all the same.
            warnings.simplefilter("ignore")
            return torch.load(path, weights_only=True, mmap=maps, map_location="cpu")
    except UnpicklingError as err:
        named = re.search(r"GLOBAL ([\w.]+)|[Cc]lass ([\w.]+)", str(err))
        what = f" ({named[1] or named[2]})" if named else ""
        raise WeightsError(
            f"{path} holds objects of Python{what}, not only tensors; expected a state "
            f"dict: {_SAVE}"
        ) from err
    except _FAULTS as err:
        reason = " ".join(str(err).split())[:200]
        raise WeightsError(
            f"{path} cannot be read as a state dict ({reason}); fetch it again"
        ) from err


def _state_dict(loaded: Any, path: Path) -> "tuple[dict[str, torch.Tensor], list[str]]":
    """Find the one set of weights in what was loaded."""
    if not isinstance(loaded, Mapping):
        raise WeightsError(
            f"{path} holds a {type(loaded).__name__}, expected a state dict; {_SAVE}"
        )
    sets = [k for k, v in loaded.items() if _holds_tensors(v) and not _is_training(k)]
    known = [key for key in sets if key in NESTED]
    state, left = loaded, [k for k, v in loaded.items() if not _is_tensor(v)]
    if known and len(sets) == 1:
        state = loaded[known[0]]
        left = [key for key in loaded if key != known[0]]
        left += [f"{known[0]}.{k}" for k, v in state.items() if not _is_tensor(v)]
        if inner := [k for k, v in state.items() if _holds_tensors(v)]:
            raise _several(path, inner, f"'{known[0]}' of ")
    elif sets:
        raise _several(path, sets)
    tensors = {key: value for key, value in state.items() if _is_tensor(value)}
    if not tensors:
        raise WeightsError(
            f"{path} holds no tensors, found {_words(loaded)}; expected a state dict: "
            f"{_SAVE}"
        )
    if odd := [key for key in tensors if not isinstance(key, str)]:
        raise WeightsError(
            f"{path} has a tensor under {odd[0]!r}, expected names; {_SAVE}"
        )
    notes = [f"{path}: left out, no weights: {_words(left)}"] if left else []
    return tensors, notes


def _several(path: Path, found: list[Any], where: str = "") -> WeightsError:
    key = found[0]
    return WeightsError(
        f"{where}{path} holds tensors in {_words(found)}, and it is not known which of "
        "them devices hold; expected names and tensors, at the top or in one of "
        f"{', '.join(NESTED)}. Save the right ones alone: "
        f"torch.save(torch.load(FILE)[{key!r}], NEW)"
    )


def _is_tensor(value: Any) -> bool:
    import torch  # noqa: TID251

    return isinstance(value, torch.Tensor)


def _holds_tensors(value: Any, deep: int = 8) -> bool:
    return isinstance(value, Mapping) and any(
        _is_tensor(inner) or (deep > 0 and _holds_tensors(inner, deep - 1))
        for inner in value.values()
    )


def _is_training(key: Any) -> bool:
    return bool(_TRAINING.fullmatch(str(key)))


def _words(keys: Any) -> str:
    return listed([repr(key)[:80] for key in keys], _SHOWN)


def _view(name: str, tensor: "torch.Tensor", path: Path, size: int) -> View:
    import torch  # noqa: TID251

    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else "sparse or nested"
    if tensor.is_meta:
        kind = "meta, without values"
    code = _TYPES.get(kind)
    if code is None:
        raise WeightsError(
            f"tensor {name!r} of {path} is {kind}, which has no place in a weight "
            f"file; known are {', '.join(_TYPES)}"
        )
    shape = tuple(tensor.shape)
    packed = 8 // PACKED_BITS.get(code, 8)  # torch counts the bytes of such numbers
    # A few bytes may pretend to be any number of them, repeated.
    if math.prod(shape) * tensor.element_size() > size:
        raise WeightsError(
            f"tensor {name!r} of {path} repeats its values to more bytes than the file "
            "has; save it with .clone()"
        )
    if packed > 1 and shape:
        shape = (*shape[:-1], shape[-1] * packed)
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)
    return View(code, shape, raw)
