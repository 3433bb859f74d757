# SPDX-License-Identifier: Apache-2.0
"""The runtime on aarch64, under emulation, held against this machine.

    python -m tools.arm64.__main__

installs the wheel with the real aarch64 wheels of its dependencies, applies the golden
patches of every released format version, lets the emulated ``dpu-edge`` and this
machine's do the same with the same bundles and patches, and compares: weights by
SHA-256, predictions within the contract's tolerance. Ends with 1 if anything differs.
Emulated memory stays below what a board of 512 MB has left; emulated times say nothing
about a board.
"""

import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from edge_runtime.commandline import CONTEXT, Command, emit, json_option, say
from edge_runtime.formats.model_folder import WEIGHTS_NAME
from tools.arm64.root import MIRROR, build_root
from tools.arm64.run import BOARD_MB, Finished, run
from tools.arm64.samples import NAMES, Sample, find_sample
from tools.wheels import CHECKOUT

_INIT = (
    "import sys; from edge_runtime import Device; "
    "print(Device.open(sys.argv[1]).store.recipe.generate().fingerprint)"
)
_GOLDEN = """\
import sys
from edge_runtime import apply_patch, open_patch, read_weights
for file, base in zip(sys.argv[1::2], sys.argv[2::2]):
    with open_patch(file) as patch:
        print(apply_patch(read_weights(base), patch).fingerprint, file)
"""
_VERSIONS = (
    "import json, platform, edge_runtime, numpy, onnxruntime; print(json.dumps({"
    "'machine': platform.machine(), 'python': platform.python_version(), "
    "'libc': ' '.join(platform.libc_ver()), 'numpy': numpy.__version__, "
    "'onnxruntime': onnxruntime.__version__, 'code': edge_runtime.__path__[0]}))"
)


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison.

    Attributes:
        what: What was done.
        passed: Whether it went as it should.
        found: What came out, in words.
        peak_mb: Memory of the emulated processes together, the emulator included.
        wall_s: Emulated.
    """

    what: str
    passed: bool
    found: str
    peak_mb: float = 0.0
    wall_s: float = 0.0


class Machine:
    """A Python that can run ``dpu-edge``: this one, or the emulated one."""

    def __init__(self, python: Path, script: Path | None, data_mb: int | None) -> None:
        """``script`` is the installed ``dpu-edge``; None takes the module."""
        self._python, self._data_mb = str(python), data_mb
        self._edge = [str(script)] if script else ["-m", "edge_runtime"]

    def python(self, *args: str) -> Finished:
        """Run Python."""
        return run([self._python, *args], data_mb=self._data_mb)

    def edge(self, *args: str | Path) -> Finished:
        """Run ``dpu-edge``."""
        return self.python(*self._edge, *map(str, args))


def basic_checks(arm: Machine, versions: dict[str, Any]) -> Iterator[Check]:
    """Check that the wheel's commands start."""
    from importlib.metadata import version

    done = arm.edge("--version")
    wanted = f"dpu-edge, version {version('dpu-edge')}"
    yield _check("dpu-edge --version", done, done.out.strip() == wanted)
    done = arm.edge("--help")
    yield _check("dpu-edge --help", done, "apply" in done.out, "lists its commands")
    found = f"{versions['machine']}, {versions['code']}"
    ours = versions["machine"] == "aarch64" and "/ours/" in versions["code"]
    yield Check("code comes from our wheel", ours, found)


def golden_checks(arm: Machine) -> Iterator[Check]:
    """Apply what every released version wrote, and compare with the targets here."""
    for folder in sorted((CHECKOUT / "tests" / "golden").glob("v*")):
        patches = sorted(folder.glob("*.dpu"))
        # Those signed in other ways are the patch "sparse".
        alone = [path.with_suffix(".base").exists() for path in patches]
        stems = [
            path.stem if own else "sparse"
            for path, own in zip(patches, alone, strict=True)
        ]
        bases = [folder / f"{stem}.base" for stem in stems]
        pairs = [str(p) for pair in zip(patches, bases, strict=True) for p in pair]
        done = arm.python("-c", _GOLDEN, *pairs)
        targets = [(folder / f"{stem}.target").read_bytes() for stem in stems]
        found = dict(line.split(" ", 1)[::-1] for line in done.out.splitlines())
        right = sum(
            found.get(str(path)) == hashlib.sha256(target).hexdigest()
            for path, target in zip(patches, targets, strict=True)
        )
        yield _check(
            f"golden patches of format {folder.name}",
            done,
            right == len(patches),
            f"{right} of {len(patches)} lead to their targets bit for bit",
        )


def device_checks(
    sample: Sample, arm: Machine, here: Machine, folder: Path
) -> Iterator[Check]:
    """Bring both machines from the bundle through all patches, and compare."""
    shutil.rmtree(folder, ignore_errors=True)
    stores = {arm: folder / "aarch64", here: folder / "here"}
    steps = [("init", sample.bundle), *(("apply", path) for path in sample.patches)]
    for verb, file in steps:
        runs = {m: m.edge("--store", s, verb, file) for m, s in stores.items()}
        what = f"{sample.name}: {verb} {file.name}"
        if runs[here].code:
            raise click.ClickException(f"{what} fails here too: {runs[here].err}")
        yield _check(what, runs[arm], runs[arm].code == 0)
        if runs[arm].code:
            return  # nothing is there to be compared
        if verb == "init":
            yield _same_init(sample, stores)
        yield _same_weights(what, stores, sample.weights(file))
        yield _same_answers(what, stores, folder)
    yield from _refusals(sample, arm, stores[arm], folder)


