# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.formats.weights import pack_weights
from trainer.rounds.rounding import round_mantissa, round_weights

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
    rounded = round_weights(weights, base, 7)
    assert rounded["w"][0] == np.float32(0.30078125)
    assert rounded["w"][1:].tobytes() == odd[1:].tobytes()
    assert rounded["same"].tobytes() == odd.tobytes()
    assert rounded["n"].tolist() == [4, 5]
    assert round_weights(weights, base, 23) is weights
