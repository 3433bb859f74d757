# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.formats.header import PatchHeader
from edge_runtime.formats.patch import open_patch
from edge_runtime.formats.weights import pack_weights
from packager.build import build_patch
from packager.diff import diff
from packager.report.patch_record import BINS, diff_record, log2_choose, patch_record


def change(base, target):
    """An open patch between arrays, and both weights."""
    a, b = pack_weights(base), pack_weights(target)
    header = PatchHeader(
        model="ab" * 32,
        parent=a.fingerprint,
        target=b.fingerprint,
        round=1,
        counter=1,
        file_size=a.layout.file_size,
    )
    return open_patch(build_patch(a, b, header)), a, b


@pytest.fixture
def pair():
    """1000 elements of which every tenth changes, 8 that all change, 4 that stay."""
    base = {
        "sparse": np.arange(1000, dtype="f4"),
        "bias": np.ones(8, "f4"),
        "still": np.zeros(4, "f8"),
    }
    target = {name: array.copy() for name, array in base.items()}
    target["sparse"][500::10] *= 2
    target["bias"] += 0.5
    return base, target


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_index_floor_is_the_logarithm_of_the_ways_to_choose(n, m):
    if m <= n:
        assert log2_choose(n, m) == pytest.approx(math.log2(math.comb(n, m)), abs=1e-9)
    else:
        assert log2_choose(n, m) == 0


def test_the_parts_add_up_to_the_file(pair, tmp_path):
    patch, base, _ = change(*pair)
    for layout in (None, base.layout):
        parts = patch_record(tmp_path / "p.dpu", patch, layout)["parts"]
        assert sum(parts.values()) == patch.size
        assert parts["signatures"] == 0
    assert parts["dense"] > 0


def test_the_floor_counts_index_and_values(pair, tmp_path):
    patch, base, _ = change(*pair)
    floor = patch_record(tmp_path / "p.dpu", patch, base.layout)["floor"]
    bits = math.log2(math.comb(1000, 50))
    assert floor["index"]["floor_bytes"] == pytest.approx(bits / 8)
    assert floor["values"]["floor_bytes"] == 50 * 4
    assert floor["dense"]["floor_bytes"] == 8 * 4
    assert floor["total"]["floor_bytes"] == pytest.approx(bits / 8 + 58 * 4)
    assert floor["total"]["ratio"] == pytest.approx(
        floor["total"]["bytes"] / floor["total"]["floor_bytes"]
    )


def test_without_changes_there_is_no_ratio(pair, tmp_path):
    patch, base, _ = change(pair[0], pair[0])
    record = patch_record(tmp_path / "p.dpu", patch, base.layout)
    assert record["floor"]["index"]["ratio"] is None
    assert record["changed"] == 0


def test_shares_say_where_in_a_tensor_elements_change(pair, tmp_path):
    patch, base, target = change(*pair)
    for record in (
        patch_record(tmp_path / "p.dpu", patch, base.layout),
        diff_record(base, target, diff(base, target)),
    ):
        tensors = {t["name"]: t for t in record["tensors"]}
        sparse = tensors["sparse"]["shares"]
        assert len(sparse) == BINS
        assert not any(sparse[: BINS // 2])
        assert all(0.05 <= share <= 0.15 for share in sparse[BINS // 2 :])
        assert tensors["bias"]["shares"] == [1.0] * 8
        assert tensors["still"]["shares"] == [0.0] * 4


def test_with_the_parent_it_says_how_far_tensors_moved(pair, tmp_path):
    patch, base, _ = change(*pair)
    without = patch_record(tmp_path / "p.dpu", patch, base.layout)
    assert "relative_change" not in without["tensors"][0]
    tensors = {
        t["name"]: t
        for t in patch_record(tmp_path / "p.dpu", patch, base.layout, base)["tensors"]
    }
    assert tensors["bias"]["relative_change"] == pytest.approx(0.5)
    assert tensors["still"]["relative_change"] is None  # it has no length


def test_infinities_nans_and_other_types_are_no_obstacle():
    base = {
        "f": np.array([1, np.inf, np.nan], "f4"),
        "i": np.arange(3, dtype="i1"),
        "none": np.zeros((0, 3), "f4"),
        "scalar": np.array(2, "f4"),
    }
    target = {n: a.copy() for n, a in base.items()}
    target["f"][:2] = -np.inf
    target["i"][0] = 9
    target["scalar"] = np.array(1, "f4")
    a, b = pack_weights(base), pack_weights(target)
    tensors = {t["name"]: t for t in diff_record(a, b, diff(a, b))["tensors"]}
    assert tensors["f"]["relative_change"] is None
    assert "relative_change" not in tensors["i"]
    assert tensors["none"]["changed"] == 0
    assert tensors["scalar"]["relative_change"] == pytest.approx(0.5)
