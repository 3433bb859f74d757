# SPDX-License-Identifier: Apache-2.0
"""What the agent tells: a status file, the same as metrics, and words for systemd."""

import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from edge_runtime.agent.plan import Decision
from edge_runtime.errors import StoreError
from edge_runtime.files import Files
from edge_runtime.formats.json_file import read_record
from edge_runtime.formats.json_record import Record
from edge_runtime.limits import limits
from edge_runtime.text import printable
from edge_runtime.times import MAX_SECONDS, utc

SCHEMA = 3
# What is to be told of a file as long as it lasts.
TOLD = {Decision.WAITING, Decision.HELD, Decision.BLOCKED, Decision.REFUSED}


def _status_path(root: Path) -> Path:
    return root / "agent.json"


def read_status(root: Path) -> dict[str, Any]:
    """Read a store's status file; empty if there is none, or none that can be read.

    It is not synced, so a power cut may leave half of it. Nothing in it is needed for
    safety: the store alone decides what may be installed.
    """
    with suppress(OSError, StoreError):
        return _parse(
            read_record(
                _status_path(root),
                "agent_bytes",
                "agent.json",
                StoreError,
                encodable=False,
            )
        )
    return {}


def _parse(record: Record) -> dict[str, Any]:
    record.schema(SCHEMA)
    installed, files = record.record("installed"), record.record("files")
    return {
        "schema": SCHEMA,
        "at": record.text("at"),
        "folder": record.text("folder", ""),
        "installed": {
            **{name: installed.digest(name) for name in ("model", "fingerprint")},
            **{name: installed.integer(name) for name in ("round", "release_counter")},
            "release_floor": installed.integer("release_floor", least=-1),
            "pinned": installed.flag("pinned"),
            **({"name": installed.text("name")} if "name" in installed else {}),
        },
        "last_success": record.integer("last_success", most=MAX_SECONDS),
        "failing": record.text("failing"),
        "basis": record.items("basis", (str, int)),
        "files": {name: _file(entry) for name, entry in files.members()},
    }


def _file(entry: Record) -> dict[str, Any]:
    words = ("verdict", "reason", "error")
    return {"identity": entry.integers("identity", least=-(1 << 63))} | {
        word: entry.text(word) for word in words
    }


def write_status(root: Path, record: dict[str, Any], metrics: Path | None) -> None:
    """Write a store's status file.

    Args:
        root: The store.
        record: What it says; ``schema`` and time are added.
        metrics: A file for the same, for the textfile collector of Prometheus.

    Raises:
        OSError: They cannot be written.
    """
    text = json.dumps({"schema": SCHEMA, "at": utc()} | record, indent=1)
    # What is not remembered is looked at again, which costs time and nothing else.
    while len(text) >= limits().agent_bytes and record["files"]:
        kept = list(record["files"].items())[len(record["files"]) // 2 + 1 :]
        record = record | {"files": dict(kept)}
        text = json.dumps({"schema": SCHEMA, "at": utc()} | record, indent=1)
    files, path = Files(), _status_path(root)
    files.replace(path, f"{text}\n".encode(), durable=False)
    if metrics:
        lines = "\n".join(metric_lines(record)) + "\n"
        files.replace(metrics, lines.encode(), durable=False)


def forget_left(root: Path, metrics: Path | None) -> None:
    """Remove what a killed agent left of files that it was writing.

    To be called only while no other agent is at work for this store.
    """
    for path in filter(None, [_status_path(root), metrics]):
        with suppress(OSError):
            Files().forget(path)


def status_lines(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a status file says, for people."""
    if not record:
        return
    yield f"agent          all was well at {utc(record['last_success'])}"
    if record["failing"]:
        yield f"failing        {printable(record['failing'])}"
    for name, file in record["files"].items():
        if file["verdict"] in TOLD:
            by = "by this device: " if file["verdict"] == Decision.BLOCKED else ""
            yield (
                f"{file['verdict']:<13}  {printable(name)}: {by}"
                f"{printable(file['reason'])}"
            )


def metric_lines(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a status file says, in the text format 0.0.4 of Prometheus."""
    installed = record["installed"]
    verdicts = [file["verdict"] for file in record["files"].values()]
    # In each sample: of a board's models, the collector keeps what differs in labels.
    whose = _labels(installed, ("model", "name"))
    samples = {
        ("installed_info", _labels(installed, ("fingerprint", "model", "name"))): 1,
        ("round", whose): installed["round"],
        ("release_counter", whose): installed["release_counter"],
        ("release_floor", whose): installed["release_floor"],
        ("pinned", whose): int(installed["pinned"]),
        ("failing", whose): int(bool(record["failing"])),
        ("last_success_timestamp_seconds", whose): record["last_success"],
        **{("patches", f'{whose},verdict="{v}"'): verdicts.count(v) for v in Decision},
    }
    for name, group in groupby(samples, lambda sample: sample[0]):
        yield f"# TYPE dpu_edge_{name} gauge"
        yield from (f"dpu_edge_{name}{{{s[1]}}} {samples[s]}" for s in group)


def _labels(installed: Mapping[str, Any], names: Iterable[str]) -> str:
    known = [name for name in names if name in installed]
    return ",".join(f'{name}="{_label(installed[name])}"' for name in known)


def _label(value: str) -> str:
    """Return a label's value as the text format spells it."""
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def sd_notify(*lines: str) -> None:
    """Send messages such as ``READY=1`` to systemd, where it listens (sd_notify)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    # An abstract socket is written with @ for its leading zero byte.
    address = address.replace("@", "\0", 1 if address[0] == "@" else 0)
    # A manager that does not listen is no reason to leave the model out of date.
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.connect(address)
        out.sendall("\n".join(lines).encode())


class PingingFiles(Files):
    """The disk, where each piece that is written is progress.

    Applying a large patch may take a slow board longer than the watchdog waits.
    """

    def write(
        self,
        path: Path,
        chunks: Iterable[bytes | memoryview],
        *,
        mode: int = 0o666,
        durable: bool = True,
    ) -> None:
        """Write a new file, as :meth:`Files.write` does."""

        def told() -> Iterator[bytes | memoryview]:
            for chunk in chunks:
                ping()
                yield chunk

        super().write(path, told(), mode=mode, durable=durable)


def ping() -> None:
    """Tell systemd's watchdog that the agent makes progress."""
    sd_notify("WATCHDOG=1")
