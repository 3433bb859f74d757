# SPDX-License-Identifier: Apache-2.0
"""The benchmark of readers makes files that readers look at, and measures commands."""

import pytest

from edge_runtime.errors import PatchFormatError
from edge_runtime.formats.patch import open_patch
from packager.models.read import read_model
from tools.bench.readers import (
    Row,
    blocks_patch,
    measure,
    metadata_file,
    section,
    tensors_file,
)


def test_files_are_of_the_size_and_kind_that_they_should_be(tmp_path):
    path = tensors_file(tmp_path / "a.safetensors", 100, 40_000, 7)
    assert 30_000 < path.stat().st_size < 50_000
    assert len(read_model(path).weights) == 100
    path = metadata_file(tmp_path / "b.safetensors", 40_000)
    assert list(read_model(path).weights) == ["w"]
    with pytest.raises(PatchFormatError, match="too many blocks"):
        open_patch(blocks_patch(tmp_path / "p.dpu", 400_000))


def test_a_command_is_measured(tmp_path):
    path = blocks_patch(tmp_path / "p.dpu", 400_000)
    row = measure("a patch", ["dpu-patch", "info", str(path)])
    assert (row.exit_code, row.command) == (3, "dpu-patch info")
    assert row.cpu_s > 0
    assert row.peak_bytes > 10 << 20
    assert "| a patch | `dpu-patch info` | 3 |" in section([row], {"cores": 2})


def test_bars_are_missed_by_name():
    assert not list(Row("f", "c", 3, 5.0, 9.0, 200_000_000).missed())
    assert list(Row("f", "c", 1, 5.1, 9.0, 200_000_001).missed()) == [
        "c with f ended with 1",
        "c with f took 5.1 s of CPU time, bar 5.0",
        "c with f took 200000001 bytes, bar 200000000",
    ]
    assert list(Row("f", "c", -9, 0, 0, 0).missed()) == ["c with f ended with -9"]
