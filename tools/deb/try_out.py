# SPDX-License-Identifier: Apache-2.0
"""The Debian packages, really installed: on this machine's Debian and on emulated Arm.

    make test-deb

installs with apt in a fresh system, brings a model from its bundle through a patch,
upgrades to a newer package, removes, purges and installs again, goes on to the next
Debian and its Python, and holds the weights against the server's at every step. Ends
with 1 if anything is not as it should be. Needs root, and qemu for the Arm.
"""

import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from edge_runtime.commandline import CONTEXT, Command, emit, json_option, say
from tools.arm64.samples import Sample, find_sample
from tools.deb.chroot import System, check_host, make_system
from tools.deb.package import MACHINES, build, source_date
from tools.release import project
from tools.wheels import CHECKOUT, fill

# Both Pythons, and on the way from one to the other.
SUITES = {"arm64": "trixie", "amd64": "bookworm"}
NEXT = {"bookworm": "trixie"}
_AS = "runuser -u dpu-edge -- dpu-edge --store /var/lib/dpu-edge/digits"
_LOADS = "import tuf.ngclient, PIL.Image, onnxruntime, numpy; print(numpy.__file__)"
_APT = "DEBIAN_FRONTEND=noninteractive apt-get -q -y -o Dpkg::Use-Pty=0"


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that an owner does.

    Attributes:
        what: In words.
        command: As root, in the system.
        wanted: A pattern that it has to write; empty for any.
        code: Its exit code.
    """

    what: str
    command: str
    wanted: str = ""
    code: int = 0


@dataclass(frozen=True, slots=True)
class Done:
    """How a step went."""

    what: str
    passed: bool
    found: str
    wall_s: float


def steps(old: Path, new: Path, sample: Sample, fingerprints: list[str]) -> list[Step]:
    """Return what is done, in its order."""
    first, second = (re.search(r"_(.*)_", p.name) for p in (old, new))
    assert first and second
    kept = f"{_AS} verify --expect {fingerprints[1]}"
    listed = "find /var/lib/dpu-edge -type f -exec sha256sum {} + | sort > "
    return [
        Step("apt-get update", f"{_APT} update"),
        Step("apt install", f"{_APT} install ./root/{old.name}", "Setting up dpu-edge"),
        Step("dpu-edge --version", "dpu-edge --version", "dpu-edge, version"),
        Step(
            "sync, TUF, images and numpy are from the package",
            f"/opt/dpu-edge/bin/python3 -I -c '{_LOADS}'",
            "^/opt/dpu-edge/lib/",
        ),
        Step(
            "bytecode is there",
            "ls /opt/dpu-edge/lib/python3*/site-packages/edge_runtime/__pycache__",
            r"errors\.cpython-3",
        ),
        Step("two users", "id dpu-edge && id dpu-edge-sync", r"dpu-edge-sync\)"),
        Step("init", f"{_AS} init /root/{sample.bundle.name}", fingerprints[0][:12]),
        Step("apply", f"{_AS} apply /root/{sample.patches[0].name}", "applied"),
        Step("verify", kept, fingerprints[1]),
        Step(
            "the other user may not write there",
            "runuser -u dpu-edge-sync -- touch /var/lib/dpu-edge/digits/x",
            "Permission denied",
            1,
        ),
        Step("a list of the store", f"{listed} /root/before"),
        Step("upgrade", f"{_APT} install ./root/{new.name}", "Unpacking dpu-edge"),
        Step("it is the new one", "dpkg-query -W dpu-edge", re.escape(second[1])),
        Step("verify after the upgrade", kept, fingerprints[1]),
        Step("apt remove", f"{_APT} remove dpu-edge", "Removing dpu-edge"),
        Step("nothing is left in /opt", "ls -R /opt/dpu-edge", "No such file", 2),
        Step(
            "apt purge", f"{_APT} purge dpu-edge", "was kept; to remove it too: rm -r"
        ),
        Step(
            "the store is as it was",
            f"{listed} /root/after; cmp /root/before /root/after && wc -l /root/after",
            r"^[1-9]",
        ),
        Step("apt install again", f"{_APT} install ./root/{new.name}", "Setting up"),
        Step("verify after all that", kept, fingerprints[1]),
    ]


def steps_beyond(suite: str, sample: Sample, fingerprint: str) -> list[Step]:
    """Return what an owner does every two years: the next Debian, the next Python."""
    if suite not in NEXT:
        return []
    units = "dpu-edge-agent@digits.service dpu-edge-sync@digits.service"
    source = f"sed -i s/{suite}/{NEXT[suite]}/ /etc/apt/sources.list"
    patches = " ".join(f"/root/{path.name}" for path in sample.patches[1:])
    return [
        Step("systemd is there", f"{_APT} install systemd", "Setting up systemd"),
        Step("units are what it takes", f"systemd-analyze verify {units}", r"\A\Z"),
        Step("Python before", "python3 --version", r"3\.11"),
        Step(
            f"full upgrade to {NEXT[suite]}",
            f"{source} && {_APT} update && {_APT} -o Dpkg::Options::=--force-confold "
            "full-upgrade && dpkg-query -W dpu-edge",
            r"^dpu-edge\s",
        ),
        Step("Python after", "python3 --version", r"3\.13"),
        Step(
            "bytecode for the new Python",
            "ls /opt/dpu-edge/lib/python3.13/site-packages/edge_runtime/__pycache__",
            r"errors\.cpython-313",
        ),
        Step("the other patches", f"{_AS} apply {patches}", "applied"),
        Step("verify on it", f"{_AS} verify --expect {fingerprint}", fingerprint),
    ]


def walk(system: System, todo: list[Step]) -> Iterator[Done]:
    """Do the steps; the first that fails is the last."""
    for step in todo:
        start = time.monotonic()
        code, said = system.run(step.command)
        found = re.search(step.wanted, said, re.MULTILINE)
        passed = code == step.code and found is not None
        lines = [line for line in said.splitlines() if line.strip()] or [""]
        shown = next((li for li in lines if found and found[0] in li), lines[-1])
        words = shown if passed else f"exit code {code}: {' | '.join(lines[-5:])}"
        yield Done(step.what, passed, words.strip(), round(time.monotonic() - start, 1))
        if not passed:
            return


def try_arch(arch: str, folder: Path, debs: list[Path]) -> list[Done]:
    """Install, use, upgrade, remove and purge on one kind of machine."""
    from edge_runtime import fingerprint_file

    suite = SUITES[arch]
    emulated = arch == "arm64" and platform.machine() != "aarch64"
    tar, root = folder / f"{suite}-{arch}.tar", folder / f"{suite}-{arch}"
    make_system(tar, arch, suite, emulated=emulated)
    sample = find_sample(folder / "samples", "digits")
    files = (sample.bundle, *sample.patches)
    fingerprints = [fingerprint_file(sample.weights(path)) for path in files]
    done = []
    with System(tar, root, emulated=emulated) as system:
        for path in (*debs, *files):
            shutil.copy(path, root / "root" / path.name)
            (root / "root" / path.name).chmod(0o644)
        (root / "root").chmod(0o755)  # the package's user reads there
        todo = steps(debs[0], debs[1], sample, fingerprints)
        todo += steps_beyond(suite, sample, fingerprints[-1])
        for step in walk(system, todo):
            done.append(step)
            say(f"{_word(step):<6}{step.wall_s:>7.1f} s  {step.what}")
    shutil.rmtree(root, ignore_errors=True)
    return done


def _word(step: Done) -> str:
    return "ok" if step.passed else "WRONG"


def build_two(arch: str, folder: Path, *, keep_wheels: bool) -> list[Path]:
    """Build the project's version and the next one, quickly."""
    wheels = CHECKOUT / "dist" / f"wheelhouse-{MACHINES[arch]}"
    if not keep_wheels:
        fill(wheels, MACHINES[arch])
    version, date = str(project()["version"]), source_date()
    say(f"building the packages for {arch} ...")
    return [
        build(wheels, arch, number, folder / "packages", date, "gzip").path
        for number in (version, f"{version}+1")
    ]


