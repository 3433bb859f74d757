# SPDX-License-Identifier: Apache-2.0
"""Arrays in NumPy's files, read within limits that are checked before the work.

``numpy.load`` believes what a file says of itself: 2 MB of zeros that somebody packed
well take 2 GB, and a header with a slip raises whatever its parser raises. Here the
sizes in the zip directory and in each header are looked at first, nothing is ever
unpickled, and whatever is wrong is a :class:`~edge_runtime.errors.ContractError`.
"""

import io
import math
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from edge_runtime.errors import ContractError
from edge_runtime.limits import limits

MAX_MEMBERS = 1024
_ENTRY = b"PK\x01\x02"  # begins each entry of a zip file's directory
_ENCRYPTED = 1
# What the readers of zip files, and of the Python text in a .npy header, raise.
_FAULTS = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError),
    *(EOFError, SyntaxError, RecursionError, RuntimeError, OSError),
    *(TokenError, zipfile.BadZipFile, zlib.error),
)


def read_npz(
    data: bytes, names: Iterable[str], *, limit: str = "golden_bytes"
) -> dict[str, NDArray[Any]]:
    """Read arrays of a ``.npz`` file.

    Args:
        data: The whole file.
        names: The arrays to read; those that are not there are left out.
        limit: Which of :class:`edge_runtime.limits.Limits` bounds how many bytes they
            have together when they are unpacked.

    Raises:
        ContractError: It is no such file, or over the limit; the message names no file.
    """
    # Whoever opens a zip file makes an object of each entry: so they are counted first.
    if data.count(_ENTRY) > MAX_MEMBERS:
        raise ContractError(
            f"more than {MAX_MEMBERS} files in a .npz file; expected a few arrays"
        )
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            known = {
                info.filename.removesuffix(".npy"): info for info in archive.infolist()
            }
            wanted = {name: known[name] for name in names if name in known}
            _check(wanted.values(), limit)
            return {n: read_npy(_unpacked(archive, i)) for n, i in wanted.items()}
    except _FAULTS as err:
        raise ContractError(f"not a .npz file of arrays, or damaged ({err})") from err


def encode_npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return a ``.npz`` file; unlike ``numpy.savez`` it takes any names."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, values in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                npy.write_array(member, np.asanyarray(values), allow_pickle=False)
    return file.getvalue()


def _check(members: Iterable[zipfile.ZipInfo], limit: str) -> None:
    unpacked = 0
    for info in members:
        is_known = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if not is_known or info.flag_bits & _ENCRYPTED:
            raise ContractError(
                f"{info.filename!r} is encrypted, or compressed in a way that NumPy "
                "does not use; write the file with numpy.savez"
            )
        unpacked += info.file_size
    if problem := limits().problem(limit, unpacked, "all that is unpacked"):
        raise ContractError(f"{problem}; else give fewer samples")


def _unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Unpack a member: as many bytes as it states, and one more if there are more.

    Who asks for all of them gets what a gigabyte unpacks to, cut off afterwards.
    """
    size = info.file_size
    info.file_size += 1
    with archive.open(info) as member:
        data = member.read(size + 1)
    if len(data) != size:
        raise ContractError(
            f"{info.filename!r} does not have the {size} bytes that it states: the "
            "file is damaged"
        )
    return data


def read_npy(data: bytes) -> NDArray[Any]:
    """Return the array of a ``.npy`` file; it shares the memory of ``data``.

    Args:
        data: The whole file.

    Raises:
        ContractError: It is no such file, or holds objects or fields; the message names
            no file.
    """
    file = io.BytesIO(data)
    try:
        shape, is_turned, dtype = _header(file)
        if dtype.hasobject or dtype.fields or dtype.subdtype:
            raise ContractError(f"an array of {dtype}, expected one of numbers")
        count, at = math.prod(shape), file.tell()
        if min(shape, default=0) < 0 or len(data) - at < count * dtype.itemsize:
            raise ContractError(
                f"a .npy file of {len(data)} bytes says that it holds {dtype} of shape "
                f"{list(shape)}: it is cut off, or damaged"
            )
        values = np.frombuffer(data, dtype, count, at) if count else np.zeros(0, dtype)
        return values.reshape(shape[::-1]).T if is_turned else values.reshape(shape)
    except _FAULTS as err:
        raise ContractError(f"not a .npy file, or damaged ({err})") from err


def _header(file: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(file)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in read:
        raise ContractError(f"a .npy file of version {version}, expected 1.0 or 2.0")
    try:
        return read[version](file)
    except MemoryError as err:  # of a parser whose stack is full
        raise ContractError("a .npy header that is nested too deeply") from err
