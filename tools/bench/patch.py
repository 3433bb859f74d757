# SPDX-License-Identifier: Apache-2.0
"""Our patches beside every other way to send new weights.

    python -m tools.bench.patch --rounds runs --check

measures size, time to make, time to apply and peak memory of each tool on the same
rounds. ``--data DIR`` trains the rounds first.
"""

import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from edge_runtime.commandline import CONTEXT, Command, emit, json_option, say
from tools.bench.contest import Bar, Contest, chosen_tools, compete, hold_bars
from tools.bench.contest_report import markdown, replace_section, svg
from tools.bench.rivals import TOOLS, Tool
from tools.bench.rounds import find_pairs, make_rounds

RESULTS = Path(__file__).parents[1] / "results"
_FOLDER = click.Path(file_okay=False, path_type=Path)


def _epilog() -> str:
    """List how each tool is installed."""
    wanted: dict[str, list[str]] = {}
    for tool in TOOLS.values():
        wanted.setdefault(tool.install, []).append(tool.key)
    lines = ["\b", "Tools; those that are not installed are reported as absent:"]
    for how, keys in wanted.items():
        lines += [
            f"  {how:<24}{', '.join(keys[i : i + 3])}" for i in range(0, len(keys), 3)
        ]
    return "\n".join(lines)


@click.command(cls=Command, context_settings=CONTEXT, epilog=_epilog())
@click.option(
    "--rounds",
    multiple=True,
    type=_FOLDER,
    metavar="DIR...",
    help="Rounds, runs, folders of runs, or folders with base.safetensors and "
    "target.safetensors; several may follow.  [default: runs]",
)
@click.argument("more", nargs=-1, type=_FOLDER, metavar="")
@click.option(
    "--data",
    type=click.Path(exists=True, path_type=Path),
    metavar="DIR",
    help="Train the rounds that are not there yet, into the first DIR: a folder with "
    "MNIST/raw, and cifar10/{train,test}/CLASS/*.",
)
@click.option(
    "--tools",
    metavar="KEY,...",
    default="",
    help="Only these, and ours.  [default: all]",
)
@click.option("--repeats", type=click.IntRange(1), default=7, show_default=True)
@click.option("--check", is_flag=True, help="End with 1 if a bar is missed.")
@click.option("--save", is_flag=True, help="Write tools/RESULTS.md, plot and JSON.")
@json_option
def main(  # noqa: PLR0913 - one for each option
    rounds: tuple[Path, ...],
    more: tuple[Path, ...],
    data: Path | None,
    tools: str,
    repeats: int,
    *,
    check: bool,
    save: bool,
    as_json: bool,
) -> None:
    """Measure our patch and its rivals on the same rounds."""
    chosen = _chosen(tools)
    folders = [*rounds, *more] or [Path("runs")]
    if data is not None:
        make_rounds((), data, folders[0], say)
    command = shlex.join(["python", "-m", "tools.bench.patch", *sys.argv[1:]])
    contests: list[Contest] = []
    with tempfile.TemporaryDirectory(prefix="bench-rounds-") as scratch:
        pairs = [p for folder in folders for p in find_pairs(folder, Path(scratch))]
        for pair in pairs:
            say(f"{pair.name}: {pair.file_size:,} B, {pair.changed:,} changed")
            contests.append(compete(pair, chosen, repeats, say))
            bars = list(hold_bars(contests))
            record = _record(contests, bars, command)
            text = markdown(contests, bars, record["machine"], command)
            if save:  # after every round, so that a long run can be cut short
                _save(record, text, svg(contests))
    emit(record, as_json=as_json, text=text)
    missed = [bar for bar in bars if not bar.holds]
    for bar in missed:
        say(f"missed: {bar.bar} on {bar.round}: {bar.text}")
    if check and missed:
        sys.exit(1)


def _chosen(tools: str) -> list[Tool]:
    try:
        return chosen_tools([key for key in tools.split(",") if key])
    except KeyError as err:
        known = ", ".join(TOOLS)
        raise click.UsageError(f"no tool {err}; known: {known}") from err


def _record(
    contests: Sequence[Contest], bars: Sequence[Bar], command: str
) -> dict[str, Any]:
    rounds = []
    for contest in contests:
        pair = asdict(contest.pair)
        del pair["base"], pair["target"]  # paths of this machine
        rounds.append(pair | {"tools": [asdict(entry) for entry in contest.entries]})
    return {
        "command": command,
        "machine": machine(),
        "rounds": rounds,
        "bars": [asdict(bar) for bar in bars],
    }


def machine() -> dict[str, Any]:
    """Describe this machine, for a table."""
    import numpy
    import zstandard

    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith(("model name", "Model"))
    ]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "Python": platform.python_version(),
        "NumPy": numpy.__version__,
        "zstandard": zstandard.__version__,
        "load": f"{os.getloadavg()[1]:.1f}",
    }


def _save(record: dict[str, Any], text: str, picture: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "patches.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "patches.svg").write_text(picture)
    document = RESULTS.parent / "RESULTS.md"
    old = document.read_text() if document.exists() else "# Results\n"
    document.write_text(replace_section(old, text))


if __name__ == "__main__":
    main()
