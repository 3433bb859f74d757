# SPDX-License-Identifier: Apache-2.0
"""Both directions of each codec agree, in one piece and in many."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import PatchFormatError
from edge_runtime.formats import numbers as codec
from edge_runtime.formats.frames import STORED, Section, SectionReader
from edge_runtime.formats.numbers import BitReader, NumberReader, UnaryReader


def reader(data):
    return SectionReader(io.BytesIO(data), Section(0, STORED, len(data), len(data), 0))


def ints(values):
    return np.array(values, np.int64)


def in_pieces(items, piece):
    return [items[start : start + piece] for start in range(0, len(items), piece)]


PIECES = st.integers(1, 50)
NUMBERS = st.lists(st.one_of(st.integers(0, 300), st.integers(0, 2**32)), max_size=200)


@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 32))), PIECES)
def test_bits_come_back_in_pieces_of_any_size(pairs, piece):
    numbers, widths = ints([n for n, _ in pairs]), ints([w for _, w in pairs])
    bits = BitReader(reader(codec.encode_bits(numbers, widths)))
    found = [bits.take(part) for part in in_pieces(widths, piece)]
    wanted = numbers & ((1 << widths) - 1)
    assert np.array_equal(np.concatenate([ints([]), *found]), wanted)
    bits.finish()


@pytest.mark.parametrize("fine", range(codec.MAX_FINE + 1))
@given(numbers=NUMBERS, piece=PIECES)
def test_numbers_that_fit_come_back_in_pieces_of_any_size(fine, numbers, piece):
    numbers = ints([n for n in numbers if fine in codec.finenesses(n)])
    symbols, widths = codec.encode_numbers(numbers, fine)
    bits = codec.encode_bits(numbers, widths)
    decoder = NumberReader(reader(symbols), reader(bits), fine)
    found = [decoder.take(len(part)) for part in in_pieces(numbers, piece)]
    assert np.array_equal(np.concatenate([ints([]), *found]), numbers)
    decoder.finish()


@pytest.mark.parametrize("fine", range(codec.MAX_FINE + 1))
def test_the_largest_number_that_fits_is_the_largest_that_comes_back(fine):
    largest = max(n for n in range(2**9) if fine in codec.finenesses(n))
    for bits in range(9, 40):
        for number in (2**bits - 1, 2**bits, 2**bits + 2 ** (bits - 1)):
            largest = max(largest, number if fine in codec.finenesses(number) else 0)
    numbers = ints([largest, 0, largest])
    symbols, widths = codec.encode_numbers(numbers, fine)
    bits = reader(codec.encode_bits(numbers, widths))
    assert np.array_equal(NumberReader(reader(symbols), bits, fine).take(3), numbers)
    assert widths.max() <= codec.MAX_WIDTH
    assert fine not in codec.finenesses(2 * largest + 2)


def test_a_number_out_of_range_is_refused():
    decoder = NumberReader(reader(bytes([3, 34])), reader(bytes(8)), 0)
    with pytest.raises(PatchFormatError, match="out of range"):
        decoder.take(2)


def test_a_fineness_out_of_range_is_refused():
    with pytest.raises(PatchFormatError, match="fine bits"):
        NumberReader(reader(b""), reader(b""), 8)


def test_bits_left_over_are_refused():
    bits = BitReader(reader(b"\x81"))
    assert bits.take(ints([6, 1])).tolist() == [1, 0]
    with pytest.raises(PatchFormatError, match="left over"):
        bits.finish()


def unary_reader(unary, bits, width):
    return UnaryReader(reader(unary), reader(bits), width)


@given(st.lists(st.integers(0, 2**39), max_size=200), st.integers(0, 32), PIECES)
def test_numbers_in_unary_come_back_in_pieces_of_any_size(numbers, width, piece):
    most = 5000 << width  # zeros take time to write, too
    numbers = ints(numbers) % most
    widths = np.full(len(numbers), width)
    unary, bits = (
        codec.encode_bits(*codec.unary_bits(numbers, width)),
        codec.encode_bits(numbers, widths),
    )
    decoder = unary_reader(unary, bits, width)
    found = [decoder.take(len(part)) for part in in_pieces(numbers, piece)]
    assert np.array_equal(np.concatenate([ints([]), *found]), numbers)
    decoder.finish()


@given(st.lists(st.integers(0, 2**20), min_size=1, max_size=50))
def test_the_width_of_numbers_in_unary_makes_them_smallest(numbers):
    numbers = ints(numbers)

    def bits(width):
        return len(numbers) * width + int((numbers >> width).sum())

    assert bits(codec.unary_width(numbers)) == min(map(bits, range(33)))


def test_a_number_in_unary_may_have_40_bits():
    # 255 zeros and a one, above 32 low bits; then 256.
    for zeros in (255, 256):
        unary = (1 << zeros).to_bytes(33, "little")
        decoder = unary_reader(unary, b"\xff" * 4, 32)
        if zeros == 255:
            assert decoder.take(1).tolist() == [2**40 - 1]
        else:
            with pytest.raises(PatchFormatError, match="out of range"):
                decoder.take(1)


@pytest.mark.parametrize(
    ("unary", "bits", "message"),
    [
        (b"\x05", b"\x07", None),  # 0 and 1, above the low bits 11 and 01
        (b"\x01", b"\x07", "too early"),
        (b"", b"\x07", "too early"),
        (b"\x05", b"", "too early"),
        (b"\x0d", b"\x07", "left over"),
        (b"\x05\0", b"\x07", "left over"),
        (b"\x05\x01", b"\x07", "left over"),
        (b"\x05", b"\x17", "left over"),
        (b"\x05", b"\x07\0", "too many"),
    ],
)
def test_unary_that_is_not_used_up_exactly_is_refused(unary, bits, message):
    decoder = unary_reader(unary, bits, 2)
    if message is None:
        assert decoder.take(2).tolist() == [3, 5]
        decoder.finish()
        return
    with pytest.raises(PatchFormatError, match=message):
        decoder.take(2)
        decoder.finish()


def test_a_width_out_of_range_is_refused():
    with pytest.raises(PatchFormatError, match="33 low bits"):
        unary_reader(b"", b"", 33)
