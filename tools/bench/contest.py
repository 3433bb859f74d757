# SPDX-License-Identifier: Apache-2.0
"""Every tool of :mod:`tools.bench.rivals` on the same rounds: measured, then judged.

Each measurement is a process of its own. The tools take turns, each turn in another
order, so that a busy moment of the machine hits all of them. Each applies twice in a
row and the second time counts, as what the one before leaves of memory and caches shows
(writing the same 56 MB took the kernel of a virtual machine 13 to 240 ms, whoever
asked, depending on the memory that it happened to find). Times to apply are compared at
their fastest: what else a machine does only adds to them.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from edge_runtime.formats.weights import fingerprint_file
from tools.bench.rivals import TOOLS, Kind, Tool
from tools.bench.rounds import Pair

ROOT = Path(__file__).resolve().parents[2]
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
SLOW_MAKE_S = 2.0  # what takes longer to make is made once
TIMEOUT_S = 1800.0

Say = Callable[[str], None]

BARS = {
    "smaller": "smaller than every other",
    "a tenth smaller": "at least a tenth smaller than every general delta tool, on "
    "rounds of DPU",
    "faster": "faster to apply than every general delta tool",
    "faster than naive": "faster to apply than the naive deltas",
}


class ToolFailedError(Exception):
    """A tool ended with an error, or its target is not the target."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement, or the medians of several.

    Attributes:
        work_s: Wall time of the work alone.
        cpu_s: Processor time of the work; of a program its start-up included.
        startup_s: Wall time of everything else: interpreter, imports and exit; of a
            program, its idle run.
        peak_bytes: Peak memory, start-up included.
        startup_peak_bytes: Peak memory before the work. A program cannot be seen below
            this, because it inherits the figure from the process that starts it.
    """

    work_s: float
    cpu_s: float
    startup_s: float
    peak_bytes: int
    startup_peak_bytes: int


@dataclass(frozen=True, slots=True)
class Entry:
    """What one tool came to on one round.

    Attributes:
        key: The tool's key.
        title: Its name in tables.
        kind: What it sends.
        size: Bytes of the patch.
        make: Medians of making it.
        apply: Medians of applying it.
        fastest_s: The least wall time of applying it.
        made: How many times it was made.
        applied: How many times it was applied.
        problem: What went wrong or is missing; the rest is then 0 or None.
    """

    key: str
    title: str
    kind: Kind
    size: int = 0
    make: Sample | None = None
    apply: Sample | None = None
    fastest_s: float = 0.0
    made: int = 0
    applied: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Contest:
    """One round and all tools on it.

    Attributes:
        pair: The round.
        entries: One for each tool, in the order of the table.
    """

    pair: Pair
    entries: tuple[Entry, ...]

    @property
    def ours(self) -> Entry:
        """Our own entry."""
        return self.entries[0]

    def others(self, *kinds: Kind) -> list[Entry]:
        """Return the other tools that were measured."""
        return [e for e in self.entries[1:] if e.kind in kinds and not e.problem]


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar that was stated, and whether it holds on one round.

    Attributes:
        bar: One of ``BARS``.
        round: The round's name.
        holds: Whether it does; False where ours failed or there is nobody to beat.
        text: The figures.
    """

    bar: str
    round: str
    holds: bool
    text: str


def compete(pair: Pair, tools: Sequence[Tool], repeats: int, say: Say) -> Contest:
    """Measure all tools on one round.

    Args:
        pair: The round.
        tools: Which tools; ours first.
        repeats: How often each applies its patch, each time behind one not counted.
        say: Shows progress.
    """
    with tempfile.TemporaryDirectory(prefix="bench-patch-") as name:
        return _Table(pair, Path(name), say).fill(tools, repeats)


