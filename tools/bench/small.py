# SPDX-License-Identifier: Apache-2.0
"""How small the runtime is: installed size, import time, memory.

``python -m tools.bench.small`` installs the wheel without extras into empty folders,
for this machine and for aarch64, adds up what each distribution takes there, and starts
fresh interpreters on the installed copy, in turn, many times. With ``--check`` it holds
that all public names of ``edge_runtime`` import within 150 ms of CPU time beyond NumPy,
without ONNX Runtime, and that our own part of the installation stays small.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import click

from edge_runtime.commandline import CONTEXT, Command, emit, json_option, say
from tools.bench.infer import CASES, write_slot
from tools.wheels import CHECKOUT, build_wheel, for_aarch64, run_pip

IMPORT_S = 0.150  # CPU time of all public names, beyond NumPy
OURS_BYTES = 2_700_000  # edge_runtime on disk, bytecode included
OURS = "dpu-edge"
_BLOCK = 512  # what st_blocks counts in

_MODEL = (
    "import numpy as np; from pathlib import Path; "
    "from edge_runtime import Predictor, RunOptions; "
    "from edge_runtime.formats.contract import Contract, InputSpec; "
    "from edge_runtime.inference.session import Backend; "
    "p = Predictor(Path({folder!r}), Contract((InputSpec('input', 'float32', "
    "(None, *{shape})),)), RunOptions(backend=Backend('{backend}'))); "
    "p.predict(np.zeros((1, *{shape}), np.float32))"
)
_MEMORY = (
    "; import json, sys, time; cpu = time.process_time(); "
    "status = dict(line.split(':', 1) for line in open('/proc/self/status')); "
    "print(json.dumps({'cpu_s': cpu, 'bytes': int(status['VmRSS'].split()[0]) * 1024, "
    "'peak': int(status['VmHWM'].split()[0]) * 1024, "
    "'loaded': sorted(n for n in sys.modules if '.' not in n)}))"
)
IMPORTS = {
    "Python alone": "pass",
    "numpy": "import numpy",
    "edge_runtime": "import edge_runtime",
    "numpy and edge_runtime, every public name": (
        "import numpy; from edge_runtime import *"
    ),
    "the command line (`dpu-edge --help`)": "import edge_runtime.cli.main",
    "numpy and onnxruntime": "import numpy, onnxruntime",
}


def install(folder: Path, wheel: Path, *where: str) -> None:
    """Install a wheel and what it depends on into an empty folder."""
    tested = ("--constraint", str(CHECKOUT / "constraints.txt"))
    run_pip("install", "--target", str(folder), *where, *tested, str(wheel))


def sizes(folder: Path) -> dict[str, int]:
    """Return the bytes on disk of each distribution in a folder, ours by package.

    Compiled bytecode is included, as pip leaves it.
    """
    found: Counter[str] = Counter()
    for distribution in distributions(path=[str(folder)]):
        for file in distribution.files or ():
            path = Path(str(distribution.locate_file(file)))
            if not path.is_file():
                continue  # scripts: pip moves them
            name = distribution.name
            part = f"{name}: {file.parts[0]}" if name == OURS else name
            found[part] += path.stat().st_blocks * _BLOCK
    return dict(found.most_common())


def start(code: str, folder: Path) -> dict[str, Any]:
    """Run code on an installed copy; return CPU time, memory and modules."""
    # -S: of this interpreter's own site-packages nothing is seen.
    command = [sys.executable, "-S", "-P", "-c", code + _MEMORY]
    env = {"PYTHONPATH": str(folder), "PATH": os.environ["PATH"]}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, env=env)
    if done.returncode:
        raise click.ClickException(f"{code!r} ended with {done.returncode}")
    return dict(json.loads(done.stdout))


def measure(codes: dict[str, str], folder: Path, times: int) -> dict[str, Any]:
    """Run every piece of code in turn, some times; return the medians."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in codes}
    for _ in range(times):
        for name, code in codes.items():
            runs[name].append(start(code, folder))
    return {
        name: {
            key: statistics.median(run[key] for run in found)
            for key in ("cpu_s", "bytes", "peak")
        }
        | {"onnxruntime": "onnxruntime" in found[0]["loaded"]}
        for name, found in runs.items()
    }


