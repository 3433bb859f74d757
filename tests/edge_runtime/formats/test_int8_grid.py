# SPDX-License-Identifier: Apache-2.0
"""Weights on a grid of int8: there and back again, and the same bits on every CPU."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import WeightsError
from edge_runtime.formats.init_weights import (
    InitSpec,
    TensorInit,
    philox,
    read_init_spec,
    write_init_spec,
)
from edge_runtime.formats.int8_grid import (
    LARGEST,
    MOST,
    SMALLEST,
    check_scales,
    to_float32,
    to_int8,
)

STEPS = np.arange(-MOST, MOST + 1).astype(np.int8)
scales = st.floats(SMALLEST, LARGEST, width=32)


@given(scales)
def test_every_step_of_every_scale_comes_back(scale):
    scale = np.float32(scale)
    check_scales("w", np.array([scale]))
    assert np.array_equal(to_int8(to_float32(STEPS, scale), scale), STEPS)


def test_every_step_comes_back_whatever_the_scale_s_bits():
    words = np.random.default_rng(0).integers(0, 1 << 23, 5_000, np.uint32)
    for exponent in (27, 127, 226):
        many = (words | np.uint32(exponent << 23)).view(np.float32)[:, None]
        assert (to_int8(to_float32(STEPS, many), many) == STEPS).all()


@given(scales, st.integers(0, 5))
def test_multiples_of_a_step_come_back_and_none_is_beyond_the_last(scale, power):
    every, scale = 1 << power, np.float32(scale)
    wanted = STEPS[STEPS % every == 0]
    assert np.array_equal(to_int8(to_float32(wanted, scale), scale, every), wanted)
    beyond = np.array([-1e3, -128, 128, 1e3, np.inf], "f4") * scale
    last = MOST // every * every
    assert to_int8(beyond, scale, every).tolist() == [-last, -last, last, last, last]


def test_a_zero_is_positive():
    assert not np.signbit(to_float32(np.zeros(1, np.int8), np.float32(0.5))).any()


@pytest.mark.parametrize("wrong", [0.0, -1.0, np.nan, np.inf, 1e-38, 1e38])
def test_scales_that_no_weight_has_are_refused(wrong):
    with pytest.raises(WeightsError, match="the int8 scales of 'w' go from"):
        check_scales("w", np.array([1.0, wrong], np.float32))


# As init weights ----------------------------------------------------------------------

SCALES = np.array([0.01, 0.0009765625, 0.3], np.float32)
SPEC = InitSpec(
    7,
    {
        "b": TensorInit("F32", (3,), "constant", 0.5),
        "w": TensorInit("I8", (3, 100, 9), "quantised", 0.25),
    },
    {"w": SCALES},
)


def test_quantised_init_weights_are_the_same_bits_for_ever():
    # Computed once; a change here would break every device in the field.
    assert SPEC.generate().fingerprint == (
        "021adbcb9528bb95e0e109108fd627d9583450a19629c728f5d31c36d86477ce"
    )


def test_quantised_init_weights_are_the_drawn_ones_on_the_grid_by_whole_numbers():
    words = philox(7, "w").random_raw(2700)
    expected = []
    for index, word in enumerate(words.tolist()):
        number = (word >> 40) - (1 << 23)
        value = np.float32(Fraction(number) * Fraction(1, 1 << 25))  # 24 bits: exact
        scale = Fraction(float(SCALES[index // 900]))
        quotient = np.float32(Fraction(float(value)) / scale)
        # Python's round goes to even, as IEEE 754 does.
        expected.append(max(-127, min(127, round(Fraction(float(quotient))))))
    assert SPEC.generate()["w"].ravel().tolist() == expected


def test_a_large_tensor_is_quantised_row_by_row_whatever_the_pieces():
    shape, many = (3, 150_000), np.array([0.01, 0.02, 0.03], np.float32)
    spec = InitSpec(1, {"w": TensorInit("I8", shape, "quantised", 1.0)}, {"w": many})
    plain = InitSpec(1, {"w": TensorInit("F32", shape, "uniform", 1.0)}, {})
    expected = to_int8(plain.generate()["w"], many[:, None])
    assert np.array_equal(spec.generate()["w"], expected)


def test_a_recipe_with_scales_survives_its_files_as_schema_2(tmp_path):
    write_init_spec(SPEC, tmp_path)
    assert '"schema": 2' in (tmp_path / "init.json").read_text()
    assert read_init_spec(tmp_path).generate().data == SPEC.generate().data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"schema": 2', '"schema": 1'), "not valid"),
        (('"schema": 2', '"schema": 3'), "this runtime knows 1, 2"),
        (('"I8"', '"U8"'), "'w' must be I8"),
        (("[3, 100, 9]", "[]"), "'w' must be I8, with an axis"),
        (("[3, 100, 9]", "[4, 100]"), r"the scales of 'w' \(F32 \[4\]\) are missing"),
        (("safetensors", ""), r"the scales of 'w' \(F32 \[3\]\) are missing"),
        (("scales", ""), "the int8 scales of 'w' go from 0"),
    ],
)
def test_malformed_quantised_recipes_are_refused(tmp_path, change, message):
    old, new = change
    spec = SPEC
    if old == "scales":
        spec = InitSpec(7, SPEC.tensors, {"w": 0 * SCALES})
    write_init_spec(spec, tmp_path)
    if old == "safetensors":
        (tmp_path / "init.safetensors").unlink()
    path = tmp_path / "init.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(WeightsError, match=message):
        read_init_spec(tmp_path)
