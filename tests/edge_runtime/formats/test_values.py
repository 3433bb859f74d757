# SPDX-License-Identifier: Apache-2.0
"""Values: any bits of any type come back, and training costs few bits."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import PatchFormatError
from edge_runtime.formats import values
from edge_runtime.formats.frames import STORED, Section, SectionReader, pack_section
from edge_runtime.formats.layout import DTYPES
from edge_runtime.formats.numbers import BitReader, encode_bits
from edge_runtime.formats.sections import BITS, SYMBOLS
from edge_runtime.formats.value_line import Form, Line
from edge_runtime.formats.values import TensorValues, ValueReader, encode_values

EDGES = {1: [0, 1, 127, 128, 255], 2: [0, 1, 0x3C00, 0x7C00, 0x7E01, 0x8000, 0xFFFF]}
EDGES[4] = [0, 1, 0x7FFFFF, 0x800000, 0x3F800000, 0x7F800000, 0x7FC00001, 0x80000000]
EDGES[8] = [0, 1, 1 << 52, 0x3FF << 52, 0x7FF << 52, (0x7FF << 52) + 9, 1 << 63]


def reader(data):
    return SectionReader(io.BytesIO(data), Section(0, STORED, len(data), len(data), 0))


def decoded(group, form, sections, piece=1 << 20):
    """The values of a group, read in pieces."""
    raw = {kind: b"".join(parts) for kind, parts in sections.items()}
    item_size = group[0].base.itemsize
    source = ValueReader(item_size, form, lambda kind: reader(raw.get(kind, b"")))
    found = [
        [
            source.take(one.dtype, one.base[start : start + piece])
            for start in range(0, len(one.base), piece)
        ]
        for one in group
    ]
    source.finish()
    return [np.concatenate(parts) for parts in found]


def same(found, group):
    return all(
        np.array_equal(f, one.target) for f, one in zip(found, group, strict=True)
    )


@st.composite
def groups(draw):
    """Tensors of one item size: odd bits, random bits, and small steps."""
    size = draw(st.sampled_from([1, 2, 4, 8]))
    types = [code for code, dtype in DTYPES.items() if dtype.itemsize == size]
    bits = st.one_of(st.sampled_from(EDGES[size]), st.integers(0, (1 << 8 * size) - 1))
    drop = draw(st.sampled_from([0, 0, 3, 5 * size]))
    group = []
    for dtype in draw(st.lists(st.sampled_from(types), min_size=1, max_size=3)):
        base = np.array(draw(st.lists(bits, min_size=1, max_size=40)), f"<u{size}")
        if draw(st.booleans()):
            target = base + np.array(draw(st.integers(0, 255)), base.dtype)
        else:
            target = np.array([draw(bits) for _ in base], base.dtype)
        group.append(TensorValues(dtype, base, target >> drop << drop))
    return group


@settings(max_examples=50)
@given(groups(), st.integers(1, 50))
def test_any_bits_of_any_type_come_back_in_pieces_of_any_size(group, piece):
    form, sections = encode_values(group)
    assert same(decoded(group, form, sections, piece), group)


def zero_bits(group):
    ones = int(np.bitwise_or.reduce(np.concatenate([one.target for one in group])))
    return (ones & -ones).bit_length() - 1 if ones else 64


@settings(max_examples=200)
@given(groups(), st.data())
def test_any_form_that_fits_brings_values_back(group, data):
    item_size = group[0].base.itemsize
    form = Form(
        data.draw(st.integers(0, min(zero_bits(group), 8 * item_size - 1))),
        data.draw(st.integers(0, item_size)),
        data.draw(st.one_of(st.integers(1, 260), st.integers(1, 2047))),
        data.draw(st.integers(0, 3)),
    )
    try:
        for one in group:
            form.check(one.dtype, item_size)
    except PatchFormatError:
        return
    sections = values._encode(group, form)
    assert same(decoded(group, form, sections), group)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E5M2", "F8_E4M3", "I8", "I16"])
@pytest.mark.parametrize("unit", [1, 2, 5, 9, 15, 31, 120, 255])
def test_every_element_of_a_small_type_comes_back_from_its_line(dtype, unit):
    size = DTYPES[dtype].itemsize
    try:
        line = Line(dtype, size, Form(0, 0, unit, 0))
    except PatchFormatError:
        assert unit >> (8 * size - 1 - values.MANTISSA_BITS.get(dtype, 15))
        return
    elements = np.arange(1 << 8 * size).astype(f"<u{size}")
    numbers = line.numbers(elements)
    rest = BitReader(reader(encode_bits(*line.rests(elements, numbers))))
    assert np.array_equal(line.elements(numbers, rest), elements)
    rest.finish()
    if dtype in ("F16", "BF16"):  # up to its infinities the line ascends
        order = np.argsort(numbers, kind="stable")
        floats = elements.astype("<u4") << 16
        floats = floats.view("<f4") if dtype == "BF16" else elements.view("<f2")
        finite = order[np.isfinite(floats[order])]
        assert np.all(np.diff(numbers[finite]) >= 0)
        large = np.abs(floats[finite].astype(float))
        assert np.all(np.diff(np.sort(np.unique(large))) >= 0)


def test_floats_below_the_unit_are_evenly_spaced_on_the_line():
    line = Line("F32", 4, Form(0, 0, 127, 0))  # up to 2.0: steps of 2**-23
    floats = np.linspace(-1.9, 1.9, 1001).astype("<f4")
    numbers = line.numbers(floats.view("<u4"))
    assert np.array_equal(
        numbers,
        np.floor(np.abs(floats) * 2.0**23).astype(int) * (np.where(floats < 0, -1, 1))
        - (floats < 0),
    )


def trained(kind, n=20_000, mantissa=23):
    """Weights before and after a step; float32 rounded to some bits of mantissa."""
    rng = np.random.default_rng(0)
    base = rng.normal(0, 0.05, n).astype("<f4")
    target = (base + rng.normal(0, 0.02, n)).astype("<f4")
    if kind == "F32":
        bits = [
            w.view("<u4") >> (23 - mantissa) << (23 - mantissa) for w in (base, target)
        ]
    elif kind == "BF16":
        bits = [(w.view("<u4") >> 16).astype("<u2") for w in (base, target)]
    elif kind == "I8":
        bits = [
            np.rint(w * 300).clip(-128, 127).astype("i1").view("u1")
            for w in (base, target)
        ]
    else:
        bits = [
            w.astype(DTYPES[kind]).view(f"<u{DTYPES[kind].itemsize}")
            for w in (base, target)
        ]
    return [TensorValues(kind, *bits)]


def bits_a_value(group):
    form, sections = encode_values(group)
    assert same(decoded(group, form, sections), group)
    packed = sum(len(pack_section(p, 19)[1]) for p in sections.values() if any(p))
    return 8 * packed / len(group[0].base)


@pytest.mark.parametrize(
    ("kind", "limit"),
    # The entropy of the step in units of the type, which is what no code can beat:
    # log2(0.02 * sqrt(2 pi e)) + 3 for float32 weights around 0.05, 26.2 bits.
    [("F32", 26.6), ("F64", 55.7), ("F16", 13.8), ("BF16", 10.6), ("I8", 4.9)],
)
def test_a_training_step_costs_about_its_entropy(kind, limit):
    assert bits_a_value(trained(kind)) < limit


@pytest.mark.parametrize("mantissa", [16, 10, 7])
def test_rounded_weights_pay_for_no_empty_bit(mantissa):
    whole, rounded = (bits_a_value(trained("F32", mantissa=m)) for m in (23, mantissa))
    assert rounded < whole - (23 - mantissa) + 0.1


def test_bfloat16_bits_cost_the_same_in_either_type():
    assert bits_a_value(trained("F32", mantissa=7)) == pytest.approx(
        bits_a_value(trained("BF16")), abs=0.1
    )


def test_values_without_relation_to_their_base_cost_no_more_than_their_bytes():
    rng = np.random.default_rng(0)
    one, two = (rng.integers(0, 1 << 32, 5000, np.uint32) for _ in range(2))
    assert bits_a_value([TensorValues("F32", one, two)]) <= 32
    assert bits_a_value([TensorValues("F32", one, np.zeros_like(one))]) == 0


@pytest.mark.parametrize(
    ("dtype", "form"),
    [
        ("F32", Form(24, 0, 1, 0)),  # into the exponent
        ("F32", Form(0, 3, 1, 0)),
        ("F32", Form(1, 4, 1, 0)),  # beyond the element
        ("F32", Form(0, 5, 1, 0)),
        ("F32", Form(0, 0, 0, 0)),
        ("F32", Form(0, 0, 256, 0)),  # no such exponent
        ("F32", Form(0, 0, 2**40, 0)),
        ("F32", Form(0, 0, 1, 8)),
        ("F64", Form(0, 3, 1, 0)),  # 40 bits on the line
        ("I32", Form(33, 0, 1, 0)),
        ("F16", Form(0, 0, 32, 0)),
    ],
)
def test_forms_that_do_not_fit_are_refused(dtype, form):
    with pytest.raises(PatchFormatError, match=dtype):
        form.check(dtype, DTYPES[dtype].itemsize)


@pytest.mark.parametrize(
    ("drop", "fine", "symbol", "fits"),
    [  # L bits, fineness, and a symbol
        (0, 7, 255, True),  # its own number
        (0, 2, 4 * 6 + 3, True),  # 192 to 223, of 8 bits
        (0, 2, 4 * 7 + 3, False),
        (1, 7, 127, True),
        (1, 7, 128, False),
    ],
)
def test_a_step_that_does_not_fit_its_line_is_refused(drop, fine, symbol, fits):
    sections = {SYMBOLS: bytes([0, symbol]), BITS: bytes(2 if fine == 2 else 0)}
    source = ValueReader(
        1, Form(drop, 0, 1, fine), lambda kind: reader(sections.get(kind, b""))
    )
    if fits:
        source.take("I8", np.zeros(2, "u1"))
    else:
        with pytest.raises(PatchFormatError, match="out of range"):
            source.take("I8", np.zeros(2, "u1"))
