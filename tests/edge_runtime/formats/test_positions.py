# SPDX-License-Identifier: Apache-2.0
"""Positions: what is encoded comes back, tensor by tensor and many at once."""

import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import PatchFormatError
from edge_runtime.formats import positions
from edge_runtime.formats.frames import STORED, Section, SectionReader
from edge_runtime.formats.layout import make_layout
from edge_runtime.formats.numbers import encode_bits, encode_numbers
from edge_runtime.formats.patch import group_of
from edge_runtime.formats.positions import (
    PositionReader,
    PositionRun,
    pack_run,
    unpack_run,
)
from edge_runtime.formats.sections import COLUMNS, INDEX, INDEX_BITS, UNARY, pack_kind
from tests.golden import independent


def reader(data):
    return SectionReader(io.BytesIO(data), Section(0, STORED, len(data), len(data), 0))


def ints(values):
    return np.array(values, np.int64)


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


def tensors_of(shapes, dtypes=("U8",)):
    """Tensors of these shapes in the order of their file, types taking turns."""
    types = [dtypes[number % len(dtypes)] for number in range(len(shapes))]
    specs = {
        f"t{number:03}": one
        for number, one in enumerate(zip(types, shapes, strict=True))
    }
    return make_layout(specs).tensors


def index_reader(fine, sections):
    raw = {kind: b"".join(parts) for kind, parts in sections.items()}
    return PositionReader(lambda kind: reader(raw.get(kind, b"")), fine)


def read(index, tensors, counts):
    """The positions of each tensor, each from the tensor's own start."""
    changed = [
        (group_of(tensor, count), tensor, count)
        for tensor, count in zip(tensors, counts, strict=True)
        if count
    ]
    runs = list(index.runs(changed))
    index.finish()
    found, behind = {tensor.name: ints([]) for tensor in tensors}, -1
    for group, dtype, item_size, some in runs:
        assert 0 < len(some) <= positions.PIECE
        starts = some * item_size
        assert np.all(np.diff(starts, prepend=behind) > 0)
        behind = starts[-1]
        for tensor, count in zip(tensors, counts, strict=True):
            inside = (starts >= tensor.start) & (starts < tensor.stop)
            if inside.any():
                assert (group_of(tensor, count), tensor.dtype) == (group, dtype)
                mine = (starts[inside] - tensor.start) // tensor.item_size
                found[tensor.name] = np.append(found[tensor.name], mine)
    assert sum(map(len, found.values())) == sum(len(run.positions) for run in runs)
    return [found[tensor.name] for tensor in tensors]


@given(
    st.lists(st.integers(1, 2**40), min_size=1, max_size=9),
    st.integers(0, 2**50),
    st.sampled_from([1, 20_000]),
)
def test_a_run_that_was_packed_is_the_same(steps, first, size):
    some = first + np.cumsum(np.resize(ints(steps), size))
    run = unpack_run(*pack_run(PositionRun(0x80, "F32", 4, some)))
    assert run.positions.dtype == some.dtype
    assert run.positions.tolist() == some.tolist()


def decoded(tensors):
    index = index_reader(*positions.encode_positions(tensors))
    layout = tensors_of([shape for shape, _ in tensors])
    return read(index, layout, [len(some) for _, some in tensors])


@given(st.lists(tensors(), max_size=5))
def test_positions_come_back_at_any_density(tensors):
    for (_, wanted), found in zip(tensors, decoded(tensors), strict=True):
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("density", [0.001, 0.2, 0.25, 0.26, 0.5, 0.74, 0.8, 0.999, 1])
def test_positions_of_large_tensors_come_back_in_bounded_pieces(density):
    size = 3 * positions.PIECE + 5
    wanted = np.flatnonzero(np.random.default_rng(0).random(size) < density)
    (found,) = decoded([((size,), wanted)])  # looks at the pieces, too
    assert np.array_equal(found, wanted)


def packed_size(tensors):
    _, sections = positions.encode_positions(tensors)
    return sum(len(pack_kind(k, p, 19)[1]) for k, p in sections.items() if any(p))


@pytest.mark.parametrize(
    "density", [0.001, 0.003, 0.01, 0.1, 0.3, 0.38, 0.5, 0.62, 0.9, 0.99]
)
@pytest.mark.parametrize("shape", [(300_000,), (500, 600), (200, 15, 10, 10)])
def test_a_random_mask_costs_little_more_than_its_entropy(shape, density):
    size = math.prod(shape)
    mask = np.random.default_rng(1).random(size) < density
    share = mask.mean()
    entropy = -share * np.log2(share) - (1 - share) * np.log2(1 - share)
    assert packed_size([(shape, np.flatnonzero(mask))]) < 1.03 * size * entropy / 8


def test_gaps_are_written_in_the_way_that_is_smaller():
    even = np.flatnonzero(np.random.default_rng(0).random(100_000) < 0.01)
    rows = np.arange(0, 100_000, 1000)
    clustered = np.sort(np.concatenate([rows + step for step in range(10)]))
    for found, unary in [(even, True), (clustered, False)]:
        fine, sections = positions.encode_positions([((100_000,), found)])
        assert (fine >= positions.UNARY_GAPS) == unary
        assert (UNARY in sections) == unary


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
        positions.encode_positions([((2**40,), ints([0, 2**39]))])


def pieces(shape, count, index, *, columns=b"", fine=0):
    sections = {INDEX: [index], COLUMNS: [columns]}
    return read(index_reader(fine, sections), tensors_of([shape]), [count])


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


# Many tensors at once: what each of them alone would give ----------------------------

