# SPDX-License-Identifier: Apache-2.0
"""What each reading command takes for a file that was made to take much.

    python -m tools.bench.readers --check

Files of 20 MB, each of a kind that somebody else may hand over, are full of what costs
a reader most: values of JSON, members of a zip file, empty blocks of zstd. A command
that reads such a file runs in a process of its own. It may refuse the file in words, or
take it; what counts is its peak memory and its CPU time, which other processes on the
machine do not lengthen as they do the time on the clock.
"""

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx

from edge_runtime.commandline import CONTEXT, Command, emit, json_option, say
from edge_runtime.formats.frames import ZSTD
from edge_runtime.formats.header import PatchHeader, encode_header
from edge_runtime.formats.sections import INDEX, encode_varint
from tools.bench.contest_report import replace_section
from tools.bench.patch import machine
from tools.ending import end

SIZE = 20_000_000
MEMORY_BAR = 200_000_000
TIME_BAR = 5.0  # seconds of CPU
LIMIT_S = 120  # of a command that does not end
BUG = 1  # the exit code that no file may lead to
_RESULTS = Path(__file__).parents[1] / "RESULTS.md"
_START = (
    "import sys; from edge_runtime.__main__ import start; "
    "program = sys.argv.pop(1); "
    "start(*{'dpu-edge': ('edge_runtime.cli.main', 'main', program), "
    "'dpu-pack': ('packager.cli.pack', 'pack', program), "
    "'dpu-patch': ('packager.cli.pack', 'patch', program)}[program])"
)


@dataclass(frozen=True, slots=True)
class Row:
    """What one command took for one file.

    Attributes:
        file: What it was.
        command: The command, without paths.
        exit_code: How it ended; negative: by this signal.
        cpu_s: CPU time.
        wall_s: Time on the clock.
        peak_bytes: Most resident memory.
    """

    file: str
    command: str
    exit_code: int
    cpu_s: float
    wall_s: float
    peak_bytes: int

    def missed(self) -> Iterator[str]:
        """Yield the bars that it misses."""
        what = f"{self.command} with {self.file}"
        if self.exit_code == BUG or self.exit_code < 0:
            yield f"{what} ended with {self.exit_code}"
        if self.cpu_s > TIME_BAR:
            yield f"{what} took {self.cpu_s:.1f} s of CPU time, bar {TIME_BAR}"
        if self.peak_bytes > MEMORY_BAR:
            yield f"{what} took {self.peak_bytes} bytes, bar {MEMORY_BAR}"


# Files -------------------------------------------------------------------------------


def weights_file(path: Path, entries: dict[str, Any], data: bytes) -> Path:
    """Write a safetensors file with any header."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def tensors_file(path: Path, count: int, size: int, fill: int) -> Path:
    """Write a safetensors file of ``size`` bytes with so many tensors of bytes."""
    each = max(1, (size // count - 90) // 2)  # as many bytes of name as of data
    entries = {
        f"{n:0{each}}": {
            "dtype": "U8",
            "shape": [each],
            "data_offsets": [n * each, (n + 1) * each],
        }
        for n in range(count)
    }
    return weights_file(path, entries, bytes([fill]) * (each * count))


def metadata_file(path: Path, size: int) -> Path:
    """Write a safetensors file that is nothing but keys of metadata."""
    entries = {
        "__metadata__": {f"{n:08}": "x" for n in range(size // 15)},
        "w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
    }
    return weights_file(path, entries, b"x")


def zip_file(path: Path, size: int, name: str) -> Path:
    """Write a zip file of empty members."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for number in range(size // (2 * (len(name) + 8) + 76)):
            archive.writestr(name.format(number), b"")
    path.write_bytes(out.getvalue())
    return path


