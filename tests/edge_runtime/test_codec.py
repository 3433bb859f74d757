"""Both directions of each codec agree, in one piece and in many."""

import io
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime import codec
from edge_runtime.codec import BitReader, NumberReader, PositionReader
from edge_runtime.errors import PatchFormatError
from edge_runtime.sections import (
    COLUMNS,
    INDEX,
    STORED,
    Section,
    SectionReader,
    pack_section,
)


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


SHAPES = [(), (0,), (2,), (7,), (64,), (5, 13), (3, 4, 2, 3), (0, 3), (6, 0, 2)]
LARGE = [(100_000,), (100, 1000), (40, 50, 5, 10), (2**33,), (1 << 15, 1 << 18)]


@st.composite
def tensors(draw):
    """A tensor's shape and the positions in it that travel, at any density."""
    shape = draw(st.sampled_from([*SHAPES, *LARGE]))
    size = math.prod(shape)
    if size < 100:
        found = draw(st.lists(st.booleans(), min_size=size, max_size=size))
        return shape, np.flatnonzero(found)
    few = draw(st.lists(st.integers(0, size - 1), unique=True, max_size=80))
    if len(shape) > 1 and draw(st.booleans()):  # in a few columns only
        depth = math.prod(shape[2:])
        row = math.prod(shape[1:])
        few = {at // row * row + at % row // depth % 5 * depth for at in few}
    if size == 100_000 and draw(st.booleans()):
        return shape, np.delete(np.arange(size), sorted(few))
    return shape, ints(sorted(few))


def index_reader(fine, sections):
    raw = {kind: b"".join(parts) for kind, parts in sections.items()}
    return PositionReader(lambda kind: reader(raw.get(kind, b"")), fine)


def decoded(tensors):
    index = index_reader(*codec.encode_positions(tensors))
    found = [
        np.concatenate([ints([]), *index.pieces(shape, len(positions))])
        for shape, positions in tensors
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
    index = index_reader(*codec.encode_positions([((size,), wanted)]))
    pieces = list(index.pieces((size,), len(wanted)))
    index.finish()
    assert np.array_equal(np.concatenate(pieces), wanted)
    assert all(0 < len(piece) <= codec.PIECE for piece in pieces)


def packed_size(tensors):
    _, sections = codec.encode_positions(tensors)
    return sum(len(pack_section(p, 19)[1]) for p in sections.values() if any(p))


@pytest.mark.parametrize("density", [0.01, 0.1, 0.3, 0.38, 0.5, 0.62, 0.9, 0.99])
@pytest.mark.parametrize("shape", [(300_000,), (500, 600), (200, 15, 10, 10)])
def test_a_random_mask_costs_little_more_than_its_entropy(shape, density):
    size = math.prod(shape)
    mask = np.random.default_rng(1).random(size) < density
    share = mask.mean()
    entropy = -share * np.log2(share) - (1 - share) * np.log2(1 - share)
    assert packed_size([(shape, np.flatnonzero(mask))]) < 1.03 * size * entropy / 8


def test_columns_in_which_nothing_travels_cost_nothing_but_their_bit():
    mask = np.random.default_rng(0).random((100, 1000, 3)) < 0.02
    mask[:, np.random.default_rng(1).random(1000) < 0.6] = False
    positions = np.flatnonzero(mask)
    with_columns, without = (
        packed_size([(shape, positions)]) for shape in ((100, 1000, 3), (300_000,))
    )
    assert with_columns < 0.9 * without
    dense = packed_size([((100, 400, 3), np.flatnonzero(mask[:, mask.any((0, 2))]))])
    assert with_columns < dense + 1000 / 8 + 20


def test_gaps_that_are_too_large_are_refused():
    with pytest.raises(PatchFormatError, match="too far"):
        codec.encode_positions([((2**40,), ints([0, 2**39]))])


def pieces(shape, count, index, *, columns=b"", fine=0):
    sections = {INDEX: [index], COLUMNS: [columns]}
    return list(index_reader(fine, sections).pieces(shape, count))


@pytest.mark.parametrize("count", [2, 18])
def test_positions_out_of_bounds_are_refused(count):
    # Gaps of 9 and 8: the second position is 18, or 20 with a gap of 10.
    assert pieces((20,), count, bytes([9, 8]), fine=3)
    with pytest.raises(PatchFormatError, match="20 of 20"):
        pieces((20,), count, bytes([9, 10]), fine=3)
    with pytest.raises(PatchFormatError, match="out of bounds"):
        pieces((20,), count, bytes([14, 14]), fine=3)


def test_positions_are_counted_in_marked_columns_only():
    # Columns 1 and 3 of 4, two elements deep: 4 of 8 in each of three rows.
    found = pieces((3, 4, 2), 3, bytes([0, 4, 2]), columns=b"\x0a", fine=3)
    assert found[0].tolist() == [2, 11, 18]
    with pytest.raises(PatchFormatError, match="12 of 12"):
        pieces((3, 4, 2), 3, bytes([0, 4, 6]), columns=b"\x0a", fine=3)


@pytest.mark.parametrize("columns", [b"\0", b"\x1a"])
def test_columns_that_contradict_their_tensor_are_refused(columns):
    with pytest.raises(PatchFormatError, match=r"out of bounds|behind its end"):
        pieces((3, 4, 2), 3, bytes([0, 4, 2]), columns=columns, fine=3)


def test_bitmaps_that_contradict_their_tensor_are_refused():
    assert pieces((9,), 4, b"\x0f\x00")[0].tolist() == [0, 1, 2, 3]
    for bitmap, message in [(b"\x1f\x00", "5 bits, expected 4"), (b"\x07\x02", "end")]:
        with pytest.raises(PatchFormatError, match=message):
            pieces((9,), 4, bitmap)
