# SPDX-License-Identifier: Apache-2.0
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
RECIPE = """
[run]
rounds = 2
id = "the same for both"
[data]
set = "digits"
initial = 60
growth = 70
validation = 100
[model]
name = "mlp"
hidden = [8]
[update]
ratio = 0.05
[train]
epochs = 1
batch = 16
"""
MOMENTS = (
    "open {runs}/tiny/.model.part/contract.json",
    "round 1 full",
    "open {runs}/tiny/.round_01.part/.weights.safetensors",
    "os.rename {runs}/tiny/.round_01.part",
)


def run_and_kill(recipe, whole, runs, moments):
    """Run once undisturbed; return the exit codes of processes killed at moments."""
    done = subprocess.run(
        [
            sys.executable,
            Path(__file__).with_name("kill_worker.py"),
            recipe,
            whole,
            runs,
        ]
        + [moment.format(runs=runs) for moment in moments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [int(code) for code in done.stdout.split()]


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_run_killed_at_every_stage_gives_the_same_bytes(tmp_path):
    recipe, killed, whole = (tmp_path / n for n in ("tiny.toml", "killed", "whole"))
    recipe.write_text(RECIPE)
    codes = run_and_kill(recipe, whole, killed, MOMENTS)
    assert codes == [-signal.SIGKILL] * len(MOMENTS) + [0]
    assert contents(killed) == contents(whole)
    assert len(contents(whole)) == 14
