# SPDX-License-Identifier: Apache-2.0
"""Advice as people read it."""

import shlex
from collections.abc import Iterator

from trainer.rounds.advice import ERROR, Advice, Candidate, block


def advice_text(advice: Advice) -> str:
    """Return what ``dpu-train advise`` prints."""
    network = advice.network
    lines = [
        f"{network.weights:,} weights and a dense part of {network.dense:,} bytes"
        + (", with BatchNorm" if network.normed else "")
        + f"; at most {advice.budget:,} bytes a patch"
    ]
    for number, candidate in enumerate(advice.candidates, 1):
        lines += ["", f"{number}. {candidate.name}: {candidate.how}"]
        lines += (f"   {line}" for line in _about(candidate))
    if advice.refused:
        lines += ["", "does not fit:"]
        lines += [f"   {name}: {why}" for name, why in advice.refused.items()]
    lines += [
        "",
        f"Shares are estimates, by up to {ERROR:.0%}; sizes are limits, which the "
        "trainer keeps to.",
    ]
    return "\n".join(lines)


def _about(candidate: Candidate) -> Iterator[str]:
    yield f"patch    {candidate.patch:,} bytes at most; from init {candidate.first:,}"
    if candidate.links:
        times = (
            f"{link['name']} {duration(link['seconds'])}" for link in candidate.links
        )
        yield "takes    " + ", ".join(times)
    yield f"known    {candidate.known}"
    yield "recipe"
    yield from (f"         {line}".rstrip() for line in block(candidate))
    yield "or"
    yield "         " + " ".join(f"--set {shlex.quote(s)}" for s in candidate.sets)


def duration(seconds: float) -> str:
    """Write a time in one or two units, as ``dpu-patch info`` does."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.{0 if seconds >= 0.01 else 1}f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    size, step, unit, part = 60, 1, "min", "s"
    if seconds >= 3599.5:
        size, step, unit, part = 60, 60, "h", "min"
    if seconds >= 86_370:
        size, step, unit, part = 24, 3600, "d", "h"
    whole, rest = divmod(round(seconds / step), size)
    return f"{whole} {unit}" + (f" {rest} {part}" if rest else "")
