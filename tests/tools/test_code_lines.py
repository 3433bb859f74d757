# SPDX-License-Identifier: Apache-2.0
"""Code lines are counted as code, and held floor by floor."""

from pathlib import Path

import pytest

from tools.code_lines import BUDGETS, code_lines, floor_lines, problems, table
from tools.wheels import CHECKOUT


def test_comments_docstrings_and_blank_lines_do_not_count(tmp_path):
    path = tmp_path / "module.py"
    path.write_text('"""One.\n\nTwo."""\n\n# three\n\nx = (\n    1,\n)  # four\n')
    assert code_lines(path) == 3


def test_a_sub_package_is_a_floor_and_the_modules_beside_are_one(tmp_path):
    for name in ("one.py", "two.py", "deep/three.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x = 1\n")
    assert floor_lines(tmp_path) == {".": 2, "deep": 1}


@pytest.mark.parametrize("package", BUDGETS)
def test_every_floor_has_a_budget_and_every_budget_a_floor(package):
    assert floor_lines(Path(CHECKOUT, package)).keys() == BUDGETS[package].keys()


def test_one_line_over_the_budget_is_a_problem():
    budget = BUDGETS["trainer"]["method"]
    assert not list(problems({"trainer": {"method": budget}}))
    (problem,) = problems({"trainer": {"method": budget + 1}})
    assert "trainer/method" in problem


def test_a_floor_without_a_budget_is_a_problem():
    (problem,) = problems({"trainer": {"new": 1}})
    assert "trainer/new has no budget" in problem


def test_the_report_shows_each_floor_beside_its_budget():
    budget = BUDGETS["trainer"]["method"]
    (_, line) = table({"trainer": 9}, {"trainer": {"method": 7}})
    assert line.split() == ["method", "7", "of", str(budget)]
