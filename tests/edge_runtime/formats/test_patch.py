# SPDX-License-Identifier: Apache-2.0
"""Patches: what is encoded comes back, for any type, shape and density."""

import dataclasses
import io
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import (
    PatchFormatError,
    PatchVersionError,
    VerificationError,
    WrongModelError,
    WrongParentError,
)
from edge_runtime.formats import patch as patch_module
from edge_runtime.formats.apply import apply_chunks, apply_patch
from edge_runtime.formats.header import HEADER_BYTES, PatchHeader, encode_header
from edge_runtime.formats.patch import open_patch
from edge_runtime.formats.patch_encoder import encode_patch
from edge_runtime.formats.sections import FORMS, SYMBOLS, encode_body, group_kind
from edge_runtime.formats.weights import CHUNK_BYTES, pack_weights
from edge_runtime.limits import Limits

TYPES = ["<f8", "<i8", "<f4", "<i4", "<f2", "<u2", "i1", "?"]
STORED_TYPES = {"BF16": "<u2", "F8_E4M3": "u1"}  # that NumPy lacks
SHAPES = [(), (1,), (0,), (7,), (64, 9), (3, 0, 2), (5, 4, 3, 3)]


def make_update(specs, density, seed):
    """Base and target weights that differ at random positions, and those positions."""
    rng = np.random.default_rng(seed)
    base, target = {}, {}
    for number, (code, shape) in enumerate(specs):
        dtype = STORED_TYPES.get(code, code)
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        base[f"t{number}"] = np.frombuffer(rng.bytes(size), dtype).reshape(shape)
        changed = rng.random(shape) < density
        other = np.frombuffer(rng.bytes(size), dtype).reshape(shape)
        target[f"t{number}"] = np.where(changed, other, base[f"t{number}"])
    codes = {f"t{n}": code for n, (code, _) in enumerate(specs) if code in STORED_TYPES}
    base, target = pack_weights(base, codes), pack_weights(target, codes)
    return base, target, differences(base, target)


def differences(base, target):
    changes = []
    for tensor in base.layout.tensors:
        one, two = (
            np.frombuffer(w.data[tensor.start : tensor.stop], f"<u{tensor.item_size}")
            for w in (base, target)
        )
        changes.append(np.flatnonzero(one != two))
    return changes


def header_of(base, target, **fields):
    record = {
        "model": "ab" * 32,
        "parent": base.fingerprint,
        "target": target.fingerprint,
        "round": 3,
        "counter": 4,
        "file_size": base.layout.file_size,
    }
    return PatchHeader(**record | fields)


def make_patch(specs=(("<f4", (64, 9)), ("<f4", (7,))), density=0.1, seed=0, **fields):
    base, target, changes = make_update(specs, density, seed)
    data = encode_patch(header_of(base, target, **fields), changes, base, target)
    return base, target, data


@given(
    st.lists(
        st.tuples(st.sampled_from([*TYPES, *STORED_TYPES]), st.sampled_from(SHAPES)),
        max_size=6,
    ),
    st.sampled_from([0.0, 0.01, 0.3, 0.6, 0.9, 1.0]),
    st.integers(0, 2**32),
)
def test_any_update_comes_back_bit_for_bit(specs, density, seed):
    base, target, data = make_patch(specs, density, seed)
    with open_patch(data) as patch:
        assert apply_patch(base, patch).data == target.data


def test_nan_payloads_and_negative_zeros_travel():
    base = pack_weights({"w": np.zeros(6, "<f4")})
    bits = np.array([0x80000000, 0x7FC00001, 0xFFC00002, 0x7F800001, 1, 0], "<u4")
    target = pack_weights({"w": bits.view("<f4")})
    data = encode_patch(header_of(base, target), [np.arange(5)], base, target)
    assert apply_patch(base, open_patch(data))["w"].tobytes() == bits.tobytes()


def test_an_empty_update_is_a_patch_too():
    base, target, data = make_patch(density=0.0)
    assert open_patch(data).counts == (0, 0)
    assert apply_patch(base, open_patch(data)).data == target.data


def test_header_fields_come_back():
    base, target, data = make_patch(round=2**32 - 1, counter=2**64 - 1, optional=5)
    header = open_patch(data).header
    assert header == header_of(
        base, target, round=2**32 - 1, counter=2**64 - 1, optional=5
    )


