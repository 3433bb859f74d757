# SPDX-License-Identifier: Apache-2.0
"""The files of a run: every name of ``model/`` and of the round folders, once.

Trainer, packager and device meet in these names; ``docs/round-folder.md`` says what is
in each file.
"""

import re
from enum import StrEnum
from os import PathLike
from pathlib import Path

MODEL_NAME = "model"  # the folder that all rounds of a run share

GRAPH_NAME = "graph.onnx"
CONTRACT_NAME = "contract.json"
GOLDEN_NAME = "golden.npz"
INIT_NAME = "init.json"
INIT_TENSORS_NAME = "init.safetensors"
RUN_NAME = "run.json"
# All that a device keeps of them.
MODEL_FILES = (
    *(GRAPH_NAME, CONTRACT_NAME, GOLDEN_NAME),
    *(INIT_NAME, INIT_TENSORS_NAME, RUN_NAME),
)

RECORD_NAME = "round.json"
WEIGHTS_NAME = "weights.safetensors"
SELECTION_NAME = "selection.safetensors"
METRICS_NAME = "metrics.jsonl"
SHARES = ("accuracy", "element_accuracy", "iou")  # metrics that read as per cent
SHADOW_NAME = "shadow.safetensors"
# The subspaces that lead from the parent to the weights, and from init to the shadow.
SUBSPACES_NAME, SHADOW_SUBSPACES_NAME = "subspaces.bin", "shadow_subspaces.bin"


class Outcome(StrEnum):
    """How a round ended, as its record states it."""

    UPDATED = "updated"
    KEPT_BASE = "kept_base"


def round_name(number: int) -> str:
    """Return the name of a round's folder."""
    return f"round_{number:02d}"


def round_number(text: str) -> int:
    """Return the number of a round, from ``round_01`` or ``1``.

    Raises:
        ValueError: It is neither.
    """
    found = re.fullmatch(r"(?:round_)?(\d{1,9})", text.strip(), re.ASCII)
    if not found:
        raise ValueError(f"found {text[:80]!r}, expected a round such as round_01 or 1")
    return int(found[1])


def list_rounds(run: str | PathLike[str]) -> list[Path]:
    """Return a run's round folders, oldest first; none if there is no run."""
    found = [
        p for p in Path(run).glob("round_*") if re.fullmatch(r"\d{2,}", p.name[6:])
    ]
    return sorted(found, key=lambda path: int(path.name[6:]))
