# SPDX-License-Identifier: Apache-2.0
"""examples/fleet is copied, and its page typed line by line, with real servers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.test_documents import blocks
from tools.parts import find

EXAMPLE = Path(__file__).parents[2] / "examples" / "fleet"


@pytest.fixture
def path(tmp_path):
    """A path on which nginx and weed are; root says as whom the workers run."""
    folder = tmp_path / "bin"
    folder.mkdir()
    root = " -g 'user root;'" if os.geteuid() == 0 else ""
    for name, more in {"nginx": root, "weed": ""}.items():
        (folder / name).write_text(f'#!/bin/sh\nexec "{find(name)}" "$@"{more}\n')
        (folder / name).chmod(0o755)
    return f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.mark.fleet
def test_the_fleet_runs_as_its_page_says(tmp_path, path):
    copy = tmp_path / "fleet"
    shutil.copytree(EXAMPLE, copy)
    lines = "\n".join(blocks((copy / "README.md").read_text(), "sh"))
    # Whatever fails, no server stays behind.
    stop = 'kill -9 ${!:-}; nginx -p "$PWD" -c nginx.conf -s stop'
    ends = f"trap '{{ {stop}; }} 2>/dev/null || true' EXIT"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DPU_")}
    done = subprocess.run(
        ["bash", "-c", f"set -euo pipefail\n{ends}\n{lines}"],
        cwd=copy,
        env=environment | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=540,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\n403\n" in done.stdout
    assert "1 of 1 device proves round 1" in done.stdout
    assert "1 of 1 device" in (copy / "fleet.html").read_text()
    assert "stable, version 1" in done.stdout
