# SPDX-License-Identifier: Apache-2.0
"""What is used of a patch is what was hashed, whoever writes to the file meanwhile."""

import hashlib
import io
import os
import threading
from contextlib import suppress

import numpy as np
import pytest

from edge_runtime.errors import DpuError, PatchFormatError, PatchIntegrityError
from edge_runtime.formats.apply import apply_patch
from edge_runtime.formats.checked_file import BLOCK_BYTES, KEPT_BLOCKS, CheckedFile
from edge_runtime.formats.header import HEADER_BYTES, PatchHeader
from edge_runtime.formats.patch import open_patch
from edge_runtime.formats.patch_encoder import encode_patch
from edge_runtime.formats.weights import pack_weights

LARGE = (KEPT_BLOCKS + 40) * BLOCK_BYTES + 77
DATA = np.random.default_rng(0).bytes(LARGE)


class Changing(io.BytesIO):
    """A file in which somebody flips a bit after so many bytes were read."""

    def __init__(self, data, at, after):
        super().__init__(data)
        self.at, self.left = at, after

    def read(self, size=-1):
        self.left -= size
        if self.left < 0 <= self.at:
            self.getbuffer()[self.at] ^= 1
            self.at = -1
        return super().read(size)


def checked(file, start=0, size=LARGE):
    digest = hashlib.sha256()
    file.seek(start) if file.seekable() else file.read(start)
    return CheckedFile(file, start, size - start, digest.update), digest.hexdigest()


@pytest.mark.parametrize("start", [0, 1, 188, BLOCK_BYTES])
def test_it_reads_as_the_file_does(start):
    file, _ = checked(io.BytesIO(DATA), start)
    rng = np.random.default_rng(1)
    for _ in range(200):
        at = start + int(rng.integers(LARGE - start))
        size = int(rng.integers(3 * BLOCK_BYTES))
        assert file.seek(at) == at
        assert file.read(size) == DATA[at : at + size]
        assert file.tell() == min(at + size, LARGE)
    assert file.seek(0, io.SEEK_END) == LARGE
    assert file.read() == b""


@pytest.mark.parametrize("at", [0, 100, BLOCK_BYTES, LARGE - 1])
def test_a_bit_that_changes_after_the_hash_is_never_used(at):
    source = Changing(DATA, at, after=LARGE + 1)
    file, digest = checked(source)
    assert digest == hashlib.sha256(DATA).hexdigest()
    source.read(1)  # from here on the file is another
    assert source.getvalue() != DATA
    used = b""
    try:
        file.seek(0)
        while chunk := file.read(1000):
            used += chunk
    except PatchIntegrityError as err:
        assert "changed while it was read" in str(err)
    assert DATA.startswith(used)


def test_a_small_file_is_never_read_again():
    source = io.BytesIO(DATA[: KEPT_BLOCKS * BLOCK_BYTES])
    file, _ = checked(source, size=KEPT_BLOCKS * BLOCK_BYTES)
    source.getbuffer()[:] = bytes(KEPT_BLOCKS * BLOCK_BYTES)
    file.seek(0)
    assert file.read() == DATA[: KEPT_BLOCKS * BLOCK_BYTES]


def test_memory_does_not_grow_with_the_file():
    file, _ = checked(io.BytesIO(DATA))
    file.read()
    assert sum(map(len, file._kept.values())) <= KEPT_BLOCKS * BLOCK_BYTES


@pytest.mark.parametrize("size", [-1, 1])
def test_a_file_of_another_size_is_refused(size):
    with pytest.raises(PatchFormatError, match="does not end where its header says"):
        checked(io.BytesIO(DATA), size=LARGE + size)


@pytest.mark.parametrize("size", [100, LARGE])
def test_a_pipe_reads_as_a_file_does(size):
    ours, theirs = os.pipe()

    def feed():
        with open(theirs, "wb") as out:
            out.write(DATA[:size])

    thread = threading.Thread(target=feed)
    thread.start()
    with open(ours, "rb") as pipe:
        file, digest = checked(pipe, 10, size)
        assert digest == hashlib.sha256(DATA[10:size]).hexdigest()
        for at in (size - 5, 10):
            file.seek(at)
            assert file.read(5) == DATA[at : at + 5]
        file.close()
    thread.join()


def test_a_pipe_that_never_ends_is_left_where_the_patch_ends():
    endless = open("/dev/zero", "rb")
    with endless, pytest.raises(PatchFormatError, match="something follows it"):
        CheckedFile(endless, 0, 1000, lambda _: None)


# A patch as a whole -------------------------------------------------------------------

SIZE = 1 << 21
BASE = pack_weights({"w": np.zeros(SIZE, "<f4")})
TARGET = pack_weights(
    {"w": np.random.default_rng(2).integers(0, 1 << 32, SIZE, "<u4").view("<f4")}
)
HEADER = PatchHeader(
    "00" * 32, BASE.fingerprint, TARGET.fingerprint, 1, 1, BASE.layout.file_size
)
OUTPUTS = np.arange(4, dtype="<f4").tobytes()
PATCH = encode_patch(HEADER, [np.arange(SIZE)], BASE, TARGET, level=1, outputs=OUTPUTS)


def test_the_patch_is_larger_than_what_is_kept_of_it():
    assert len(PATCH) > KEPT_BLOCKS * BLOCK_BYTES


@pytest.mark.parametrize("place", range(0, 100, 4))
def test_a_patch_that_changes_while_it_is_read_gives_its_target_or_nothing(place):
    """Wherever the bit is, and whenever it flips."""
    rng = np.random.default_rng(place)
    at = HEADER_BYTES + int(rng.integers(len(PATCH) - HEADER_BYTES))
    after = int(rng.integers(2 * len(PATCH)))
    try:
        with open_patch(Changing(PATCH, at, after)) as patch:
            assert patch.outputs == OUTPUTS
            result = apply_patch(BASE, patch)
    except DpuError:
        return
    assert result.fingerprint == TARGET.fingerprint


@pytest.mark.parametrize("count", [100, SIZE], ids=["small", "large"])
def test_outputs_that_are_exchanged_after_the_hash_are_not_believed(count):
    """What 3 of 20 tries of a process that toggles a byte got through once."""
    at = np.arange(count)
    data = encode_patch(HEADER, [at], BASE, TARGET, level=1, outputs=OUTPUTS)
    start = data.index(OUTPUTS)
    file = Changing(data, start, after=len(data) + 1)
    with suppress(PatchIntegrityError), open_patch(file) as patch:
        assert patch.outputs == OUTPUTS
        file.read(len(data))
        assert OUTPUTS not in file.getvalue()
        patch._file.seek(start)
        assert patch._file.read(16) == OUTPUTS


def test_a_patch_far_larger_than_its_weight_file_is_refused_unread():
    small = PatchHeader("00" * 32, "11" * 32, "22" * 32, 1, 1, 1000)
    with pytest.raises(PatchFormatError, match="weight file of 1000, at most 4196304"):
        open_patch(encode_patch(small, [np.arange(SIZE)], BASE, TARGET, level=1)[:500])
