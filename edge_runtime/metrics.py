"""Metrics of the agent, in the text format 0.0.4 of Prometheus."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

_CLIENT_S = 5.0  # for a client that connects and then does not ask

# Labels are digests and names of classes: nothing in them needs a backslash.
_TEXT = """\
# HELP dpu_edge_installed_info The weights in use.
# TYPE dpu_edge_installed_info gauge
dpu_edge_installed_info{{fingerprint="{fingerprint}",model="{model}"}} 1
# HELP dpu_edge_round Round of the weights in use.
# TYPE dpu_edge_round gauge
dpu_edge_round {round}
# HELP dpu_edge_release_floor Highest release counter that was ever active.
# TYPE dpu_edge_release_floor gauge
dpu_edge_release_floor {release_floor}
# HELP dpu_edge_pinned 1 while updates are held back.
# TYPE dpu_edge_pinned gauge
dpu_edge_pinned {pinned:d}
# HELP dpu_edge_patches_waiting Patches in the folder that cannot be applied yet.
# TYPE dpu_edge_patches_waiting gauge
dpu_edge_patches_waiting {waiting}
# HELP dpu_edge_failures_total Looks that an error of disk or store ended.
# TYPE dpu_edge_failures_total counter
dpu_edge_failures_total {failures}
# HELP dpu_edge_last_success_timestamp_seconds Last look without such an error.
# TYPE dpu_edge_last_success_timestamp_seconds gauge
dpu_edge_last_success_timestamp_seconds {last_success}
# HELP dpu_edge_last_apply_timestamp_seconds Last applied patch, 0 if there was none.
# TYPE dpu_edge_last_apply_timestamp_seconds gauge
dpu_edge_last_apply_timestamp_seconds {last_apply}
# HELP dpu_edge_patches_applied_total Patches applied.
# TYPE dpu_edge_patches_applied_total counter
dpu_edge_patches_applied_total {applied}
# HELP dpu_edge_apply_seconds What applied patches took, trial and hooks included.
# TYPE dpu_edge_apply_seconds summary
dpu_edge_apply_seconds_sum {apply_seconds}
dpu_edge_apply_seconds_count {applied}
# HELP dpu_edge_patches_refused_total Patches refused, by the kind of error.
# TYPE dpu_edge_patches_refused_total counter
"""


def render_metrics(record: Mapping[str, Any]) -> str:
    """Return the metrics that a status record of the agent gives."""
    verdicts = [file["verdict"] for file in record["files"].values()]
    waiting = sum(verdict in ("waiting", "held") for verdict in verdicts)
    counts = record["counts"]
    return _TEXT.format(**record["installed"], **counts, waiting=waiting) + "".join(
        f'dpu_edge_patches_refused_total{{reason="{kind}"}} {count}\n'
        for kind, count in sorted(counts["refused"].items())
    )


def serve_metrics(host: str, port: int, text: Callable[[], str]) -> int:
    """Answer ``GET /metrics`` in a thread of its own, for as long as the process lives.

    Args:
        host: The address to listen at.
        port: The port; 0 for any that is free.
        text: What to answer.

    Returns:
        The port.

    Raises:
        OSError: The address is not to be had.
    """
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Answer(BaseHTTPRequestHandler):
        timeout = _CLIENT_S

        def do_GET(self) -> None:
            if self.path != "/metrics":
                self.send_error(404, "only /metrics is here")
                return
            body = text().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing: a line for each scrape tells nobody anything."""

    server = HTTPServer((host, port), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port
