# SPDX-License-Identifier: Apache-2.0
"""Damaged and malicious subspaces are refused, and cost no more than they may."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from edge_runtime.errors import DpuError, PatchError
from edge_runtime.formats.apply import apply_patch
from edge_runtime.formats.header import DATED, SUBSPACE, PatchHeader, encode_header
from edge_runtime.formats.patch import open_patch
from edge_runtime.formats.patch_encoder import encode_patch
from edge_runtime.formats.sections import COUNTS, SUBSPACES, encode_body, encode_varint
from edge_runtime.formats.subspace import Term, encode_terms, round_scale
from edge_runtime.formats.subspace_moves import move_weights
from edge_runtime.formats.weights import pack_weights

RNG = np.random.default_rng(0)
BASE = pack_weights(
    {
        "a": RNG.normal(0, 0.1, (30, 20)).astype("<f4"),
        "b": RNG.normal(0, 0.1, 50).astype("<f2"),
        "n": np.arange(9, dtype="<i2"),
    }
)
SIGNS = (2 * RNG.integers(0, 2, 128) - 1).astype(np.int16)
TERM = Term(300, 1, 2, {0: round_scale(0.01), 2: round_scale(0.02)}, SIGNS)
assert [t.name for t in BASE.layout.tensors] == ["a", "b", "n"]
TERM = replace(TERM, scales={0: TERM.scales[0], 1: TERM.scales[2]})
TARGET = move_weights(BASE, [TERM])
HEADER = PatchHeader(
    "ab" * 32, BASE.fingerprint, TARGET.fingerprint, 1, 1, BASE.layout.file_size
)
NONE = [np.zeros(0, np.int64)] * 3
PATCH = encode_patch(HEADER, NONE, TARGET, TARGET, terms=[TERM])
GOOD = encode_terms([TERM], 3)
# Where the parts of the one term begin.
COUNT, SEED, SIZE, BITS, TAPS, TENSORS, SCALES, COEFFICIENTS = 0, 1, 3, 4, 5, 6, 7, 11


def forged(section, critical=SUBSPACE):
    """A patch with valid checksums around any bytes as its subspaces."""
    body = encode_body({COUNTS: [bytes(3)], SUBSPACES: [section]}, 3)
    return encode_header(replace(HEADER, critical=critical), body) + b"\0\0" + body


def refused(data):
    with pytest.raises(PatchError) as refusal, open_patch(data) as patch:
        patch.check(BASE.layout)
    return str(refusal.value)


def with_byte(at, *values):
    return GOOD[:at] + bytes(values) + GOOD[at + len(values) :]


def test_the_good_patch_is_forged_alike():
    assert forged(GOOD) == PATCH
    assert apply_patch(BASE, open_patch(PATCH)).data == TARGET.data


def test_a_patch_truncated_at_any_byte_is_refused():
    for cut in range(len(PATCH)):
        refused(PATCH[:cut])


def test_a_patch_with_any_flipped_bit_is_refused():
    for position in range(8 * len(PATCH)):
        data = bytearray(PATCH)
        data[position // 8] ^= 1 << position % 8
        refused(bytes(data))


def test_any_flipped_bit_of_a_subspace_is_refused_also_with_good_checksums():
    for position in range(8 * len(GOOD)):
        data = bytearray(GOOD)
        data[position // 8] ^= 1 << position % 8
        with pytest.raises(DpuError), open_patch(forged(bytes(data))) as patch:
            apply_patch(BASE, patch)


def test_a_subspace_cut_short_or_too_long_is_refused():
    for cut in range(1, len(GOOD)):
        # The file is whole: to fetch it again would be of no use.
        assert "fetch it again" not in refused(forged(GOOD[:cut]))
    assert "end early" in refused(forged(GOOD[:-1]))
    assert "1 bytes too many" in refused(forged(GOOD + b"\0"))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (with_byte(COUNT, 0), "0 subspaces, expected 1 to 64"),
        (encode_varint(65) + 65 * GOOD[1:], "65 subspaces, expected 1 to 64"),
        (with_byte(SIZE, 0), "0 coefficients"),
        (with_byte(BITS, 0), "of 0 bits"),
        (with_byte(BITS, 9), "of 9 bits"),
        (with_byte(TAPS, 0), "0 for each weight"),
        (with_byte(TAPS, 5), "5 for each weight"),
        (with_byte(TENSORS, 0), "moves no tensor"),
        (with_byte(TENSORS, 0b1010), "one that is not there"),
        (with_byte(TENSORS, 0b110), "'n' of type I16"),
        (with_byte(SCALES, 0, 0), "out of range"),  # zero
        (with_byte(SCALES, 0x80, 0x7F), "out of range"),  # infinite
        (with_byte(SCALES, 0xC0, 0x7F), "out of range"),  # no number
        (with_byte(SCALES, 0x24, 0xBC), "out of range"),  # negative
        (with_byte(SCALES, 0x7F, 0x0D), "out of range"),  # below 2**-100
        (with_byte(SCALES, 0x81, 0x71), "out of range"),  # above 2**100
    ],
)
def test_a_subspace_that_breaks_a_rule_is_refused(section, message):
    assert message in refused(forged(section))


def test_more_coefficients_than_allowed_are_refused_before_they_take_memory():
    huge = GOOD[:SIZE] + encode_varint(1 << 40) + GOOD[BITS:]
    tracemalloc.start()
    assert "at most 4194304 more" in refused(forged(huge))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_many_terms_may_not_have_more_coefficients_together():
    half = (1 << 21) + 64
    one = GOOD[1:SIZE] + encode_varint(half // 64) + GOOD[BITS:COEFFICIENTS]
    one += bytes(half // 8)
    assert "at most 2097088 more" in refused(forged(b"\2" + one + one))


def test_a_section_above_a_mebibyte_is_refused_before_it_is_unpacked():
    assert "too large" in refused(forged(GOOD + bytes(1 << 20)))


@pytest.mark.parametrize(
    ("section", "critical"), [(GOOD, 0), (GOOD, DATED), (b"", SUBSPACE)]
)
def test_header_and_body_must_agree_on_subspaces(section, critical):
    assert "disagree" in refused(forged(section, critical))


def test_random_bytes_never_do_more_than_be_refused():
    for _ in range(500):
        data = bytearray(GOOD)
        for _ in range(3):
            data[RNG.integers(len(data))] = RNG.integers(256)
        try:
            with open_patch(forged(bytes(data))) as patch:
                result = apply_patch(BASE, patch)
        except DpuError:
            continue
        assert result.data == TARGET.data
