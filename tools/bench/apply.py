# SPDX-License-Identifier: Apache-2.0
"""How long applying a patch takes beside copying the weights, and how much memory.

    python -m tools.bench.apply --rounds runs --check

Time: reading base and patch, writing the target, its SHA-256 and fsync, in turns with
reading, writing, hashing once and fsyncing a file of that size, in one process. The
fastest turn of each counts, as what else the machine does only ever adds. CPU time is
given beside it: applying uses a second processor where there is one, copying does not.

Memory: the peak of a process of its own that makes the calls of ``dpu-edge apply`` on a
store, less its peak once everything is imported. The trial session is left out: on a
device it is another process, whose memory is that of ONNX Runtime and the model; here
the trial does nothing, as no graph is needed.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np

from edge_runtime.commandline import CONTEXT, Command, emit, json_option, say
from edge_runtime.formats.identity import network_id
from edge_runtime.formats.init_weights import InitSpec, TensorInit, write_init_spec
from edge_runtime.formats.layout import read_layout
from edge_runtime.formats.signing import Trust
from edge_runtime.formats.subspace import Term, round_scale
from edge_runtime.formats.subspace_moves import move_weights
from edge_runtime.formats.weights import (
    pack_weights,
    read_chunks,
    read_weights,
    write_weights,
)
from edge_runtime.store.state import Slot
from edge_runtime.store.store import Store
from packager.build import header_for, pack_changes
from packager.diff import diff
from tools.bench.contest_report import replace_section
from tools.bench.patch import machine
from tools.bench.rivals import TOOLS, Target
from tools.bench.rounds import find_pairs
from tools.ending import end

TIME_BAR = 1.5  # of copying, hashing once and fsyncing
SUBSPACE_BAR = 1.4  # the same, where every weight moves
MEMORY_BAR = 32 << 20  # bytes over interpreter and imports
DENSITIES = (0.01, 0.1)  # of the synthetic file
LAYERS, ROWS, COLUMNS = 20, 1250, 4000  # of the synthetic file: 400 MB
MOVED_LAYERS, COEFFICIENTS = 14, 8192  # of the one that moves
_GRAPH = b"a graph; no session is started here"
_RESULTS = Path(__file__).parents[1] / "RESULTS.md"
# Runs apart, with the store and the patch as arguments.
_CHILD = """
import sys
import edge_runtime.cli.main
from edge_runtime.update.device import Device
def peak():
    status = open("/proc/self/status").read()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10
