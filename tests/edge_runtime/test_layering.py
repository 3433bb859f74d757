"""The ground floor stays a ground floor."""

import subprocess
import sys

import pytest

HEAVY = ["torch", "onnx", "onnxruntime", "onnxscript", "trainer", "packager"]


def modules_after(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_the_runtime_imports_nothing_above_it():
    assert not modules_after("import edge_runtime") & set(HEAVY)


@pytest.mark.parametrize("module", ["trainer.cli", "packager.cli", "edge_runtime.cli"])
def test_command_lines_start_without_their_heavy_parts(module):
    assert not modules_after(f"import {module}") & {
        "torch",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "torchvision",
    }


def test_the_packager_never_imports_the_trainer_or_torch():
    found = modules_after("import packager, packager.bundle, packager.report")
    assert not found & {"torch", "trainer"}


def test_the_trainer_never_imports_the_packager():
    assert "packager" not in modules_after("import trainer.rounds, trainer.cli")


@pytest.mark.parametrize("package", ["edge_runtime", "packager", "trainer"])
def test_a_package_exposes_exactly_what_it_lists(package):
    code = (
        f"import {package} as p; [getattr(p, n) for n in p.__all__]; "
        "assert sorted(p.__all__) == list(p.__all__), 'not sorted'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
