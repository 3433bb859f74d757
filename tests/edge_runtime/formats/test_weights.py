# SPDX-License-Identifier: Apache-2.0
"""The weight file: canonical bytes, exact bits, clear refusals."""

import hashlib
import json

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_runtime.errors import WeightsError
from edge_runtime.formats.layout import (
    DTYPES,
    PACKED_BITS,
    make_layout,
    parse_layout,
    read_layout,
)
from edge_runtime.formats.weights import pack_weights, read_weights, write_weights

DTYPE_STRATEGY = st.sampled_from(
    [np.dtype(t) for t in ("<f8", "<i8", "<f4", "<i4", "<f2", "<u2", "i1", "?")]
)
ARRAYS = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    hnp.arrays(DTYPE_STRATEGY, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0)),
    min_size=1,
    max_size=5,
)


@given(ARRAYS)
def test_every_array_comes_back_bit_for_bit(arrays):
    weights = read_weights(bytes(pack_weights(arrays).data))
    assert set(weights) == set(arrays)
    for name, array in arrays.items():
        assert weights[name].dtype == array.dtype
        assert weights[name].shape == array.shape
        assert weights[name].tobytes() == array.tobytes()


@given(ARRAYS)
def test_the_safetensors_library_reads_our_files(arrays):
    found = safetensors.numpy.load(bytes(pack_weights(arrays).data))
    for name, array in arrays.items():
        assert found[name].tobytes() == array.tobytes()


def test_a_float32_file_equals_what_the_safetensors_library_writes(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        f"layer{i}.{kind}": rng.normal(size=shape).astype("f4")
        for i in range(12)
        for kind, shape in [("weight", (7, 3)), ("bias", (7,)), ("scale", ())]
    }
    arrays["größe"] = np.ones((2, 0, 3), "f4")
    safetensors.numpy.save_file(arrays, tmp_path / "theirs")
    assert bytes(pack_weights(arrays).data) == (tmp_path / "theirs").read_bytes()


def test_the_order_of_the_arrays_does_not_change_the_bytes():
    a, b = np.zeros(3, "f4"), np.ones(5, "f2")
    assert pack_weights({"a": a, "b": b}).data == pack_weights({"b": b, "a": a}).data


def test_the_fingerprint_is_the_sha256_of_the_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    fingerprint = write_weights({"w": np.arange(10, dtype="f4")}, path)
    assert fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not list(tmp_path.glob("*.part"))


def test_every_tensor_is_aligned_to_its_item_size():
    specs = {
        f"{code}{n}": (code, (4 * n if code in PACKED_BITS else n,))
        for code in DTYPES
        for n in (1, 3, 5)
    }
    for tensor in make_layout(specs).tensors:
        assert tensor.start % tensor.item_size == 0


def test_bfloat16_is_kept_as_bits():
    bits = np.array([0x7FC1, 0x8000, 0x3F80], "<u2")
    weights = pack_weights({"w": bits}, {"w": "BF16"})
    assert weights.layout.by_name["w"].dtype == "BF16"
    assert read_weights(bytes(weights.data))["w"].tobytes() == bits.tobytes()


def test_a_big_endian_array_is_stored_little_endian():
    weights = pack_weights({"w": np.array([1.5, -2.0], ">f4")})
    assert weights["w"].tolist() == [1.5, -2.0]


@pytest.mark.parametrize("cut", [0, 4, 8, 20, 70, -1])
def test_a_truncated_file_is_refused(cut):
    data = bytes(pack_weights({"weight": np.zeros(9, "f4")}).data)
    with pytest.raises(WeightsError):
        read_weights(data[:cut])


def test_trailing_bytes_are_refused():
    data = bytes(pack_weights({"w": np.zeros(9, "f4")}).data)
    with pytest.raises(WeightsError, match="trailing"):
        read_weights(data + b"\0")


def _with_header(record):
    text = record if isinstance(record, bytes) else json.dumps(record).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "record",
    [
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"w":1}',
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},  # has spaces
        {"w": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
        {"__metadata__": {"format": "pt"}},
    ],
)
def test_a_header_that_is_not_canonical_is_refused(record):
    with pytest.raises(WeightsError):
        parse_layout(_with_header(record))


def test_a_huge_header_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "w"
    path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with path.open("rb") as file, pytest.raises(WeightsError, match="header length"):
        read_layout(file)


def test_a_type_without_counterpart_is_refused():
    with pytest.raises(WeightsError, match="complex128"):
        pack_weights({"w": np.zeros(2, complex)})
