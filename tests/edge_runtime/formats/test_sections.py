# SPDX-License-Identifier: Apache-2.0
"""Sections: the table, both encodings, and frames that are not what they should be."""

import io

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import PatchFormatError
from edge_runtime.formats.frames import STORED, ZSTD, pack_section
from edge_runtime.formats.sections import (
    COUNTS,
    INDEX,
    Body,
    decode_varint,
    encode_body,
    encode_varint,
)

NOISE = np.random.default_rng(0).bytes(1000)
TEXT = b"a lot of text, " * 400


@given(st.integers(0, 2**63 - 1))
def test_varints_come_back(value):
    assert decode_varint(iter(encode_varint(value))) == value


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x80\x00", b"\xff" * 9 + b"\x01"])
def test_malformed_varints_are_refused(data):
    with pytest.raises(PatchFormatError, match="malformed"):
        decode_varint(iter(data))


def read_body(body, before=b"before"):
    """Sections by kind, each read to its end."""
    file = io.BytesIO(before + body)
    file.seek(len(before))
    found = {}
    sections = Body(file, len(before + body))
    for section in sections.sections:
        reader = sections.reader(section.kind)
        found[section.kind] = section.encoding, reader.take(section.raw_size)
        reader.finish()
    return found


@pytest.mark.parametrize(
    ("raw", "encoding"),
    [(bytes(1000), ZSTD), (b"x", STORED), (TEXT, ZSTD), (NOISE, STORED)],
)
def test_a_section_takes_its_smaller_encoding_and_comes_back(raw, encoding):
    assert read_body(encode_body({COUNTS: [raw]}, 19)) == {COUNTS: (encoding, raw)}


def test_parts_of_different_statistics_are_smaller_apart():
    rng = np.random.default_rng(0)
    parts = [bytes(rng.integers(low, low + 4, 3000, np.uint8)) for low in (0, 90, 200)]
    apart, together = (len(pack_section(p, 19)[1]) for p in (parts, [b"".join(parts)]))
    assert apart < 0.9 * together
    assert read_body(encode_body({INDEX: parts}, 19))[INDEX][1] == b"".join(parts)


@given(st.lists(st.binary(max_size=300), max_size=5), st.integers(1, 50))
def test_a_section_comes_back_in_pieces_of_any_size(parts, piece):
    raw = b"".join(parts)
    section, starts = reader(*parts), range(0, len(raw), piece)
    assert raw == b"".join(section.take(min(piece, len(raw) - n)) for n in starts)
    section.finish()


def reader(*parts):
    body = encode_body({COUNTS: parts}, 19)
    return Body(io.BytesIO(body), len(body)).reader(COUNTS)


def test_reading_more_than_a_section_holds_is_refused():
    with pytest.raises(PatchFormatError, match="too early"):
        reader(b"abc").take(4)


def test_a_section_that_is_not_used_up_is_refused():
    section = reader(b"abc")
    section.take(2)
    with pytest.raises(PatchFormatError, match="1 bytes too many"):
        section.finish()


def zstd(**options):
    return zstandard.ZstdCompressor(**options).compress(TEXT)


def skippable():
    return b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"


def disguised():
    """A skippable frame that seems to end where junk behind a real frame ends."""
    size = 0xC0  # as the descriptor of a header it asks for 14 bytes
    behind = zstd() + b"junk"
    block = (8 + size + len(behind) - 14 - 3) << 3 | 1
    skipped = (bytes(6) + block.to_bytes(3, "little")).ljust(size, b"\0")
    return b"\x50\x2a\x4d\x18" + size.to_bytes(4, "little") + skipped + behind


def large_window():
    parameters = zstandard.ZstdCompressionParameters(window_log=20)
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    return compressor.compress(TEXT * 300)


def named_dictionary():
    """A frame with a dictionary id of 0, which says as little as none."""
    packed = zstd()
    assert packed[4] >> 5 == 0b011  # one segment, size in two bytes
    return packed[:4] + bytes([packed[4] | 1, 0]) + packed[5:]


def test_the_window_of_a_single_segment_is_its_content():
    packed = zstandard.ZstdCompressor().compress(bytes(1 << 18))
    assert packed[4] & 0x20
    body = bytes([1, COUNTS, ZSTD]) + encode_varint(len(packed)) + packed
    assert read_body(body) == {COUNTS: (ZSTD, bytes(1 << 18))}


@pytest.mark.parametrize(
    "packed",
    [
        bytes(40),
        zstandard.ZstdCompressor().compress(b""),
        zstd(write_content_size=False),
        zstd() + b"\0",
        zstd() + zstd(),
        zstd() + skippable(),
        skippable() + zstd(),
        disguised(),
        zstd()[:-1],
        zstd()[:12],
        zstd(write_checksum=True)[:-4],
        large_window(),
        zstandard.ZstdCompressor().compress(bytes((1 << 18) + 1)),
        named_dictionary(),
    ],
    ids=[
        "zeros",
        "of nothing",
        "no content size",
        "trailing byte",
        "two frames",
        "skippable behind",
        "skippable before",
        "skippable before, with junk behind",
        "cut",
        "cut early",
        "cut checksum",
        "large window",
        "large segment",
        "dictionary id",
    ],
)
def test_a_frame_that_is_not_exactly_one_section_is_refused(packed):
    with pytest.raises(PatchFormatError, match=r"frame|window"):
        read_body(bytes([1, COUNTS, ZSTD]) + encode_varint(len(packed)) + packed)


def test_a_frame_with_a_checksum_is_read():
    packed = zstd(write_checksum=True)
    body = bytes([1, COUNTS, ZSTD]) + encode_varint(len(packed)) + packed
    assert read_body(body) == {COUNTS: (ZSTD, TEXT)}


@pytest.mark.parametrize("stated", [len(TEXT) - 1, len(TEXT) + 1])
def test_a_frame_that_states_another_size_is_refused(stated):
    packed = bytearray(zstd())
    assert packed[4] >> 5 == 0b011  # size in two bytes, less 256
    packed[5:7] = (stated - 256).to_bytes(2, "little")
    with pytest.raises(PatchFormatError):
        read_body(bytes([1, COUNTS, ZSTD]) + encode_varint(len(packed)) + packed)


def test_a_frame_that_does_not_decompress_is_refused():
    packed = bytearray(zstd())
    packed[7] |= 3 << 1  # the reserved block type, in a block of the same size
    with pytest.raises(PatchFormatError, match="does not decompress"):
        read_body(bytes([1, COUNTS, ZSTD]) + encode_varint(len(packed)) + packed)