@click.command(cls=Command, context_settings=CONTEXT)
@click.option(
    "--arch",
    "arches",
    type=click.Choice(list(MACHINES)),
    multiple=True,
    default=list(MACHINES),
    show_default=True,
    help="For which machines (repeatable); arm64 is emulated on others.",
)
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=CHECKOUT / ".venv" / "deb",
    help="Where systems and the sample are kept.  [default: .venv/deb]",
)
@click.option("--keep-wheels", is_flag=True, help="Take dist/wheelhouse-* as they are.")
@json_option
def main(
    arches: tuple[str, ...],
    folder: Path,
    *,
    keep_wheels: bool,
    as_json: bool,
) -> None:
    """Install the packages, use them, upgrade, remove, purge and install again."""
    check_host()
    folder = folder.resolve()
    found = {}
    for arch in arches:
        debs = build_two(arch, folder, keep_wheels=keep_wheels)
        found[arch] = try_arch(arch, folder, debs)
    passed = all(step.passed for done in found.values() for step in done)
    steps_of = {arch: [asdict(s) for s in done] for arch, done in found.items()}
    text = "\n".join(
        f"{arch}  {_word(s):<6}{s.wall_s:>7.1f} s  {s.what}\n{'':<24}{s.found}"
        for arch, done in found.items()
        for s in done
    )
    record = {"suites": SUITES, "passed": passed, "steps": steps_of}
    emit(record, as_json=as_json, text=text)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
