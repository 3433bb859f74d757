# SPDX-License-Identifier: Apache-2.0
"""Advice as people read it."""

import shlex
from collections.abc import Iterator

from edge_runtime.times import duration
from trainer.rounds.advice import Advice, Candidate, block


def advice_text(advice: Advice) -> str:
    """Return what ``dpu-train advise`` prints."""
    network = advice.network
    lines = [
        f"{network.weights:,} weights and a dense part of {network.dense:,} bytes"
        + (", with BatchNorm" if network.normed else "")
        + f"; at most {advice.budget:,} bytes a patch",
        f"all of it takes {network.full:,} bytes"
        + (": full updating fits too" if network.full <= advice.budget else ""),
    ]
    for number, candidate in enumerate(advice.candidates, 1):
        lines += ["", f"{number}. {candidate.name}: {candidate.how}"]
        lines += (f"   {line}" for line in _about(candidate))
    if advice.refused:
        lines += ["", "does not fit:"]
        lines += [f"   {name}: {why}" for name, why in advice.refused.items()]
    lines += [
        "",
        "Shares are estimates, as is what is about a size; other sizes are limits, "
        "which the trainer keeps to.",
    ]
    return "\n".join(lines)


def _about(candidate: Candidate) -> Iterator[str]:
    about, most = ("about ", "") if candidate.estimated else ("", " at most")
    yield (
        f"patch    {about}{candidate.patch:,} bytes{most}; "
        f"from init {about}{candidate.first:,}"
    )
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
