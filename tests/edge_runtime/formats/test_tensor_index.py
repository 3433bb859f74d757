# SPDX-License-Identifier: Apache-2.0
"""How the positions of one tensor are written."""

import numpy as np
import pytest

from edge_runtime.formats import tensor_index
from edge_runtime.formats.tensor_index import TensorIndex


@pytest.fixture(params=[8, tensor_index.WINDOW], autouse=True)
def window(request, monkeypatch):
    monkeypatch.setattr(tensor_index, "WINDOW", request.param)


def index(shape, *positions):
    found = TensorIndex(shape, np.array(positions, np.int64))
    gaps = [int(gap) for piece in found.gaps() for gap in piece]
    return found.listed, gaps, b"".join(found.bitmap()) if found.bitmap_bytes else b""


def test_of_few_positions_the_gaps_before_them_are_listed():
    assert index((20,), 0, 3, 4, 19) == (4, [0, 2, 0, 14], b"")


def test_of_nearly_all_positions_those_that_stay_are_listed():
    assert index((8,), 0, 1, 3, 4, 5, 6) == (2, [2, 4], b"")


def test_of_half_of_the_positions_there_is_a_bitmap():
    assert index((10,), 0, 1, 3, 8, 9) == (0, [], b"\x0b\x03")


def test_columns_in_which_nothing_travels_are_not_counted():
    rows, columns = 100, 40
    found = TensorIndex((rows, columns), np.arange(7, rows * columns, columns))
    assert np.flatnonzero(found.used).tolist() == [7]
    assert not any(np.concatenate(list(found.gaps())))
