# SPDX-License-Identifier: Apache-2.0
"""How much memory and time packing two files takes.

    python -m tools.bench.pack --check --json

Memory: ``dpu-pack --base A --target B`` on two weight files of bfloat16, of half a
gigabyte each (``--large``: of four gigabytes too), of which a share changes. What
``/proc`` says of the process is read every few milliseconds: anonymous memory, and the
peak of all resident memory, mapped pages of the files included.

Time: two files of 40,000 small tensors are read and hashed, and then packed, in one
process; what packing takes is given in multiples of what reading and hashing took.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np

from edge_runtime.commandline import CONTEXT, Command, emit, json_option, say
from edge_runtime.formats.layout import make_layout
from edge_runtime.formats.weights import write_weights
from tools.bench.contest_report import replace_section
from tools.bench.patch import machine
from tools.ending import end

MIB = 1 << 20
PEAK_BAR = 800 * MIB  # of two files of half a gigabyte, with mapped pages
ANONYMOUS_BAR = 512 * MIB  # of two files of four gigabytes
TIMES_BAR = 20  # reading and hashing
TENSORS = 40_000
SHAPES = ((64,), (16, 16), (32, 8), (4, 4, 3, 3))  # of small tensors
SHARES = (0.01, 0.2)  # of elements that change
_ROWS, _COLUMNS = 4096, 4096  # of a large tensor: 32 MB
_PIECE = 1 << 22  # elements that are made at a time
_RESULTS = Path(__file__).parents[1] / "RESULTS.md"
_PACK = "from packager.__main__ import pack; pack()"
_MANY = """
import json, sys, time
from packager.models.read import pack_models, read_model
times = [(time.perf_counter(), time.process_time())]
models = [read_model(path) for path in sys.argv[1:]]
for model in models:
    model.weights.fingerprint
times.append((time.perf_counter(), time.process_time()))
made = pack_models(*models)
times.append((time.perf_counter(), time.process_time()))
print(json.dumps({"times": times, "patch": len(made.data)}))
"""


@dataclass(frozen=True, slots=True)
class Memory:
    """What packing two large files takes.

    Attributes:
        file_bytes: Of each of them.
        share: Of the elements, how many change.
        patch_bytes: Of the patch.
        seconds: Wall time.
        anonymous_bytes: Most memory that no file stands behind.
        peak_bytes: Most resident memory, mapped pages included.
    """

    file_bytes: int
    share: float
    patch_bytes: int
    seconds: float
    anonymous_bytes: int
    peak_bytes: int

    def missed(self) -> Iterator[str]:
        """Yield the bars that it misses."""
        if self.file_bytes <= 1e9 and self.peak_bytes > PEAK_BAR:
            yield f"packing took {self.peak_bytes} bytes of memory, bar {PEAK_BAR}"
        if self.anonymous_bytes > ANONYMOUS_BAR:
            yield (
                f"packing took {self.anonymous_bytes} bytes of anonymous memory, bar "
                f"{ANONYMOUS_BAR}"
            )


@dataclass(frozen=True, slots=True)
class Time:
    """What packing two files of many tensors takes.

    Attributes:
        tensors: In each of them.
        file_bytes: Of each of them.
        patch_bytes: Of the patch.
        read_s: Wall time of reading and hashing both.
        pack_s: Wall time of packing.
        read_cpu_s: CPU time of reading and hashing both.
        pack_cpu_s: CPU time of packing.
    """

    tensors: int
    file_bytes: int
    patch_bytes: int
    read_s: float
    pack_s: float
    read_cpu_s: float
    pack_cpu_s: float

    def missed(self) -> Iterator[str]:
        """Yield the bars that it misses."""
        for what, times in (
            ("time", self.pack_s / self.read_s),
            ("CPU time", self.pack_cpu_s / self.read_cpu_s),
        ):
            if times > TIMES_BAR:
                yield (
                    f"packing {self.tensors} tensors took {times:.1f} times the {what} "
                    f"of reading and hashing them, bar {TIMES_BAR}"
                )


def make_large(folder: Path, size: float, share: float) -> tuple[Path, Path]:
    """Write two files of bfloat16 that differ in a share of their elements."""
    count = max(1, round(size / (2 * _ROWS * _COLUMNS)))
    layout = make_layout(
        {f"layer{n:04}.weight": ("BF16", (_ROWS, _COLUMNS)) for n in range(count)}
    )
    paths = folder / "a.safetensors", folder / "b.safetensors"
    rng = np.random.default_rng(0)
    with paths[0].open("wb") as base, paths[1].open("wb") as target:
        for file in (base, target):
            file.write(layout.header)
        for _ in range(0, count * _ROWS * _COLUMNS, _PIECE):
            values = rng.standard_normal(_PIECE, np.float32) * np.float32(0.02)
            bits = (values.view("<u4") >> 16).astype("<u2")
            base.write(bits.data)
            bits ^= (rng.random(_PIECE, np.float32) < share).astype("<u2")
            target.write(bits.data)
    return paths


def make_many(folder: Path, tensors: int) -> tuple[Path, Path]:
    """Write two files of many small tensors, a tenth of which stay as they are."""
    rng = np.random.default_rng(0)
    base, target = {}, {}
    for number in range(tensors):
        shape = SHAPES[number % len(SHAPES)]
        old = rng.normal(0, 0.05, shape).astype("<f4")
        new = old.copy()
        if number % 10:
            moved = rng.random(shape) < 0.1
            new[moved] -= rng.normal(0, 0.001, shape).astype("<f4")[moved]
        base[f"layer{number}.weight"], target[f"layer{number}.weight"] = old, new
    paths = folder / "a.safetensors", folder / "b.safetensors"
    for path, arrays in zip(paths, (base, target), strict=True):
        write_weights(arrays, path)
    return paths


def measure_memory(folder: Path, size: float, share: float) -> Memory:
    """Pack two large files in a process of its own and watch it."""
    base, target = make_large(folder, size, share)
    patch = folder / "patch.dpu"
    files = ["--base", str(base), "--target", str(target), "-o", str(patch), "--force"]
    start = time.perf_counter()
    command = [sys.executable, "-c", _PACK, *files, "--quiet"]
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        anonymous = peak = 0
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            anonymous = max(anonymous, _field(status, "RssAnon"))
            peak = max(peak, _field(status, "VmHWM"))
            time.sleep(0.005)
    if process.returncode:
        raise click.ClickException(f"dpu-pack ended with {process.returncode}")
    seconds = time.perf_counter() - start
    return Memory(
        base.stat().st_size, share, patch.stat().st_size, seconds, anonymous, peak
    )


def _field(status: str, name: str) -> int:
    """Return a number of bytes of ``/proc/PID/status``; 0 of a process that ended."""
    _, found, rest = status.partition(f"{name}:")
    return int(rest.split()[0]) << 10 if found else 0


def measure_time(folder: Path, tensors: int) -> Time:
    """Read, hash and pack two files of many tensors, in a process of its own."""
    base, target = make_many(folder, tensors)
    command = [sys.executable, "-c", _MANY, str(base), str(target)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    record = json.loads(done.stdout)
    (wall, cpu), (read, read_cpu), (end, end_cpu) = record["times"]
    return Time(
        tensors,
        base.stat().st_size,
        record["patch"],
        read - wall,
        end - read,
        read_cpu - cpu,
        end_cpu - read_cpu,
    )


def section(memory: list[Memory], found: Time, host: dict[str, object]) -> str:
    """Return the section of RESULTS.md."""
    rows = [
        f"| {m.file_bytes / 1e6:.0f} | {m.share:.0%} | {m.patch_bytes / 1e6:.2f} | "
        f"{m.seconds:.0f} | {m.anonymous_bytes / MIB:.0f} | {m.peak_bytes / MIB:.0f} |"
        for m in memory
    ]
    table = "\n".join(rows)
    names = ", ".join(f"{name} {value}" for name, value in host.items())
    return f"""## Packing

