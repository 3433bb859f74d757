# SPDX-License-Identifier: Apache-2.0
"""Subspaces: their bytes come back, and they move weights to the bit as they should."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import PatchFormatError, PatchVersionError
from edge_runtime.formats import header as headers
from edge_runtime.formats.apply import apply_chunks, apply_patch
from edge_runtime.formats.header import DATED, PatchHeader
from edge_runtime.formats.patch import open_patch
from edge_runtime.formats.patch_encoder import encode_patch
from edge_runtime.formats.subspace import (
    Term,
    decode_terms,
    encode_terms,
    round_scale,
    term_size,
)
from edge_runtime.formats.subspace_moves import move_weights
from edge_runtime.formats.weights import pack_weights
from tests.golden import independent

RNG = np.random.default_rng(0)
BASE = pack_weights(
    {
        "a": RNG.normal(0, 0.1, (300, 500)).astype("<f4"),
        "b": RNG.normal(0, 0.1, (7, 11)).astype("<f4"),
        "c": RNG.normal(0, 0.1, 1000).astype("<f2"),
        "d": np.arange(6, dtype="<i4"),
        "e": RNG.integers(-128, 128, (30, 33)).astype("<i1"),
    }
)
NAMES = list(BASE)
SCALE = round_scale(0.01)


def term(*tensors, bits=1, taps=2, size=128, seed=5, scale=SCALE):
    numbers = np.random.default_rng(seed).integers(0, 1 << bits, size)
    coefficients = (2 * numbers - (1 << bits) + 1).astype(np.int16)
    scales = {NAMES.index(name): scale for name in tensors}
    return Term(seed, bits, taps, scales, coefficients)


def patch_of(base, terms):
    """A patch that only moves, and what it leads to."""
    target = move_weights(base, terms)
    size = base.layout.file_size
    header = PatchHeader("ab" * 32, base.fingerprint, target.fingerprint, 1, 1, size)
    none = [np.zeros(0, np.int64)] * len(base)
    return encode_patch(header, none, target, target, terms=terms), target


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2**63 - 1),
            st.integers(1, 8),
            st.integers(1, 4),
            st.integers(1, 9),
            st.floats(2.0**-100, 2.0**100),
        ),
        max_size=4,
    )
)
@settings(max_examples=60, deadline=None)
def test_terms_come_back_and_take_no_more_than_is_said(drawn):
    terms = [
        term("a", "c", bits=b, taps=t, size=64 * n, seed=seed, scale=round_scale(scale))
        for seed, b, t, n, scale in drawn
    ]
    data = encode_terms(terms, 4)
    assert len(data) <= sum(
        term_size(4, 2, len(one.coefficients), one.bits) for one in terms
    ) + bool(terms)
    back = decode_terms(data, 4)
    for one, found in zip(terms, back, strict=True):
        assert (found.seed, found.bits, found.taps) == (one.seed, one.bits, one.taps)
        assert found.scales == one.scales
        assert np.array_equal(found.coefficients, one.coefficients)


@pytest.mark.parametrize(
    ("bits", "taps", "size"), [(1, 1, 64), (1, 2, 8192), (5, 4, 192), (8, 3, 320)]
)
def test_an_independent_decoder_moves_weights_alike(bits, taps, size):
    small = pack_weights({n: BASE[n].reshape(-1)[:900] for n in NAMES})
    terms = [
        term("a", "b", "c", bits=bits, taps=taps, size=size),
        term("c", size=64),
        term("e", bits=bits, taps=taps, size=size, scale=0.75),
    ]
    data, target = patch_of(small, terms)
    assert independent.apply(bytes(small.data), data) == target.data


@given(st.lists(st.integers(1, 200_000), max_size=8))
@settings(max_examples=20, deadline=None)
def test_weights_move_alike_in_pieces_of_any_size(sizes):
    terms = [
        term("a", "b", "c", "e", bits=3),
        term("b", "e", seed=7, taps=1, scale=3.0),
    ]
    data, target = patch_of(BASE, terms)
    cuts = [0, *np.cumsum(sizes), len(BASE.data)]
    pieces = [BASE.data[a:b] for a, b in pairwise(cuts)]
    with open_patch(data) as patch:
        patch.check(BASE.layout)
        found = b"".join(map(bytes, apply_chunks(pieces, BASE.layout, patch)))
    assert found == target.data


def test_where_taps_cancel_weights_keep_their_bits():
    odd = np.array([0, 0x80000000, 1, 0x807FFFFF, 0x7F7FFFFF], "<u4")
    base = pack_weights({"w": np.tile(odd, 400).view("<f4")})
    moved = move_weights(base, [Term(1, 1, 2, {0: SCALE}, term("a").coefficients)])
    same = moved["w"].view("<u4") == base["w"].view("<u4")
    assert 0.4 < same.reshape(-1, 5)[:, :4].mean() < 0.6


def test_int8_weights_move_by_whole_steps_and_end_at_both_ends():
    weights = np.repeat(np.array([-128, -127, -1, 0, 1, 126], "<i1"), 3000)
    base = pack_weights({"w": weights})
    coefficients = term("a").coefficients

    def moves(scale, taps):
        found = move_weights(base, [Term(1, 1, taps, {0: scale}, coefficients)])["w"]
        return [np.unique(part).tolist() for part in found.reshape(6, -1)]

    assert moves(2.0**100, 1) == [[-127, 127]] * 6
    # Halves go to the even one: 1.5 to 2, 0.5 to 0.
    assert moves(0.5, 1) == [[-127], [-127, -126], [-2, 0], [0], [0, 2], [126]]
    # Where taps cancel, even -128 stays, which no grid has.
    assert moves(0.5, 2)[0] == [-128, -127]


def test_where_denormals_are_taken_as_zero_weights_move_alike():
    odd = RNG.integers(0, 1 << 32, 90000, dtype="<u4") & 0x8FFFFFFF
    odd = np.concatenate([odd & 0x807FFFFF, odd])
    weights = pack_weights(
        {"w": odd.view("<f4"), "x": (odd >> 16).astype("<u2")}, {"x": "BF16"}
    )
    least = 2.0**-100
    moving = Term(3, 2, 2, {0: least, 1: least}, term("a", bits=2).coefficients)
    expected = move_weights(weights, [moving])
    torch = pytest.importorskip("torch", reason="which can set the CPU to it")
    assert torch.set_flush_denormal(True)
    try:
        assert np.float32(1e-39) + np.float32(0) == 0
        found = move_weights(weights, [moving])
    finally:
        torch.set_flush_denormal(False)
    assert found.fingerprint == expected.fingerprint


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, np.finfo("<f4").max])
def test_weights_that_are_or_become_no_finite_number_are_refused(value):
    array = np.full(2000, value, "<f4")
    base = pack_weights({"w": array})
    big = Term(1, 8, 4, {0: 2.0**100}, np.full(64, 255, np.int16))
    with pytest.raises(PatchFormatError, match="no finite number"):
        move_weights(base, [big])


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF])
def test_bfloat16_weights_that_are_no_finite_number_are_refused(bits):
    base = pack_weights({"w": np.full(64, bits, "<u2")}, {"w": "BF16"})
    with pytest.raises(PatchFormatError, match="no finite number"):
        move_weights(base, [term("a")])


def test_float16_weights_that_overflow_are_refused():
    base = pack_weights({"w": np.full(64, 65504, "<f2")})
    with pytest.raises(PatchFormatError, match="no finite number"):
        move_weights(base, [term("a", scale=64.0)])


def test_a_reader_from_before_subspaces_refuses_them_in_words(monkeypatch):
    data, _ = patch_of(BASE, [term("a")])
    monkeypatch.setattr(headers, "KNOWN_CRITICAL", DATED)
    with pytest.raises(PatchVersionError, match="features 0x2 that this runtime does"):
        open_patch(data)


def test_elements_change_on_top_of_what_has_moved():
    terms = [term("a", "b")]
    moved = move_weights(BASE, terms)
    arrays = {name: np.array(array) for name, array in moved.items()}
    arrays["a"][7, 9] += 1
    arrays["d"][2] = -5
    target = pack_weights(arrays)
    changes = [np.flatnonzero(moved[name] != target[name]) for name in BASE]
    header = PatchHeader(
        "ab" * 32, BASE.fingerprint, target.fingerprint, 1, 1, BASE.layout.file_size
    )
    data = encode_patch(header, changes, moved, target, terms=terms)
    with open_patch(data) as patch:
        assert patch.counts == (1, 0, 1, 0, 0)
        assert apply_patch(BASE, patch).data == target.data


@pytest.mark.parametrize(
    ("scale", "rounded"),
    [(1.0, 1.0), (1.004, 1.0078125), (0.0, 2.0**-100), (1e38, 2.0**100)],
)
def test_a_scale_is_rounded_to_one_that_a_term_may_have(scale, rounded):
    assert round_scale(scale) == rounded