def _same_init(sample: Sample, stores: dict[Machine, Path]) -> Check:
    arm, here = [m.python("-c", _INIT, str(store)) for m, store in stores.items()]
    same = arm.out == here.out != ""
    return _check(
        f"{sample.name}: init weights regenerated", arm, same, f"{arm.out.strip()}"
    )


def _same_weights(what: str, stores: dict[Machine, Path], server: Path) -> Check:
    from edge_runtime import fingerprint_file

    wanted = fingerprint_file(server)
    # Hashed by this machine: what the emulated one claims is asked at the end.
    files = [store / "current" / WEIGHTS_NAME for store in stores.values()]
    found = [fingerprint_file(file) for file in files]
    same = found == [wanted, wanted]
    return Check(f"{what}: weights bit for bit", same, found[0])


def _same_answers(what: str, stores: dict[Machine, Path], folder: Path) -> Check:
    import numpy as np

    from edge_runtime import Device
    from edge_runtime.update.golden import relative_difference

    outputs = []
    runs = []
    for number, (machine, store) in enumerate(stores.items()):
        path = folder / f"outputs_{number}.npy"
        runs.append(machine.edge("--store", store, "infer", "--golden", "-o", path))
        outputs.append(np.load(path) if runs[-1].code == 0 else np.zeros(0))
    difference = relative_difference(*outputs)
    allowed = Device.open(list(stores.values())[1]).store.contract.output_tolerance
    same = np.array_equal(outputs[0].argmax(-1), outputs[1].argmax(-1))
    return _check(
        f"{what}: predictions",
        runs[0],
        difference <= allowed and same,
        f"{len(outputs[1])} samples, same classes: {same}, largest difference "
        f"{difference:.1e} of the largest output ({allowed:g} allowed)",
    )


def _refusals(
    sample: Sample, arm: Machine, store: Path, folder: Path
) -> Iterator[Check]:
    """A damaged patch changes nothing, and there is a way back."""
    server = sample.weights(sample.patches[-1])
    damaged = bytearray(sample.patches[-1].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / "damaged.dpu").write_bytes(damaged)
    done = arm.edge("--store", store, "apply", folder / "damaged.dpu")
    what = f"{sample.name}: one flipped bit"
    yield _check(what, done, done.code == 3, f"exit code {done.code}")
    done = arm.edge("--store", store, "verify", "--expect", server)
    yield _check(f"{sample.name}: verify --expect", done, done.code == 0)
    done = arm.edge("--store", store, "rollback")
    yield _check(f"{sample.name}: rollback", done, done.code == 0)


def _check(what: str, done: Finished, passed: bool, found: str = "") -> Check:
    """Judge a run: what it should do, in the memory that a board has."""
    said = found if found and done.code in (0, 3) else (done.out or done.err).strip()
    lines = said.splitlines() or [f"exit code {done.code}"]
    line = lines[0 if done.code == 0 else -1]  # errors explain themselves at the end
    fits = done.peak_mb <= BOARD_MB
    if not fits:
        line += f"; more than the {BOARD_MB} MB of a small board"
    return Check(what, passed and fits, line, round(done.peak_mb, 1), done.wall_s)


def table(checks: list[Check], facts: dict[str, Any]) -> Iterator[str]:
    """Yield the report as lines."""
    for name, fact in facts.items():
        yield f"{name:<12}{fact}"
    yield ""
    yield f"{'':<6}{'peak MB':>9}{'s':>7}"
    for check in checks:
        figures = f"{check.peak_mb:>9.0f}{check.wall_s:>7.1f}" if check.wall_s else ""
        yield f"{'ok' if check.passed else 'WRONG':<6}{figures:<16}  {check.what}"
        yield f"{'':<26}{check.found}"
    wrong = sum(not check.passed for check in checks)
    yield f"{len(checks)} checks, {wrong} wrong"


@click.command(cls=Command, context_settings=CONTEXT)
@click.option(
    "--root",
    type=click.Path(file_okay=False, path_type=Path),
    default=CHECKOUT / ".venv" / "arm64",
    help="Where the arm64 system and the samples are kept.  [default: .venv/arm64]",
)
@click.option("--mirror", default=MIRROR, show_default=True, help="Of Debian.")
@click.option(
    "--only",
    "names",
    type=click.Choice(NAMES),
    multiple=True,
    default=NAMES,
    show_default=True,
    help="Which networks (repeatable).",
)
@json_option
def main(root: Path, mirror: str, names: tuple[str, ...], *, as_json: bool) -> None:
    """Run dpu-edge on an emulated aarch64 board, and compare with this machine."""
    root = root.resolve()
    python = build_root(root, mirror)
    samples = [find_sample(root / "samples", name) for name in names]
    arm = Machine(python, root / "ours" / "bin" / "dpu-edge", BOARD_MB)
    here = Machine(Path(sys.executable), None, None)
    versions = json.loads(arm.python("-c", _VERSIONS).out)
    facts = versions | {
        "emulator": "qemu-aarch64-static, Cortex-A72",
        "host": f"{platform.machine()}, {os.cpu_count()} cores",
        "cap": f"{BOARD_MB} MB of private memory a process (RLIMIT_DATA)",
    }
    checks: list[Check] = []
    work = root / "work"
    for found in (
        basic_checks(arm, versions),
        golden_checks(arm),
        *(device_checks(s, arm, here, work / s.name) for s in samples),
    ):
        for check in found:
            checks.append(check)
            say(f"{'ok' if check.passed else 'WRONG':<6} {check.what}")
    passed = all(check.passed for check in checks)
    record = facts | {"passed": passed, "checks": [asdict(check) for check in checks]}
    emit(record, as_json=as_json, text="\n".join(table(checks, facts)))
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
