"""Both directions of each codec agree, in one piece and in many."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime import codec
from edge_runtime.codec import BitReader, NumberReader
from edge_runtime.errors import PatchFormatError
from edge_runtime.frames import STORED, Section, SectionReader


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
