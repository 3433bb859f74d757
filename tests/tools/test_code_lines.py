"""Code lines of the runtime: counted as code, held in rings."""

import pytest

from tools.code_lines import RINGS, code_lines, problems, runtime_lines, table


def test_comments_docstrings_and_blank_lines_do_not_count(tmp_path):
    path = tmp_path / "module.py"
    path.write_text('"""One.\n\nTwo."""\n\n# three\n\nx = (\n    1,\n)  # four\n')
    assert code_lines(path) == 3


def test_every_module_stands_in_exactly_one_ring():
    modules = [module for ring in RINGS.values() for module in ring.modules]
    assert len(modules) == len(set(modules))
    assert runtime_lines().keys() <= set(modules)


@pytest.mark.parametrize("name", RINGS)
def test_one_line_over_the_budget_is_a_problem(name):
    module = min(RINGS[name].modules)
    assert not list(problems({module: RINGS[name].budget}))
    (problem,) = problems({module: RINGS[name].budget + 1})
    assert repr(name) in problem


def test_a_module_in_no_ring_is_a_problem():
    (problem,) = problems({"new": 1})
    assert "edge_runtime/new.py is in no ring" in problem


def test_the_report_says_whether_the_goal_is_held():
    assert "missed" in "\n".join(table({}, {"store": 2001}))
    assert "held" in "\n".join(table({}, {"store": 2000, "numpy_backend": 200}))
