# SPDX-License-Identifier: Apache-2.0
import pytest

from edge_runtime.times import duration


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.0 ms"),
        (0.0042, "4.2 ms"),
        (0.147, "147 ms"),
        (0.9996, "1.0 s"),
        (59.96, "1 min"),
        (91, "1 min 31 s"),
        (3599.6, "1 h"),
        (5640, "1 h 34 min"),
        (86_380, "1 d"),
        (198_000, "2 d 7 h"),
        (1e9, "11 574 d 2 h"),
    ],
)
def test_times_have_one_or_two_units(seconds, words):
    assert duration(seconds) == words