`python -m tools.bench.pack --check`: `dpu-pack --base A --target B` of two weight files
of bfloat16. Bars: 800 MiB resident for 0.5 GB, 512 MiB anonymous for 4 GB (`--large`).

| each file, MB | changed | patch, MB | wall s | anonymous, MiB | resident, MiB |
|--:|--:|--:|--:|--:|--:|
{table}

{found.tensors:,} small tensors ({found.file_bytes / 1e6:.1f} MB): reading and hashing
both files {found.read_s:.2f} s (CPU {found.read_cpu_s:.2f}), packing {found.pack_s:.2f}
s (CPU {found.pack_cpu_s:.2f}): {found.pack_s / found.read_s:.1f} times the time,
{found.pack_cpu_s / found.read_cpu_s:.1f} times the CPU time; bar {TIMES_BAR}.

{names}.
"""


@click.command(cls=Command, context_settings=CONTEXT)
@click.option("--large", is_flag=True, help="Two files of 4 GB too: minutes, 8 GB.")
@click.option(
    "--tensors",
    type=click.IntRange(2),  # the first one stays as it is
    default=TENSORS,
    show_default=True,
    help="Small ones.",
)
@click.option("--write", is_flag=True, help="Put the tables into RESULTS.md.")
@click.option("--check", is_flag=True, help="End with 1 if a bar is missed.")
@json_option
def main(tensors: int, *, large: bool, write: bool, check: bool, as_json: bool) -> None:
    """Measure memory and time of packing."""
    cases = [(0.5e9, share) for share in SHARES]
    cases += [(4e9, 0.02)] if large else []
    memory = []
    for size, share in cases:
        say(f"packing two files of {size / 1e9} GB, {share:.0%} changed ...")
        with tempfile.TemporaryDirectory() as name:
            memory.append(measure_memory(Path(name), size, share))
    say(f"packing two files of {tensors} tensors ...")
    with tempfile.TemporaryDirectory() as name:
        found = measure_time(Path(name), tensors)
    problems = [text for row in memory for text in row.missed()] + [*found.missed()]
    host = machine()
    text = section(memory, found, host)
    record = {
        "memory": [asdict(row) for row in memory],
        "time": asdict(found),
        "problems": problems,
        "machine": host,
    }
    emit(record, as_json=as_json, text=text)
    if write:
        _RESULTS.write_text(replace_section(_RESULTS.read_text(), text))
    end(problems, check=check)


if __name__ == "__main__":
    main()
