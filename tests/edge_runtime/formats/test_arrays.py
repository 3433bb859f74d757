# SPDX-License-Identifier: Apache-2.0
"""Array files are read as NumPy reads them, but never more than is allowed."""

import io
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import ContractError
from edge_runtime.formats.arrays import MAX_MEMBERS, read_npy, read_npz


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def npz(save=np.savez, **arrays):
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


def with_header(text, body=b"", version=b"\1\0"):
    header = text.encode("latin1") + b"\n"
    size = struct.pack("<H" if version == b"\1\0" else "<I", len(header))
    return b"\x93NUMPY" + version + size + header + body


ARRAYS = [
    np.arange(12, dtype="u1").reshape(3, 4),
    np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
    np.float32(3),
    np.zeros((0, 5), "f4"),
    np.array([True, False]),
    np.arange(4, dtype=">i8"),
    np.array(["a", "bc"]),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}{a.shape}")
def test_an_array_is_what_numpy_wrote(array):
    found = read_npy(npy(array))
    assert (found.dtype, found.shape) == (array.dtype, np.shape(array))
    assert np.array_equal(found, array)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_wanted_arrays_of_an_npz_file_are_read_and_no_others(save):
    data = npz(save, inputs=ARRAYS[0], labels=ARRAYS[5], extra=np.zeros(1000))
    found = read_npz(data, ("inputs", "labels", "outputs"))
    assert set(found) == {"inputs", "labels"}
    assert np.array_equal(found["inputs"], ARRAYS[0])


def test_a_small_file_that_unpacks_to_much_is_refused_before_it_is_unpacked():
    data = npz(np.savez_compressed, inputs=np.zeros(80 << 20, "u1"))
    assert len(data) < 1 << 20
    tracemalloc.start()
    with pytest.raises(ContractError, match=r"83886208 bytes, 67108864 .*golden_bytes"):
        read_npz(data, ["inputs"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_directory_that_states_too_little_gives_no_more_than_it_states():
    data = npz(np.savez_compressed, inputs=np.zeros(8 << 20, "u1"))
    size = struct.pack("<I", (8 << 20) + 128)
    with pytest.raises(ContractError, match="damaged"):
        read_npz(data.replace(size, struct.pack("<I", 1000)), ["inputs"])


@pytest.mark.parametrize("more", [0, 1])  # bytes that the checksum covers
@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_what_unpacks_to_more_than_it_states_is_refused_and_not_unpacked(kind, more):
    good, file = npy(ARRAYS[0]), io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        archive.writestr("inputs.npy", good + bytes(8 << 20))
        info = archive.infolist()[0]
    stated = struct.pack("<LLL", info.CRC, info.compress_size, info.file_size)
    false = struct.pack(
        "<LLL", zlib.crc32(good + bytes(more)), info.compress_size, len(good)
    )
    data = file.getvalue()
    assert data.count(stated) == 2
    data = data.replace(stated, false)
    tracemalloc.start()
    with pytest.raises(ContractError, match="damaged"):
        read_npz(data, ["inputs"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_many_files_in_one_are_counted_before_they_are_looked_at():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for number in range(MAX_MEMBERS + 1):
            archive.writestr(str(number), b"")
    with pytest.raises(ContractError, match="more than 1024 files"):
        read_npz(file.getvalue(), ["inputs"])


def odd_zip(compression=zipfile.ZIP_STORED, flags=0):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("inputs.npy", npy(ARRAYS[0]))
    data = bytearray(file.getvalue())
    at = data.index(b"PK\1\2")
    data[at + 8] |= flags
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (odd_zip(zipfile.ZIP_BZIP2), "compressed in a way"),
        (odd_zip(zipfile.ZIP_LZMA), "compressed in a way"),
        (odd_zip(flags=1), "encrypted"),
        (b"", "not a .npz file"),
        (b"PK\3\4 and no more", "not a .npz file"),
        (npz(inputs=ARRAYS[0])[:-9], "not a .npz file"),
        (npz(inputs=np.array([{}], object)), "expected one of numbers"),
    ],
)
def test_a_file_that_is_none_is_refused_in_words(data, text):
    with pytest.raises(ContractError, match=text):
        read_npz(data, ["inputs"])


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (9,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 4)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}",
        "{'descr': ('<f4', (2, 2)), 'fortran_order': False, 'shape': (1,)}",
        "{'descr': 'nonsense', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1L,",
        "{'descr': '<f4', 'fortran_order': False}",
        "[" * 5000,
        "(" * 200 + ")" * 200,
        "-" * 9000 + "1",
        "\0",
        "'",
        "",
    ],
)
def test_a_header_with_a_slip_is_refused_in_words(header):
    for version in (b"\1\0", b"\2\0", b"\3\0"):
        with pytest.raises(ContractError):
            read_npy(with_header(header, bytes(16), version))


@given(st.data())
def test_no_damage_raises_anything_else(data):
    whole = npz(np.savez_compressed, inputs=ARRAYS[0], labels=ARRAYS[4])
    for file, read in (
        (whole, lambda d: read_npz(d, ["inputs", "labels"])),
        (npy(ARRAYS[1]), read_npy),
    ):
        damaged = bytearray(file)
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(file) - 1))
            damaged[at] = data.draw(st.integers(0, 255))
        cut = data.draw(st.integers(0, len(file)))
        for case in (bytes(damaged), bytes(damaged[:cut])):
            try:
                read(case)
            except ContractError:
                continue
