"""What the agent tells: a line for each decision, a status file, metrics."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from edge_runtime.metrics import render_metrics
from edge_runtime.route import Verdict
from edge_runtime.state import State

SCHEMA = 1
STATUS_NAME = "agent.json"
HEARTBEAT_S = 600.0  # the files are written at least this often


class Report:
    """Keeps account of what the agent does; counts go on after a restart.

    Attributes:
        log: Called with the name of an event and its facts.
        record: The content of the status file, without times that always change.
        counts: The part of it that only grows.
        last_success: When a look last ended well, in seconds since 1970.
    """

    def __init__(
        self, log: Callable[..., None], status: Path, metrics: Path | None = None
    ) -> None:
        """Read what an earlier agent left in the status file.

        Args:
            log: Called with the name of an event and its facts.
            status: The status file.
            metrics: A file for the textfile collector of Prometheus.
        """
        self.log, self._status, self._metrics = log, status, metrics
        self._written: object = None
        self._written_at = -HEARTBEAT_S
        counts = ("patches_applied_total", "failures_total", "apply_seconds")
        nothing: dict[str, Any] = {
            "schema": SCHEMA,
            "counts": dict.fromkeys(counts, 0) | {"patches_refused_total": {}},
            "last_decision": None,
            "last_error": None,
            "failing": "",
            "basis": [],
            "files": {},
        }
        self.record = nothing | read_status(status)
        self.counts = self.record["counts"]
        self.last_success = int(self.record.pop("last_success", 0))

    def note(self, event: str, **facts: Any) -> None:
        """Log a decision."""
        self.log(event, **facts)
        self.record["last_decision"] = {"at": now(), "event": event} | facts

    def fail(self, error: Exception) -> None:
        """Count a failure of disk or store; log it unless it goes on."""
        self.counts["failures_total"] += 1
        facts = {"error": type(error).__name__, "reason": str(error)}
        self.record["last_error"] = {"at": now()} | facts
        if self.record["failing"] != str(error):
            self.record["failing"] = str(error)
            self.log("failed", **facts)

    def succeed(self, *, worked: bool) -> None:
        """Note that a look ended well; ``worked`` if it did more than look."""
        self.last_success = int(time.time())
        if worked and self.record["failing"]:
            self.record["failing"] = ""
            self.log("recovered")

    @property
    def is_old(self) -> bool:
        """Whether the files are due to be written even without news."""
        return time.monotonic() - self._written_at >= HEARTBEAT_S

    def publish(self, state: State) -> None:
        """Write status file and metrics, if there is news or they have become old.

        Raises:
            OSError: They cannot be written.
        """
        active = state.active_slot
        self.record["installed"] = {
            "round": active.round,
            "fingerprint": active.target,
            "model": state.model,
            "release_floor": state.floor,
            "pinned": state.pinned,
        }
        news = json.dumps(self.record)
        if news == self._written and not self.is_old:
            return
        record = {"at": now()} | self.record | {"last_success": self.last_success}
        _replace(self._status, json.dumps(record, indent=1) + "\n")
        if self._metrics:
            _replace(self._metrics, render_metrics(record))
        self._written, self._written_at = news, time.monotonic()


def read_status(path: Path) -> dict[str, Any]:
    """Read a status file; empty if there is none, or none that can be read.

    It is not synced, so a power cut may leave half of it. Nothing in it is needed for
    safety: the store alone decides what may be installed.
    """
    with suppress(OSError, ValueError, LookupError, TypeError):
        record: dict[str, Any] = json.loads(path.read_bytes())
        return record if record["schema"] == SCHEMA else {}
    return {}


def status_lines(record: dict[str, Any]) -> Iterator[str]:
    """Yield what a status file says, for people."""
    if not record:
        return
    yield f"agent          all was well at {_utc(record['last_success'])}"
    if record["failing"]:
        yield f"failing        {record['failing']}"
    for name, file in record["files"].items():
        if file["verdict"] in (Verdict.WAITING, Verdict.HELD, Verdict.REFUSED):
            yield f"{file['verdict']:<13}  {name}: {file['reason']}"


def _replace(path: Path, text: str) -> None:
    # Whoever reads it sees the old file or the new one. A store collects *.part.
    part = path.with_name(f".{path.name}.new")
    part.write_text(text)
    part.replace(path)


def now() -> str:
    """Return the time by this device's own clock, for people."""
    return _utc(time.time())


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
