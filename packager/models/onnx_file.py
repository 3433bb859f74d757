# SPDX-License-Identifier: Apache-2.0
"""An ONNX file as it lies on the disk: one file, or several, or links to them.

Values beside the graph are mapped, not read: they may be larger than the memory. Links
are followed, as caches of models consist of them; where a link leads was said by
whoever made the folder. What the file itself says may not lead out of its folder.
"""

import math
import re
from collections.abc import Iterator
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import (  # type: ignore[import-untyped]
    DecodeError,
    Message,
)
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from edge_runtime.errors import WeightsError
from packager.mapped import MappedFile
from packager.models.views import REPEATS

External = tuple[str, int, int]  # file, offset, bytes
# What exporters write for people and their own bookkeeping, some of it with paths and
# dates: it must not make two exports of one network differ.
REMARKS = {"doc_string", "metadata_props", "producer_name", "producer_version"}


class Values:
    """The values of a model's tensors: in its file, or in files beside it."""

    def __init__(self, path: Path) -> None:
        """Begin with no other file mapped; ``path`` is the model's own."""
        self._path = path
        self._files: dict[str, MappedFile] = {}

    def raw(self, tensor: TensorProto) -> tuple[NDArray[np.uint8], MappedFile | None]:
        """Return a tensor's bytes, and the file of which they are a part."""
        if not is_external(tensor):
            array = np.ascontiguousarray(numpy_helper.to_array(tensor))
            return array.reshape(-1).view(np.uint8), None
        name, offset, size = _external(tensor)
        if name not in self._files:
            self._files[name] = MappedFile(_beside(self._path, name))
        file = self._files[name]
        return np.frombuffer(file.data[offset : offset + size], np.uint8), file

    def array(self, tensor: TensorProto) -> NDArray[Any]:
        """Return a tensor's values in ONNX's own NumPy type, in memory."""
        if is_external(tensor):
            inside = TensorProto(data_type=tensor.data_type, dims=list(tensor.dims))
            inside.raw_data = self.raw(tensor)[0].tobytes()
            tensor = inside
        return numpy_helper.to_array(tensor)


def read_onnx(path: str | PathLike[str]) -> tuple[onnx.ModelProto, Values]:
    """Read an ONNX file; values that lie in other files stay there.

    Raises:
        OSError: A file cannot be read.
        WeightsError: Not an ONNX file, or one whose values are not all there; the first
            tensor is named.
    """
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except (DecodeError, ValueError) as err:
        raise WeightsError(
            f"{path} is neither an ONNX nor a safetensors file ({err})"
        ) from err
    if not model.graph.node:
        raise WeightsError(f"{path} is no ONNX file with a network in it")
    check_texts(model, path)
    for tensor in tensors_in(model):
        _check(tensor, Path(path))
    _check_sum(model, Path(path))
    return model, Values(Path(path))


def check_texts(message: Message, path: object, place: str = "model") -> None:
    """Insist that what is text in a model is text; remarks may be anything.

    Raises:
        WeightsError: It is not; the first field is named.
    """
    for field, value in message.ListFields():
        inside = f"{place}.{field.name}"
        kinds = field.TYPE_MESSAGE, field.TYPE_STRING
        if field.name in REMARKS or field.type not in kinds:
            continue
        for entry in [value] if isinstance(value, str | bytes | Message) else value:
            if isinstance(entry, Message):
                check_texts(entry, path, inside)
            elif isinstance(entry, bytes):
                raise WeightsError(
                    f"{path} has {entry[:40]!r} as {inside}, expected text in UTF-8; "
                    "export the model again"
                )


def tensors_in(message: Message) -> Iterator[TensorProto]:
    """Yield every tensor of a model: initializers, attributes, those in bodies."""
    for field, value in message.ListFields():
        if field.message_type is not None:
            for entry in [value] if isinstance(value, Message) else value:
                if isinstance(entry, TensorProto):
                    yield entry
                else:
                    yield from tensors_in(entry)


def is_external(tensor: TensorProto) -> bool:
    """Return whether the values lie in another file."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def _check(tensor: TensorProto, path: Path) -> None:
    what = f"{path}: the tensor {tensor.name!r}"
    if tensor.data_type not in TensorProto.DataType.values()[1:]:
        raise WeightsError(f"{what} has a type that ONNX does not know")
    if tensor.data_type == TensorProto.STRING:
        return
    if any(n < 0 for n in tensor.dims):
        raise WeightsError(f"{what} has the shape {list(tensor.dims)}")
    if is_external(tensor):
        _check_external(tensor, path, what)
        return
    try:
        numpy_helper.to_array(tensor)
    except (ValueError, TypeError) as err:
        shape = list(tensor.dims)
        raise WeightsError(
            f"{what} does not hold the values of its shape {shape} ({err}); export the "
            "model again"
        ) from err


def _check_external(tensor: TensorProto, path: Path, what: str) -> None:
    try:
        name, offset, size = _external(tensor)
    except (ValueError, KeyError) as err:
        raise WeightsError(
            f"{what} does not say where its values lie ({err}); export the model again"
        ) from err
    place = PurePosixPath(name)
    if place.is_absolute() or ".." in place.parts or "\0" in name:
        raise WeightsError(
            f"{what} has its values in {name!r}, outside of the model's folder; put "
            "that file beside the model and export it again"
        )
    try:
        found = _size(_beside(path, name))
    except (FileNotFoundError, NotADirectoryError) as err:
        raise WeightsError(
            f"{what} has its values in {name!r}, and its weights are missing: there is "
            f"no such file in {path.parent}; put it there"
        ) from err
    wanted = _bytes(tensor)
    if size != wanted or found < offset + size:
        there = min(size, max(0, found - offset))
        raise WeightsError(
            f"{what} needs {wanted} bytes for its shape {list(tensor.dims)}; the model "
            f"gives it {size} of {name!r} from byte {offset} on, where {there} are; "
            "export the model again, or fetch the whole file"
        )


def _check_sum(model: onnx.ModelProto, path: Path) -> None:
    """Insist that values do not lie in the same bytes again and again."""
    found = [
        _external(tensor)
        for tensor in tensors_in(model)
        if is_external(tensor) and tensor.data_type != TensorProto.STRING
    ]
    wanted = sum(size for _, _, size in found)
    there = sum(_size(_beside(path, name)) for name in {name for name, *_ in found})
    if wanted > REPEATS * there:
        raise WeightsError(
            f"{path} has {len(found)} tensors of together {wanted} bytes in files of "
            f"{there}: they are the same values more than {REPEATS} times; export the "
            "model again"
        )


def _beside(path: Path, name: str) -> Path:
    """Return a file beside a model, or beside what a link to it leads to."""
    near = path.parent / name
    return near if near.exists() else path.resolve().parent / name


def _size(path: Path) -> int:
    if not path.is_file() and path.exists():
        raise WeightsError(f"{path} is no file; a model's values lie in files")
    return path.stat().st_size


def _external(tensor: TensorProto) -> External:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    offset = int(entries.get("offset", 0))
    size = int(entries.get("length") or _bytes(tensor))
    if offset < 0 or size < 0:
        raise ValueError(f"offset {offset}, length {size}")
    return entries["location"], offset, size


def _bytes(tensor: TensorProto) -> int:
    """Return how many bytes the values have in a file."""
    count: int = math.prod(tensor.dims)
    return (count * _bits(tensor.data_type) + 7) // 8


def _bits(kind: int) -> int:
    found = re.match(r"(?:FLOAT|U?INT)([246])(?!\d)", TensorProto.DataType.Name(kind))
    if found:
        return int(found[1])
    return 8 * int(onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize)
