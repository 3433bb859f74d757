# SPDX-License-Identifier: Apache-2.0
"""Our wheel, and everything a board needs to install it without a network.

    python -m tools.wheels

fills ``dist/wheelhouse-aarch64`` with the wheel of this checkout and the aarch64 wheels
of what it depends on, for the Python versions of Raspberry Pi OS, and then lets pip
resolve an installation from that folder alone.
"""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click

from edge_runtime.commandline import CONTEXT, Command, emit, json_option, say

CHECKOUT = Path(__file__).resolve().parents[1]
PYTHONS = {"3.11": "Raspberry Pi OS Bookworm", "3.13": "Raspberry Pi OS Trixie"}
# What pip takes for a board of glibc 2.36 (Bookworm). It has to be told every older
# name too: from "manylinux_2_36" it does not conclude that "manylinux_2_28" fits.
PLATFORMS = (
    *(f"manylinux_2_{minor}_aarch64" for minor in range(36, 16, -1)),
    "manylinux2014_aarch64",
)


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


def dependencies() -> list[str]:
    """Return what the runtime depends on, as pyproject.toml says."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    return list(project["dependencies"])


def for_aarch64(python: str) -> list[str]:
    """Return the arguments that make pip choose wheels for a 64-bit Arm board.

    Args:
        python: Its Python, for instance ``"3.13"``.
    """
    platforms = [arg for name in PLATFORMS for arg in ("--platform", name)]
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


def check_complete(folder: Path, python: str) -> None:
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
        *for_aarch64(python),
        "dpu-edge",
        env=env | {"PIP_CONFIG_FILE": os.devnull},
    )


@click.command(cls=Command, context_settings=CONTEXT)
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=CHECKOUT / "dist" / "wheelhouse-aarch64",
    help="Where to.  [default: dist/wheelhouse-aarch64]",
)
@json_option
def main(folder: Path, *, as_json: bool) -> None:
    """Collect the wheels that install dpu-edge on a board without a network."""
    shutil.rmtree(folder, ignore_errors=True)  # of an older version, nothing may stay
    folder.mkdir(parents=True)
    say("building our wheel ...")
    wheel = build_wheel(folder)
    tested = ("--constraint", str(CHECKOUT / "constraints.txt"))
    for python, system in PYTHONS.items():
        say(f"downloading the wheels for Python {python} ({system}) ...")
        where = ("--dest", str(folder), *tested)
        run_pip("download", *where, *for_aarch64(python), *dependencies())
        check_complete(folder, python)
        say("  complete: pip installs dpu-edge from this folder alone")
    files = sorted(folder.glob("*.whl"))
    sizes = {file.name: file.stat().st_size for file in files}
    total = sum(sizes.values())
    emit(
        {"folder": str(folder), "wheel": wheel.name, "files": sizes, "bytes": total},
        as_json=as_json,
        text="\n".join(f"{size:>10}  {name}" for name, size in sizes.items())
        + f"\n{len(sizes)} wheels, {total / 1e6:.0f} MB in {folder}\n"
        "on the board:\n  python3 -m venv dpu && dpu/bin/pip install --no-index "
        f"--find-links {folder.name} dpu-edge",
    )


if __name__ == "__main__":
    main()
