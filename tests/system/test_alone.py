# SPDX-License-Identifier: Apache-2.0
"""The wheel alone, as a device has it: no torch, no onnx, nothing that is only trained
or packed with. What needs them says so in one sentence."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What a device installs, with what these need in turn.
DEVICE = ["numpy", "numpy.libs", "click", "zstandard", "cryptography", "_cffi_*.so"]
SCRIPTS = {
    "dpu-train": "from trainer.__main__ import main; main()",
    "dpu-pack": "from packager.__main__ import pack; pack()",
    "dpu-patch": "from packager.__main__ import patch; patch()",
    "dpu-edge": "from edge_runtime.__main__ import main; main()",
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Run a command where only the packages of a device can be imported."""
    folder = tmp_path_factory.mktemp("device")
    installed = Path(importlib.util.find_spec("numpy").origin).parents[1]
    for name in DEVICE:
        for found in installed.glob(name):
            (folder / found.name).symlink_to(found)
    for package in ("edge_runtime", "packager", "trainer"):
        (folder / package).symlink_to(ROOT / package)

    def start(script, *args):
        return subprocess.run(
            # -S: without site-packages
            [sys.executable, "-S", "-c", SCRIPTS[script], *map(str, args)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
            check=False,
        )

    return start


@pytest.mark.parametrize(
    ("line", "package", "extra"),
    [
        ("dpu-train run digits", "torch", "train"),
        ("dpu-train check digits", "torch", "train"),
        ("dpu-train check digits --json", "torch", "train"),
        ("dpu-pack --base x.onnx --bundle", "onnx", "pack"),
        ("dpu-pack --runs {runs} round_00 --bundle", "onnx", "pack"),
        ("dpu-patch extract x.onnx -o {runs}/new", "onnx", "pack"),
    ],
)
def test_a_package_that_is_missing_is_one_sentence_with_its_install(
    alone, run, line, package, extra
):
    (run.path.parent / "x.onnx").write_bytes(
        (run.path / "model/graph.onnx").read_bytes()
    )
    words = line.format(runs=run.path.parent).replace("x.onnx", "{x}").split()
    words = [w.format(x=run.path.parent / "x.onnx") for w in words]
    done = alone(*words)
    assert done.returncode == 2, done.stderr
    assert f"needs {package}, which is not installed" in done.stderr
    assert f"pip install -e '.[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "line",
    [
        "dpu-train --help",
        "dpu-train run --help",
        "dpu-train recipes",
        "dpu-pack --help",
        "dpu-pack --runs {runs} round_01",
        "dpu-patch diff {run}/round_00/weights.safetensors "
        "{run}/round_01/weights.safetensors",
        "dpu-patch report {run}",
        "dpu-edge --help",
    ],
)
def test_what_needs_nothing_else_works(alone, run, line):
    done = alone(*line.format(runs=run.path.parent, run=run.path).split())
    assert done.returncode == 0, done.stderr
