# SPDX-License-Identifier: Apache-2.0
"""A patch is made window by window: in little memory, and of the same bytes."""

import json
import tracemalloc

import numpy as np
import pytest

from edge_runtime.errors import VerificationError
from edge_runtime.formats import positions, spool, tensor_index, values
from edge_runtime.formats.apply import apply_patch
from edge_runtime.formats.patch import open_patch
from edge_runtime.formats.weights import pack_weights, write_weights
from packager import diff as differences
from packager.build import header_for, pack_changes
from packager.cli.pack import pack, patch
from packager.models.read import pack_models, read_model


def moved(array, share, rng):
    """Some of an array's elements, with other low bits."""
    bits = array.reshape(-1).view(f"u{array.dtype.itemsize}").copy()
    at = rng.random(bits.size) < share
    bits[at] ^= rng.integers(1, 100, int(at.sum())).astype(bits.dtype)
    return bits.view(array.dtype).reshape(array.shape)


def model(seed, shares=(0, 0.01, 0.1, 0.24, 0.4, 0.6, 0.8, 0.95, 1)):
    rng = np.random.default_rng(seed)
    base, target = {}, {}
    for number, share in enumerate(shares):
        for dtype in ("f4", "f2", "u2", "i1"):
            shape = [(3, 700), (2500,), (9, 30, 3, 3)][number % 3]
            array = (rng.normal(0, 0.05, shape) * (1 if dtype < "g" else 900)).astype(
                dtype
            )
            changed = moved(array, share, rng)
            if len(shape) > 1 and number % 2:  # dead inputs
                changed[:, ::3] = array[:, ::3]
            name = f"t{rng.integers(1000)}.{number}.{dtype}"
            base[name], target[name] = array, changed
    return pack_weights(base), pack_weights(target)


def packed(base, target, level=3):
    header = header_for(base, target, model="00" * 32, round_=1, counter=1)
    changes = differences.diff(base, target)
    return pack_changes(base, target, header, changes, level=level).data


@pytest.mark.parametrize("seed", range(3))
def test_windows_of_any_size_give_the_same_patch(seed, monkeypatch):
    base, target = model(seed)
    whole = packed(base, target)
    for module in (positions, tensor_index, values, differences):
        monkeypatch.setattr(module, "WINDOW", 256)
    monkeypatch.setattr(differences, "_COMPARED", 512)
    monkeypatch.setattr(spool, "KEPT_BYTES", 1000)
    monkeypatch.setattr(spool, "READ_BYTES", 300)
    assert packed(base, target) == whole
    with open_patch(whole) as patch:
        assert apply_patch(base, patch).data == target.data


def test_positions_of_a_change_are_the_same_in_pieces_and_at_once(monkeypatch):
    base, target = model(7)
    monkeypatch.setattr(differences, "WINDOW", 64)
    for change in differences.diff(base, target):
        wanted = np.flatnonzero(
            base[change.name].reshape(-1).view(np.uint8)
            != target[change.name].reshape(-1).view(np.uint8)
        )
        wanted = np.unique(wanted // base[change.name].itemsize)
        assert change.positions.tolist() == wanted.tolist()
        assert len(change) == len(wanted)


def test_packing_large_files_takes_a_part_of_their_size(tmp_path):
    rng = np.random.default_rng(0)
    base = {f"w{n}": rng.integers(0, 1 << 16, (4, 2 << 20), "<u2") for n in range(3)}
    target = {name: moved(array, 0.3, rng) for name, array in base.items()}
    size = sum(array.nbytes for array in base.values())
    for name, arrays in (("a", base), ("b", target)):
        write_weights(arrays, tmp_path / f"{name}.safetensors")
    del base, target
    tracemalloc.start()
    models = (read_model(tmp_path / f"{name}.safetensors") for name in "ab")
    made = pack_models(*models, level=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak - 3 * len(made.data) < size / 2


def test_looking_at_large_files_takes_a_part_of_their_size(tmp_path, command):
    rng = np.random.default_rng(0)
    base = rng.integers(1, 100, 6 << 20).astype("f2")
    files = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for path, array in zip(files, (base, moved(base, 0.001, rng)), strict=True):
        write_weights({"w": array}, path)
    out = tmp_path / "b.dpu"
    command(pack, "--base", files[0], "--target", files[1], "-o", out, "-q")
    tracemalloc.start()
    told = [
        command(patch, "diff", *files, "--json"),
        command(patch, "info", out, "--base", files[0], "--json"),
    ]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    changes = [json.loads(text)["tensors"][0]["relative_change"] for _, text, _ in told]
    assert changes[0] == changes[1] > 0
    assert peak < 2 * base.nbytes


@pytest.mark.parametrize("name", "ab")
def test_a_file_that_changes_while_it_is_packed_gives_no_patch(tmp_path, name):
    base, target = model(1)
    files = {key: tmp_path / f"{key}.safetensors" for key in "ab"}
    write_weights(base, files["a"])
    write_weights(target, files["b"])
    read = {key: read_model(path) for key, path in files.items()}
    assert all(one.weights.fingerprint for one in read.values())
    with files[name].open("r+b") as file:
        file.seek(-1, 2)
        (last,) = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    with pytest.raises(VerificationError, match="changed while it was packed"):
        pack_models(read["a"], read["b"])
