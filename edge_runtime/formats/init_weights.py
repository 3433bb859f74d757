# SPDX-License-Identifier: Apache-2.0
"""Init weights: what training started from, regenerated on a device from a seed.

Each tensor is one of four kinds: ``uniform`` (from the seed), ``constant``, ``file``
(taken from ``init.safetensors`` beside the recipe), or ``quantised``: drawn as a
uniform one, and put on a grid of int8 whose scales lie in that file under the tensor's
name. The first deployment can then be a seed and a patch instead of the full weights,
and a re-initialised round needs only what training changed.

Uniform values are the same bits on every CPU: raw Philox words (NumPy guarantees that
stream), keyed by SHA-256 of seed and tensor name, to 24-bit integers, which float32
holds exactly, times one float32 scale, which IEEE 754 rounds in one way. Quantised ones
take one division, which IEEE 754 rounds in one way too (:mod:`.int8_grid`).
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import WeightsError
from edge_runtime.formats.int8_grid import check_scales, to_int8
from edge_runtime.formats.json_file import read_record
from edge_runtime.formats.layout import (
    DTYPES,
    MAX_DATA_BYTES,
    Layout,
    Tensor,
    make_layout,
)
from edge_runtime.formats.model_folder import INIT_NAME, INIT_TENSORS_NAME
from edge_runtime.formats.weights import (
    CHUNK_BYTES,
    Weights,
    pack_weights,
    read_weights,
)
from edge_runtime.limits import limits

SCHEMA, INT8_SCHEMA = 1, 2  # 2: with a quantised tensor
_MAX_SEED = 1 << 128
KINDS = ("uniform", "constant", "file", "quantised")


@dataclass(frozen=True, slots=True)
class TensorInit:
    """How one tensor starts.

    Attributes:
        dtype: Safetensors type code; ``uniform`` needs ``"F32"``, ``quantised``
            ``"I8"``.
        shape: The shape.
        kind: ``"uniform"``, ``"constant"``, ``"file"`` or ``"quantised"``.
        value: For ``uniform`` and ``quantised`` the scale ``a`` of [-a, a); for
            ``constant`` the value of every element. Rounded to the tensor's type when
            used, of ``quantised`` to float32.
    """

    dtype: str
    shape: tuple[int, ...]
    kind: str
    value: float = 0.0


@dataclass(frozen=True)
class InitSpec:
    """What regenerates the init weights of one network, bit for bit.

    Attributes:
        seed: Any integer; keys every uniform tensor together with its name.
        tensors: One entry a tensor of the weight file.
        stored: The tensors of kind ``file``, by name, and for those of kind
            ``quantised`` the float32 scales of the slices of their first axis.
    """

    seed: int
    tensors: Mapping[str, TensorInit]
    stored: Mapping[str, NDArray[Any]]

    @property
    def is_quantised(self) -> bool:
        """Whether a tensor is drawn and put on a grid of int8."""
        return any(init.kind == "quantised" for init in self.tensors.values())

    def layout(self) -> Layout:
        """Return the layout of the weight file that this recipe generates."""
        return make_layout(
            {name: (init.dtype, init.shape) for name, init in self.tensors.items()}
        )

    def chunks(self) -> Iterator[bytes]:
        """Yield the init weights as a weight file, in pieces of bounded size."""
        layout = self.layout()
        yield layout.header
        for tensor in layout.tensors:
            yield from self._tensor_chunks(tensor, self.tensors[tensor.name])

    def generate(self) -> Weights:
        """Return the init weights in memory."""
        return Weights(self.layout(), b"".join(self.chunks()))

    def _tensor_chunks(self, tensor: Tensor, init: TensorInit) -> Iterator[bytes]:
        if init.kind == "file":
            yield self.stored[tensor.name].tobytes()
            return
        step, words = CHUNK_BYTES // max(tensor.item_size, 4), None
        if init.kind in ("uniform", "quantised"):
            words = philox(self.seed, tensor.name)
        for start in range(0, tensor.size, step):
            count = min(step, tensor.size - start)
            if words is None:
                yield np.full(count, init.value, DTYPES[tensor.dtype]).tobytes()
                continue
            values = uniform(words, count, init.value)
            if init.kind == "quantised":
                row = np.arange(start, start + count) // math.prod(init.shape[1:])
                scales = self.stored[tensor.name].take(row)
                yield to_int8(values, scales).tobytes()
            else:
                yield values.tobytes()


def philox(seed: int, name: str) -> np.random.Philox:
    """Return the random stream of one tensor."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return np.random.Philox(key=np.frombuffer(digest[:16], "<u8"))


