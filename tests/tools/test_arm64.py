# SPDX-License-Identifier: Apache-2.0
"""What the emulated checks stand on; the emulation itself is `make test-arm64`."""

import sys

import click
import pytest

from tools.arm64.__main__ import Check, table
from tools.arm64.root import check_host
from tools.arm64.run import run
from tools.wheels import check_complete, dependencies, for_aarch64

ALLOCATE = "import time; held = b'x' * (150 << 20); time.sleep(0.3)"
IN_A_CHILD = (
    f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ALLOCATE!r}])"
)


def python(code, **limits):
    return run([sys.executable, "-c", code], **limits)


def test_a_run_reports_what_was_said_and_how_it_ended():
    done = python("import sys; print('out'); sys.exit('err')")
    assert (done.code, done.out, done.err) == (1, "out\n", "err\n")


def test_the_peak_covers_child_processes_too():
    alone = python(ALLOCATE)
    both = python(IN_A_CHILD)
    assert 150 < alone.peak_mb < 250
    assert both.peak_mb > alone.peak_mb


def test_memory_over_the_cap_is_refused_in_children_too():
    assert python(ALLOCATE, data_mb=400).code == 0
    assert "MemoryError" in python(ALLOCATE, data_mb=100).err
    assert "MemoryError" in python(IN_A_CHILD, data_mb=100).err


def test_a_missing_emulator_is_named_with_the_command_that_installs_it(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(click.ClickException, match=r"install .*qemu-user-static"):
        check_host()


def test_an_incomplete_wheelhouse_is_refused(tmp_path):
    with pytest.raises(click.ClickException, match="dpu-edge"):
        check_complete(tmp_path, "3.13")


def test_wheels_are_chosen_for_the_oldest_glibc_that_is_supported():
    names = for_aarch64("3.11")
    assert {"manylinux_2_36_aarch64", "manylinux2014_aarch64", "3.11"} <= set(names)
    assert "manylinux_2_37_aarch64" not in names


def test_the_wheelhouse_is_made_of_what_the_runtime_depends_on():
    assert any(name.startswith("onnxruntime") for name in dependencies())
    assert not any(name.startswith("torch") for name in dependencies())
    assert any(name.startswith("urllib3") for name in dependencies("sync"))
    assert not any(name.startswith("urllib3") for name in dependencies())
    assert not any(name.startswith("dpu-edge") for name in dependencies("dev"))
    assert set(dependencies("train")) > set(dependencies("pack"))


def test_the_report_says_what_is_wrong():
    checks = [Check("one", True, "fine", 1.0, 1.0), Check("two", False, "differs")]
    text = "\n".join(table(checks, {"machine": "aarch64"}))
    assert "WRONG" in text and "differs" in text and "2 checks, 1 wrong" in text


def test_memory_is_counted_of_children_in_groups_of_their_own_too():
    child = "b = bytearray(64 << 20); import time; time.sleep(0.3)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}]"
    done = run([sys.executable, "-c", code + ", process_group=0)"])
    assert done.code == 0
    assert done.peak_mb > 64
