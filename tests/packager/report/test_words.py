# SPDX-License-Identifier: Apache-2.0
import pytest

from packager.report.words import natural, percent, short_bytes, spaced, times


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_949, "99.9 kB"),
        (123_456, "123 kB"),
        (56_165_136, "56.2 MB"),
        (4e9, "4.0 GB"),
    ],
)
def test_sizes_have_three_digits_or_so(size, words):
    assert short_bytes(size) == words


def test_numbers_and_shares():
    assert spaced(1234567) == "1 234 567"
    assert spaced("-") == "-"
    assert percent(1, 3) == "33.33 %"
    assert percent(1, 0) == "-"
    assert times(62.31, 1) == "62.3\u00d7"


def test_layers_stand_in_the_order_that_people_expect():
    names = ["11.weight", "4.weight", "0.weight", "b10", "b9"]
    assert sorted(names, key=natural) == [
        "0.weight",
        "4.weight",
        "11.weight",
        "b9",
        "b10",
    ]
