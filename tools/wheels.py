# SPDX-License-Identifier: Apache-2.0
"""Our wheel, and everything a board needs to install it without a network.

    python -m tools.wheels

fills ``dist/wheelhouse-aarch64`` with the wheel of this checkout and the aarch64 wheels
of what it and the extras of a device depend on, for the Python versions of Raspberry Pi
OS, and then lets pip resolve an installation from that folder alone. ``tools.deb``
makes Debian packages from such folders.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from edge_runtime.commandline import CONTEXT, Command, emit, json_option, say

CHECKOUT = Path(__file__).resolve().parents[1]
PYTHONS = {"3.11": "Raspberry Pi OS Bookworm", "3.13": "Raspberry Pi OS Trixie"}
MACHINES = ("aarch64", "x86_64")
EXTRAS = ("sync", "tuf", "image")  # what a device may need beside the runtime itself
# What pip takes for a machine of glibc 2.36 (Bookworm). It has to be told every older
# name too: from "manylinux_2_36" it does not conclude that "manylinux_2_28" fits.
PLATFORMS = (*(f"manylinux_2_{minor}" for minor in range(36, 16, -1)), "manylinux2014")


def build_wheel(folder: Path) -> Path:
    """Build the wheel of this checkout.

    Args:
        folder: Where to; wheels of ours that are there are removed.

    Returns:
        The wheel.

    Raises:
        click.ClickException: The build failed.
    """
    for old in folder.glob("dpu_edge-*.whl"):
        old.unlink()
    # setuptools would pack again what an earlier build left here, deleted modules too.
    shutil.rmtree(CHECKOUT / "build", ignore_errors=True)
    run_pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(CHECKOUT))
    (wheel,) = folder.glob("dpu_edge-*.whl")
    return wheel


def dependencies(*extras: str) -> list[str]:
    """Return what the runtime depends on, as pyproject.toml says, and some extras."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *_extra(project["optional-dependencies"], extras)]


def _extra(optional: dict[str, list[str]], names: Iterable[str]) -> Iterator[str]:
    for name in names:
        for line in optional[name]:
            # One extra may ask for another: no index has this project.
            own = re.fullmatch(r"dpu-edge\[(.*)\]", line)
            yield from _extra(optional, own[1].split(",")) if own else [line]


def for_aarch64(python: str) -> list[str]:
    """Return the arguments that make pip choose wheels for a 64-bit Arm board."""
    return for_machine("aarch64", python)


def for_machine(machine: str, python: str) -> list[str]:
    """Return the arguments that make pip choose wheels for another machine.

    Args:
        machine: One of ``MACHINES``.
        python: Its Python, for instance ``"3.13"``.
    """
    platforms = [arg for p in PLATFORMS for arg in ("--platform", f"{p}_{machine}")]
    return [
        *platforms,
        *("--python-version", python, "--implementation", "cp"),
        "--only-binary=:all:",
    ]


def run_pip(*args: str, env: dict[str, str] | None = None) -> None:
    """Run the pip of this interpreter, quietly.

    Raises:
        click.ClickException: It failed.
    """
    command = [sys.executable, "-m", "pip", args[0], "--quiet", *args[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise click.ClickException(
            f"pip {args[0]} ended with {done.returncode}:\n{done.stderr.strip()}"
        )


def check_complete(folder: Path, python: str, machine: str = "aarch64") -> None:
    """Let pip resolve an installation from a folder, and from nothing else.

    Raises:
        click.ClickException: Something is missing there.
    """
    # A machine's own pip settings could add an index or a folder that a board lacks.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    only = ("--no-index", "--find-links", str(folder), "--ignore-installed")
    run_pip(
        "install",
        "--dry-run",
        *only,
        *("--target", str(folder / "unused")),
        *for_machine(machine, python),
        f"dpu-edge[{','.join(EXTRAS)}]",
        env=env | {"PIP_CONFIG_FILE": os.devnull},
    )


def fill(folder: Path, machine: str) -> Path:
    """Collect the wheels that install dpu-edge on a machine without a network.

    Args:
        folder: Where to; what is there goes.
        machine: One of ``MACHINES``.

    Returns:
        Our own wheel among them.

    Raises:
        click.ClickException: pip failed, or something is missing.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of an older version, nothing may stay
    folder.mkdir(parents=True)
    say("building our wheel ...")
    wheel = build_wheel(folder)
    tested = ("--constraint", str(CHECKOUT / "constraints.txt"))
    for python, system in PYTHONS.items():
        say(f"downloading the {machine} wheels for Python {python} ({system}) ...")
        where = ("--dest", str(folder), *tested)
        wanted = (*for_machine(machine, python), *dependencies(*EXTRAS))
        run_pip("download", *where, *wanted)
        check_complete(folder, python, machine)
        say("  complete: pip installs dpu-edge from this folder alone")
    return wheel


@click.command(cls=Command, context_settings=CONTEXT)
@click.option(
    "--machine", type=click.Choice(MACHINES), default="aarch64", show_default=True
)
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to.  [default: dist/wheelhouse-MACHINE]",
)
@json_option
def main(machine: str, folder: Path | None, *, as_json: bool) -> None:
    """Collect the wheels that install dpu-edge on a board without a network."""
    folder = folder or CHECKOUT / "dist" / f"wheelhouse-{machine}"
    wheel = fill(folder, machine)
    files = sorted(folder.glob("*.whl"))
    sizes = {file.name: file.stat().st_size for file in files}
    total = sum(sizes.values())
    emit(
        {"folder": str(folder), "wheel": wheel.name, "files": sizes, "bytes": total},
        as_json=as_json,
        text="\n".join(f"{size:>10}  {name}" for name, size in sizes.items())
        + f"\n{len(sizes)} wheels, {total / 1e6:.0f} MB in {folder}\n"
        "on the board:\n  python3 -m venv dpu && dpu/bin/pip install --no-index "
        f"--find-links {folder.name} 'dpu-edge[{','.join(EXTRAS)}]'",
    )


if __name__ == "__main__":
    main()
