# SPDX-License-Identifier: Apache-2.0
"""``round.json``: what a trainer states about a round."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from edge_runtime.errors import RoundError
from edge_runtime.formats import json_file
from edge_runtime.formats.model_folder import RECORD_NAME, Outcome, round_name

SCHEMAS = (1, 2)  # 2: of a run with an id, which older packagers do not know


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """What the packager needs of ``round.json``; the rest of it is for people.

    Attributes:
        run: The run's name.
        round: Number of the round.
        counter: Release counter of its target.
        outcome: Whether there is something to send.
        model: Identity of the network, hexadecimal.
        parent: Fingerprint that the update leads from, hexadecimal.
        target: Fingerprint of the deployed weights, hexadecimal.
        packable: False where the weights were never meant for devices.
    """

    run: str
    round: int
    counter: int
    outcome: Outcome
    model: str
    parent: str
    target: str
    packable: bool


def read_record(folder: Path) -> RoundRecord:
    """Read a round folder's ``round.json`` and check it in itself.

    Raises:
        RoundError: Missing, malformed or inconsistent; every problem is listed.
    """
    path = folder / RECORD_NAME
    try:
        what = str(path)
        raw = json_file.read_record(
            path, "record_bytes", what, RoundError, finite=False
        ).values
    except FileNotFoundError as err:
        raise RoundError(
            f"{folder} is no round folder: no {RECORD_NAME} in it"
        ) from err
    schema = raw.get("schema")
    if schema not in SCHEMAS:
        raise RoundError(
            f"{path} has schema {schema!r}, this packager knows "
            f"{' and '.join(map(str, SCHEMAS))}"
        )
    if problems := list(_problems(folder.name, raw)):
        raise RoundError("\n  - ".join([f"{path} is not valid:", *problems]))
    known = {field.name: raw[field.name] for field in fields(RoundRecord)}
    return RoundRecord(**known | {"outcome": Outcome(raw["outcome"])})


def _problems(folder: str, raw: Mapping[str, Any]) -> Iterator[str]:
    kinds = get_type_hints(RoundRecord) | {"outcome": str}
    wrong = [name for name, kind in kinds.items() if type(raw.get(name)) is not kind]
    for name in wrong:
        yield f"{name}: expected {kinds[name].__name__}, found {raw.get(name)!r}"
    if wrong:
        return
    for name in ("model", "parent", "target"):
        if not re.fullmatch("[0-9a-f]{64}", raw[name]):
            yield f"{name}: expected 64 hexadecimal digits, found {raw[name]!r}"
    for name, bits in (("round", 32), ("counter", 64)):
        if not 0 <= raw[name] < 1 << bits:
            yield f"{name}: expected 0 to 2**{bits} - 1, found {raw[name]}"
    if folder != round_name(raw["round"]):
        yield f"round: {raw['round']} does not fit the folder's name {folder}"
    if raw["outcome"] not in set(Outcome):
        yield f"outcome: expected {' or '.join(Outcome)}, found {raw['outcome']!r}"
        return
    equal = raw["outcome"] == Outcome.KEPT_BASE
    if equal != (raw["parent"] == raw["target"]):
        yield (
            f"outcome {raw['outcome']}: parent and target must be "
            + ("equal" if equal else "different")
        )
