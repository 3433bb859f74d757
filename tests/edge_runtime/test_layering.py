# SPDX-License-Identifier: Apache-2.0
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

from tools.layers import FLOORS, edges, problems
from tools.layers import modules as modules_of

ROOT = Path(__file__).parents[2]
STANDARD_LIBRARY = (
    "base64 binascii calendar codecs collections concurrent contextlib ctypes "
    "dataclasses datetime enum errno fcntl functools gc hashlib heapq http importlib "
    "inspect io "
    "itertools json logging math os pathlib pwd queue random re resource secrets "
    "shlex shutil signal socket stat struct subprocess sys tempfile threading time "
    "tokenize traceback types typing urllib weakref zipfile zlib"
)
# Beside NumPy, which any module may import, and click, which commands import.
THIRD_PARTY = {
    "onnxruntime": {"inference.session"},
    "zstandard": {"formats.frames"},
    "cryptography": {"live.proof", "live.report", "live.shared", "formats.signing"},
    "PIL": {"inference.inputs"},
    "tuf": {"sync.tuf"},
    "urllib3": {"sync.http", "sync.wire"},
}
RUNTIME = "edge_runtime"
FILES = {
    name.removeprefix(f"{RUNTIME}."): path
    for name, path in modules_of(ROOT, RUNTIME).items()
}


@cache
def packages(module):
    """The packages that a module of the runtime imports anywhere in its text."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found


COMMANDS = {m for m in FILES if "click" in packages(m)}


def test_no_import_runs_upward_and_none_in_a_circle():
    assert not list(problems(edges(ROOT)))


@pytest.mark.parametrize("package", FLOORS)
def test_every_floor_is_there(package):
    for floor in FLOORS[package]:
        path = ROOT / package / floor
        assert path.is_dir() or path.with_suffix(".py").is_file(), floor


@pytest.mark.parametrize(
    ("module", "other", "words"),
    [
        ("edge_runtime.formats.patch", "edge_runtime.store.state", "a floor above"),
        ("edge_runtime.errors", "packager.build", "may not know it"),
        ("trainer.publish", "packager.build", "may not know it"),
        ("packager.cellar.new", "edge_runtime.errors", "is on no floor"),
    ],
)
def test_an_import_that_breaks_the_order_is_named(module, other, words):
    (problem,) = problems({module: {other}})
    assert module in problem
    assert words in problem


def test_a_circle_is_named():
    one, two = "trainer.rounds.methods", "trainer.rounds.budget"
    (problem,) = problems({one: {two}, two: {one}})
    assert one in problem
    assert two in problem


def test_the_runtime_imports_what_is_listed_and_nothing_else():
    found = set().union(*map(packages, FILES)) - {RUNTIME}
    assert " ".join(sorted(found & sys.stdlib_module_names)) == STANDARD_LIBRARY
    assert found - sys.stdlib_module_names == {"numpy", "click", *THIRD_PARTY}


@pytest.mark.parametrize("package", THIRD_PARTY)
def test_only_the_named_modules_import_it(package):
    assert {m for m in FILES if package in packages(m)} == THIRD_PARTY[package]


def test_the_library_knows_nothing_of_its_command_line():
    beside = {"exit_codes", "parameters", "commandline"}
    assert {m for m in FILES if m.startswith("cli.")} | beside == COMMANDS


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
        # The network side sees no weights: 16 MB of a small board's memory.
        (
            "import edge_runtime.cli.sync, edge_runtime.sync.sync, "
            "edge_runtime.sync.uploads",
            {"click"},
        ),
        ("from edge_runtime import *", {"numpy", "zstandard"}),
        (
            "import importlib; [importlib.import_module(f'edge_runtime.{m}') for m in "
            f"{[m for m in FILES if m != '__main__']}]",
            {"numpy", "zstandard", "click"},
        ),
    ],
)
def test_imports_bring_exactly_what_they_need(statement, wanted):
    # Less what the environment starts every process with.
    loaded = modules_after(statement) - modules_after("pass")
    found = {name.partition(".")[0] for name in loaded}
    found -= sys.stdlib_module_names | {RUNTIME}
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
