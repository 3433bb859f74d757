# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from edge_runtime.errors import WrongModelError
from edge_runtime.formats.weights import pack_weights
from packager.diff import diff


def positions(base, target, types=None):
    changes = diff(pack_weights(base, types), pack_weights(target, types))
    return {change.name: change.positions.tolist() for change in changes}


def test_finds_what_a_comparison_of_numbers_cannot_see():
    quiet, payload = np.array([0x7FC00000, 0x7FC00001], "<u4").view("<f4")
    base = {"w": np.array([0.0, quiet, 1.0, quiet], "f4")}
    target = {"w": np.array([-0.0, payload, 1.0, quiet], "f4")}
    assert positions(base, target) == {"w": [0, 1]}


def test_lists_every_tensor_in_file_order_and_unchanged_ones_as_empty():
    base = {"b": np.zeros(3, "f4"), "a": np.zeros((2, 2), "f4"), "n": np.zeros(2, "i8")}
    target = base | {"a": np.array([[0, 1], [0, 1]], "f4")}
    found = positions(base, target)
    assert list(found.items()) == [("n", []), ("a", [1, 3]), ("b", [])]


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?"])
def test_compares_every_item_size(dtype):
    base = {"w": np.zeros((3, 5), dtype), "s": np.zeros((), dtype)}
    target = {name: array.copy() for name, array in base.items()}
    target["w"][2, 1] = 1
    target["s"][()] = 1
    assert positions(base, target) == {"w": [11], "s": [0]}


def test_compares_types_that_numpy_lacks():
    base = {"w": np.array([1, 2, 3], "<u2")}
    target = {"w": np.array([1, 7, 3], "<u2")}
    assert positions(base, target, {"w": "BF16"}) == {"w": [1]}


def test_accepts_tensors_without_elements():
    empty = {"w": np.zeros((0, 4), "f4")}
    assert positions(empty, empty) == {"w": []}


def test_positions_are_int64_and_ascending():
    base = pack_weights({"w": np.zeros(1000, "f4")})
    target = pack_weights({"w": np.arange(1000, dtype="f4") % 3})
    (change,) = diff(base, target)
    assert change.positions.dtype == np.int64
    assert (np.diff(change.positions) > 0).all()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"w": np.zeros(4, "f4")}, r"F32 \[3\] in the base, F32 \[4\] in the target"),
        ({"w": np.zeros(3, "i4")}, r"F32 \[3\] in the base, I32 \[3\] in the target"),
        ({"v": np.zeros(3, "f4")}, r"'w' is F32 \[3\] in the base, missing in"),
    ],
)
def test_refuses_another_network_and_names_the_tensor(other, words):
    base = {"w": np.zeros(3, "f4")}
    with pytest.raises(WrongModelError, match=words):
        diff(pack_weights(base), pack_weights(other))
