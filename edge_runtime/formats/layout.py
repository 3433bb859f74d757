# SPDX-License-Identifier: Apache-2.0
"""The header of a weight file: which tensors it holds, and where each one lies."""

import gc
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from edge_runtime.errors import WeightsError
from edge_runtime.limits import limits

METADATA = "__metadata__"  # in a header, what is no tensor
MAX_DIMENSIONS = 32  # as many as every NumPy has
MAX_DATA_BYTES = 1 << 62  # so that every offset is one of NumPy's integers
# safetensors type -> NumPy type of the same size. Unsigned where NumPy lacks the type.
DTYPES: dict[str, np.dtype[Any]] = {
    "C64": np.dtype("<c8"),
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
    **dict.fromkeys(("F4", "F6_E2M3", "F6_E3M2"), np.dtype("u1")),
    **dict.fromkeys(("F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"), np.dtype("u1")),
    "F8_E5M2": np.dtype("u1"),
    "F8_E4M3": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
# Bits of a number that is smaller than a byte. Such numbers lie packed, and what they
# lie in is handled as a row of bytes: nothing here takes them apart.
PACKED_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_QUOTED = json.JSONEncoder(ensure_ascii=False).encode
# Of types that share one of NumPy's the last counts: U16 and U8.
NATIVE_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Tensor(NamedTuple):
    """Where one tensor lies in the weight file.

    Attributes:
        name: The state-dict name.
        dtype: The safetensors type code, for example ``"F32"``.
        shape: The shape; ``()`` for a scalar.
        start: Offset of the first byte, from the start of the file.
        stop: Offset after the last byte.
        size: Number of elements; of packed numbers, of their bytes.
        item_size: Bytes of one element.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    size: int
    item_size: int

    @property
    def axes(self) -> tuple[int, ...]:
        """The shape of the elements: of packed numbers, a row of bytes."""
        return (self.size,) if self.dtype in PACKED_BITS else self.shape

    def external_data(self, file: str) -> dict[str, str]:
        """Return the entries by which an ONNX graph finds the tensor in a file."""
        length = self.stop - self.start
        return {"location": file, "offset": str(self.start), "length": str(length)}


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

    @cached_property
    def types(self) -> Mapping[str, str]:
        """The type codes by name, in file order."""
        return {tensor.name: tensor.dtype for tensor in self.tensors}

    @property
    def file_size(self) -> int:
        """Bytes of the whole weight file."""
        return self.tensors[-1].stop if self.tensors else len(self.header)


def make_layout(specs: Mapping[str, tuple[str, tuple[int, ...]]]) -> Layout:
    """Lay tensors out canonically.

    Args:
        specs: Type code and shape by tensor name, in any order.

    Raises:
        WeightsError: A type is unknown, or they are too many bytes.
    """
    if problem := limits().problem("tensors", len(specs), "the weight file"):
        raise WeightsError(problem)
    if METADATA in specs:
        raise WeightsError(
            f"a tensor is called {METADATA!r}, which safetensors keeps for remarks; "
            "give it another name"
        )
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
    text, spans, start = bytearray(8), [], 0
    entry = cache(_entry)  # most tensors of a network have the shape of another one
    try:
        for name in order:
            try:
                opening, size, item_size = entry(*specs[name])
            except WeightsError as err:
                raise WeightsError(f"{name!r}: {err}") from err
            stop = start + size * item_size
            # What json.dumps writes, in a fraction of its time.
            text += f",{_QUOTED(name)}{opening}{start},{stop}]}}".encode()
            spans.append((start, stop, size, item_size))
            start = stop
    except UnicodeEncodeError as err:
        raise WeightsError(f"the name of a tensor is no text ({err.reason})") from err
    if start > MAX_DATA_BYTES:
        raise WeightsError(f"the weights have {start} bytes, which is too many")
    text[8:9] = b"{"  # in place of the first comma
    text += b"}"
    text += b" " * (-len(text) % 8)
    text[:8] = (len(text) - 8).to_bytes(8, "little")
    header = bytes(text)
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
    size, rest = divmod(math.prod(shape) * PACKED_BITS.get(dtype, 8), 8)
    if rest:
        raise WeightsError(
            f"a tensor of {dtype} {list(shape)} does not fill its last byte"
        )
    return opening, size, DTYPES[dtype].itemsize


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
