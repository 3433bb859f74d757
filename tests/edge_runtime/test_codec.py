"""Both directions of each codec agree, in one piece and in many."""

import io

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime import codec
from edge_runtime.codec import PositionDecoder, SectionReader
from edge_runtime.errors import PatchFormatError


def reader(data):
    return SectionReader(io.BytesIO(data), 0, codec.STORED, len(data), len(data))


POSITIONS = st.lists(
    st.one_of(st.integers(0, 300), st.integers(0, 2**40)), unique=True, max_size=200
).map(lambda found: np.array(sorted(found), np.int64))


@given(st.lists(POSITIONS, max_size=4), st.integers(1, 50))
def test_positions_come_back_in_pieces_of_any_size(tensors, piece):
    gaps, bits = codec.encode_positions(tensors)
    decoder = PositionDecoder(reader(gaps), reader(bits))
    for wanted in tensors:
        found, previous = [], -1
        for start in range(0, len(wanted), piece):
            found.append(decoder.take(min(piece, len(wanted) - start), previous))
            previous = int(found[-1][-1])
        assert np.array_equal(np.concatenate([[], *found]), wanted)
    decoder.finish()


def test_gaps_at_every_power_of_two_come_back():
    gaps = np.unique([2**n + d for n in range(6, 52) for d in (-1, 0, 1)])
    wanted = np.cumsum(gaps + 1) - 1
    decoder = PositionDecoder(*map(reader, codec.encode_positions([wanted])))
    assert np.array_equal(decoder.take(len(wanted), -1), wanted)


def test_sums_that_overflow_are_refused():
    largest = bytes([64 + 50]) * 200
    decoder = PositionDecoder(reader(largest), reader(b"\xff" * 200 * 7))
    with pytest.raises(PatchFormatError, match="overflow"):
        decoder.take(200, -1)


def test_a_class_out_of_range_is_refused():
    decoder = PositionDecoder(reader(bytes([64 + 51])), reader(b"\xff" * 8))
    with pytest.raises(PatchFormatError, match="class"):
        decoder.take(1, -1)


def test_bits_left_over_are_refused():
    gaps, bits = codec.encode_positions([np.array([100])])  # 6 bits of a byte
    decoder = PositionDecoder(reader(gaps), reader(bytes([bits[0] | 0x80])))
    decoder.take(1, -1)
    with pytest.raises(PatchFormatError, match="left over"):
        decoder.finish()


@given(st.binary(max_size=400), st.sampled_from([1, 2, 4, 8]))
def test_byte_planes_come_back(data, size):
    values = np.frombuffer(data[: len(data) // size * size], f"<u{size}")
    planes = [reader(plane) for plane in codec.encode_planes(values)]
    assert np.array_equal(codec.decode_planes(planes, len(values)), values)


@given(st.integers(0, 2**63 - 1))
def test_varints_come_back(value):
    assert codec.decode_varint(io.BytesIO(codec.encode_varint(value))) == value


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x80\x00", b"\xff" * 9 + b"\x01"])
def test_malformed_varints_are_refused(data):
    with pytest.raises(PatchFormatError):
        codec.decode_varint(io.BytesIO(data))


@pytest.mark.parametrize(
    ("raw", "encoding"),
    [
        (b"\0" * 1000, codec.CONSTANT),
        (b"x", codec.CONSTANT),
        (b"abcabc" * 500, codec.ZSTD),
        (np.random.default_rng(0).bytes(1000), codec.STORED),
    ],
)
def test_a_section_takes_its_smallest_encoding_and_comes_back(raw, encoding):
    found, packed = codec.pack_section(raw, 19)
    assert found == encoding
    section = SectionReader(
        io.BytesIO(b"before" + packed), 6, found, len(packed), len(raw)
    )
    assert section.take(10 % len(raw)) + section.take(len(raw) - 10 % len(raw)) == raw
    section.finish()


def test_reading_more_than_a_section_holds_is_refused():
    with pytest.raises(PatchFormatError, match="too early"):
        reader(b"abc").take(4)


def test_a_section_that_is_not_used_up_is_refused():
    section = reader(b"abc")
    section.take(2)
    with pytest.raises(PatchFormatError, match="too many"):
        section.finish()


RAW = b"a lot of text, " * 400


def zstd(**options):
    return zstandard.ZstdCompressor(**options).compress(RAW)


def bomb():
    return zstandard.ZstdCompressor().compress(bytes(1 << 28))


def skippable():
    return b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\0" * 40,
        zstd(write_content_size=False),
        zstd() + b"\0",
        zstd() + zstd(),
        zstd() + skippable(),
        skippable() + zstd(),
        zstd()[:-1],
        zstd(write_checksum=True)[:-4],
        bomb(),
    ],
    ids=[
        "empty",
        "zeros",
        "no content size",
        "trailing byte",
        "two frames",
        "skippable behind",
        "skippable before",
        "cut",
        "cut checksum",
        "bomb",
    ],
)
def test_a_frame_that_is_not_exactly_one_section_is_refused(packed):
    with pytest.raises(PatchFormatError):
        SectionReader(io.BytesIO(packed), 0, codec.ZSTD, len(packed), len(RAW))


def test_a_frame_with_a_large_window_is_refused():
    size = 1 << 23
    parameters = zstandard.ZstdCompressionParameters(window_log=23)
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    packed = compressor.compress(bytes(size // 2) + bytes(range(256)) * (size // 512))
    with pytest.raises(PatchFormatError, match="window"):
        SectionReader(io.BytesIO(packed), 0, codec.ZSTD, len(packed), size)


def test_a_frame_that_does_not_decompress_is_refused():
    packed = bytearray(zstd())
    packed[7] |= 3 << 1  # the reserved block type, in a block of the same size
    with pytest.raises(PatchFormatError):
        SectionReader(io.BytesIO(packed), 0, codec.ZSTD, len(packed), len(RAW)).take(
            len(RAW)
        )


@pytest.mark.parametrize(
    ("encoding", "packed", "raw"),
    [(codec.STORED, 3, 4), (codec.CONSTANT, 2, 2), (3, 1, 1)],
)
def test_sizes_that_contradict_the_encoding_are_refused(encoding, packed, raw):
    with pytest.raises(PatchFormatError, match="cannot be"):
        SectionReader(io.BytesIO(bytes(packed)), 0, encoding, packed, raw)
