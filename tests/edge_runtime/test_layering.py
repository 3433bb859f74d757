"""The ground floor stays a ground floor.

The import list: what the runtime may import at all, and what is imported when. A new
entry is a decision: it is code that every device has to have, and has to trust.
"""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tools.code_lines import RINGS

RUNTIME = Path(__file__).parents[2] / "edge_runtime"
STANDARD_LIBRARY = (
    "collections contextlib ctypes dataclasses enum errno fcntl functools gc hashlib "
    "importlib inspect io itertools json logging math os pathlib queue re shlex shutil "
    "signal socket struct subprocess sys tempfile threading time traceback "
    "types typing weakref zipfile zlib"
)
# Beside NumPy, which any module may import, and click, which commands import.
THIRD_PARTY = {
    "onnxruntime": {"infer"},
    "zstandard": {"frames"},
    "cryptography": {"proof", "signing"},
    "PIL": {"inputs"},
}


@cache
def imports(module):
    """What a module of the runtime imports anywhere in its text."""
    found = set()
    for node in ast.walk(ast.parse((RUNTIME / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def packages(module):
    return {name.partition(".")[0] for name in imports(module)}


def own(module):
    return {
        name.split(".")[1] for name in imports(module) if name.startswith(RUNTIME.name)
    }


MODULES = sorted(path.stem for path in RUNTIME.glob("*.py"))
COMMANDS = {m for m in MODULES if "click" in packages(m)}


def test_the_runtime_imports_what_is_listed_and_nothing_else():
    found = set().union(*map(packages, MODULES)) - {RUNTIME.name}
    assert " ".join(sorted(found & sys.stdlib_module_names)) == STANDARD_LIBRARY
    assert found - sys.stdlib_module_names == {"numpy", "click", *THIRD_PARTY}


@pytest.mark.parametrize("package", THIRD_PARTY)
def test_only_the_named_modules_import_it(package):
    assert {m for m in MODULES if package in packages(m)} == THIRD_PARTY[package]


def test_what_reads_a_patch_knows_nothing_of_what_surrounds_it():
    for module in RINGS["patch"].modules:
        assert own(module) <= RINGS["patch"].modules | {"errors"}, module


def test_the_library_knows_nothing_of_its_command_line():
    for module in set(MODULES) - COMMANDS - {"__main__"}:
        assert not own(module) & COMMANDS, module


def modules_after(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "wanted"),
    [
        ("import edge_runtime", set()),
        ("import edge_runtime.cli.main", {"click"}),
        ("from edge_runtime import *", {"numpy", "zstandard"}),
        (
            "import importlib; [importlib.import_module(f'edge_runtime.{m}') for m in "
            f"{[m for m in MODULES if m != '__main__']}]",
            {"numpy", "zstandard", "click"},
        ),
    ],
)
def test_imports_bring_exactly_what_they_need(statement, wanted):
    # Less what the environment starts every process with.
    loaded = modules_after(statement) - modules_after("pass")
    found = {name.partition(".")[0] for name in loaded}
    found -= sys.stdlib_module_names | {RUNTIME.name}
    # The finder of an editable installation; what NumPy is compiled with.
    assert {n for n in found if not n.startswith(("__", "_cython", "cython"))} == wanted


@pytest.mark.parametrize(
    "module", ["trainer.cli", "packager.cli.pack", "edge_runtime.cli.main"]
)
def test_command_lines_start_without_their_heavy_parts(module):
    assert not modules_after(f"import {module}") & {
        "torch",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "torchvision",
    }


def test_the_packager_never_imports_the_trainer_or_torch():
    found = modules_after(
        "import packager, packager.bundles.from_round, packager.report.packed"
    )
    assert not found & {"torch", "trainer"}


def test_the_trainer_never_imports_the_packager():
    found = modules_after("import trainer.rounds.schedule, trainer.cli")
    assert "packager" not in found


@pytest.mark.parametrize("package", ["edge_runtime", "packager", "trainer"])
def test_a_package_exposes_exactly_what_it_lists(package):
    code = (
        f"import {package} as p; [getattr(p, n) for n in p.__all__]; "
        "assert sorted(p.__all__) == list(p.__all__), 'not sorted'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