def trained(shape, density, seed=0):
    """Base and target float32 weights, a random share of them moved by a little."""
    rng = np.random.default_rng(seed)
    base = rng.normal(0, 0.05, shape).astype("<f4")
    step = rng.normal(0, 0.02, shape) * (rng.random(shape) < density)
    bias = rng.normal(0, 0.1, shape[0]).astype("<f4")
    one = pack_weights({"w": base, "b": bias})
    two = pack_weights({"w": base + step.astype("<f4"), "b": bias * np.float32(1.01)})
    return one, two


def test_small_tensors_of_types_of_one_size_each_keep_their_line():
    rng = np.random.default_rng(0)
    base, target = {}, {}
    for number in range(20):
        name = f"t{number:02}"
        if number % 2:
            base[name] = rng.integers(-900, 900, 60, "<i4")
            target[name] = base[name] + rng.integers(-3, 4, 60, "<i4")
        else:
            base[name] = rng.normal(0, 0.05, 60).astype("<f4")
            target[name] = base[name] + rng.normal(0, 0.02, 60).astype("<f4")
    base, target = pack_weights(base), pack_weights(target)
    header = header_of(base, target)
    with open_patch(
        encode_patch(header, differences(base, target), base, target)
    ) as patch:
        assert any(s.kind == group_kind(4, True) + SYMBOLS for s in patch.sections)
        assert apply_patch(base, patch).data == target.data


def test_framing_takes_at_most_250_bytes():
    base, target = trained((400, 1000), 0.1)
    changes = differences(base, target)
    patch = open_patch(encode_patch(header_of(base, target), changes, base, target))
    # Everything but positions and values; the forms of the values count as framing.
    content = [s.packed_size for s in patch.sections if s.kind != FORMS]
    assert len(content) >= 8
    assert patch.size - sum(content) <= 250


def test_applying_needs_memory_that_does_not_grow_with_the_patch(monkeypatch):
    monkeypatch.setattr(patch_module, "KEPT_BYTES", 1 << 14)
    peaks = []
    for rows in (600, 6000):
        base, target = trained((rows, 1000), 0.1)
        header = header_of(base, target)
        data = encode_patch(header, differences(base, target), base, target, level=3)
        patch = open_patch(data)
        tracemalloc.start()
        patch.check(base.layout)
        for _ in apply_chunks([base.data], base.layout, patch):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 16 << 20


def test_a_dense_patch_is_applied_whether_or_not_its_positions_are_kept(monkeypatch):
    base, target, data = make_patch([("<f4", (300, 1000))], 0.2)
    for kept in (0, 16 << 20):
        monkeypatch.setattr(patch_module, "KEPT_BYTES", kept)
        assert apply_patch(base, open_patch(data)).data == target.data


def test_the_same_update_gives_the_same_bytes():
    assert make_patch()[2] == make_patch()[2]


def test_a_patch_is_read_from_a_file_as_from_bytes(tmp_path):
    base, target, data = make_patch()
    (tmp_path / "a.dpu").write_bytes(data)
    with open_patch(tmp_path / "a.dpu") as patch:
        assert apply_patch(base, patch).data == target.data


@settings(max_examples=20)
@given(
    st.lists(st.integers(5000, 3 * CHUNK_BYTES), min_size=1, max_size=5),
    st.sampled_from([bytes, bytearray]),
    st.sampled_from([200_000, CHUNK_BYTES]),
)
def test_the_base_may_arrive_in_pieces_of_any_size(sizes, kind, rows):
    base, target, data = make_patch([("<f8", (rows,)), ("<f2", (500_001,))], 0.01)
    source, pieces = io.BytesIO(base.data), []
    while piece := source.read(sizes[len(pieces) % len(sizes)]):
        pieces.append(kind(piece))
    patch = open_patch(data)
    # A piece is valid until the next one is asked for.
    found = b"".join(map(bytes, apply_chunks(pieces, base.layout, patch)))
    assert found == target.data


def test_patches_are_applied_one_behind_the_other_in_one_stream():
    base, middle, first = make_patch([("<f4", (CHUNK_BYTES,))], 0.01)
    values = middle["t0"].view("<u4").copy()
    values[::50] ^= 1
    target = pack_weights({"t0": values.view("<f4")})
    changes = differences(middle, target)
    second = encode_patch(header_of(middle, target), changes, middle, target)
    for _ in range(20):
        chunks = apply_chunks([bytearray(base.data)], base.layout, open_patch(first))
        chunks = apply_chunks(chunks, base.layout, open_patch(second))
        # What one writes to is not what the other one still hashes.
        found = [(bytes(piece), piece.readonly) for piece in chunks]
        assert b"".join(data for data, _ in found) == target.data
        assert all(readonly for _, readonly in found)


