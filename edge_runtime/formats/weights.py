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

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from io import SEEK_END, BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import WeightsError
from edge_runtime.files import Files
from edge_runtime.formats.layout import (
    DTYPES,
    NATIVE_CODES,
    Layout,
    Tensor,
    make_layout,
    read_layout,
)

CHUNK_BYTES = 1 << 20


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
        raw = np.frombuffer(self._read(tensor, 0, tensor.stop - tensor.start), np.uint8)
        return raw.view(DTYPES[tensor.dtype]).reshape(tensor.axes)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.by_name)

    def __len__(self) -> int:
        return len(self.layout.tensors)

    def bits(self, tensor: Tensor, start: int, stop: int) -> NDArray[Any]:
        """Return elements of a tensor, in C order, as unsigned integers.

        Args:
            tensor: One of this layout.
            start: The first one.
            stop: The one behind the last.
        """
        size = tensor.item_size
        return np.frombuffer(self._read(tensor, start * size, stop * size), f"<u{size}")

    def _read(
        self, tensor: Tensor, start: int, stop: int
    ) -> bytes | memoryview | NDArray[np.uint8]:
        """Return bytes of a tensor; a subclass has them elsewhere."""
        return self.data[tensor.start + start : tensor.start + stop]

    @cached_property
    def data(self) -> memoryview:
        """The whole file in memory, for whoever cannot do with less."""
        return memoryview(b"".join(self.chunks()))

    def chunks(self) -> Iterator[memoryview]:
        """Yield the file's bytes in order, in pieces of bounded size."""
        for start in range(0, len(self.data), CHUNK_BYTES):
            yield self.data[start : start + CHUNK_BYTES]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the file's bytes, hexadecimal."""
        return fingerprint_chunks(self.chunks())


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
        native = NATIVE_CODES.get(array.dtype.newbyteorder("<"))
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
