# SPDX-License-Identifier: Apache-2.0
"""Three devices of the demo follow a channel, each by the commands of a real one.

Nobody touches a device: ``dpu-fleet publish`` fills a folder, and on each device
``dpu-edge sync`` and ``dpu-edge agent`` do the rest. One of them is away for a
round and catches up by one patch. What they report goes onto the fleet's page.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import click

from edge_runtime.formats.model_folder import round_name

BOARDS = 3
Fetched = dict[int, list[int] | None]  # bytes of the patches, by round; None: away
_CHECKOUT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Fleet:
    """What became of the boards.

    Attributes:
        fetched: What each board fetched.
        proved: How many of them prove that they run the newest release.
        page: The fleet's page.
    """

    fetched: Sequence[Fetched]
    proved: int
    page: Path


@dataclass(slots=True)
class _Board:
    """A device: a store, a folder, and what was provisioned for it."""

    name: str
    folder: Path
    cards: Path
    fetched: Fetched = field(default_factory=dict)

    def install(self, channel: Path) -> None:
        """Install from the channel, as an owner does once."""
        key = self.cards / self.name / "device.key"
        self.folder.mkdir(parents=True)
        (self.folder / "in").mkdir()
        trusted = ["--trust", self.cards / self.name / "release.pub.pem"]
        self._edge("init", channel, *trusted)
        (self.folder / "store" / key.name).write_bytes(key.read_bytes())
        (self.folder / "store" / key.name).chmod(0o600)

    def visit(self, channel: Path, round_: int) -> None:
        """Fetch, apply, and send the report that came of it."""
        sync = ["sync", channel, self.folder / "in", "--json"]
        sync += ["--device", self.name, "--report", channel]
        names = json.loads(self._edge(*sync))["fetched"]
        sizes = [(self.folder / "in" / name).stat().st_size for name in names]
        self.fetched[round_] = sizes
        self._edge("agent", self.folder / "in", "--once")
        self._edge(*sync)

    def _edge(self, *words: object) -> str:
        return _run("edge_runtime", "--store", self.folder / "store", *words)


def follow(folder: Path, run: Path, rounds: list[int], page: Path) -> Fleet:
    """Publish rounds one by one, and let three boards follow them.

    Args:
        folder: Where keys, channel and boards go.
        run: The run's folder.
        rounds: Those that have something new, the first of them 0.
        page: Where the fleet's page goes.
    """
    key, public = folder / "release.pem", folder / "release.pub.pem"
    channel, cards = folder / "www" / run.name, folder / "cards"
    _packager("patch", "keygen", key)
    options = ["--url", channel, "--trust", public, "--report", channel]
    _packager("fleet", "provision", BOARDS, "-o", cards, *options)
    names = sorted(path.name for path in cards.glob("board-*"))
    boards = [_Board(name, folder / "boards" / name, cards) for name in names]
    missed = rounds[1:2] if len(rounds) > 2 else []  # it comes back after the next
    with ThreadPoolExecutor(BOARDS) as pool:
        for number in rounds:
            source = run / round_name(number)
            _packager("fleet", "publish", source, "--to", channel, "--sign", key)
            if number == rounds[0]:
                list(pool.map(lambda board: board.install(channel), boards))
                continue
            here = boards[:-1] if number in missed else boards
            list(pool.map(lambda b, n=number: b.visit(channel, n), here))
            for board in boards:
                board.fetched.setdefault(number, None)
    page.parent.mkdir(parents=True, exist_ok=True)
    watch = ["--devices", cards / "keys", "--trust", public, "--run", run, "--once"]
    watch += ["--db", folder / "fleet.db", "--json"]
    _packager("fleet", "watch", channel, *watch, "-o", page)
    shown = json.loads(
        _packager("fleet", "show", "--db", folder / "fleet.db", "--json")
    )
    proved = shown["progress"].get("run it", 0)
    return Fleet([board.fetched for board in boards], proved, page)


def _packager(script: str, *words: object) -> str:
    code = f"from packager.__main__ import {script}; {script}()"
    return _run(None, *words, code=code)


def _run(module: str | None, *words: object, code: str = "") -> str:
    """Run a command of the project; what it printed.

    Raises:
        click.ClickException: It failed; its own words follow.
    """
    start = ["-m", module] if module else ["-c", code]
    done = subprocess.run(
        [sys.executable, *start, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(_CHECKOUT)},
    )
    if done.returncode:
        raise click.ClickException(f"{' '.join(map(str, words))}: {done.stderr}")
    return done.stdout