def test_giving_up_half_way_leaves_no_thread_behind():
    base, _, data = make_patch([("<f4", (2 * CHUNK_BYTES,))], 0.01)
    before = set(threading.enumerate())  # of earlier tests, and may end at any time
    chunks = apply_chunks([base.data], base.layout, open_patch(data))
    next(chunks)
    assert (begun := set(threading.enumerate()) - before)
    chunks.close()
    assert not any(thread.is_alive() for thread in begun)


WITHOUT_ROOM = """
import resource, sys, threading
from edge_runtime.formats.apply import apply_patch
from edge_runtime.formats.patch import open_patch
from edge_runtime.formats.weights import read_weights
base, patch = read_weights(sys.argv[1]), open_patch(sys.argv[2])
threading.stack_size(1 << 30)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20),) * 2)
try:
    apply_patch(base, patch)
except OSError as err:
    print(err)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_system_that_has_no_other_thread_is_told_as_such(tmp_path):
    base, _, data = make_patch()
    (tmp_path / "base").write_bytes(base.data)
    (tmp_path / "patch").write_bytes(data)
    paths = tmp_path / "base", tmp_path / "patch"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ROOM, *paths],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "no room for another thread" in done.stdout


def test_a_base_of_another_size_is_refused():
    base, _, data = make_patch()
    with pytest.raises(PatchFormatError, match="the base has"):
        list(apply_chunks([base.data[:-4]], base.layout, open_patch(data)))


def test_a_wrong_base_is_refused_and_both_fingerprints_are_named():
    base, _, data = make_patch()
    other = pack_weights({name: array + 1 for name, array in base.items()})
    with pytest.raises(WrongParentError) as refusal:
        apply_patch(other, open_patch(data))
    assert refusal.value.expected == base.fingerprint
    assert refusal.value.actual == other.fingerprint


def test_a_patch_for_another_model_is_refused():
    base, _, data = make_patch()
    with pytest.raises(WrongModelError, match="another network"):
        apply_patch(base, open_patch(data), model="cd" * 32)


def test_a_result_that_was_not_promised_is_refused():
    base, target, changes = make_update([("<f4", (50,))], 0.3, 0)
    header = dataclasses.replace(header_of(base, target), target="12" * 32)
    data = encode_patch(header, changes, base, target)
    with pytest.raises(VerificationError) as refusal:
        apply_patch(base, open_patch(data))
    assert refusal.value.actual == target.fingerprint


@pytest.mark.parametrize(("version", "advice"), [(9, "newer dpu-edge"), (0, "again")])
def test_another_version_is_refused_by_its_number(version, advice):
    data = bytearray(make_patch()[2])
    data[8:10] = version.to_bytes(2, "little")
    with pytest.raises(PatchVersionError, match=advice) as refusal:
        open_patch(bytes(data))
    assert (refusal.value.found, refusal.value.supported) == (version, 1)


def test_an_unknown_critical_feature_is_refused():
    with pytest.raises(PatchVersionError, match="0x4"):
        open_patch(make_patch(critical=4)[2])


def test_a_patch_over_the_size_limit_is_refused_unread():
    with pytest.raises(PatchFormatError, match="100 are accepted"):
        open_patch(make_patch()[2], Limits(patch_bytes=100))


def test_a_long_signature_block_is_refused_unread():
    data = bytearray(make_patch()[2])
    data[HEADER_BYTES : HEADER_BYTES + 2] = b"\xff\xff"
    with pytest.raises(PatchFormatError, match="signature block has 65535"):
        open_patch(bytes(data))


def test_a_file_that_is_no_patch_is_refused():
    with pytest.raises(PatchFormatError, match="not a patch"):
        open_patch(b"PK\x03\x04 something else")


def test_a_unit_where_nothing_is_a_float_is_refused():
    base = pack_weights({"n": np.arange(400, dtype="<i4")})
    target = pack_weights({"n": np.arange(400, dtype="<i4") // 2 * 2})
    header = header_of(base, target)
    data = encode_patch(header, differences(base, target), base, target)
    with open_patch(data) as patch:
        raw = {
            s.kind: [patch._body.reader(s.kind).take(s.raw_size)]
            for s in patch.sections
        }
    forms = bytearray(raw[FORMS][0])
    assert forms[3] == 1
    forms[3] = 2
    body = encode_body(raw | {FORMS: [bytes(forms)]}, 3)
    forged = encode_header(header, body) + b"\0\0" + body
    with pytest.raises(PatchFormatError, match="without floats"):
        apply_patch(base, open_patch(forged))
