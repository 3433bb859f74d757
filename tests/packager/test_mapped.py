# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.errors import WeightsError
from edge_runtime.formats.weights import read_weights, write_weights
from packager import mapped
from packager.mapped import MappedFile, map_weights


@pytest.fixture
def path(tmp_path):
    found = tmp_path / "weights.safetensors"
    write_weights({"w": np.arange(3000, dtype="f4"), "b": np.ones(3, "i1")}, found)
    return found


def test_a_mapped_weight_file_is_what_a_read_one_is(path, monkeypatch):
    monkeypatch.setattr(mapped, "KEPT_BYTES", 1)  # pages go back after every piece
    read, found = read_weights(path), map_weights(path)
    assert found.layout == read.layout
    assert found.fingerprint == read.fingerprint
    assert b"".join(found.chunks()) == read.data
    for tensor in read.layout.tensors:
        assert np.array_equal(found[tensor.name], read[tensor.name])
        bits = found.bits(tensor, 1, tensor.size)
        assert bits.tolist() == read.bits(tensor, 1, tensor.size).tolist()


@pytest.mark.parametrize("damage", ["cut", "longer", "odd"])
def test_what_reading_refuses_mapping_refuses(path, damage):
    data = path.read_bytes()
    bad = {"cut": data[:-1], "longer": data + b"x", "odd": data[:20] + b" " + data[20:]}
    path.write_bytes(bad[damage])
    with pytest.raises(WeightsError) as read:
        read_weights(path)
    with pytest.raises(WeightsError) as found:
        map_weights(path)
    assert str(found.value) == str(read.value)


def test_what_is_no_file_is_not_mapped():
    with pytest.raises(OSError, match="no ordinary file"):
        MappedFile(Path("/dev/null"))
