# SPDX-License-Identifier: Apache-2.0
"""The measurement of int8 beside float32 knows when a bar is not reached."""

import pytest

from tools.bench.int8 import Case, Row, measure

CASE = Case("small", "small_cnn", (1, 8, 8), steps=2, size=0.3, time=None)


def test_both_forms_are_measured_and_answer_alike(tmp_path):
    row = measure(CASE, 0.01, tmp_path)
    assert row.weights[1] < 0.3 * row.weights[0]
    assert min(row.seconds) > 0
    assert row.difference < 0.06


@pytest.mark.parametrize(
    ("found", "word"),
    [({"weights": (100, 31)}, "bytes"), ({"difference": 0.07}, "differ")],
)
def test_a_bar_that_is_not_reached_is_named(found, word):
    fine = {"weights": (100, 29), "difference": 0.01}
    fields = {"case": "small", "graphs": (1, 1), "seconds": (1.0, 1.0), "same": 1.0}
    assert list(Row(**fields, **fine).problems(CASE)) == []
    (problem,) = Row(**fields, **(fine | found)).problems(CASE)
    assert word in problem
