"""Result files of the reproduction; the table and plot that are drawn from them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SCHEMA = 1
METHODS = ("fu", "dpu", "gcpu", "rpu", "pruning")


def read_result(path: Path) -> dict[str, Any]:
    """Read a result file."""
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def write_result(
    path: Path, about: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]
) -> None:
    """Replace a result file; a round is a line: longer runs are short diffs."""
    head = json.dumps({"schema": SCHEMA, **about}, indent=1)
    lines = ",\n".join("  " + json.dumps(row) for row in rounds)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(f'{head[:-2]},\n "rounds": [\n{lines}\n ]\n}}\n')
    part.replace(path)
