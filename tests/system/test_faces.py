# SPDX-License-Identifier: Apache-2.0
"""What type checkers see of a package is what Python finds in it."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import edge_runtime
import packager
import trainer

ROOT = Path(__file__).parents[2]
PACKAGES = [edge_runtime, packager, trainer]


def seen_by_type_checkers(package):
    """Public name -> the module that it is imported from."""
    found = {}
    for node in ast.parse(Path(package.__file__).read_text()).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for line in node.body:
                if isinstance(line, ast.ImportFrom):
                    found |= {alias.name: line.module for alias in line.names}
    return found


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
def test_type_checkers_see_the_names_that_python_finds(package):
    seen = seen_by_type_checkers(package)
    assert sorted(seen) == sorted(package.__all__)
    for name, module in seen.items():
        assert getattr(package, name) is getattr(importlib.import_module(module), name)


def test_the_version_comes_from_one_place():
    assert (
        f'version = "{edge_runtime.__version__}"'
        in (ROOT / "pyproject.toml").read_text()
    )
    assert (
        f"\nversion: {edge_runtime.__version__}\n"
        in (ROOT / "CITATION.cff").read_text()
    )
    assert f"\n## {edge_runtime.__version__} " in (ROOT / "CHANGELOG.md").read_text()


def test_importing_the_runtime_loads_no_numpy():
    code = "import sys, edge_runtime; sys.exit('numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
