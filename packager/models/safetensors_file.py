# SPDX-License-Identifier: Apache-2.0
"""A safetensors file of anybody -> a canonical weight file.

The rules are those of the reference library: what it refuses is refused here. The two
are held against each other in the tests.
"""

import math
from os import PathLike
from pathlib import Path
from sys import intern

import numpy as np

from edge_runtime.errors import WeightsError
from edge_runtime.formats.json_file import parse_record
from edge_runtime.formats.json_record import Record
from edge_runtime.formats.layout import DTYPES, MAX_DIMENSIONS, PACKED_BITS, gc_paused
from edge_runtime.limits import limits
from packager.mapped import MappedFile
from packager.models.views import View

METADATA = "__metadata__"
_VALUES = 10  # commas and brackets of a tensor of four dimensions


def is_safetensors(path: str | PathLike[str]) -> bool:
    """Say whether a file looks like safetensors: a short length, then JSON."""
    with open(path, "rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    return start[8:] == b"{" and length <= limits().weight_header_bytes


def views(
    data: memoryview, path: Path, file: MappedFile | None = None
) -> dict[str, View]:
    """Find the tensors of a safetensors file.

    Metadata is left out; every bit of every tensor stays as it is.

    Args:
        data: The whole file.
        path: What to call it in an error.
        file: The mapping that ``data`` is, if it is one.

    Raises:
        WeightsError: Malformed, truncated, with bytes that belong to no tensor or to
            two, or with types that a weight file lacks.
    """
    header, body = read_header(data, path)
    if file:
        file.forget()
    found: dict[str, View] = {}
    spans = [
        (*_span(header.record(name)), name)
        for name in header.values
        if name != METADATA
    ]
    whole = np.frombuffer(body, np.uint8)
    expected = 0
    for start, stop, name in sorted(spans):
        if start != expected or stop < start:
            raise WeightsError(
                f"{path} is malformed: tensor {name!r} lies at bytes {start} to "
                f"{stop}, expected its start at {expected}; tensors follow each other "
                "without gaps and do not overlap"
            )
        expected = stop
        raw = whole[start:stop]
        what = _described(raw.size, header.record(name), name, path)
        # Base and target have the same names: each is kept once.
        found[intern(name)] = View(*what, raw, file, len(data) - len(body) + start)
    if expected != len(body):
        raise WeightsError(
            f"{path} has {len(body)} bytes of tensors, its header describes "
            f"{expected}; fetch it again, or write it again with the safetensors "
            "library"
        )
    return found


def read_header(data: memoryview, path: Path) -> tuple[Record, memoryview]:
    """Read the header of a safetensors file; return it and what follows it.

    Raises:
        WeightsError: Malformed or truncated.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise WeightsError(
            f"{path} is truncated: its header should have {length} bytes, "
            f"{max(0, len(data) - 8)} are there; fetch it again"
        )
    what = f"the header of {path}"
    if problem := limits().problem("checkpoint_header_bytes", length, what):
        raise WeightsError(problem)
    text = bytes(data[8 : 8 + length])
    _check_amount(text, what)
    with gc_paused():
        header = parse_record(text, "checkpoint_header_bytes", what, WeightsError)
    if header.values.get(METADATA) is not None:
        metadata = header.record(METADATA)
        for name in metadata.values:
            metadata.text(name)
    return header, data[8 + length :]


def _check_amount(text: bytes, what: str) -> None:
    """Insist on limits before anything is parsed: a value takes far more than its text.

    Raises:
        WeightsError: It holds more tensors, or more beside them.
    """
    tensors = text.count(b'"data_offsets"')
    others = sum(map(text.count, (b",", b"[", b"{"))) - _VALUES * tensors
    for name, found in (("checkpoint_tensors", tensors), ("metadata_values", others)):
        if problem := limits().problem(name, found, what):
            raise WeightsError(problem)


def _span(entry: Record) -> tuple[int, int]:
    offsets = entry.integers("data_offsets")
    if len(offsets) != 2:
        raise entry.problem("data_offsets", "two whole numbers")
    return offsets[0], offsets[1]


def _described(
    size: int, entry: Record, name: str, path: Path
) -> tuple[str, tuple[int, ...]]:
    """Return type and shape of a tensor that has so many bytes."""
    code, shape = intern(entry.text("dtype")), tuple(entry.integers("shape"))
    dtype = DTYPES.get(code)
    if dtype is None:
        known = ", ".join(DTYPES)
        raise WeightsError(
            f"tensor {name!r} of {path} has the type {code}, which is not "
            f"known; known are {known}"
        )
    if len(shape) > MAX_DIMENSIONS:
        raise WeightsError(
            f"tensor {name!r} of {path} has {len(shape)} dimensions, at most "
            f"{MAX_DIMENSIONS} are possible"
        )
    bits = math.prod(shape) * PACKED_BITS.get(code, 8 * dtype.itemsize)
    if bits != 8 * size:
        raise WeightsError(
            f"tensor {name!r} of {path} has {size} bytes, but {code} "
            f"{list(shape)} needs {bits / 8:.16g}"
        )
    return code, shape
