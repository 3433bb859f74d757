# SPDX-License-Identifier: Apache-2.0
"""Install with pip, and show in few lines what it fetches: it may be gigabytes.

    python -m tools.install --constraint constraints.txt --editable '.[train]'

Arguments are those of ``pip install``. On a terminal one line shows the download at
work; elsewhere each large file is one line. What pip says about errors is shown as it
comes. This runs before anything is installed: the standard library alone.
"""

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator

LARGE = 1 << 20  # bytes; smaller files come at once
UNITS = {"bytes": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
CLEAR = "\r\x1b[K"
RAW_SINCE = (24, 1)  # pip that tells its progress to a program


def shown(lines: Iterable[str], *, live: bool) -> Iterator[str]:
    """Turn what pip says into what a person wants to see.

    Args:
        lines: Of pip's standard output.
        live: Whether a line may be replaced by the next one: on a terminal.

    Yields:
        Pieces to be written one after the other.
    """
    name, percent = "", -1
    for line in lines:
        if found := re.match(r"\s*Downloading (\S+) \(([\d.]+) (\w+)\)", line):
            name, percent = _downloading(*found.groups()), -1
            if name and not live:
                yield f"  {name}\n"
        elif found := re.match(r"Progress (\d+) of (\d+)", line):
            done, total = map(int, found.groups())
            if live and name and total and 100 * done // total != percent:
                percent = 100 * done // total
                yield f"{CLEAR}  {name}  {percent} %" + ("\n" if percent == 100 else "")
        elif found := re.match(r"Installing collected packages: (.*)", line):
            yield f"  installing {found[1].count(',') + 1} packages ...\n"


def _downloading(link: str, number: str, unit: str) -> str:
    """Name a large file with its size; nothing for a small one."""
    if float(number) * UNITS.get(unit, 1) < LARGE or link.endswith(".metadata"):
        return ""
    return f"downloading {link.rpartition('/')[2]} ({number} {unit})"


def main(arguments: list[str]) -> int:
    """Run ``pip install``; return its exit code."""
    import pip

    version = tuple(int(part) for part in re.findall(r"\d+", pip.__version__)[:2])
    bar = ["--progress-bar", "raw" if version >= RAW_SINCE else "off"]
    print("installing into .venv; torch alone may be 200 MB to 3 GB", flush=True)
    command = [sys.executable, "-u", "-m", "pip", "install", *bar, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for piece in shown(process.stdout, live=sys.stdout.isatty()):
            print(piece, end="", flush=True)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
