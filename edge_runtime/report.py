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

_TIME = "%Y-%m-%dT%H:%M:%SZ"
_COUNTS = {
    "applied": 0,
    "apply_seconds": 0.0,
    "failures": 0,
    "last_apply": 0,
    "last_success": 0,
}


class Report:
    """Keeps account of what the agent does; counts go on after a restart.

    Attributes:
        counts: What the metrics count, and times in seconds since 1970.
        files: What became of each patch file, by its name, as plain data.
        basis: What that depends on beside the files.
        metrics_text: The metrics, as of the last :meth:`publish`.
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
        self._log, self._status, self._metrics = log, status, metrics
        self.metrics_text, self.files, self.basis = "", dict[str, Any](), list[Any]()
        self.counts: dict[str, Any] = {**_COUNTS, "refused": {}}
        self._last: dict[str, Any] = {"result": None, "error": None}
        self._failure, self._written, self._written_at = "", "", 0.0
        if saved := read_status(status):
            self.files, self.basis = saved["files"], saved["basis"]
            self.counts |= saved["counts"]
            self._last = {key: saved[f"last_{key}"] for key in self._last}

    def note(self, event: str, **facts: Any) -> None:
        """Log an event."""
        self._log(event, **facts)
        self._last["result"] = {"at": now(), "event": event} | facts

    def applied(self, seconds: float, **facts: Any) -> None:
        """Log and count an applied patch."""
        self.counts["applied"] += 1
        self.counts["apply_seconds"] += round(seconds, 3)
        self.counts["last_apply"] = int(time.time())
        self.note("applied", **facts, seconds=round(seconds, 3))

    def refused(self, error: str, **facts: Any) -> None:
        """Log and count a refused patch."""
        self.counts["refused"][error] = self.counts["refused"].get(error, 0) + 1
        self.note("refused", **facts, error=error)

    def failed(self, error: Exception) -> None:
        """Count a failure of disk or store; log it unless it is the one before."""
        self.counts["failures"] += 1
        facts = {"error": type(error).__name__, "reason": str(error)}
        if self._failure != str(error):
            self._failure = str(error)
            self._log("failed", **facts)
            self._last["error"] = {"at": now()} | facts

    def succeeded(self, *, worked: bool) -> None:
        """Note that a look ended without a failure."""
        self.counts["last_success"] = int(time.time())
        if worked and self._failure:
            self._failure = ""
            self._log("recovered")

    def publish(self, state: State) -> bool:
        """Write status file and metrics, if there is anything new in them.

        Returns:
            Whether there was.

        Raises:
            OSError: They cannot be written.
        """
        active = state.active_slot
        record = {
            "schema": SCHEMA,
            "installed": {
                "round": active.round,
                "fingerprint": active.target,
                "model": state.model,
                "release_floor": state.floor,
                "pinned": state.pinned,
            },
            **{f"last_{key}": value for key, value in self._last.items()},
            "failing": self._failure,
            "files": self.files,
            "basis": self.basis,
        }
        news, record["counts"] = json.dumps(record), self.counts
        self.metrics_text = render_metrics(record)
        due = time.monotonic() - self._written_at >= HEARTBEAT_S
        if news == self._written and not due:
            return False
        text = json.dumps({"at": now()} | record, indent=1) + "\n"
        write_replaced(self._status, text)
        if self._metrics:
            write_replaced(self._metrics, self.metrics_text)
        self._written, self._written_at = news, time.monotonic()
        return True


def read_status(path: Path) -> dict[str, Any]:
    """Read a status file; empty if there is none, or none that can be read.

    It is not synced, so a power cut may leave half of it. Nothing in it is needed for
    safety: the store alone decides what may be installed.
    """
    with suppress(OSError, ValueError):
        record: dict[str, Any] = json.loads(path.read_bytes())
        if record["schema"] == SCHEMA:
            return record
    return {}


def status_lines(record: dict[str, Any]) -> Iterator[str]:
    """Yield what a status file says, for people."""
    if not record:
        return
    success = time.strftime(_TIME, time.gmtime(record["counts"]["last_success"]))
    yield f"agent          last good look {success} or later"
    if last := record["last_result"]:
        facts = (str(last[key]) for key in ("file", "reason") if last.get(key))
        yield f"last decision  {last['at']}  {last['event']} {': '.join(facts)}"
    if record["failing"]:
        yield f"failing        {record['failing']}"
    for name, file in record["files"].items():
        if file["verdict"] in (Verdict.WAITING, Verdict.HELD):
            yield f"{file['verdict']:<13}  {name}: {file['reason']}"


def write_replaced(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one."""
    part = path.with_name(f".{path.name}.new")  # a store collects *.part
    part.write_text(text)
    part.replace(path)


def now() -> str:
    """Return the time by this device's own clock, for people."""
    return time.strftime(_TIME, time.gmtime())