before = peak()
Device.open(sys.argv[1], trial=lambda *_, **__: None).update(sys.argv[2])
print(before, peak())
"""


@dataclass(frozen=True, slots=True)
class Row:
    """What applying one patch costs.

    Attributes:
        name: Of the round.
        file_size: Bytes of the weights.
        patch_size: Bytes of the patch.
        apply_cpu_s: CPU time of applying, in the fastest turn, as all times.
        copy_cpu_s: CPU time of copying, hashing and fsyncing.
        apply_s: Wall time of applying.
        copy_s: Wall time of copying, hashing and fsyncing.
        imports_bytes: Peak memory of the process once everything is imported.
        peak_bytes: Peak memory in the end.
        bar: What ``ratio`` may be.
    """

    name: str
    file_size: int
    patch_size: int
    apply_cpu_s: float
    copy_cpu_s: float
    apply_s: float
    copy_s: float
    imports_bytes: int
    peak_bytes: int
    bar: float = TIME_BAR

    @property
    def ratio(self) -> float:
        """Wall time of applying to that of copying."""
        return self.apply_s / self.copy_s

    @property
    def memory(self) -> int:
        """Bytes that applying needs over interpreter and imports."""
        return self.peak_bytes - self.imports_bytes

    def missed(self) -> Iterator[str]:
        """Yield the bars that it misses."""
        if self.ratio > self.bar:
            yield f"{self.name}: {self.ratio:.2f} of copying, bar {self.bar}"
        if self.memory > MEMORY_BAR:
            yield f"{self.name}: {self.memory >> 20} MiB, bar {MEMORY_BAR >> 20}"


def measure(
    name: str,
    base: Path,
    target: Path,
    folder: Path,
    repeats: int,
    *,
    level: int = 19,
    terms: Sequence[Term] = (),
) -> Row:
    """Pack a round and measure what applying it costs.

    Args:
        name: Of the round.
        base: The weight file that it leads from.
        target: The one that it leads to.
        folder: For the patch and what it leads to.
        repeats: How often both are timed.
        level: Of zstd.
        terms: The subspaces that lead to the target.

    Raises:
        ValueError: The result is not the target.
    """
    patch, result, store = (folder / part for part in ("a.dpu", "result", "store"))
    old, new = read_weights(base), read_weights(target)
    model = network_id(old.layout.header, _GRAPH)
    header = header_for(old, new, model=model, round_=1, counter=1)
    changes = diff(move_weights(old, terms), new)
    packed = pack_changes(old, new, header, changes, level=level, terms=terms)
    patch.write_bytes(packed.data)
    del old, new, changes, packed

    def apply() -> None:
        if TOOLS["ours"].apply(base, patch, result) != header.target:
            raise ValueError(f"{name}: applying leads to another target")

    def copy() -> None:
        out = Target(result)
        for chunk in read_chunks(base):
            out.write(chunk)
        out.finish()

    copy()  # fills the page cache
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    turn = [(apply, ours), (copy, theirs)]
    for _ in range(repeats):
        turn.reverse()  # neither is always first, with what the other left behind
        for work, times in turn:
            times.append(_timed(work, result))
    _install(store, base, header.parent)
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(store), str(patch)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    imports, peak = map(int, done.stdout.split())
    return Row(
        name,
        base.stat().st_size,
        patch.stat().st_size,
        min(cpu for cpu, _ in ours),
        min(cpu for cpu, _ in theirs),
        min(wall for _, wall in ours),
        min(wall for _, wall in theirs),
        imports,
        peak,
        SUBSPACE_BAR if terms else TIME_BAR,
    )


def _timed(work: Callable[[], None], result: Path) -> tuple[float, float]:
    """Return CPU and wall time, as if for the first time."""
    result.unlink(missing_ok=True)
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def _install(root: Path, base: Path, parent: str) -> None:
    """Make a store that is at the base."""
    with open(base, "rb") as file:
        layout = read_layout(file)
    tensors = {
        t.name: TensorInit(t.dtype, t.shape, "constant", 0.0) for t in layout.tensors
    }
    with tempfile.TemporaryDirectory() as name:
        write_init_spec(InitSpec(0, tensors, {}), name)
        files = {path.name: path.read_bytes() for path in Path(name).iterdir()}
    root.mkdir()
    store = Store(root)
    files |= {"graph.onnx": _GRAPH, "contract.json": b"none; nothing is inferred"}
    store.create(files, Trust(), layout.file_size)
    store.stage(read_chunks(base), parent)
    store.commit(store.state.activated(Slot(parent, 0, 0), "installed"))


def make_synthetic(folder: Path, density: float) -> tuple[Path, Path]:
    """Write two weight files of 400 MB that differ in a share of their elements."""
    rng = np.random.default_rng(0)
    base, target = {}, {}
    for layer in range(LAYERS):
        old = rng.normal(0, 0.05, (ROWS, COLUMNS)).astype("<f4")
        new = old.copy()
        found = rng.random(old.shape) < density
        new[found] += rng.normal(0, 0.01, int(found.sum())).astype("<f4")
        base[f"layer{layer:02}.weight"], target[f"layer{layer:02}.weight"] = old, new
    paths = folder / "base.safetensors", folder / "target.safetensors"
    for tensors, path in zip((base, target), paths, strict=True):
        write_weights(pack_weights(tensors), path)
    return paths


def make_moved(folder: Path, taps: int) -> tuple[Path, Path, list[Term]]:
    """Write two weight files of 14 million weights, every one of which moves."""
    rng = np.random.default_rng(0)
    shape = ROWS, COLUMNS // 5
    base = pack_weights(
        {
            f"layer{layer:02}.weight": rng.normal(0, 0.05, shape).astype("<f4")
            for layer in range(MOVED_LAYERS)
        }
    )
    scales = dict.fromkeys(range(MOVED_LAYERS), round_scale(0.001))
    signs = rng.choice(np.array([-1, 1], np.int16), COEFFICIENTS)
    terms = [Term(1, 1, taps, scales, signs)]
    paths = folder / "base.safetensors", folder / "target.safetensors"
    write_weights(base, paths[0])
    write_weights(move_weights(base, terms), paths[1])
    return *paths, terms


@click.command(cls=Command, context_settings=CONTEXT)
@click.option(
    "--rounds",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Rounds, runs or folders of runs, as for tools.bench.patch; may be repeated.",
)
@click.option(
    "--no-synthetic", is_flag=True, help="Leave the files of 400 and 56 MB out."
)
@click.option("--repeats", type=click.IntRange(1), default=15, show_default=True)
@click.option("--check", is_flag=True, help="End with 1 if a bar is missed.")
@click.option("--save", is_flag=True, help="Write the section of tools/RESULTS.md.")
@json_option
def main(
    rounds: tuple[Path, ...],
    repeats: int,
    *,
    no_synthetic: bool,
    check: bool,
    save: bool,
    as_json: bool,
) -> None:
    """Measure time and memory of applying patches."""
    if no_synthetic and not rounds:
        raise click.UsageError("nothing to measure: expected --rounds")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-rounds-") as scratch:
        for pair in (p for path in rounds for p in find_pairs(path, Path(scratch))):
            say(f"measuring {pair.name}")
            with tempfile.TemporaryDirectory(prefix="bench-apply-") as name:
                folder = Path(name)
                rows.append(measure(pair.name, pair.base, pair.target, folder, repeats))
    for density in () if no_synthetic else DENSITIES:
        say(f"measuring 400 MB at {density:.0%}")
        with tempfile.TemporaryDirectory(prefix="bench-apply-") as name:
            files = make_synthetic(Path(name), density)
            label = f"synthetic, {density:.0%} changed"
            rows.append(measure(label, *files, Path(name), min(repeats, 5), level=3))
    for taps in () if no_synthetic else (1, 2):
        say(f"measuring a subspace of {taps} taps")
        with tempfile.TemporaryDirectory(prefix="bench-apply-") as name:
            base, target, terms = make_moved(Path(name), taps)
            label = f"synthetic, subspace of {taps} taps"
            rows.append(measure(label, base, target, Path(name), repeats, terms=terms))
    missed = [problem for row in rows for problem in row.missed()]
    told = machine()
    text = table(rows, missed, told)
    record = {"machine": told, "missed": missed, "rounds": [
        asdict(row) | {"ratio": row.ratio, "memory": row.memory} for row in rows
    ]}  # fmt: skip
    emit(record, as_json=as_json, text=text)
    if save:
        _RESULTS.write_text(replace_section(_RESULTS.read_text(), text))
    end(missed, check=check)


def table(rows: Sequence[Row], missed: Sequence[str], told: dict[str, object]) -> str:
    """Return the section "Apply" of the results."""
    lines = [
        "## Apply",
        "",
        "    python -m tools.bench.apply --rounds runs --check",
        "",
        "Applying beside copying the weight file, hashing it once and fsyncing it, in",
        "turns; the fastest of each. Memory is over interpreter and imports, without",
        f"the trial's process. Bars: {TIME_BAR} of the time of copying "
        f"({SUBSPACE_BAR} for a",
        f"subspace), {MEMORY_BAR >> 20} MiB.",
        "",
        "Machine: " + ", ".join(f"{k} {v}" for k, v in told.items()) + ".",
        "",
        "| round | weights MB | patch B | apply ms | copy ms | ratio "
        "| apply CPU ms | copy CPU ms | ratio | memory MiB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row.name} | {row.file_size / 1e6:.1f} | {row.patch_size:,} "
        f"| {row.apply_s * 1e3:.1f} | {row.copy_s * 1e3:.1f} | {row.ratio:.2f} "
        f"| {row.apply_cpu_s * 1e3:.1f} | {row.copy_cpu_s * 1e3:.1f} "
        f"| {row.apply_cpu_s / row.copy_cpu_s:.2f} | {row.memory / 2**20:.1f} |"
        for row in rows
    ]
    lines += ["", *(f"- missed: {problem}" for problem in missed)]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    main()
