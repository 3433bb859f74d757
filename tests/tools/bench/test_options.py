# SPDX-License-Identifier: Apache-2.0
"""Benchmarks refuse options that would leave them nothing to measure."""

import pytest

from tools.bench import apply, pack, readers, small, swap, trainer


@pytest.mark.parametrize(
    ("program", "args", "problem"),
    [
        (apply, ["--no-synthetic"], "nothing to measure"),
        (pack, ["--tensors", 1], "1 is not in the range"),
        (readers, ["--size", 0], "0 is not in the range"),
        (small, ["--times", 0], "0 is not in the range"),
        (swap, ["--callers", 0], "0 is not in the range"),
        (swap, ["--swaps", 0], "0 is not in the range"),
        (swap, ["--model", "nonsense"], "Unknown model nonsense"),
        (trainer, ["--turns", 0], "0 is not in the range"),
    ],
)
def test_options_that_leave_nothing_to_measure_are_refused(
    command, program, args, problem
):
    code, out, err = command(program.main, *args)
    assert (code, out, problem in err) == (2, "", True)
