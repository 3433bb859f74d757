"""Damaged and malicious patches are refused before anything is written."""

import hashlib
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import zstandard

from edge_runtime import codec
from edge_runtime.apply import apply_patch
from edge_runtime.errors import DpuError, PatchError, PatchIntegrityError
from edge_runtime.header import HEADER_BYTES, PatchHeader
from edge_runtime.patch import COUNTS, GAP_BITS, GAPS, encode_patch, open_patch
from edge_runtime.weights import pack_weights

BASE = pack_weights({"w": np.zeros((40, 40), "<f4"), "b": np.zeros(5, "<f4")})
TARGET = pack_weights(
    {
        "w": np.where(np.arange(1600) % 97 == 3, 1.5, 0).astype("<f4").reshape(40, 40),
        "b": np.ones(5, "<f4"),
    }
)
CHANGES = [np.arange(5), np.flatnonzero(TARGET["w"])]
PATCH = encode_patch(
    PatchHeader(
        "ab" * 32, BASE.fingerprint, TARGET.fingerprint, 1, 1, BASE.layout.file_size
    ),
    CHANGES,
    TARGET,
)
BODY = HEADER_BYTES + 2
VALUE_PLANES = range(0x50, 0x54)


def refused(data):
    """Whether ``data`` is refused without any byte of a result."""
    with pytest.raises(PatchError) as refusal, open_patch(data) as patch:
        patch.check(BASE.layout)
    return refusal.value


def sections():
    """The raw sections of the good patch."""
    patch = open_patch(PATCH)
    return {s.kind: patch._reader(s.kind).take(s.raw_size) for s in patch.sections}


def forge(raw, *, encode=codec.pack_section, entries=None, tail=b""):
    """A patch with valid checksums around any sections."""
    table, packed_all = bytearray([len(raw) if entries is None else entries]), b""
    for kind, data in raw:
        encoding, packed = encode(data, 3)
        table += bytes([kind, encoding])
        table += codec.encode_varint(len(packed)) + codec.encode_varint(len(data))
        packed_all += packed
    return seal(bytes(table) + packed_all + tail)


def seal(body):
    header = bytearray(PATCH[:HEADER_BYTES])
    struct.pack_into("<Q32s", header, 132, len(body), hashlib.sha256(body).digest())
    struct.pack_into("<I", header, HEADER_BYTES - 4, zlib.crc32(header[:-4]))
    return bytes(header) + b"\0\0" + body


def test_the_forge_makes_good_patches():
    forged = open_patch(forge(list(sections().items())))
    assert apply_patch(BASE, forged).data == TARGET.data


def test_a_patch_truncated_at_any_byte_is_refused():
    for cut in range(len(PATCH)):
        refused(PATCH[:cut])


def test_a_patch_with_any_flipped_bit_is_refused():
    for position in range(8 * len(PATCH)):
        data = bytearray(PATCH)
        data[position // 8] ^= 1 << position % 8
        refused(bytes(data))


def test_trailing_bytes_are_refused():
    assert "something follows" in str(refused(PATCH + b"\0"))
    assert "end at byte" in str(refused(forge(list(sections().items()), tail=b"x")))


def test_damage_behind_the_header_is_found_before_anything_is_unpacked(monkeypatch):
    def unpack(*_):
        raise AssertionError("unpacked")

    monkeypatch.setattr(codec, "decode_varint", unpack)
    damaged = bytearray(PATCH)
    damaged[-1] ^= 1
    assert isinstance(refused(bytes(damaged)), PatchIntegrityError)


def with_section(kind, data):
    return forge(list((sections() | {kind: data}).items()))


@pytest.mark.parametrize("position", [1600, 1601, 10**6, 2**45])
def test_an_index_out_of_bounds_is_refused(position):
    gaps, bits = codec.encode_positions([np.array([*CHANGES[1][:-1], position])])
    forged = forge(list((sections() | {GAPS: gaps, GAP_BITS: bits}).items()))
    assert f"out of bounds: {position} of 1600" in str(refused(forged))


@pytest.mark.parametrize("kind", [COUNTS, GAPS, GAP_BITS, *VALUE_PLANES])
@pytest.mark.parametrize(
    "edit",
    [lambda raw: raw[:-1], lambda raw: raw + b"\x01", lambda raw: b""],
    ids=["shorter", "longer", "missing"],
)
def test_a_section_of_the_wrong_size_is_refused(kind, edit):
    raw = sections()
    raw[kind] = edit(raw[kind])
    refused(forge([(k, data) for k, data in raw.items() if data]))


@pytest.mark.parametrize(
    "counts",
    [
        b"\x06\x11",
        b"\x05\xc1\x0c",
        b"\x05\x10",
        b"\x05",
        b"\x05\x11\x00",
        b"\x85\x00\x11",
    ],
    ids=[
        "more than a tensor has",
        "more than a sparse tensor has",
        "fewer than travel",
        "a tensor missing",
        "a tensor too many",
        "not the shortest form",
    ],
)
def test_counts_that_do_not_add_up_are_refused(counts):
    refused(with_section(COUNTS, counts))


def test_counts_of_a_gigabyte_are_refused_without_memory():
    data = forge([(COUNTS, bytes(1 << 24))])
    tracemalloc.start()
    refused(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_decompression_bomb_is_refused_without_memory():
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))

    def pack(raw, level):
        return (codec.ZSTD, bomb) if raw == gaps else codec.pack_section(raw, level)

    gaps = sections()[GAPS]
    data = forge(list(sections().items()), encode=pack)
    tracemalloc.start()
    refused(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_sections_out_of_order_or_twice_are_refused():
    raw = list(sections().items())
    assert "not in order" in str(refused(forge(raw[::-1])))
    assert "not in order" in str(refused(forge([*raw, raw[-1]])))


def test_sections_of_unknown_kind_or_encoding_are_refused():
    raw = list(sections().items())
    assert "does not know" in str(refused(forge([*raw, (0x70, b"x")])))
    unknown = forge(raw, encode=lambda data, _: (7, data))
    assert "does not know" in str(refused(unknown))


def test_empty_sections_are_refused():
    refused(forge([*sections().items(), (0x58, b"")]))


def test_values_that_nobody_asked_for_are_refused():
    refused(forge([*sections().items(), (0x58, b"12345678")]))


@pytest.mark.parametrize("entries", [0, 1, 200, 255])
def test_a_wrong_number_of_sections_is_refused(entries):
    refused(forge(list(sections().items()), entries=entries))


@pytest.mark.parametrize("offset", [10, 124, 132])
@pytest.mark.parametrize("value", [0, 1, 0xFFFF, 0x7FFF])
def test_length_fields_of_the_header_are_not_trusted(offset, value):
    header = bytearray(PATCH[:HEADER_BYTES])
    struct.pack_into("<H", header, offset, value)
    struct.pack_into("<I", header, HEADER_BYTES - 4, zlib.crc32(header[:-4]))
    refused(bytes(header) + PATCH[HEADER_BYTES:])


def test_random_sections_never_do_more_than_be_refused():
    rng = np.random.default_rng(0)
    for _ in range(500):
        raw = sections()
        kind = int(rng.choice(list(raw)))
        data = bytearray(raw[kind])
        data[rng.integers(len(data))] = rng.integers(256)
        forged = with_section(kind, bytes(data))
        try:
            with open_patch(forged) as patch:
                result = apply_patch(BASE, patch)
        except DpuError:
            continue
        assert result.data == TARGET.data