SMALL = [(), (0,), (1,), (3, 0, 2), (9,), (7, 5), (4, 6, 3), (2, 3, 2, 2), (40,)]
TYPES = ["F64", "I64", "F32", "I32", "F16", "BF16", "U8", "BOOL"]


@st.composite
def files(draw):
    """The tensors of a file, of any types and sizes, and what travels of each."""
    shapes = draw(st.lists(st.sampled_from(SMALL), min_size=1, max_size=12))
    tensors = tensors_of(shapes, draw(st.permutations(TYPES)))
    found = []
    for tensor in tensors:
        density = draw(st.sampled_from([0, 0.04, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95, 1]))
        rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
        mask = rng.random(tensor.shape) < density
        if mask.ndim > 1 and draw(st.booleans()):
            mask[:, draw(st.integers(0, mask.shape[1])) :] = False
        found.append(np.flatnonzero(mask))
    return tensors, found


def one_by_one(tensors, counts, fine, raw):
    """The positions of each tensor as FORMAT.md has them; ValueError where refused."""
    kinds = (INDEX, INDEX_BITS, COLUMNS, UNARY)
    parts = [independent._Bits(raw.get(kind, b"")) for kind in kinds]
    grid = len(raw.get(COLUMNS, b""))
    found = [
        independent._positions(list(tensor.shape), count, fine, parts, grid)
        for tensor, count in zip(tensors, counts, strict=True)
    ]
    if any(part.size >= 8 or part.left for part in parts):
        raise ValueError("something is left")
    return found


PIECES = st.sampled_from([8, 16, 64, positions.PIECE])


@given(files(), PIECES)
def test_many_tensors_at_once_are_what_each_of_them_is(file, piece):
    tensors, wanted = file
    shapes = [tensor.shape for tensor in tensors]
    fine, sections = positions.encode_positions(list(zip(shapes, wanted, strict=True)))
    raw = {kind: b"".join(parts) for kind, parts in sections.items()}
    counts = [len(some) for some in wanted]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(positions, "PIECE", piece)
        found = read(index_reader(fine, sections), tensors, counts)
    alone = one_by_one(tensors, counts, fine, raw)
    for some, other, third in zip(found, wanted, alone, strict=True):
        assert some.tolist() == other.tolist() == third


@settings(max_examples=300)
@given(files(), st.data())
def test_what_one_tensor_would_not_accept_many_do_not_accept_either(file, data):
    tensors, changed = file
    shapes = [tensor.shape for tensor in tensors]
    fine, sections = positions.encode_positions(list(zip(shapes, changed, strict=True)))
    raw = {kind: bytearray(b"".join(parts)) for kind, parts in sections.items()}
    counts = [len(some) for some in changed]
    for _ in range(data.draw(st.integers(1, 4))):
        one = raw[data.draw(st.sampled_from(sorted(raw)))]
        if one:
            at = data.draw(st.integers(0, len(one) - 1))
            one[at] = data.draw(st.integers(0, 40) | st.integers(0, 255))
    if data.draw(st.integers(0, 9)) == 0:  # a section too many
        raw.setdefault(data.draw(st.sampled_from([INDEX, UNARY])), bytearray(b"\1"))
    if data.draw(st.booleans()):
        number = data.draw(st.integers(0, len(counts) - 1))
        counts[number] = data.draw(st.integers(0, tensors[number].size))
    try:
        wanted = one_by_one(
            tensors, counts, fine, {k: bytes(v) for k, v in raw.items()}
        )
    except ValueError:
        wanted = None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(positions, "PIECE", data.draw(PIECES))
        index = index_reader(fine, {kind: [bytes(one)] for kind, one in raw.items()})
        if wanted is None:
            with pytest.raises(PatchFormatError):
                read(index, tensors, counts)
        else:
            found = read(index, tensors, counts)
            assert [some.tolist() for some in found] == wanted


@pytest.mark.parametrize("piece", [8, positions.PIECE])
@pytest.mark.parametrize("number", range(6))
def test_a_gap_that_would_land_in_the_next_tensor_is_refused(
    number, piece, monkeypatch
):
    monkeypatch.setattr(positions, "PIECE", piece)
    tensors = tensors_of([(20,), (4,), (5, 8), (20,), (3,), (100,)])
    counts = [2, 4, 3, 3, 3, 12]  # listed, whole, in columns, listed, whole, listed
    listed = [2, 0, 3, 3, 0, 12]
    sizes = [20, 4, 5 * 7, 20, 3, 100]
    gaps = np.ones(sum(listed), np.int64)

    def decoded():
        symbols, widths = encode_numbers(gaps, 2)
        bits = encode_bits(gaps, widths)
        sections = {INDEX: [symbols], INDEX_BITS: [bits], COLUMNS: [b"\xf7"]}
        return read(index_reader(2, sections), tensors, counts)

    assert [len(found) for found in decoded()] == counts
    if not listed[number]:
        return
    last = sum(listed[: number + 1]) - 1
    gaps[last] = sizes[number] - 2 * (listed[number] - 1) - 1
    assert decoded()[number][-1] == tensors[number].size - 1
    gaps[last] += 1
    with pytest.raises(PatchFormatError, match=f"{sizes[number]} of {sizes[number]} "):
        decoded()
    # Nor may what is still to come be where no room is left, nor a sum run over.
    gaps[:] = 1
    for gap in (sizes[number], 1 << 34):
        gaps[last - 1] = gap
        with pytest.raises(PatchFormatError, match="out of bounds"):
            decoded()
