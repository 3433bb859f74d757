# SPDX-License-Identifier: Apache-2.0
"""Files that the reference library refuses are refused, and no others."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from edge_runtime.errors import WeightsError
from edge_runtime.formats.header import PatchHeader
from edge_runtime.formats.layout import DTYPES, PACKED_BITS, make_layout
from edge_runtime.formats.patch import open_patch
from edge_runtime.formats.weights import read_weights
from packager.build import build_patch
from packager.models.safetensors_file import views
from packager.models.views import ViewedWeights
from tests.golden import independent

PATH = Path("model.safetensors")
TENSORS = {"a": np.arange(6, dtype="f4").reshape(2, 3), "b": np.arange(3, dtype="i2")}
WHOLE = save(TENSORS, {"format": "pt"})


def build(header, body=WHOLE[-30:]):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(start, stop, shape=(), dtype="U8"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def reference_takes(data):
    try:
        safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return False
    return True


def parse(data):
    return ViewedWeights(views(memoryview(data), PATH))


def ours_takes(data):
    try:
        parse(data)
    except WeightsError:
        return False
    return True


def test_what_the_reference_wrote_is_read_bit_for_bit():
    read = parse(WHOLE)
    for name, array in TENSORS.items():
        assert np.array_equal(read[name], array)


TWICE = b"""{"a": {"dtype": "U8", "shape": [15], "data_offsets": [0, 15]},
"a": {"dtype": "U8", "shape": [15], "data_offsets": [15, 30]}}"""
BROKEN = {
    "a name twice": (TWICE, "given twice"),
    "overlap": ({"a": entry(0, 20, [20]), "b": entry(10, 30, [20])}, "overlap"),
    "a hole": ({"a": entry(0, 10, [10]), "b": entry(20, 30, [10])}, "without gaps"),
    "bytes behind the last": ({"a": entry(0, 20, [20])}, "describes 20"),
    "a start behind the first byte": ({"a": entry(10, 30, [20])}, "start at 0"),
    "a negative size": ({"a": entry(0, 30, [-5, -6])}, "shape"),
    "a size that does not fit": ({"a": entry(0, 30, [29])}, "needs 29"),
    "a size that overflows": ({"a": entry(0, 30, [1 << 40, 1 << 40])}, "needs"),
    "a size with a fraction": ({"a": entry(0, 30, [7.5, 4])}, "shape"),
    "a size that is true": ({"a": entry(0, 30, [True, 30])}, "shape"),
    "offsets backwards": ({"a": entry(30, 0, [30])}, "start at 0"),
    "three offsets": (
        {"a": {"dtype": "U8", "shape": [30], "data_offsets": [0, 30, 30]}},
        "two whole numbers",
    ),
    "no type": ({"a": {"shape": [30], "data_offsets": [0, 30]}}, "dtype"),
    "an unknown type": ({"a": entry(0, 30, [30], "U9")}, "not known"),
    "metadata of numbers": (
        {"__metadata__": {"step": 1}, "a": entry(0, 30, [30])},
        "step",
    ),
    "metadata that is a text": (
        {"__metadata__": "pt", "a": entry(0, 30, [30])},
        "__metadata__",
    ),
    "no object": (b"[]", "no JSON object"),
    "no JSON": (b"{", "malformed"),
    "a tensor that is a number": ({"a": 3}, "'a'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_the_reference_refuses_is_refused_in_words(case):
    header, words = BROKEN[case]
    data = build(header)
    assert not reference_takes(data)
    with pytest.raises(WeightsError, match=words):
        parse(data)


def test_more_dimensions_than_arrays_have_are_refused():
    with pytest.raises(WeightsError, match="901 dimensions"):
        parse(build({"a": entry(0, 30, [1] * 900 + [30])}))


@pytest.mark.parametrize("cut", [0, 4, 8, 20, len(WHOLE) - 1])
def test_a_file_that_was_cut_is_refused(cut):
    assert not reference_takes(WHOLE[:cut])
    with pytest.raises(WeightsError):
        parse(WHOLE[:cut])


# Bits of every type that the format knows.
TYPES = {code: 8 * dtype.itemsize for code, dtype in DTYPES.items()} | PACKED_BITS


@pytest.mark.parametrize("code", TYPES)
def test_every_type_is_held_and_patched_bit_for_bit(code):
    size = 120 * TYPES[code] // 8
    rng = np.random.default_rng(1)
    old = bytearray(rng.bytes(size))
    new = bytearray(old)
    for at in (0, size // 2, size - 1):
        new[at] ^= 255
    base, target = (
        parse(build({"a": entry(0, size, [2, 60], code)}, bytes(d))) for d in (old, new)
    )
    assert reference_takes(bytes(base.data))
    header = PatchHeader(
        "0" * 64, base.fingerprint, target.fingerprint, 1, 1, base.layout.file_size
    )
    packed = build_patch(base, target, header)
    with open_patch(packed) as patch:
        assert sum(patch.counts) in (2, 3)
    assert independent.apply(bytes(base.data), packed) == bytes(target.data)
    assert read_weights(bytes(target.data)).fingerprint == target.fingerprint


@pytest.mark.parametrize("code", PACKED_BITS)
def test_numbers_that_do_not_fill_their_last_byte_are_refused(code):
    data = build({"a": entry(0, 3, [5], code)}, bytes(3))
    assert not reference_takes(data)
    with pytest.raises(WeightsError, match=f"{code} .5. needs"):
        parse(data)
    with pytest.raises(WeightsError, match="does not fill its last byte"):
        make_layout({"a": (code, (5,))})


def test_a_type_that_nobody_knows_is_called_by_its_name():
    with pytest.raises(WeightsError, match="type F3, which is not known; known are"):
        parse(build({"a": entry(0, 30, [30], "F3")}))


NUMBERS = st.sampled_from([0, 1, 2, 3, 5, 6, 10, 15, 24, 30, 31, -1, 1 << 63])
ENTRIES = st.builds(
    entry,
    NUMBERS,
    NUMBERS,
    st.lists(NUMBERS, max_size=3),
    st.sampled_from(["U8", "I16", "F32", "BOOL", "F16", "u8", "", *DTYPES]),
)
HEADERS = st.dictionaries(
    st.sampled_from(["a", "b", "c", "", "__metadata__", "ä"]),
    st.one_of(ENTRIES, st.just(None), st.just({}), st.just({"format": "pt"})),
    max_size=4,
)


@settings(max_examples=400, deadline=None)
@given(HEADERS)
def test_both_say_the_same_of_any_header(header):
    data = build(header)
    assert ours_takes(data) == reference_takes(data)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255))
def test_both_say_the_same_of_any_byte_that_was_changed(at, value):
    data = bytearray(WHOLE)
    data[at] = value
    assert ours_takes(bytes(data)) == reference_takes(bytes(data))
