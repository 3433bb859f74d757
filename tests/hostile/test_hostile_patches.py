# SPDX-License-Identifier: Apache-2.0
"""Damaged and malicious patches are refused before anything is written."""

import hashlib
import struct
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest
import zstandard

from edge_runtime.errors import (
    DpuError,
    PatchError,
    PatchFormatError,
    PatchIntegrityError,
    VerificationError,
)
from edge_runtime.formats import positions, sections
from edge_runtime.formats.apply import apply_patch
from edge_runtime.formats.frames import ZSTD, pack_section
from edge_runtime.formats.header import (
    HEADER_BYTES,
    SUBSPACE,
    PatchHeader,
    encode_header,
)
from edge_runtime.formats.numbers import encode_bits, unary_bits
from edge_runtime.formats.patch import open_patch
from edge_runtime.formats.patch_encoder import encode_patch
from edge_runtime.formats.sections import (
    BITS,
    COLUMNS,
    COUNTS,
    FORMS,
    INDEX,
    INDEX_BITS,
    OUTPUTS,
    PLANES,
    REST,
    SUBSPACES,
    SYMBOLS,
    UNARY,
    Body,
    encode_varint,
    group_kind,
)
from edge_runtime.formats.subspace import decode_terms
from edge_runtime.formats.weights import pack_weights

# One tensor of every kind: listed in one of its columns, a bitmap, those that stay
# listed, and whole; and values in both forms.
RNG = np.random.default_rng(0)
BASE = pack_weights(
    {
        "a": RNG.normal(0, 0.1, (1000, 10)).astype("<f4"),
        "b": RNG.normal(0, 0.1, 50).astype("<f4"),
        "c": RNG.normal(0, 0.1, 30).astype("<f4"),
        "d": RNG.normal(0, 0.1, 5).astype("<f4"),
        "e": np.frombuffer(RNG.bytes(128), "<u2"),
    }
)
CHANGES = [
    np.array([0, 2, 5, 24, 30, 90, 290, 291, 295, 600, 601, 700, 999]) * 10 + 3,
    np.arange(0, 50, 3),
    np.delete(np.arange(30), [4, 7]),
    np.arange(5),
    np.arange(9),
]


def _target():
    moved = {name: array.copy() for name, array in BASE.items()}
    for (name, array), found in zip(moved.items(), CHANGES, strict=True):
        noise = np.frombuffer(RNG.bytes(128), "<u2")[: len(found)]
        array.reshape(-1)[found] = (
            noise if name == "e" else array.reshape(-1)[found] + 1
        )
    return pack_weights(moved)


TARGET = _target()
PATCH = encode_patch(
    PatchHeader(
        "ab" * 32, BASE.fingerprint, TARGET.fingerprint, 1, 1, BASE.layout.file_size
    ),
    CHANGES,
    BASE,
    TARGET,
)
SPARSE, DENSE = group_kind(4, dense=False), group_kind(4, dense=True)
SHORTS = group_kind(2, dense=False)


def refused(data):
    """Whether ``data`` is refused without any byte of a result."""
    with pytest.raises(PatchError) as refusal, open_patch(data) as patch:
        patch.check(BASE.layout)
    return refusal.value


def raw_sections():
    """The raw sections of the good patch."""
    patch = open_patch(PATCH)
    body = patch._body
    return {s.kind: body.reader(s.kind).take(s.raw_size) for s in body.sections}


def forge(raw, *, encode=pack_section, entries=None, tail=b""):
    """A patch with valid checksums around any sections."""
    table, packed_all = bytearray([len(raw) if entries is None else entries]), b""
    for kind, data in raw:
        encoding, packed = encode([data], 3) if data else (0, b"")
        table += bytes([kind, encoding]) + encode_varint(len(packed))
        packed_all += packed
    return seal(bytes(table) + packed_all + tail)


def with_sections(changed):
    """A patch with valid checksums; sections are changed, added or (b"") left out."""
    raw = sorted((raw_sections() | changed).items())
    return forge([(kind, data) for kind, data in raw if data])


def seal(body):
    header = bytearray(PATCH[:HEADER_BYTES])
    struct.pack_into("<Q32s", header, 132, len(body), hashlib.sha256(body).digest())
    struct.pack_into("<I", header, HEADER_BYTES - 4, zlib.crc32(header[:-4]))
    return bytes(header) + b"\0\0" + body


def test_the_forge_makes_good_patches():
    forged = open_patch(with_sections({}))
    assert apply_patch(BASE, forged).data == TARGET.data


