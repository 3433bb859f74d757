"""What the agent tells: a line for each decision, a status file, metrics."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from itertools import groupby
from pathlib import Path
from typing import Any

from edge_runtime.route import Verdict
from edge_runtime.state import State, utc

SCHEMA = 2
HEARTBEAT_S = 600.0  # the files are written at least this often
_NOTHING: dict[str, Any] = {
    "schema": SCHEMA,
    "last_success": 0,
    "failing": "",
    "counts": {
        "patches_applied_total": 0,
        "patches_refused_total": {},
        "failures_total": 0,
    },
    "basis": [],
    "files": {},
}


class Report:
    """Keeps account of what the agent does; counts go on after a restart.

    Attributes:
        log: Called with the name of an event and its facts.
        record: The content of the status file.
        counts: The part of it that only grows.
    """

    def __init__(
        self, log: Callable[..., None], root: Path, metrics: Path | None = None
    ) -> None:
        """Read what an earlier agent left in the status file.

        Args:
            log: Called with the name of an event and its facts.
            root: The store.
            metrics: A file for the textfile collector of Prometheus.
        """
        self.log, self._status, self._metrics = log, _status_path(root), metrics
        self._written_at = -HEARTBEAT_S
        self.record = deepcopy(_NOTHING) | read_status(root)
        self.counts = self.record["counts"]

    def fail(self, error: Exception) -> None:
        """Count a failure of disk or store; log it unless it goes on."""
        self.counts["failures_total"] += 1
        if self.record["failing"] != str(error):
            self.record["failing"] = str(error)
            self.log("failed", error=type(error).__name__, reason=str(error))

    def succeed(self, *, worked: bool) -> None:
        """Note that a look ended well; ``worked`` if it did more than look."""
        self.record["last_success"] = int(time.time())
        if worked and self.record["failing"]:
            self.record["failing"] = ""
            self.log("recovered")

    def publish(self, state: State, *, news: bool) -> None:
        """Write status file and metrics; without news now and then only.

        Raises:
            OSError: They cannot be written.
        """
        if not news and time.monotonic() - self._written_at < HEARTBEAT_S:
            return
        self.record["installed"] = state.summary()
        record = {"at": utc()} | self.record
        _replace(self._status, json.dumps(record, indent=1) + "\n")
        if self._metrics:
            _replace(self._metrics, "\n".join(metric_lines(record)) + "\n")
        self._written_at = time.monotonic()


def _status_path(root: Path) -> Path:
    return root / "agent.json"


def read_status(root: Path) -> dict[str, Any]:
    """Read a store's status file; empty if there is none, or none that can be read.

    It is not synced, so a power cut may leave half of it. Nothing in it is needed for
    safety: the store alone decides what may be installed.
    """
    with suppress(OSError, ValueError, LookupError, TypeError):
        record: dict[str, Any] = json.loads(_status_path(root).read_bytes())
        return record if record["schema"] == SCHEMA else {}
    return {}


def status_lines(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a status file says, for people."""
    if not record:
        return
    yield f"agent          all was well at {utc(record['last_success'])}"
    if record["failing"]:
        yield f"failing        {record['failing']}"
    for name, file in record["files"].items():
        if file["verdict"] in (Verdict.WAITING, Verdict.HELD, Verdict.REFUSED):
            yield f"{file['verdict']:<13}  {name}: {file['reason']}"


def metric_lines(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a status file says, in the text format 0.0.4 of Prometheus."""
    installed, counts = record["installed"], dict(record["counts"])
    refused = counts.pop("patches_refused_total")
    verdicts = [file["verdict"] for file in record["files"].values()]
    # Labels are digests and names of classes: nothing in them needs a backslash.
    labels = 'fingerprint="{fingerprint}",model="{model}"'.format(**installed)
    samples = {
        f"installed_info{{{labels}}}": 1,
        "round": installed["round"],
        "release_floor": installed["release_floor"],
        "pinned": int(installed["pinned"]),
        "patches_waiting": sum(v in (Verdict.WAITING, Verdict.HELD) for v in verdicts),
        "last_success_timestamp_seconds": record["last_success"],
        **counts,
        **{f'patches_refused_total{{reason="{k}"}}': n for k, n in refused.items()},
    }
    for name, group in groupby(samples, lambda sample: sample.partition("{")[0]):
        kind = "counter" if name.endswith("_total") else "gauge"
        yield f"# TYPE dpu_edge_{name} {kind}"
        yield from (f"dpu_edge_{sample} {samples[sample]}" for sample in group)


def _replace(path: Path, text: str) -> None:
    # Whoever reads it sees the old file or the new one. A store collects *.part.
    part = path.with_name(f".{path.name}.new")
    part.write_text(text)
    part.replace(path)
