# SPDX-License-Identifier: Apache-2.0
"""An aarch64 system in a folder: Debian's Python under qemu, our wheel in it.

It needs no root, no chroot and no binfmt: packages are downloaded into a private apt
directory and unpacked with dpkg-deb, and ``ROOT/python3`` is a script that starts the
unpacked interpreter through qemu. That script is also what the interpreter takes for
itself, so child processes (a trial session is one) start the same way.
"""

import shutil
import subprocess
from pathlib import Path
from typing import IO

import click

from edge_runtime.commandline import say
from tools.wheels import CHECKOUT, build_wheel, dependencies, for_aarch64, run_pip

QEMU = "qemu-aarch64-static"
PYTHON = "3.13"  # of trixie
SUITE = "trixie"
MIRROR = "http://deb.debian.org/debian"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
PACKAGES = (
    *("libc6", "libgcc-s1", "libstdc++6"),
    *("python3-minimal", "python3", "libpython3-stdlib"),
)
# Program -> the Debian package that brings it.
NEEDED = {
    QEMU: "qemu-user-static",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "tar": "tar",
    "prlimit": "util-linux",
}
# One core of a Raspberry Pi 4. ONNX Runtime reads this while it is imported, and
# crashes under emulation where it finds the host's.
_CORE = """\
processor\t: {number}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

"""
_START = """\
#!/bin/sh
# The interpreter of this folder, emulated.
export QEMU_CPU=cortex-a72 QEMU_LD_PREFIX='{root}'
export PYTHONHOME='{root}/usr' PYTHONPATH='{root}/ours:{root}/deps'
# Nothing of the checkout that this may be started in: our wheel is what is tested.
export PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1
exec {qemu} -0 '{root}/python3' '{root}/usr/bin/python{python}' "$@"
"""


def check_host() -> None:
    """Insist on the programs that the emulation needs.

    Raises:
        click.ClickException: Some are missing; names the packages.
    """
    missing = {package for name, package in NEEDED.items() if not shutil.which(name)}
    if not KEYRING.exists():
        missing.add("debian-archive-keyring")
    if missing:
        raise click.ClickException(
            f"the emulation of aarch64 needs {', '.join(sorted(missing))}; on Debian "
            f"or Ubuntu run: apt-get install {' '.join(sorted(missing))}"
        )


def build_root(root: Path, mirror: str = MIRROR) -> Path:
    """Build the system, or bring it up to date; what is done already is kept.

    Args:
        root: The folder.
        mirror: Where Debian packages come from.

    Returns:
        The emulated interpreter.

    Raises:
        click.ClickException: A program is missing or failed.
    """
    check_host()
    root = root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    packages = f"{SUITE} {' '.join(PACKAGES)}"
    if not _is_done(root, "packages", packages):
        say(f"downloading and unpacking Debian {SUITE} arm64 ...")
        _unpack(root, _download(root, mirror))
        describe_cpu(root)
        _mark_done(root, "packages", packages)
    wanted = "\n".join(dependencies())
    wanted += (CHECKOUT / "constraints.txt").read_text()
    if not _is_done(root, "wheels", wanted):
        say("installing the aarch64 wheels of what the runtime depends on ...")
        _install(root / "deps", *dependencies())
        _mark_done(root, "wheels", wanted)
    say("building and installing our wheel ...")
    _install(root / "ours", "--no-deps", str(build_wheel(root / "dist")))
    start = root / "python3"
    start.write_text(_START.format(root=root, qemu=shutil.which(QEMU), python=PYTHON))
    start.chmod(0o755)
    return start


def _is_done(root: Path, step: str, wanted: str) -> bool:
    stamp = root / f".{step}"
    return stamp.exists() and stamp.read_text() == wanted


def _mark_done(root: Path, step: str, wanted: str) -> None:
    (root / f".{step}").write_text(wanted)


def _download(root: Path, mirror: str) -> list[Path]:
    """Let apt resolve and fetch the packages, in a directory of its own."""
    apt = root / "apt"
    for folder in ("state/lists/partial", "cache/archives/partial", "etc"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    (apt / "etc/sources.list").write_text(
        f"deb [signed-by={KEYRING}] {mirror} {SUITE} main\n"
    )
    options = {
        "Dir::State": apt / "state",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "Dir::Etc::sourcelist": apt / "etc/sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::Etc::preferencesparts": "-",
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",  # the folder need not be readable by "_apt"
    }
    command = ["apt-get", "-qq"]
    for name, value in options.items():
        command += ["-o", f"{name}={value}"]
    _run([*command, "update"])
    _run([*command, "install", "--download-only", "--yes", *PACKAGES])
    return sorted((apt / "cache/archives").glob("*.deb"))


def _unpack(root: Path, packages: list[Path]) -> None:
    for package in packages:
        stream = subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE
        )
        tar = ["tar", "-x", "--keep-directory-symlink", "-C", str(root)]
        _run(tar, stdin=stream.stdout)
        if stream.wait():
            raise click.ClickException(f"{package} is damaged; remove it and try again")
    # Only base-files would bring these links.
    for name in ("lib", "bin", "sbin"):
        if not (root / name).exists():
            (root / name).symlink_to(f"usr/{name}")


def describe_cpu(root: Path) -> None:
    """Write what a Raspberry Pi 4 says of its processor below a root."""
    cores = root / "sys/devices/system/cpu"
    cores.mkdir(parents=True, exist_ok=True)
    for name in ("possible", "present"):
        (cores / name).write_text("0-1\n")
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/cpuinfo").write_text("".join(_CORE.format(number=n) for n in (0, 1)))


def _install(folder: Path, *args: str) -> None:
    # Into a new folder: pip --target leaves older versions lying beside.
    shutil.rmtree(folder, ignore_errors=True)
    tested = ("--constraint", str(CHECKOUT / "constraints.txt"))
    where = ("--target", str(folder), *for_aarch64(PYTHON))
    run_pip("install", *where, *tested, *args)


def _run(command: list[str], stdin: IO[bytes] | None = None) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, stdin=stdin
    )
    if done.returncode:
        raise click.ClickException(
            f"{command[0]} ended with {done.returncode}:\n{done.stderr.strip()}"
        )
