# SPDX-License-Identifier: Apache-2.0
"""Accuracy by bytes: what is held against what, and what the picture shows."""

import xml.etree.ElementTree as ET

import pytest

from edge_runtime.errors import RoundError
from packager.report.frontier import (
    LETTER,
    Measured,
    frontier_chart,
    frontier_points,
    on_the_frontier,
)
from packager.report.html import to_svg
from packager.report.svg import WIDTH

FULL = [
    Measured(f"fu_seed{seed}", "fu", seed, {0: 0.90, 1: 0.95, 2: level}, [900] * 3)
    for seed, level in ((1, 0.97), (2, 0.99))
]


def run(seed, values, sent, name="lean", **more):
    return Measured(f"{name}_seed{seed}", "dpu", seed, values, sent, **more)


def point(name, size, points):
    return {
        "name": name,
        "runs": 1,
        "points": points,
        "error": None,
        "bytes": size,
        "first_bytes": size,
        "all_bytes": size,
    }


def test_a_run_is_held_against_full_updating_of_its_seed_over_common_rounds():
    runs = [*FULL, run(2, {1: 0.93, 2: 0.98}, [300, 100, 50])]
    (found,) = frontier_points(runs)
    assert found["points"] == pytest.approx((-0.02 - 0.01) / 2)
    assert (found["bytes"], found["first_bytes"], found["all_bytes"]) == (75, 300, 450)
    assert found["error"] is None  # one seed says nothing of the next


def test_seeds_of_one_name_are_one_point_with_its_error():
    runs = [run(1, {2: 0.96}, [9, 1]), run(2, {2: 0.96}, [9, 3]), *FULL]
    (found,) = frontier_points(runs)
    assert (found["name"], found["runs"], found["bytes"]) == ("lean", 2, 2)
    assert found["points"] == pytest.approx(-0.02)
    assert found["error"] == pytest.approx(0.01)  # of -0.01 and -0.03


def test_a_run_without_full_updating_of_its_seed_has_no_place():
    assert frontier_points([*FULL, run(3, {2: 0.96}, [9, 1])]) == []
    assert frontier_points([*FULL, run(1, {7: 0.96}, [9, 1])]) == []


def test_recipes_of_one_name_are_points_of_their_own_and_named_by_their_paths():
    runs = [
        run(1, {2: 0.96}, [9, 1], recipe="ratio 0.01", path="a/lean_seed1"),
        run(2, {2: 0.96}, [9, 3], recipe="ratio 0.1", path="b/lean_seed2"),
    ]
    found = frontier_points([*FULL, *runs])
    assert [(p["name"], p["runs"], p["bytes"]) for p in found] == [
        ("a/lean_seed1", 1, 1),
        ("b/lean_seed2", 1, 3),
    ]


def test_two_runs_of_one_seed_are_no_seeds_to_average_over():
    runs = [run(1, {2: 0.96}, [9, 1], path=f"{at}/lean_seed1") for at in "ab"]
    found = frontier_points([*FULL, *runs])
    assert [(p["name"], p["error"]) for p in found] == [
        ("a/lean_seed1", None),
        ("b/lean_seed1", None),
    ]


def test_two_runs_of_full_updating_of_one_seed_are_refused_where_one_is_needed():
    full = [Measured("fu", "fu", 1, {0: 0.9}, [9], path=f"{at}/fu") for at in "ab"]
    assert frontier_points(full) == []
    with pytest.raises(RoundError, match=r"a/fu and b/fu .* seed 1.*leave one out"):
        frontier_points([*full, run(1, {0: 0.8}, [1])])


def test_where_lower_is_better_less_is_a_gain():
    full = Measured("full", "fu", 1, {0: 5.0}, [], lower=True)
    (found,) = frontier_points([full, run(1, {0: 4.0}, [9, 1], lower=True)])
    assert found["points"] == 1


def test_the_frontier_is_what_no_other_beats_in_both():
    points = [
        point("dear", 300, -0.1),
        point("worse", 200, -0.5),
        point("lean", 100, -0.2),
        point("equal", 100, -0.3),
        point("tiny", 10, -0.9),
    ]
    assert [p["name"] for p in on_the_frontier(points)] == ["tiny", "lean", "dear"]


def test_the_picture_has_a_mark_and_a_name_for_each_and_a_ring_for_what_is_far():
    points = [
        point("lean & mean", 4000, -0.2),
        point("paper", 17000, -0.3),
        point("lost", 9000, -12),
    ]
    chart = frontier_chart("By bytes", points, unit="points")
    root = ET.fromstring(to_svg(chart))  # a file of its own, well-formed
    marks = root.findall("{*}circle")
    assert [mark.get("class").split()[0] for mark in marks] == ["fill", "fill", "ring"]
    left, right, middle = (float(mark.get("cx")) for mark in marks)
    assert left < middle < right
    assert float(marks[0].get("cy")) < float(marks[1].get("cy"))
    words = [text.text for text in root.findall("{*}text")]
    assert {"lean & mean", "paper", "lost -12.0"} <= set(words)
    assert "+1" not in words


def test_names_that_would_meet_stand_apart():
    points = [point("one", 1000, -0.2), point("two", 1040, -0.2)]
    root = ET.fromstring(to_svg(frontier_chart("x", points, unit="points")))
    places = [
        (float(text.get("x")), float(text.get("y")))
        for text in root.findall("{*}text")
        if text.text in ("one", "two")
    ]
    (x1, y1), (x2, y2) = places
    assert abs(x1 - x2) > 20 or abs(y1 - y2) > 11


def test_a_name_at_the_lower_edge_stays_out_of_the_axis_words():
    near = [point(str(size), size, -0.2) for size in (1400, 4500, 6600, 11800)]
    near.append(point("behind", 16800, -0.8))  # where the other name could be
    far = [point("random", 18000, -9), point("pruning", 35000, -12)]
    root = ET.fromstring(to_svg(frontier_chart("x", near + far, unit="points")))
    texts = {text.text: text for text in root.findall("{*}text")}
    axis = float(texts["2 kB"].get("y"))
    for name in ("pruning -12.0", "random -9.0"):
        assert float(texts[name].get("y")) < axis - 11


def test_a_name_with_no_place_of_its_own_stays_in_the_picture():
    near = [point(f"a_method_{k}", 20_000, -1 + k / 100) for k in range(20)]
    chart = frontier_chart("t", [point("small", 1000, -0.5), *near], unit="points")
    names = [
        text
        for text in ET.fromstring(to_svg(chart)).iter()
        if "method" in str(text.text)
    ]
    names = [text for text in names if text.get("text-anchor") == "start"]
    assert len(names) == 20
    assert all(float(t.get("x")) + LETTER * len(t.text) <= WIDTH for t in names)
