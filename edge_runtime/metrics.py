"""Metrics of the agent, in the text format 0.0.4 of Prometheus."""

from collections.abc import Iterator, Mapping
from typing import Any

# Name, type, help; the values are in the function below.
_METRICS = """\
installed_info gauge The weights in use.
round gauge Round of the weights in use.
release_floor gauge Highest release counter that was ever active.
pinned gauge 1 while updates are held back.
patches_waiting gauge Patches in the folder that cannot be applied yet.
patches_applied_total counter Patches applied.
patches_refused_total counter Patches refused, by the kind of error.
failures_total counter Looks that an error of disk or store ended.
last_success_timestamp_seconds gauge Time of the last look without such an error.
apply_seconds summary Time that applied patches took, with trials and hooks."""


def render_metrics(record: Mapping[str, Any]) -> str:
    """Return the metrics that a status record of the agent gives."""
    return "\n".join(_lines(record)) + "\n"


def _lines(record: Mapping[str, Any]) -> Iterator[str]:
    installed, counts = record["installed"], record["counts"]
    verdicts = [file["verdict"] for file in record["files"].values()]
    values = {name: {"": value} for name, value in (installed | counts).items()}
    # Labels are digests and names of classes: nothing in them needs a backslash.
    labels = '{{fingerprint="{fingerprint}",model="{model}"}}'.format(**installed)
    values |= {
        "installed_info": {labels: 1},
        "last_success_timestamp_seconds": {"": record["last_success"]},
        "pinned": {"": int(installed["pinned"])},
        "patches_waiting": {"": sum(v in ("waiting", "held") for v in verdicts)},
        "patches_refused_total": {
            f'{{reason="{kind}"}}': count
            for kind, count in sorted(counts["patches_refused_total"].items())
        },
        "apply_seconds": {
            "_sum": counts["apply_seconds"],
            "_count": counts["patches_applied_total"],
        },
    }
    for line in _METRICS.splitlines():
        name, kind, text = line.split(maxsplit=2)
        yield f"# HELP dpu_edge_{name} {text}"
        yield f"# TYPE dpu_edge_{name} {kind}"
        for suffix, value in values[name].items():
            yield f"dpu_edge_{name}{suffix} {value}"
