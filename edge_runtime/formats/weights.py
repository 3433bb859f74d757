# SPDX-License-Identifier: Apache-2.0
"""The weight file: one canonical safetensors file for each set of weights.

Equal weights are equal bytes, so ``sha256sum weights.safetensors`` is the
fingerprint, on the server and on the device. Canonical means: tensors by decreasing
item size, then by name; no metadata; the header padded with spaces to a multiple of
eight, as the safetensors library does. A float32 file equals what
``safetensors.numpy.save_file`` writes.

Tensors are handled as bits. Types that NumPy lacks (bfloat16, float8) are unsigned
integers of the same size here and are never converted.
"""

import gc
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from io import SEEK_END, BytesIO
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import WeightsError
from edge_runtime.files import Files
from edge_runtime.limits import limits

MAX_DIMENSIONS = 32  # as many as every NumPy has
MAX_DATA_BYTES = 1 << 62  # so that every offset is one of NumPy's integers
CHUNK_BYTES = 1 << 20

# safetensors type -> NumPy type of the same size. Unsigned where NumPy lacks the type.
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "F8_E5M2": np.dtype("u1"),
    "F8_E4M3": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_QUOTED = json.JSONEncoder(ensure_ascii=False).encode
# Of types that share one of NumPy's the last counts: U16 and U8.
_NATIVE_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Tensor(NamedTuple):
    """Where one tensor lies in the weight file.

    Attributes:
        name: The state-dict name.
        dtype: The safetensors type code, for example ``"F32"``.
        shape: The shape; ``()`` for a scalar.
        start: Offset of the first byte, from the start of the file.
        stop: Offset after the last byte.
        size: Number of elements.
        item_size: Bytes of one element.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    size: int
    item_size: int


@dataclass(frozen=True)
class Layout:
    """The header of a weight file: which tensors lie where.

    Attributes:
        header: The exact first bytes of the file, up to the first tensor.
        tensors: In file order; the bytes of the file after ``header`` are covered
            completely, without holes.
    """

    header: bytes
    tensors: tuple[Tensor, ...]

    @cached_property
    def by_name(self) -> dict[str, Tensor]:
        """The tensors by name, in file order."""
        return {tensor.name: tensor for tensor in self.tensors}

    @property
    def file_size(self) -> int:
        """Bytes of the whole weight file."""
        return self.tensors[-1].stop if self.tensors else len(self.header)


class Weights(Mapping[str, NDArray[Any]]):
    """A whole weight file in memory: a read-only mapping from name to array."""

    def __init__(self, layout: Layout, data: bytes | bytearray | memoryview) -> None:
        """Wrap the bytes of a weight file.

        Args:
            layout: The parsed header of ``data``.
            data: The whole file, header included.

        Raises:
            WeightsError: ``data`` has another size than the layout says.
        """
        check_size(layout, len(data))
        self.layout = layout
        self.data = memoryview(data).toreadonly()

    def __getitem__(self, name: str) -> NDArray[Any]:
        tensor = self.layout.by_name[name]
        raw = np.frombuffer(self.data[tensor.start : tensor.stop], np.uint8)
        return raw.view(DTYPES[tensor.dtype]).reshape(tensor.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.by_name)

    def __len__(self) -> int:
        return len(self.layout.tensors)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the file's bytes, hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()


def make_layout(specs: Mapping[str, tuple[str, tuple[int, ...]]]) -> Layout:
    """Lay tensors out canonically.

    Args:
        specs: Type code and shape by tensor name, in any order.

    Raises:
        WeightsError: A type is unknown, or they are too many bytes.
    """
    if problem := limits().problem("tensors", len(specs), "the weight file"):
        raise WeightsError(problem)
    for name, (dtype, shape) in specs.items():
        if dtype not in DTYPES:
            raise WeightsError(
                f"tensor {name!r} has type {dtype!r}; known: {', '.join(DTYPES)}"
            )
        if len(shape) > MAX_DIMENSIONS:
            raise WeightsError(
                f"tensor {name!r} has {len(shape)} dimensions; at most "
                f"{MAX_DIMENSIONS} are possible"
            )
    order = sorted(specs, key=lambda name: (-DTYPES[specs[name][0]].itemsize, name))
    entries, spans, start = [], [], 0
    entry = cache(_entry)  # most tensors of a network have the shape of another one
    for name in order:
        opening, size, item_size = entry(*specs[name])
        stop = start + size * item_size
        # What json.dumps writes, in a fraction of its time.
        entries.append(f"{_QUOTED(name)}{opening}{start},{stop}]}}")
        spans.append((start, stop, size, item_size))
        start = stop
    if start > MAX_DATA_BYTES:
        raise WeightsError(f"the weights have {start} bytes, which is too many")
    try:
        text = f"{{{','.join(entries)}}}".encode()
    except UnicodeEncodeError as err:
        raise WeightsError(f"the name of a tensor is no text ({err.reason})") from err
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    first = len(header)
    tensors = (
        Tensor(name, *specs[name], first + start, first + stop, size, item_size)
        for name, (start, stop, size, item_size) in zip(order, spans, strict=True)
    )
    return Layout(header, tuple(tensors))


def _entry(dtype: str, shape: tuple[int, ...]) -> tuple[str, int, int]:
    """Return what stands between name and offsets, elements, and bytes of one."""
    lengths = ",".join(map(str, shape))
    opening = f':{{"dtype":"{dtype}","shape":[{lengths}],"data_offsets":['
    # NumPy multiplies the lengths of an empty tensor too, without the zero.
    if math.prod(filter(None, shape)) > MAX_DATA_BYTES // 8:
        raise WeightsError(f"a tensor of shape {list(shape)} is too large")
    return opening, math.prod(shape), DTYPES[dtype].itemsize


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause the garbage collector of the whole process.

    So many objects as a header has start it. It would look at all that has been
    imported, for longer than it takes to apply a patch, and none of them is garbage.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def parse_layout(header: bytes) -> Layout:
    """Parse the header of a weight file and insist on the canonical form.

    Args:
        header: The first bytes of the file: length field and JSON, no more.

    Raises:
        WeightsError: Not a weight file, or laid out in another way.
    """
    with gc_paused():
        try:
            values = sum(map(header.count, (b",", b"[", b"{")))
            if problem := limits().problem("json_values", values, "its header"):
                raise ValueError(problem)
            entries = json.loads(header[8:])
            specs = {
                name: (entry["dtype"], tuple(entry["shape"]))
                for name, entry in entries.items()
            }
            sizes = [n for _, shape in specs.values() for n in shape]
            if not all(type(n) is int and n >= 0 for n in sizes):
                raise WeightsError("a shape in the weight file's header is not valid")
            layout = make_layout(specs)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
            raise WeightsError(
                f"not a weight file: its header is malformed ({err})"
            ) from err
    if layout.header != header:
        raise WeightsError(
            "the weight file is not in canonical form (tensors by decreasing item "
            "size, then name; no metadata); write it again with write_weights"
        )
    return layout


def read_layout(file: BinaryIO) -> Layout:
    """Read the header from an open weight file and leave the position after it.

    Raises:
        WeightsError: Not a weight file, or not in canonical form.
    """
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    most = limits().weight_header_bytes
    if len(prefix) < 8 or not 2 <= length <= most:
        raise WeightsError(
            f"not a weight file: header length {length}, expected 2 to {most} bytes "
            "(DPU_LIMITS=weight_header_bytes=N for more)"
        )
    text = file.read(length)
    if len(text) < length:
        raise WeightsError("the weight file is truncated inside its header")
    return parse_layout(prefix + text)


def read_weights(source: str | PathLike[str] | bytes) -> Weights:
    """Read a whole weight file into memory.

    Args:
        source: A path, or the bytes of the file.

    Raises:
        OSError: The file cannot be read.
        WeightsError: Malformed, truncated or not canonical.
    """
    if isinstance(source, bytes):
        return Weights(read_layout(BytesIO(source)), source)
    with open(source, "rb") as file:
        layout, size = read_layout(file), file.seek(0, SEEK_END)
        check_size(layout, size)
        # No byte is read twice: what was parsed is what is hashed.
        data = bytearray(size)
        data[: len(layout.header)] = layout.header
        file.seek(len(layout.header))
        found = file.readinto(memoryview(data)[len(layout.header) :])
        check_size(layout, len(layout.header) + found)
    return Weights(layout, data)


def check_size(layout: Layout, size: int) -> None:
    """Insist that a weight file has the size that its header describes.

    Raises:
        WeightsError: It has another.
    """
    if size != layout.file_size:
        raise WeightsError(
            f"the weight file has {size} bytes, its header describes "
            f"{layout.file_size}; it is truncated or has trailing bytes"
        )


def pack_weights(
    tensors: Mapping[str, NDArray[Any]], types: Mapping[str, str] | None = None
) -> Weights:
    """Put arrays into one weight file in memory.

    Args:
        tensors: Arrays by name, in any order.
        types: Type codes for tensors that NumPy cannot name (``{"w": "BF16"}`` for
            a uint16 array that holds bfloat16 bits).

    Raises:
        WeightsError: An array's type has no place in a weight file.
    """
    specs = {}
    for name, array in tensors.items():
        native = _NATIVE_CODES.get(array.dtype.newbyteorder("<"))
        if not (code := (types or {}).get(name, native)):
            raise WeightsError(f"{array.dtype} has no place in a weight file")
        specs[name] = code, array.shape
    layout = make_layout(specs)
    data = bytearray(layout.file_size)
    data[: len(layout.header)] = layout.header
    for tensor in layout.tensors:
        array = tensors[tensor.name]
        # tobytes keeps 0-d shapes and any stride; the cast only fixes byte order.
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        raw = little.tobytes(order="C")
        if len(raw) != tensor.stop - tensor.start:
            raise WeightsError(
                f"tensor {tensor.name!r}: {array.dtype} does not have the item size "
                f"of {tensor.dtype}"
            )
        data[tensor.start : tensor.stop] = raw
    return Weights(layout, data)


def write_weights(
    tensors: Mapping[str, NDArray[Any]], path: str | PathLike[str]
) -> str:
    """Write a weight file and return its fingerprint.

    Args:
        tensors: Arrays by name, or :class:`Weights`, which are written as they are.
        path: Where to write; replaced only once complete.

    Raises:
        OSError: The file cannot be written.
        WeightsError: An array's type has no place in a weight file.
    """
    weights = tensors if isinstance(tensors, Weights) else pack_weights(tensors)
    Files().replace(Path(path), weights.data, durable=False)
    return weights.fingerprint


def fingerprint_chunks(chunks: Iterable[bytes | memoryview]) -> str:
    """Return the SHA-256 of the chunks, hexadecimal."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def read_chunks(path: str | PathLike[str]) -> Iterator[memoryview]:
    """Yield a file's bytes in bounded chunks, every other one in the same memory."""
    with open(path, "rb", buffering=0) as file:
        chunk, other = (np.empty(CHUNK_BYTES, np.uint8).data for _ in range(2))
        while size := file.readinto(chunk):
            yield chunk[:size]
            chunk, other = other, chunk


def fingerprint_file(path: str | PathLike[str]) -> str:
    """Return the SHA-256 of a file, as ``sha256sum`` prints it."""
    return fingerprint_chunks(read_chunks(path))
