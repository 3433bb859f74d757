# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.formats.weights import pack_weights
from trainer.rounds.rounding import Rounding, round_mantissa, round_to, step_for

words = st.integers(0, 2**32 - 1)


@given(st.lists(words, min_size=1, max_size=50))
def test_seven_bits_are_what_bfloat16_keeps(values):
    array = np.array(values, "<u4").view("<f4")
    array = array[np.isfinite(array)]
    found = round_mantissa(array, 7)
    expected = torch.from_numpy(array.copy()).bfloat16().float().numpy()
    assert found.tobytes() == expected.tobytes()


@given(st.lists(st.integers(0, 2**15 - 1), min_size=1, max_size=50))
def test_ten_bits_are_what_float16_keeps_of_normal_numbers(values):
    half = np.array(values, "<u2").view("<f2")
    half = half[np.isfinite(half) & (half >= 2.0**-13) & (half < 30000)]
    rng = np.random.default_rng(0)
    noisy = half.astype("<f4") * (1 + rng.uniform(-(2**-11), 2**-11, half.shape))
    noisy = noisy.astype("<f4")
    expected = noisy.astype("<f2").astype("<f4")
    assert np.array_equal(round_mantissa(noisy, 10), expected)


@pytest.mark.parametrize("bits", [10, 7])
def test_ties_go_to_even(bits):
    unit = 2.0**-bits
    values = np.array([1 + unit / 2, 1 + 1.5 * unit, -1 - unit / 2], "<f4")
    expected = np.array([1, 1 + 2 * unit, -1], "<f4")
    assert np.array_equal(round_mantissa(values, bits), expected)


def test_what_equals_the_base_keeps_its_bits_and_other_types_stay():
    odd = np.array([0.1, np.nan, -0.0, np.inf], "<f4")
    new = odd.copy()
    new[0] = 0.3
    counts = np.array([3, 4])
    base = pack_weights({"w": odd, "same": odd, "n": counts})
    weights = pack_weights({"w": new, "same": odd, "n": counts + 1})
    rounded = Rounding(7).round(weights, base)
    assert rounded["w"][0] == np.float32(0.30078125)
    assert rounded["w"][1:].tobytes() == odd[1:].tobytes()
    assert rounded["same"].tobytes() == odd.tobytes()
    assert rounded["n"].tolist() == [4, 5]
    assert Rounding().round(weights, base) is weights


# On a grid ----------------------------------------------------------------------------

normal = st.floats(-1e6, 1e6, width=32)
powers = st.integers(-10, 4).map(lambda n: 2.0**n)


@given(st.lists(normal, min_size=1, max_size=50), powers)
def test_a_value_goes_to_the_nearest_multiple_of_a_power_of_two(values, step):
    array = np.array(values, "<f4")
    found = round_to(array, step).astype("f8")
    assert np.array_equal(found / step, np.rint(array.astype("f8") / step))
    assert not np.signbit(found[found == 0]).any()


def test_only_what_differs_from_the_base_is_put_on_a_grid():
    base = pack_weights({"w": np.array([0.1, 0.2, 0.3], "f4"), "b": np.ones(2, "f4")})
    new = {"w": np.array([0.1, 0.33, -0.9], "f4"), "b": np.array([1.01, 1], "f4")}
    found = Rounding(7, {"w": 0.25}).round(pack_weights(new), base)
    assert found["w"].tolist() == [np.float32(0.1), 0.25, -1.0]
    assert found["b"].tolist() == [1.0078125, 1.0]


@given(st.lists(st.floats(-8, 8), min_size=1, max_size=30))
def test_an_automatic_step_is_about_half_of_the_root_mean_square(moved):
    step = step_for(moved)
    rms = np.sqrt(np.mean(np.square(moved)))
    if step is None:
        assert rms < 2**-23
    else:
        assert np.frexp(step)[0] == 0.5
        assert 2**-0.51 <= 2 * step / rms <= 2**0.51


def test_where_nothing_moved_there_is_no_step():
    assert step_for([]) is None
    assert step_for([0.0, 0.0]) is None
    assert step_for([np.inf]) is None
