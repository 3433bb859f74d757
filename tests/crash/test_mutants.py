# SPDX-License-Identifier: Apache-2.0
"""The broken stores that the crash suite has to find are still stores."""

import ast
from pathlib import Path

import pytest

from tests.crash.mutants import MUTANTS, ROOT


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_breaks_one_place_and_is_python_still(name):
    module, old, new = MUTANTS[name]
    text = Path(ROOT, "edge_runtime", f"{module}.py").read_text()
    assert text.count(old) == 1
    ast.parse(text.replace(old, new))
