# SPDX-License-Identifier: Apache-2.0
"""One measurement of one tool, in a process of its own.

::

    python -m tools.bench.measure make  bsdiff4 BASE PATCH TARGET
    python -m tools.bench.measure apply bsdiff4 BASE PATCH TARGET

print one JSON object: seconds of the work alone and of what came before it (imports, or
an idle run of a program), and the peak memory.
"""

import json
import resource
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from tools.bench.rivals import TOOLS, Tool


def _peak_bytes(tool: Tool) -> int:
    """Return the peak memory of the tool so far.

    A program's is at least that of this process, because it is forked from it; its
    idle run shows how much that is.
    """
    if tool.programs:
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    # Not ru_maxrss, which a process takes over from the one that started it.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def _cpu_s() -> float:
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    used = [resource.getrusage(w) for w in who]
    return sum(u.ru_utime + u.ru_stime for u in used)


def measure_here(
    tool: Tool, verb: str, base: Path, patch: Path, target: Path
) -> dict[str, Any]:
    """Make or apply one patch and measure it.

    Returns:
        ``before_s`` (imports, or the idle run of a program) with its peak memory
        ``before_peak_bytes``; ``work_s``, ``cpu_s`` and ``peak_bytes`` of the work; and
        for ``apply`` the ``sha256`` of the target.
    """
    start = time.perf_counter()
    for name in tool.modules:
        import_module(name)
    if tool.idle:
        # Some programs have no --version; without arguments they tell their usage.
        subprocess.run(tool.idle, check=False, capture_output=True)
    before, before_peak = time.perf_counter() - start, _peak_bytes(tool)
    cpu, start = _cpu_s(), time.perf_counter()
    digest = None
    if verb == "apply":
        digest = tool.apply(base, patch, target)
    else:
        tool.make(base, target, patch)
    return {
        "work_s": time.perf_counter() - start,
        "cpu_s": _cpu_s() - cpu,
        "peak_bytes": _peak_bytes(tool),
        "before_s": before,
        "before_peak_bytes": before_peak,
        "sha256": digest,
    }


def main(arguments: list[str], out: IO[str]) -> None:
    verb, key, *paths = arguments
    base, patch, target = map(Path, paths)
    record = measure_here(TOOLS[key], verb, base, patch, target)
    out.write("\n" + json.dumps(record))  # on a line of its own, whatever tools print


if __name__ == "__main__":
    main(sys.argv[1:], sys.stdout)
