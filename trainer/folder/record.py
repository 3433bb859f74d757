# SPDX-License-Identifier: Apache-2.0
"""What a round folder states about its round: ``round.json``."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any

from edge_runtime.errors import PatchFormatError, RoundError, WeightsError
from edge_runtime.formats.json_file import read_record
from edge_runtime.formats.model_folder import RECORD_NAME, WEIGHTS_NAME, Outcome
from edge_runtime.formats.weights import Weights, read_weights

SCHEMA, RUN_SCHEMA = 1, 2  # 2: of a run with an id
ACCURACY, HIGHER = "accuracy", "higher"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRecord:
    """The content of ``round.json``.

    Attributes:
        run: The run's name.
        round: Number of the round, from 0.
        counter: Release counter of the target.
        outcome: Whether there is an update to send.
        model: Identity of the network, hexadecimal; filled in by :func:`write_round`.
        parent: Fingerprint of the weights that the update leads from: the last
            deployed ones, or the init weights (round_00, re-initialised rounds).
        target: Fingerprint of the deployed weights; filled in by :func:`write_round`.
        method: What selected the weights, for example ``"dpu"``.
        ratio: Share of the selectable weights that was selected; None for all.
        reinitialised: Whether training started from the init weights again.
        tried_reinit: Whether a re-initialised model was trained, deployed or not.
        packable: False if devices were never meant to get these weights.
        samples: Number of training samples.
        metrics: Numbers by name. A recipe's run has ``val_METRIC`` and ``test_METRIC``
            among them, a loop of your own what it gave.
        metric: The name of METRIC.
        better: Which values of it are better, ``"higher"`` or ``"lower"`` ones.
        seeds: Every seed that decided the round, by purpose.
        versions: Of Python and the libraries; filled in by :func:`write_round`.
        config: The recipe of the run, resolved.
    """

    run: str
    round: int
    counter: int
    outcome: Outcome
    model: str = ""
    parent: str
    target: str = ""
    method: str
    ratio: float | None
    reinitialised: bool
    tried_reinit: bool = False
    packable: bool
    samples: int
    metrics: Mapping[str, float]
    metric: str = ACCURACY
    better: str = HIGHER
    seeds: Mapping[str, int]
    versions: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any]


def as_json(record: RoundRecord) -> dict[str, Any]:
    """Return what ``round.json`` holds; the metric only where it is no accuracy."""
    found = asdict(record)
    if (record.metric, record.better) == (ACCURACY, HIGHER):
        del found["metric"], found["better"]
    return found


def record_of(raw: Mapping[str, Any]) -> RoundRecord:
    """Return the record that JSON states, whatever else stands there.

    Raises:
        KeyError: Something is missing.
        ValueError: The outcome is none.
    """
    # Earlier versions kept it among the metrics.
    tried = bool(raw["metrics"].get("tried_reinit", False))
    raw = {"metric": ACCURACY, "better": HIGHER, "tried_reinit": tried, **raw}
    known = {part.name: raw[part.name] for part in fields(RoundRecord)}
    return RoundRecord(**known | {"outcome": Outcome(raw["outcome"])})


def read_round_record(folder: str | PathLike[str]) -> RoundRecord:
    """Read what a round folder states about its round.

    Raises:
        RoundError: ``round.json`` is malformed or of another schema.
        OSError: It cannot be read.
    """
    path = Path(folder, RECORD_NAME)
    try:
        what = str(path)
        found = read_record(path, "record_bytes", what, RoundError, finite=False)
        raw = found.values
        if raw["schema"] not in (SCHEMA, RUN_SCHEMA):
            raise RoundError(
                f"{path} has schema {raw['schema']}, expected {SCHEMA} or {RUN_SCHEMA}"
            )
        return record_of(raw)
    except (ValueError, KeyError, TypeError) as err:
        raise RoundError(f"{path} is malformed ({err!r})") from err


def read_deployed(folder: Path) -> Weights:
    """Read the weights that a round deployed, held against its record.

    Raises:
        RoundError: They are damaged, or not those that the record states.
        OSError: They cannot be read.
    """
    path, stated = folder / WEIGHTS_NAME, read_round_record(folder).target
    with telling_of(path):
        weights = read_weights(path)
        if weights.fingerprint != stated:
            raise WeightsError(
                f"its fingerprint is {weights.fingerprint}, {RECORD_NAME} states "
                f"{stated}"
            )
    return weights


@contextmanager
def telling_of(path: Path) -> Iterator[None]:
    """Let what is wrong with a file of a round name it, and say what to do.

    Raises:
        RoundError: Something is.
    """
    try:
        yield
    except (WeightsError, PatchFormatError) as err:
        raise RoundError(
            f"{path} is damaged, or of another round: {err}; restore {path.parent} "
            "from a copy, or remove it and train the round again"
        ) from err
