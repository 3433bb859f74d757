# SPDX-License-Identifier: Apache-2.0
"""A release, as somebody else will get it: built, checked, installed elsewhere.

    make release

builds the source distribution and the wheel in ``dist``, has twine check them, installs
each in a fresh environment, and starts every command there. Nothing is uploaded, and
nothing is tagged.
"""

import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import click

from edge_runtime.commandline import CONTEXT, Command, emit, json_option, say
from tools.wheels import CHECKOUT, replacing, run


def project() -> dict[str, Any]:
    """Return what pyproject.toml says of the project; the version is only there."""
    text = (CHECKOUT / "pyproject.toml").read_text()
    return dict(tomllib.loads(text)["project"])


def try_out(archive: Path, version: str) -> None:
    """Install a distribution where nothing else is, and start its commands.

    Raises:
        click.ClickException: It cannot be installed, or a command does not answer with
            the version of the project.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "venv", "env", cwd=folder)
        python = folder / "env" / "bin" / "python"
        constraints = CHECKOUT / "constraints.txt"
        install = (python, "-m", "pip", "install", "--quiet", "-c", constraints)
        run(*install, archive, cwd=folder)
        for command in project()["scripts"]:
            answer = run(python.parent / command, "--version", cwd=folder)
            if version not in answer:
                raise click.ClickException(
                    f"{command} of {archive.name} answers {answer!r}, not {version}"
                )


@click.command(cls=Command, context_settings=CONTEXT)
@json_option
def main(*, as_json: bool) -> None:
    """Build, check and install a release; upload nothing."""
    version, dist = str(project()["version"]), CHECKOUT / "dist"
    with replacing(dist, "dpu_edge-*.whl", "dpu_edge-*.tar.gz") as made:
        say(f"building {version}")
        # Its wheel is built from the source distribution, so of nothing that lies here.
        run(sys.executable, "-m", "build", "--outdir", made, CHECKOUT)
        archives = sorted(made.iterdir())
        run(sys.executable, "-m", "twine", "check", "--strict", *archives)
        for archive in archives:
            say(f"installing {archive.name} in a fresh environment")
            try_out(archive, version)
    files = [str(dist / archive.name) for archive in archives]
    emit(
        {"version": version, "files": files},
        as_json=as_json,
        text="\n".join(f"{file}  checked, installed, started" for file in files),
    )


if __name__ == "__main__":
    main()
