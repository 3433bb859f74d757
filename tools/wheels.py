# SPDX-License-Identifier: Apache-2.0
"""Our wheel, and everything a board needs to install it without a network.

    python -m tools.wheels

fills ``dist/wheelhouse-aarch64`` with the wheel of this checkout and the aarch64 wheels
of what it and the extras of a device depend on, for the Python versions of Raspberry Pi
OS, and then lets pip resolve an installation from that folder alone. With ``--ours`` it
builds our wheel into ``dist`` and no more. ``tools.deb`` makes Debian packages from
such folders.
"""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from edge_runtime.commandline import CONTEXT, Command, emit, json_option, say
from edge_runtime.files import Files
from edge_runtime.reading import strangers

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGES = ("edge_runtime", "packager", "trainer")
SOURCES = ("pyproject.toml", "README.md", "LICENSE", *PACKAGES)  # of the wheel
PYTHONS = {"3.11": "Raspberry Pi OS Bookworm", "3.13": "Raspberry Pi OS Trixie"}
MACHINES = ("aarch64", "x86_64")
EXTRAS = ("sync", "tuf", "image")  # what a device may need beside the runtime itself
# What pip takes for a machine of glibc 2.36 (Bookworm). It has to be told every older
# name too: from "manylinux_2_36" it does not conclude that "manylinux_2_28" fits.
PLATFORMS = (*(f"manylinux_2_{minor}" for minor in range(36, 16, -1)), "manylinux2014")


@contextmanager
def replacing(folder: Path, *patterns: str) -> Iterator[Path]:
    """Yield an empty folder, and put what is made there in place of older files.

    Args:
        folder: Where to; its files stay as they are where making fails.
        patterns: Of the older files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = folder.resolve()  # programs may run elsewhere
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=place) as name:
        yield Path(name)
        new = {place / path.name for path in Path(name).iterdir()}
        for path in new:
            Files().rename(Path(name, path.name), path)
        for old in {path for pattern in patterns for path in place.glob(pattern)} - new:
            old.unlink()


def build_wheel(folder: Path, *how: str, source: Path = CHECKOUT) -> Path:
    """Build the wheel of a checkout; its version ends with the commit.

    Args:
        folder: Where to, in place of the wheels of ours that are there.
        how: More arguments for pip.
        source: The checkout.

    Returns:
        The wheel.

    Raises:
        click.ClickException: The build failed.
    """
    ours = "dpu_edge-*.whl"
    with tempfile.TemporaryDirectory() as name, replacing(folder, ours) as made:
        # Elsewhere: in the checkout setuptools packs again what an earlier build left,
        # deleted modules too, and would leave this version there for all that ask.
        apart = Path(name)
        for part in SOURCES:
            (apart / part).symlink_to(source / part)
        settings = f"[egg_info]\ntag_build = {commit_tag(source)}\n"
        (apart / "setup.cfg").write_text(settings)
        run_pip("wheel", "--no-deps", *how, "--wheel-dir", str(made), name)
        (wheel,) = made.glob(ours)
    return folder / wheel.name


def commit_tag(source: Path = CHECKOUT) -> str:
    """Return what tells builds of one version apart: the commit, behind its time.

    Returns:
        For instance ``+20261129140928.gc040d69``, with ``.changed`` where something is
        in no commit; nothing outside of a clone. pip and dpkg put it in the order of
        time. It counts no commits: a shallow clone has one.

    Raises:
        click.ClickException: git failed.
    """
    if not (source / ".git").exists():
        return ""
    when = "--date=format-local:%Y%m%d%H%M%S"
    git, utc = ("git", "-C", source), os.environ | {"TZ": "UTC"}
    commit = run(*git, "log", "-1", "--format=%cd.g%h", when, env=utc).strip()
    changed = run(*git, "status", "--porcelain")
    return f"+{commit}.changed" if changed else f"+{commit}"


def run(
    *command: str | Path, cwd: Path = CHECKOUT, env: dict[str, str] | None = None
) -> str:
    """Run a program and return what it wrote to standard output.

    Raises:
        click.ClickException: It is not here, or failed; with all that it wrote.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, cwd=cwd, capture_output=True, text=True, check=False, env=env
        )
    except FileNotFoundError as err:
        raise click.ClickException(f"{words[0]} is missing here: {err}") from err
    if done.returncode:
        raise click.ClickException(
            f"{' '.join(words)} ended with {done.returncode}:\n"
            f"{done.stdout}{done.stderr}"
        )
    return done.stdout


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
        folder: Where to, in place of the wheels that are there: of an older version
            none may stay.
        machine: One of ``MACHINES``.

    Returns:
        Our own wheel among them.

    Raises:
        click.ClickException: The folder holds other things than wheels, pip failed, or
            something is missing.
    """
    if found := strangers(folder, {path.name for path in folder.glob("*.whl")}):
        raise click.UsageError(
            f"{folder} holds {found}, expected wheels alone; remove it, or choose "
            "another folder"
        )
    tested = ("--constraint", str(CHECKOUT / "constraints.txt"))
    with replacing(folder, "*.whl") as made:
        say("building our wheel ...")
        wheel = build_wheel(made)
        for python, system in PYTHONS.items():
            say(f"downloading the {machine} wheels for Python {python} ({system}) ...")
            where = ("--dest", str(made), *tested)
            wanted = (*for_machine(machine, python), *dependencies(*EXTRAS))
            run_pip("download", *where, *wanted)
            check_complete(made, python, machine)
            say("  complete: pip installs dpu-edge from this folder alone")
    return folder / wheel.name


@click.command(cls=Command, context_settings=CONTEXT)
@click.option(
    "--machine", type=click.Choice(MACHINES), default="aarch64", show_default=True
)
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to.  [default: dist/wheelhouse-MACHINE]",
)
@click.option("--ours", is_flag=True, help="Our own wheel alone, in dist.")
@json_option
def main(machine: str, folder: Path | None, *, ours: bool, as_json: bool) -> None:
    """Collect the wheels that install dpu-edge on a board without a network."""
    if ours:
        wheel = build_wheel(folder or CHECKOUT / "dist")
        emit({"wheel": str(wheel)}, as_json=as_json, text=str(wheel))
        return
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