def packed_zeros(path: Path, size: int) -> Path:
    """Write an ``.npz`` file whose array has 300 times as many bytes unpacked."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "|u1", "fortran_order": False, "shape": (300 * size,)}
        )
        with archive.open("inputs.npy", "w", force_zip64=True) as member:
            member.write(header.getvalue())
            for _ in range(300 * size // (1 << 20)):
                member.write(bytes(1 << 20))
    return path


def blocks_patch(path: Path, size: int) -> Path:
    """Write a patch whose index is a frame of empty blocks."""
    frame = b"\x28\xb5\x2f\xfd\x20\x01" + bytes(3) * (size // 3) + b"\x09\0\0x"
    body = bytes([1, INDEX, ZSTD]) + encode_varint(len(frame)) + frame
    header = PatchHeader("00" * 32, "11" * 32, "22" * 32, 1, 1, 1 << 30)
    path.write_bytes(encode_header(header, body) + b"\0\0" + body)
    return path


def json_file(path: Path, size: int, start: str = "", value: str = '"",') -> Path:
    """Write JSON that is one long list, behind some fields."""
    many = value * (size // len(value))
    path.write_text(f'{{{start}"x": [{many.rstrip(",")}]}}')
    return path


def objects_file(path: Path, size: int, start: str = "") -> Path:
    """Write JSON that is one object with many names."""
    many = ",".join(f'"{n:08}":{{}}' for n in range(size // 14))
    path.write_text(f'{{{start}"x": {{{many}}}}}')
    return path


def model_file(path: Path) -> Path:
    """Write a small network as ONNX."""
    weight = onnx.numpy_helper.from_array(np.ones((4, 3), np.float32), "w")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "graph",
        [onnx.helper.make_tensor_value_info("x", 1, [None, 4])],
        [onnx.helper.make_tensor_value_info("y", 1, [None, 3])],
        [weight],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


# Commands ----------------------------------------------------------------------------


def cases(folder: Path, size: int) -> Iterator[tuple[str, list[str]]]:
    """Write each file, and yield what it is and the commands that read it."""
    yield from _weights(folder, size)
    yield from _archives(folder, size)
    yield from _records(folder, size)
    yield from _device(folder, size)


def _weights(folder: Path, size: int) -> Iterator[tuple[str, list[str]]]:
    for count in (100_000, 40_000, 10_000):
        a, b = (
            tensors_file(folder / f"{name}.safetensors", count, size, fill)
            for fill, name in enumerate(("a", "b"))
        )
        yield from _compared(f"weights of {count:,} tensors", a, b)
    a, b = (metadata_file(folder / f"{name}.safetensors", size) for name in ("a", "b"))
    yield from _compared("weights with metadata alone", a, b)


def _compared(what: str, a: Path, b: Path) -> Iterator[tuple[str, list[str]]]:
    yield what, ["dpu-patch", "diff", str(a), str(b), "--json"]
    yield what, ["dpu-pack", "--base", str(a), "--target", str(b), "--dry-run"]
    folder = a.parent / f"extracted from {what}"
    yield what, ["dpu-patch", "extract", str(a), "-o", str(folder)]


def _archives(folder: Path, size: int) -> Iterator[tuple[str, list[str]]]:
    bundle = zip_file(folder / "many.zip", size, "keys/{:08}.pem")
    for command in (["dpu-patch", "info"], ["dpu-patch", "verify"]):
        yield "zip of many members", [*command, str(bundle)]
    store = str(folder / "other")
    yield "zip of many members", ["dpu-edge", "--store", store, "init", str(bundle)]
    patch = blocks_patch(folder / "blocks.dpu", size)
    for name in ("info", "verify"):
        yield "patch of empty blocks", ["dpu-patch", name, str(patch)]
    model = model_file(folder / "model.onnx")
    zeros = packed_zeros(folder / "zeros.npz", size)
    golden = ["dpu-pack", "--base", str(model), "--bundle", "--dry-run", "--golden"]
    yield "npz of packed zeros", [*golden, str(zeros)]
    many = zip_file(folder / "many.npz", size, "{:08}.npy")
    yield "npz of many arrays", [*golden, str(many)]


def _records(folder: Path, size: int) -> Iterator[tuple[str, list[str]]]:
    run = folder / "runs" / "run"
    (run / "model").mkdir(parents=True)
    (run / "round_00").mkdir()
    for make in (json_file, objects_file):
        words = "a list" if make is json_file else "many names"
        proof = str(make(folder / "proof.json", size, '"nonce": "n", '))
        asked = ["dpu-patch", "check-proof", proof, "--nonce", "n"]
        yield f"proof with {words}", asked
        keys = str(make(folder / "1.root.json", size, '"signed": 1, '))
        yield f"key list with {words}", ["dpu-patch", "trust", "show", keys]
        contract = str(make(folder / "contract.json", size, '"accuracy_floor": 1, '))
        model = str(model_file(folder / "model.onnx"))
        bundle = ["dpu-pack", "--base", model, "--bundle", "--dry-run"]
        yield f"contract with {words}", [*bundle, "--contract", contract]
        make(run / "round_00" / "round.json", size)
        yield f"run record with {words}", ["dpu-pack", str(run / "round_00")]
        line = make(run / "releases.jsonl", size)
        yield f"ledger, a line with {words}", ["dpu-patch", "releases", str(run)]
        line.unlink()
    (run / "releases.jsonl").write_text("{}\n" * (size // 3))
    yield "ledger of many lines", ["dpu-patch", "releases", str(run)]


def _device(folder: Path, size: int) -> Iterator[tuple[str, list[str]]]:
    bundle, store = str(folder / "model.bundle.zip"), str(folder / "store")
    edge = ["dpu-edge", "--store", store]
    model = str(model_file(folder / "model.onnx"))
    for command in (
        ["dpu-pack", "--base", model, "--bundle", "-o", bundle],
        [*edge, "init", bundle],
    ):
        done = subprocess.run(
            [sys.executable, "-c", _START, *command], check=False, capture_output=True
        )
        if done.returncode:
            raise click.ClickException(done.stderr.decode())
    yield "patch of empty blocks", [*edge, "apply", str(folder / "blocks.dpu")]
    keys = str(objects_file(folder / "1.root.json", size, '"signed": 1, '))
    yield "key list with many names", [*edge, "trust", "add", keys]
    for name in ("zeros.npz", "many.npz"):
        yield f"inputs, {name}", [*edge, "infer", str(folder / name)]
    yield "inputs, JSON", [*edge, "infer", str(json_file(folder / "in.json", size))]
    weights = tensors_file(folder / "a.safetensors", 100_000, size, 0)
    yield "weights of 100,000 tensors", [*edge, "verify", "--expect", str(weights)]
    json_file(folder / "store" / "state.json", size)
    yield "state with a list", [*edge, "status"]


def measure(what: str, command: list[str]) -> Row:
    """Run a command in a process of its own and watch it."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", _START, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    status = Path(f"/proc/{process.pid}/status")
    peak, done = 0, 0
    while not done:
        _, found, rest = status.read_text().partition("VmHWM:")
        peak = max(peak, int(rest.split()[0]) << 10 if found else 0)
        if time.perf_counter() - start > LIMIT_S:
            process.send_signal(signal.SIGKILL)
        done, code, used = os.wait4(process.pid, os.WNOHANG)
        time.sleep(0.005)
    process.returncode = os.waitstatus_to_exitcode(code)
    words = [word for word in command if not word.startswith("/")]
    return Row(
        what,
        " ".join(words),
        process.returncode,
        used.ru_utime + used.ru_stime,
        time.perf_counter() - start,
        peak,
    )