def test_the_good_patch_has_sections_of_every_kind():
    group = {SYMBOLS, BITS, REST}
    wanted = {COUNTS, FORMS, INDEX, INDEX_BITS, COLUMNS}
    wanted |= {SHORTS + PLANES, SHORTS + PLANES + 1}
    wanted |= {SPARSE + kind for kind in group} | {DENSE + kind for kind in group}
    assert raw_sections().keys() == wanted


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
    assert "end at byte" in str(refused(forge(list(raw_sections().items()), tail=b"x")))


def test_damage_behind_the_header_is_found_before_anything_is_unpacked(monkeypatch):
    def unpack(*_):
        raise AssertionError("unpacked")

    monkeypatch.setattr(sections, "decode_varint", unpack)
    damaged = bytearray(PATCH)
    damaged[-1] ^= 1
    assert isinstance(refused(bytes(damaged)), PatchIntegrityError)


def index_of(changes):
    """The sections that hold these positions."""
    # As vectors: without columns, where any position can be written.
    shapes = [(tensor.size,) for tensor in BASE.layout.tensors]
    fine, found = positions.encode_positions(list(zip(shapes, changes, strict=True)))
    forms = bytes([fine]) + raw_sections()[FORMS][1:]
    return {kind: b"".join(parts) for kind, parts in found.items()} | {FORMS: forms}


@pytest.mark.parametrize("position", [10000, 10001, 10**6, 2**33])
def test_an_index_out_of_bounds_is_refused(position):
    changes = [np.array([*CHANGES[0][:-1], position]), *CHANGES[1:]]
    forged = with_sections(index_of(changes))
    assert f"out of bounds: {position} of 10000" in str(refused(forged))


@pytest.mark.parametrize("number", range(12))
def test_a_gap_from_one_small_tensor_into_the_next_is_refused(number):
    base = pack_weights({f"t{n:02}": np.zeros(40, "<f4") for n in range(12)})
    moved = {name: array.copy() for name, array in base.items()}
    for array in moved.values():
        array[[1, 5]] = 1
    target, changes = pack_weights(moved), [np.array([1, 5])] * 12
    header = PatchHeader(
        "00" * 32, base.fingerprint, target.fingerprint, 1, 1, base.layout.file_size
    )
    with open_patch(encode_patch(header, changes, base, target)) as patch:
        reader = patch._body.reader
        raw = {s.kind: reader(s.kind).take(s.raw_size) for s in patch.sections}
    raw[FORMS] = bytes([7]) + raw[FORMS][1:]  # every gap is its own symbol
    del raw[UNARY], raw[INDEX_BITS]
    for gap, error in [(3, None), (37, VerificationError), (38, PatchFormatError)]:
        index = bytearray(bytes([1, 3]) * 12)
        index[2 * number + 1] = gap
        body = sections.encode_body(
            {k: [v] for k, v in (raw | {INDEX: index}).items()}, 3
        )
        with open_patch(encode_header(header, body) + b"\0\0" + body) as patch:
            if error is None:
                assert apply_patch(base, patch).data == target.data
            else:
                with pytest.raises(error, match=r"40 of 40|fingerprint"):
                    apply_patch(base, patch)


def test_gaps_in_unary_are_refused_where_they_are_not_what_they_should_be():
    # Without columns: of the first tensor, those that stay of the third, of the last.
    gaps = np.append(np.diff(CHANGES[0], prepend=-1) - 1, [4, 2, *[0] * 9])
    even = {
        FORMS: bytes([positions.UNARY_GAPS + 9]) + raw_sections()[FORMS][1:],
        INDEX: raw_sections()[INDEX][13:20],  # the bitmap of the second
        INDEX_BITS: encode_bits(gaps, np.full(24, 9)),
        COLUMNS: b"",
        UNARY: encode_bits(*unary_bits(gaps, 9)),
    }
    with open_patch(with_sections(even)) as patch:
        assert apply_patch(BASE, patch).data == TARGET.data
    unary = even[UNARY]
    refusals = {
        "too early": {UNARY: unary[:-1]},
        "left over": {UNARY: unary + b"\0"},
        "too many": {INDEX_BITS: even[INDEX_BITS] + b"\1"},
        "out of bounds": {UNARY: encode_bits(*unary_bits(gaps + 512 * (gaps == 0), 9))},
        "at most 32": {FORMS: b"\x29" + even[FORMS][1:]},
        "ends too": {FORMS: b"\x02" + even[FORMS][1:]},
    }
    for message, change in refusals.items():
        assert message in str(refused(with_sections(even | change)))


def test_unary_that_nothing_asks_for_is_refused():
    assert "too many" in str(refused(with_sections({UNARY: b"\1"})))