def uniform(words: np.random.Philox, count: int, scale: float) -> NDArray[np.float32]:
    """Draw float32 values from [-scale, scale), exactly reproducible.

    Args:
        words: The stream; one 64-bit word is used for each value.
        count: Number of values.
        scale: Half the width of the interval; rounded to float32.
    """
    integers = (words.random_raw(count) >> np.uint64(40)).astype(np.int32) - (1 << 23)
    # Both factors are exact in float32, so one rounding is all that happens.
    return integers.astype("<f4") * (np.float32(scale) * np.float32(2.0**-23))


def write_init_spec(recipe: InitSpec, folder: str | PathLike[str]) -> None:
    """Write ``init.json``, and ``init.safetensors`` where tensors are stored.

    Raises:
        OSError: The files cannot be written.
    """
    folder = Path(folder)
    entries = {name: asdict(init) for name, init in recipe.tensors.items()}
    if recipe.stored:
        types = {
            name: recipe.tensors[name].dtype
            for name in recipe.stored
            if recipe.tensors[name].kind == "file"
        }
        stored = pack_weights(recipe.stored, types)
        (folder / INIT_TENSORS_NAME).write_bytes(stored.data)
    schema = INT8_SCHEMA if recipe.is_quantised else SCHEMA
    text = json.dumps({"schema": schema, "seed": recipe.seed, "tensors": entries})
    (folder / INIT_NAME).write_text(text + "\n", encoding="utf-8")


def read_init_spec(folder: str | PathLike[str]) -> InitSpec:
    """Read an init recipe from a folder.

    Raises:
        OSError: A file cannot be read.
        WeightsError: The recipe is malformed or does not fit its stored tensors.
    """
    folder = Path(folder)
    stored_path = folder / INIT_TENSORS_NAME
    stored = read_weights(stored_path) if stored_path.exists() else None
    record = read_record(
        folder / INIT_NAME,
        "recipe_bytes",
        "the init recipe",
        WeightsError,
        finite=False,
    )
    schema = record.schema(SCHEMA, INT8_SCHEMA)
    entries = record.record("tensors")
    if problem := limits().problem("tensors", len(entries.values), "the init recipe"):
        raise WeightsError(problem)
    tensors = {
        name: TensorInit(
            entry.text("dtype"),
            tuple(entry.integers("shape", most=MAX_DATA_BYTES)),
            entry.text("kind"),
            entry.number("value", 0.0, finite=False),
        )
        for name, entry in entries.members()
    }
    seed = record.integer("seed", least=-_MAX_SEED, most=_MAX_SEED)
    recipe = InitSpec(seed, tensors, stored or {})
    _check(recipe, stored, KINDS if schema == INT8_SCHEMA else KINDS[:3])
    return recipe


def _check(recipe: InitSpec, stored: Weights | None, kinds: Sequence[str]) -> None:
    for name, init in recipe.tensors.items():
        known = init.kind in kinds and init.dtype in DTYPES
        if not (known and (init.kind == "file" or _is_in_range(init))):
            raise WeightsError(f"init recipe: tensor {name!r} is not valid ({init})")
        if init.kind == "uniform" and init.dtype != "F32":
            raise WeightsError(f"init recipe: uniform tensor {name!r} must be F32")
        if init.kind == "quantised":
            _check_quantised(name, init, recipe, stored)
        if init.kind == "file":
            found = stored.layout.by_name.get(name) if stored else None
            if found is None or (found.dtype, found.shape) != (init.dtype, init.shape):
                raise WeightsError(
                    f"init recipe: tensor {name!r} ({init.dtype} {list(init.shape)}) "
                    f"is missing from {INIT_TENSORS_NAME} or differs there"
                )


def _is_in_range(init: TensorInit) -> bool:
    """Return whether a value is of its type: what others become differs by CPU."""
    is_drawn = init.kind != "constant"
    dtype = DTYPES["F32" if is_drawn else init.dtype]
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return math.isfinite(init.value) and info.min <= int(init.value) <= info.max
    if not math.isfinite(init.value):
        return not is_drawn and dtype.kind in "fc"
    return dtype.kind == "b" or abs(init.value) <= float(np.finfo(dtype).max)


def _check_quantised(
    name: str, init: TensorInit, recipe: InitSpec, stored: Weights | None
) -> None:
    if init.dtype != "I8" or not init.shape:
        raise WeightsError(
            f"init recipe: quantised tensor {name!r} must be I8, with an axis"
        )
    found = stored.layout.by_name.get(name) if stored else None
    if found is None or (found.dtype, found.shape) != ("F32", init.shape[:1]):
        raise WeightsError(
            f"init recipe: the scales of {name!r} (F32 [{init.shape[0]}]) are missing "
            f"from {INIT_TENSORS_NAME} or differ there"
        )
    check_scales(name, recipe.stored[name])
