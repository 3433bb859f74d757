# SPDX-License-Identifier: Apache-2.0
"""Hold that every source file begins with the line that says its licence.

    python -m tools.licence_line            # writes it where it is missing
    python -m tools.licence_line --check    # names the files that lack it

What ``dpu-train init`` copies is left out: it belongs to whoever asks for it.
"""

import sys
from pathlib import Path

import click

from edge_runtime.commandline import CONTEXT, Command, emit, json_option
from tools.wheels import CHECKOUT

LINE = "# SPDX-License-Identifier: Apache-2.0\n"
FOLDERS = ("edge_runtime", "packager", "trainer", "tools", "tests", "examples", "docs")
_COPIED = Path("trainer", "starter")


def sources(root: Path) -> list[Path]:
    """Return every Python file of the project, by name."""
    return sorted(
        path
        for folder in FOLDERS
        for path in (root / folder).rglob("*.py")
        if not path.relative_to(root).is_relative_to(_COPIED)
    )


def lacking(root: Path) -> list[Path]:
    """Return the files that do not begin with the line."""
    return [
        path
        for path in sources(root)
        if not path.read_text(encoding="utf-8").startswith(LINE)
    ]


@click.command(cls=Command, context_settings=CONTEXT)
@click.option("--check", is_flag=True, help="Write nothing; exit 1 if a file lacks it.")
@json_option
def main(*, check: bool, as_json: bool) -> None:
    """Write the licence's line into each source file that lacks it."""
    found = lacking(CHECKOUT)
    if not check:
        for path in found:
            path.write_text(LINE + path.read_text(encoding="utf-8"), encoding="utf-8")
    names = [str(path.relative_to(CHECKOUT)) for path in found]
    word = "lacks" if check else "written into"
    emit(
        {"lacking": names} if check else {"written": names},
        as_json=as_json,
        text="\n".join(f"{word}  {name}" for name in names) or "every file has it",
    )
    sys.exit(1 if check and found else 0)


if __name__ == "__main__":
    main()
