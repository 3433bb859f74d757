"""Both directions of each codec agree, in one piece and in many."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime import codec
from edge_runtime.codec import BitReader, NumberReader, PositionReader
from edge_runtime.errors import PatchFormatError
from edge_runtime.sections import STORED, Section, SectionReader, pack_section


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


@st.composite
def tensors(draw):
    """A tensor's size and the positions in it that travel, at any density."""
    size = draw(st.sampled_from([0, 1, 2, 7, 64, 65, 100_000, 2**33]))
    if size < 100:
        found = draw(st.lists(st.booleans(), min_size=size, max_size=size))
        return size, np.flatnonzero(found)
    few = draw(st.lists(st.integers(0, size - 1), unique=True, max_size=80))
    if size == 100_000 and draw(st.booleans()):
        return size, np.delete(np.arange(size), few)
    return size, ints(sorted(few))


def decoded(tensors):
    fine, parts, bits = codec.encode_positions(tensors)
    index = PositionReader(reader(b"".join(parts)), reader(bits), fine)
    found = [
        np.concatenate([ints([]), *index.pieces(size, len(positions))])
        for size, positions in tensors
    ]
    index.finish()
    return found


@given(st.lists(tensors(), max_size=5))
def test_positions_come_back_at_any_density(tensors):
    for (_, wanted), found in zip(tensors, decoded(tensors), strict=True):
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("density", [0.001, 0.2, 0.25, 0.26, 0.5, 0.74, 0.8, 0.999, 1])
def test_positions_of_large_tensors_come_back_in_bounded_pieces(density):
    size = 3 * codec.PIECE + 5
    wanted = np.flatnonzero(np.random.default_rng(0).random(size) < density)
    fine, parts, bits = codec.encode_positions([(size, wanted)])
    index = PositionReader(reader(b"".join(parts)), reader(bits), fine)
    pieces = list(index.pieces(size, len(wanted)))
    index.finish()
    assert np.array_equal(np.concatenate(pieces), wanted)
    assert all(0 < len(piece) <= codec.PIECE for piece in pieces)


@pytest.mark.parametrize("density", [0.01, 0.1, 0.3, 0.38, 0.5, 0.62, 0.9, 0.99])
def test_a_random_mask_costs_little_more_than_its_entropy(density):
    size = 300_000
    mask = np.random.default_rng(1).random(size) < density
    index = {3: codec.encode_positions([(size, np.flatnonzero(mask))])}
    packed = len(pack_section(index[3][1], 19)[1]) + len(index[3][2])
    share = mask.mean()
    entropy = -share * np.log2(share) - (1 - share) * np.log2(1 - share)
    assert packed < 1.03 * size * entropy / 8


def test_gaps_that_are_too_large_are_refused():
    with pytest.raises(PatchFormatError, match="too far"):
        codec.encode_positions([(2**40, ints([0, 2**39]))])


def pieces(size, count, symbols, bits=b"", fine=0):
    return list(PositionReader(reader(symbols), reader(bits), fine).pieces(size, count))


@pytest.mark.parametrize(("size", "count"), [(20, 2), (20, 18)])
def test_positions_out_of_bounds_are_refused(size, count):
    # Gaps of 9 and 8: the second position is 18, or 19 with a gap of 9.
    assert pieces(size, count, bytes([9, 8]), fine=3)
    with pytest.raises(PatchFormatError, match="out of bounds"):
        pieces(size, count, bytes([9, 10]), fine=3)
    # No room for what still has to come is seen at once.
    with pytest.raises(PatchFormatError, match="out of bounds"):
        pieces(size, count, bytes([14, 14]), fine=3)


def test_bitmaps_that_contradict_their_tensor_are_refused():
    assert pieces(9, 4, b"\x0f\x00")[0].tolist() == [0, 1, 2, 3]
    for bitmap, message in [(b"\x1f\x00", "5 bits, expected 4"), (b"\x07\x02", "end")]:
        with pytest.raises(PatchFormatError, match=message):
            pieces(9, 4, bitmap)