class _Table:
    """The samples of one round while they are collected."""

    def __init__(self, pair: Pair, folder: Path, say: Say) -> None:
        self.pair, self.folder, self.say = pair, folder, say
        self.expected = fingerprint_file(pair.target)
        self.made: dict[str, list[Sample]] = {}
        self.applied: dict[str, list[Sample]] = {}
        self.problems: dict[str, str] = {}

    def fill(self, tools: Sequence[Tool], repeats: int) -> Contest:
        for tool in tools:
            absent = ", ".join(tool.missing())
            if absent:
                self.problems[tool.key] = f"absent: {absent} ({tool.install})"
                self.say(f"  {tool.title}: {self.problems[tool.key]}")
        for turn in range(repeats):
            self.say(f"  making, turn {turn + 1} of {repeats}")
            for tool in tools:
                self._turn(tool, "make", self.made)
        for turn in range(repeats):
            self.say(f"  applying, turn {turn + 1} of {repeats}")
            for tool in Random(turn).sample(tools, len(tools)):
                self._turn(tool, "apply", {})  # leaves the same to each
                self._turn(tool, "apply", self.applied)
        return Contest(self.pair, tuple(self._entry(tool) for tool in tools))

    def _turn(self, tool: Tool, verb: str, samples: dict[str, list[Sample]]) -> None:
        known = samples.setdefault(tool.key, [])
        slow = verb == "make" and known and known[0].work_s >= SLOW_MAKE_S
        if tool.key in self.problems or slow:
            return
        try:
            known.append(self._measure(tool, verb))
        except ToolFailedError as err:
            self.problems[tool.key] = str(err)
            self.say(f"    {tool.title}: {err}")
            return
        if verb == "make" and len(known) == 1:
            self.say(f"    {tool.title}: made in {known[0].work_s:.2f} s")

    def _patch(self, tool: Tool) -> Path:
        return self.folder / f"{tool.key}.patch"

    def _measure(self, tool: Tool, verb: str) -> Sample:
        patch, result = self._patch(tool), self.folder / "target"
        (patch if verb == "make" else result).unlink(missing_ok=True)
        target = self.pair.target if verb == "make" else result
        record, whole_s = _measure_apart(tool, verb, self.pair.base, patch, target)
        if verb == "apply" and record["sha256"] != self.expected:
            raise ToolFailedError("failed: it gave another target")
        program = bool(tool.programs)
        # A program's start-up lies inside its work, the interpreter's before it.
        startup = record["before_s"] if program else whole_s - record["work_s"]
        return Sample(
            work_s=max(
                0.0, record["work_s"] - startup if program else record["work_s"]
            ),
            cpu_s=record["cpu_s"],
            startup_s=startup,
            peak_bytes=record["peak_bytes"],
            startup_peak_bytes=record["before_peak_bytes"],
        )

    def _entry(self, tool: Tool) -> Entry:
        name = (tool.key, tool.title, tool.kind)
        if tool.key in self.problems:
            return Entry(*name, problem=self.problems[tool.key])
        made, applied = self.made[tool.key], self.applied[tool.key]
        size = self._patch(tool).stat().st_size
        return Entry(
            *name,
            size,
            _medians(made),
            _medians(applied),
            min(sample.work_s for sample in applied),
            len(made),
            len(applied),
        )


def _measure_apart(
    tool: Tool, verb: str, base: Path, patch: Path, target: Path
) -> tuple[dict[str, Any], float]:
    """Measure in a process of its own; return its record and its whole wall time.

    Raises:
        ToolFailedError: It failed or took too long.
    """
    paths = [str(path.resolve()) for path in (base, patch, target)]
    command = [sys.executable, "-m", "tools.bench.measure", verb, tool.key, *paths]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | ONE_THREAD,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as err:
        message = f"failed to {verb}: took longer than {TIMEOUT_S:g} s"
        raise ToolFailedError(message) from err
    whole_s = time.perf_counter() - start
    if done.returncode:
        last = (done.stderr.strip() or f"exit {done.returncode}").splitlines()[-1]
        raise ToolFailedError(f"failed to {verb}: {last}")
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record, whole_s


def _medians(samples: Sequence[Sample]) -> Sample:
    names = [field.name for field in fields(Sample)]
    return Sample(**{n: median(getattr(s, n) for s in samples) for n in names})


def hold_bars(contests: Sequence[Contest]) -> Iterator[Bar]:
    """Hold the results against the bars that were stated."""
    for contest in contests:
        if contest.ours.problem:
            for bar in BARS:
                yield Bar(bar, contest.pair.name, False, contest.ours.problem)
            continue
        yield _beats("smaller", contest, _size, Kind.DELTA, Kind.NAIVE, Kind.FULL)
        if contest.pair.method == "dpu":
            yield _beats("a tenth smaller", contest, _size, Kind.DELTA, share=0.9)
        yield _beats("faster", contest, _apply_ms, Kind.DELTA)
        yield _beats("faster than naive", contest, _apply_ms, Kind.NAIVE)


def _size(entry: Entry) -> tuple[float, str]:
    return entry.size, f"{entry.size:,} B"


def _apply_ms(entry: Entry) -> tuple[float, str]:
    return entry.fastest_s, f"{entry.fastest_s * 1e3:.1f} ms"


def _beats(
    bar: str,
    contest: Contest,
    key: Callable[[Entry], tuple[float, str]],
    *kinds: Kind,
    share: float = 1.0,
) -> Bar:
    name, others = contest.pair.name, contest.others(*kinds)
    if not others:
        return Bar(bar, name, False, "there is no other tool to compare with")
    best = min(others, key=lambda entry: key(entry)[0])
    (ours, ours_text), (other, other_text) = key(contest.ours), key(best)
    text = f"{ours_text} beside {other_text} of {best.title}"
    return Bar(bar, name, ours < share * other, text)


def chosen_tools(keys: Sequence[str]) -> list[Tool]:
    """Return the tools of these keys, or all; ours always and first.

    Raises:
        KeyError: A key is unknown.
    """
    ours = next(iter(TOOLS))
    return [TOOLS[key] for key in dict.fromkeys([ours, *(keys or TOOLS)])]
