# SPDX-License-Identifier: Apache-2.0
import errno
import io
import tempfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.formats import spool
from edge_runtime.formats.frames import pack_section
from edge_runtime.formats.numbers import BitWriter, encode_bits, unary_bits
from edge_runtime.formats.spool import Spool


def spool_of(parts):
    made = Spool()
    for part in parts:
        made.write(part)
        made.stops.append(made.size)
    return made


@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(0, 60))
def test_what_was_written_comes_back_from_memory_and_from_a_file(parts, kept):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(spool, "KEPT_BYTES", kept)
        patched.setattr(spool, "READ_BYTES", 7)
        made = spool_of(parts)
        assert list(made) == parts
        assert b"".join(made.pieces()) == b"".join(parts)
        assert pack_section(made, 3) == pack_section(parts, 3)


def test_large_content_is_not_held_in_memory():
    made = Spool()
    for _ in range(40):
        made.write(np.zeros(1 << 20, np.uint8))
    assert made._file is not None
    assert not made._memory


@pytest.mark.parametrize("when", ["write", "flush"])
def test_a_full_folder_for_temporary_files_is_named(monkeypatch, when):
    class Full(io.BytesIO):
        def refuse(self, *_):
            raise OSError(errno.ENOSPC, "No space left on device")

    setattr(Full, when, Full.refuse)
    monkeypatch.setattr(spool, "KEPT_BYTES", 1)
    monkeypatch.setattr(spool, "TemporaryFile", lambda **_: Full())

    def spooled():
        made = Spool()
        made.write(b"ab")
        return made.read(0, 2)

    with pytest.raises(OSError, match="No space left") as refusal:
        spooled()
    assert refusal.value.filename == tempfile.gettempdir()


NUMBERS = st.lists(
    st.tuples(st.integers(0, 2**31), st.integers(0, 31), st.booleans()), max_size=60
)


@given(NUMBERS)
def test_bits_written_in_pieces_are_those_that_are_written_at_once(numbers):
    made, piece = Spool(), []
    writer = BitWriter(made)
    for number, width, ends in numbers:
        piece.append((number, width))
        if ends:
            writer.write(*np.array(piece, np.int64).T)
            piece = []
    writer.write(*np.array(piece, np.int64).reshape(-1, 2).T)
    writer.finish()
    values, widths = (
        np.array([(n, w) for n, w, _ in numbers], np.int64).reshape(-1, 2).T
    )
    assert made.read(0, made.size) == encode_bits(values, widths)


@given(st.lists(st.integers(0, 3000), max_size=30), st.integers(0, 6))
def test_unary_is_so_many_zeros_and_a_one(numbers, width):
    bits = "".join("0" * (n >> width) + "1" for n in numbers)
    raw = np.packbits([int(bit) for bit in bits] or np.zeros(0, int), bitorder="little")
    found = encode_bits(*unary_bits(np.array(numbers, np.int64), width))
    assert found == raw.tobytes()
