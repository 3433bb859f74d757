# SPDX-License-Identifier: Apache-2.0
"""The benchmark of applying measures what it says, on a file of a few kilobytes."""

import numpy as np
import pytest

from edge_runtime.formats.weights import write_weights
from tools.bench.apply import MEMORY_BAR, Row, measure, table


@pytest.fixture
def row(tmp_path):
    base = {"w": np.random.default_rng(3).normal(size=(300, 70)).astype("f4")}
    target = {"w": base["w"].copy()}
    target["w"][::7] += 0.5
    paths = tmp_path / "base", tmp_path / "target"
    for tensors, path in zip((base, target), paths, strict=True):
        write_weights(tensors, path)
    return measure("tiny", *paths, tmp_path, repeats=2, level=3)


def test_time_and_memory_are_measured(row):
    assert row.file_size > 300 * 70 * 4
    assert 0 < row.patch_size < row.file_size
    assert min(row.apply_cpu_s, row.copy_cpu_s, row.apply_s, row.copy_s) > 0
    assert 10 << 20 < row.imports_bytes <= row.peak_bytes
    assert row.memory < MEMORY_BAR
    assert "| tiny | 0.1 |" in table([row], ["a bar"], {"cores": 2})


def test_bars_are_missed_by_name():
    good = Row("good", 9, 9, 9.0, 1.0, 1.4, 1.0, 0, 31 << 20)
    slow = Row("slow", 9, 9, 1.0, 1.0, 1.6, 1.0, 0, 1)
    moving = Row("moving", 9, 9, 1.0, 1.0, 1.45, 1.0, 0, 1, bar=1.4)
    assert list(moving.missed()) == ["moving: 1.45 of copying, bar 1.4"]
    large = Row("large", 9, 9, 1.0, 1.0, 1.0, 1.0, 1, 34 << 20)
    assert list(good.missed()) == []
    assert list(slow.missed()) == ["slow: 1.60 of copying, bar 1.5"]
    assert list(large.missed()) == ["large: 33 MiB, bar 32"]