def models(root: Path) -> dict[str, str]:
    """Export the networks to load; return the code that loads each and asks once."""
    codes = {}
    for case in (case for case in CASES if case.model in ("mlp", "vgg")):
        folder = root / case.model
        if not folder.exists():
            write_slot(folder, case)
            for backend in ("onnxruntime", "numpy"):
                codes[f"{case.model}, {backend}"] = _MODEL.format(
                    folder=str(folder), shape=case.shape, backend=backend
                )
    return codes


def problems(record: dict[str, Any]) -> Iterator[str]:
    """Yield what is larger or slower than promised."""
    cost = record["import_beyond_numpy_s"]
    if cost > IMPORT_S:
        yield f"importing takes {cost * 1e3:.0f} ms, allowed are {IMPORT_S * 1e3:.0f}"
    for name, found in record["imports"].items():
        if found["onnxruntime"] and "onnxruntime" not in name:
            yield f"{name} imports onnxruntime"
    for machine, found in record["sizes"].items():
        ours = found[f"{OURS}: edge_runtime"]
        if ours > OURS_BYTES:
            yield f"edge_runtime takes {ours} bytes on {machine}, not {OURS_BYTES}"


def table(record: dict[str, Any]) -> Iterator[str]:
    """Yield the report as lines of Markdown."""
    machines = list(record["sizes"])
    yield "| installed, MB | " + " | ".join(machines) + " |"
    yield "|---|" + "---|" * len(machines)
    for name in record["sizes"][machines[0]]:
        found = (record["sizes"][machine].get(name, 0) for machine in machines)
        yield f"| {name} | " + " | ".join(f"{n / 1e6:.2f}" for n in found) + " |"
    totals = (sum(record["sizes"][machine].values()) for machine in machines)
    yield "| together | " + " | ".join(f"{n / 1e6:.0f}" for n in totals) + " |"
    yield ""
    yield "| a fresh process that has | CPU time, ms | memory, MB | highest, MB |"
    yield "|---|---|---|---|"
    for name, found in (record["imports"] | record["models"]).items():
        yield (
            f"| {name} | {found['cpu_s'] * 1e3:.0f} | {found['bytes'] / 1e6:.0f} | "
            f"{found['peak'] / 1e6:.0f} |"
        )
    yield ""
    cost = record["import_beyond_numpy_s"]
    yield f"every public name beyond numpy: {cost * 1e3:.0f} ms of CPU time"


@click.command(cls=Command, context_settings=CONTEXT)
@click.option(
    "--times",
    type=click.IntRange(1),
    default=15,
    show_default=True,
    help="Starts for each figure.",
)
@click.option("--check", is_flag=True, help="End with 1 if a promise is broken.")
@json_option
def main(times: int, *, check: bool, as_json: bool) -> None:
    """Measure what the runtime takes: on disk, to import, in memory."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        wheel = build_wheel(root)
        machines = {
            platform.machine(): (),
            # Bytecode is the same on every machine, for one version of Python.
            "aarch64": for_aarch64("{}.{}".format(*sys.version_info[:2])),
        }
        for machine, where in machines.items():
            say(f"installing for {machine} ...")
            install(root / machine, wheel, *where)
        here = root / platform.machine()
        say("starting fresh processes ...")
        imports = measure(IMPORTS, here, times)
        loaded = measure(models(root), here, max(1, times // 3))
        record: dict[str, Any] = {
            "sizes": {machine: sizes(root / machine) for machine in machines},
            "imports": imports,
            "models": loaded,
            "import_beyond_numpy_s": (
                imports["numpy and edge_runtime, every public name"]["cpu_s"]
                - imports["numpy"]["cpu_s"]
            ),
        }
    found = list(problems(record))
    emit(record | {"problems": found}, as_json=as_json, text="\n".join(table(record)))
    if check:
        for problem in found:
            say(f"error: {problem}")
        sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