def section(rows: list[Row], host: dict[str, Any]) -> str:
    """Return the section of RESULTS.md."""
    lines = [
        f"| {r.file} | `{r.command}` | {r.exit_code} | {r.cpu_s:.1f} | "
        f"{r.wall_s:.1f} | {r.peak_bytes / 1e6:.0f} |"
        for r in rows
    ]
    table = "\n".join(lines)
    names = ", ".join(f"{name} {value}" for name, value in host.items())
    return f"""## Files made to take much

`python -m tools.bench.readers --check`: files of 20 MB, and commands that read them.
Bars: {TIME_BAR:.0f} s of CPU time, {MEMORY_BAR / 1e6:.0f} MB; exit code 1 is a bug.

| file | command | exit code | CPU s | wall s | memory, MB |
|---|---|--:|--:|--:|--:|
{table}

{names}.
"""


@click.command(cls=Command, context_settings=CONTEXT)
@click.option(
    "--size",
    type=click.IntRange(1),
    default=SIZE,
    show_default=True,
    help="Bytes of each file.",
)
@click.option("--write", is_flag=True, help="Put the table into RESULTS.md.")
@click.option("--check", is_flag=True, help="End with 1 if a bar is missed.")
@json_option
def main(size: int, *, write: bool, check: bool, as_json: bool) -> None:
    """Measure what reading commands take for files made to take much."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for what, command in cases(Path(name), size):
            rows.append(measure(what, command))
            row = rows[-1]
            say(
                f"{row.file}: {row.command}: exit code {row.exit_code}, CPU "
                f"{row.cpu_s:.1f} s, {row.peak_bytes / 1e6:.0f} MB"
            )
    problems = [text for row in rows for text in row.missed()]
    host = machine()
    text = section(rows, host)
    record = {
        "readers": [asdict(row) for row in rows],
        "problems": problems,
        "machine": host,
    }
    emit(record, as_json=as_json, text=text)
    if write:
        _RESULTS.write_text(replace_section(_RESULTS.read_text(), text))
    end(problems, check=check)


if __name__ == "__main__":
    main()