def test_unary_may_not_be_compressed():
    # Ones at the end of zeros: a gigabyte of them would take an hour and 100 KB.
    raw = sorted((raw_sections() | {UNARY: bytes(1 << 16)}).items())
    assert "encoding 1" in str(refused(forge(raw)))


def test_positions_that_stay_out_of_bounds_are_refused():
    index = bytearray(raw_sections()[INDEX])
    assert index[20:22] == bytes([4, 2])  # behind 13 gaps and 7 bytes of bitmap
    index[21] = 29
    assert "out of bounds: 34 of 30" in str(
        refused(with_sections({INDEX: bytes(index)}))
    )


@pytest.mark.parametrize("bit", [0, 50])
def test_a_bitmap_with_other_bits_than_its_count_is_refused(bit):
    index = bytearray(raw_sections()[INDEX])
    start = len(CHANGES[0])
    index[start + bit // 8] ^= 1 << bit % 8
    assert "bitmap" in str(refused(with_sections({INDEX: bytes(index)})))


@pytest.mark.parametrize("columns", [b"\0\0", b"\x08\x04", b"\x0c\0", b"\xff\x03"])
def test_other_columns_are_refused_or_give_other_weights(columns):
    assert raw_sections()[COLUMNS] == b"\x08\0"  # column 3 of 10
    with (
        pytest.raises(DpuError),
        open_patch(with_sections({COLUMNS: columns})) as patch,
    ):
        apply_patch(BASE, patch)


def test_an_index_that_is_longer_than_its_positions_is_refused():
    index = raw_sections()[INDEX]
    assert "too many" in str(refused(with_sections({INDEX: index + b"\1"})))
    assert "too early" in str(refused(with_sections({INDEX: index[:-1]})))


VALUES = [
    *(group + kind for group in (SPARSE, DENSE) for kind in (SYMBOLS, BITS, REST)),
    *(SHORTS + PLANES + plane for plane in (0, 1)),
]


@pytest.mark.parametrize("kind", [COUNTS, FORMS, INDEX, INDEX_BITS, COLUMNS, *VALUES])
@pytest.mark.parametrize(
    "edit",
    [lambda raw: raw[:-1], lambda raw: raw + b"\x01", lambda raw: b""],
    ids=["shorter", "longer", "missing"],
)
def test_a_section_of_the_wrong_size_is_refused(kind, edit):
    edited = edit(raw_sections()[kind])
    forged = with_sections({kind: edited})
    # How many bits there must be only the base tells; and where no columns are given,
    # all of them count.
    bits = kind >= SHORTS and kind & 15 in (BITS, REST)
    if bits or (kind == COLUMNS and not edited):
        error = PatchFormatError if bits else VerificationError
        with pytest.raises(error), open_patch(forged) as patch:
            apply_patch(BASE, patch)
    else:
        refused(forged)


@pytest.mark.parametrize(
    "counts",
    [
        (10001, 17, 28, 5, 9),
        (14, 17, 28, 5, 9),
        (12, 17, 28, 5, 9),
        (13, 16, 28, 5, 9),
        (13, 17, 29, 5, 9),
        (13, 17, 28, 4, 9),
        (13, 17, 28, 6, 9),
        (13, 17, 28, 5, 8),
        (13, 17, 28, 5, 0),
        (13, 17, 28, 5),
        (13, 17, 28, 5, 9, 0),
    ],
)
def test_counts_that_do_not_add_up_are_refused(counts):
    assert raw_sections()[COUNTS] == bytes([13, 17, 28, 5, 9])
    refused(with_sections({COUNTS: b"".join(map(encode_varint, counts))}))


def test_numbers_that_are_not_in_their_shortest_form_are_refused():
    refused(with_sections({COUNTS: bytes([0x8D, 0, 17, 28, 5, 9])}))
    forms = raw_sections()[FORMS]
    refused(with_sections({FORMS: bytes([forms[0] | 0x80, 0]) + forms[1:]}))


@pytest.mark.parametrize("at", range(13))
@pytest.mark.parametrize(
    "value", [b"\x09", b"\x21", b"\xff\xff\x03", b"\xff" * 8 + b"\x7f"]
)
def test_forms_that_do_not_fit_are_refused(at, value):
    file = iter(raw_sections()[FORMS])
    numbers = [sections.decode_varint(file) for _ in range(13)]
    forms = [encode_varint(number) for number in numbers]
    forms[at] = value
    forged = with_sections({FORMS: b"".join(forms)})
    if (at in (7, 11) and len(value) == 1) or (at in (5, 9) and value == b"\x09"):
        # Such drops and units are possible: they give other weights.
        with pytest.raises(DpuError), open_patch(forged) as patch:
            apply_patch(BASE, patch)
    else:
        refused(forged)


def test_more_tensors_than_a_weight_file_may_have_are_refused_before_any_takes_memory():
    count = 400_000
    term = b"\1\1\1\1\1" + b"\xff" * (count // 8) + b"\x80\x3f" * count + bytes(8)
    many = {COUNTS: [bytes(count)], SUBSPACES: [term]}
    body = sections.encode_body(many, 3)
    header = replace(open_patch(PATCH).header, critical=SUBSPACE)
    forged = encode_header(header, body) + b"\0\0" + body
    assert len(forged) < 1000
    tracemalloc.start()
    assert "has 400000 tensors, 100000 are accepted" in str(refused(forged))
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_scales_of_many_tensors_take_little_memory():
    count, terms = 8000, 61
    term = b"\1\1\1\1" + b"\xff" * (count // 8) + b"\x80\x3f" * count + bytes(8)
    data = encode_varint(terms) + term * terms
    assert len(data) < 1 << 20
    tracemalloc.start()
    found = decode_terms(data, count)
    assert tracemalloc.get_traced_memory()[1] < 12 << 20
    tracemalloc.stop()
    assert len(found) == terms
    assert found[9].scales == dict.fromkeys(range(count), 1.0)
    assert 0 in found[9].scales
    assert -1 not in found[9].scales
    assert count not in found[9].scales


@pytest.mark.parametrize("size", [1, 3, 5, (1 << 20) - 1])
def test_expected_outputs_that_end_within_a_value_are_refused(monkeypatch, size):
    forged = with_sections({OUTPUTS: RNG.bytes(size)})
    monkeypatch.setattr(Body, "whole", but_outputs(Body.whole))
    assert "not a whole number of float32" in str(refused(forged))


def but_outputs(whole):
    """Unpack any section but the expected outputs."""

    def unpack(body, kind):
        assert kind != OUTPUTS, "unpacked before its size was looked at"
        return whole(body, kind)

    return unpack


def test_as_many_expected_outputs_as_a_patch_can_carry_are_read():
    data = RNG.bytes(1 << 20)
    with open_patch(with_sections({OUTPUTS: data})) as patch:
        assert patch.outputs == data
        assert apply_patch(BASE, patch).data == TARGET.data
    assert "too large" in str(refused(with_sections({OUTPUTS: data + bytes(4)})))


@pytest.mark.parametrize("kind", [COUNTS, FORMS, OUTPUTS])
def test_a_section_of_any_length_as_large_as_memory_is_refused(kind):
    data = forge(sorted((raw_sections() | {kind: bytes(1 << 24)}).items()))
    tracemalloc.start()
    refused(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_decompression_bomb_is_refused_without_memory():
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    raw = raw_sections()

    def pack(parts, level):
        return (ZSTD, bomb) if parts == [raw[INDEX]] else pack_section(parts, level)

    data = forge(list(raw.items()), encode=pack)
    tracemalloc.start()
    refused(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_sections_out_of_order_or_twice_are_refused():
    raw = list(raw_sections().items())
    assert "not in order" in str(refused(forge(raw[::-1])))
    assert "not in order" in str(refused(forge([*raw, raw[-1]])))


def test_sections_of_unknown_kind_or_encoding_are_refused():
    raw = list(raw_sections().items())
    assert "does not know" in str(refused(forge([*raw, (0xC0, b"x")])))
    unknown = forge(raw, encode=lambda parts, _: (7, parts[0]))
    assert "does not know" in str(refused(unknown))


def test_empty_sections_are_refused():
    raw = sorted((raw_sections() | {SPARSE + PLANES: b""}).items())
    assert "is empty" in str(refused(forge(raw)))


@pytest.mark.parametrize(
    "kind",
    [
        SPARSE + PLANES,
        DENSE + PLANES + 3,
        SHORTS + SYMBOLS,
        SHORTS + BITS,
        SHORTS + REST,
    ]
    + [group_kind(8, dense) + kind for dense in (False, True) for kind in range(3)],
)
def test_values_that_nobody_asked_for_are_refused(kind):
    assert "its counts ask for" in str(refused(with_sections({kind: b"12345"})))


@pytest.mark.parametrize("entries", [0, 1, 200, 255])
def test_a_wrong_number_of_sections_is_refused(entries):
    refused(forge(list(raw_sections().items()), entries=entries))


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
        raw = raw_sections()
        kind = int(rng.choice(list(raw)))
        data = bytearray(raw[kind])
        data[rng.integers(len(data))] = rng.integers(256)
        try:
            with open_patch(with_sections({kind: bytes(data)})) as patch:
                result = apply_patch(BASE, patch)
        except DpuError:
            continue
        assert result.data == TARGET.data
