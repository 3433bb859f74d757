# SPDX-License-Identifier: Apache-2.0
"""A run as its patches: what anybody needs to go on with it, or to check it.

A folder holds ``run.json`` (recipe, id and the records of all rounds), the patch of
every round that deployed something, and ``shadow.dpu``, which leads from the init
weights to those that are trained on unseen. Init weights, graph and data come from the
recipe; where devices compute in int8 a training decided scales and ranges, and the
graph and the recipe of the init weights lie in ``model``. Full updating has none: it
starts from the init weights in every round, and its patches are as large as the
network.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_runtime.errors import RoundError, VerificationError
from edge_runtime.files import Files
from edge_runtime.formats.apply import apply_patch
from edge_runtime.formats.identity import read_run
from edge_runtime.formats.json_file import read_record
from edge_runtime.formats.model_folder import (
    GRAPH_NAME,
    INIT_NAME,
    INIT_TENSORS_NAME,
    MODEL_NAME,
    SHADOW_NAME,
    Outcome,
    round_name,
)
from edge_runtime.formats.patch import open_patch
from edge_runtime.formats.weights import Weights, read_weights
from packager.build import build_patch, header_for, pack_round
from packager.rounds.folder import read_init, read_round
from tools.paper.reproduction import BASELINES
from trainer.data.samples import DataSource
from trainer.folder.record import RoundRecord, as_json, record_of
from trainer.recipe.schema import Config
from trainer.rounds.restore import RestoredRun

SCHEMA = 1
RUN_FILE, SHADOW_FILE = "run.json", "shadow.dpu"


def has_checkpoints(method: str) -> bool:
    """Tell whether the patches of a method are worth keeping: none is a network."""
    return method not in ("fu", "dpu_paper_chain", *BASELINES)


def patch_name(number: int) -> str:
    """Return the name of a round's patch."""
    return f"{round_name(number)}.dpu"


def keep(folder: Path, run_dir: Path, records: Sequence[RoundRecord]) -> None:
    """Add to a run's checkpoints what its newest rounds came to.

    Args:
        folder: Of the checkpoints.
        run_dir: The run.
        records: Of all of its rounds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = Files()
    for record in records:
        path = folder / patch_name(record.round)
        if record.outcome is Outcome.UPDATED and not path.exists():
            packed = pack_round(read_round(run_dir / round_name(record.round)))
            if packed is not None:
                files.replace(path, packed.data, durable=False)
    last = run_dir / round_name(len(records) - 1)
    if (last / SHADOW_NAME).exists():
        data = _pack_shadow(last, records[-1])
        files.replace(folder / SHADOW_FILE, data, durable=False)
    else:
        (folder / SHADOW_FILE).unlink(missing_ok=True)
    run = read_run(run_dir / MODEL_NAME)
    config = records[-1].config
    if config["model"].get("deploy") == "int8":
        (folder / MODEL_NAME).mkdir(exist_ok=True)
        for name in (GRAPH_NAME, INIT_NAME, INIT_TENSORS_NAME):
            if (path := run_dir / MODEL_NAME / name).exists():
                files.replace(
                    folder / MODEL_NAME / name, path.read_bytes(), durable=False
                )
    # Where the data lay is a matter of that machine.
    where = {key: value for key, value in config["data"].items() if key != "root"}
    about = {
        "schema": SCHEMA,
        "id": run.id if run else "",
        "versions": records[-1].versions,
        "config": {**config, "data": where},
    }
    lines = ",\n".join("  " + json.dumps(_short(record)) for record in records)
    text = f'{json.dumps(about, indent=1)[:-2]},\n "rounds": [\n{lines}\n ]\n}}\n'
    files.replace(folder / RUN_FILE, text.encode(), durable=False)


def _short(record: RoundRecord) -> dict[str, Any]:
    """Return a record without what is the same in every round."""
    found = as_json(record)
    return {k: v for k, v in found.items() if k not in ("config", "versions")}


def _pack_shadow(folder: Path, record: RoundRecord) -> bytes:
    init = read_init(read_round(folder)).weights
    shadow = read_weights(folder / SHADOW_NAME)
    header = header_for(
        init, shadow, model=record.model, round_=record.round, counter=record.counter
    )
    return build_patch(init, shadow, header)


def read_checkpoints(folder: Path, root: str) -> tuple[str, list[RoundRecord]]:
    """Return a run's id and the records of its rounds, whose data lies in ``root``.

    Raises:
        RoundError: Their file is damaged.
        OSError: It cannot be read.
    """
    path = folder / RUN_FILE
    found = read_record(path, "record_bytes", str(path), RoundError, finite=False)
    try:
        config = found.values["config"]
        config["data"]["root"] = root
        same = {"config": config, "versions": found.values["versions"]}
        return found.text("id"), [record_of(same | r) for r in found.values["rounds"]]
    except (ValueError, KeyError, TypeError) as err:
        raise RoundError(f"{path} is malformed ({err!r})") from err


def restore(
    folder: Path, config: Config, runs_dir: Path, source: DataSource
) -> list[RoundRecord]:
    """Rebuild a run's folder from its checkpoints, so that training can go on.

    Returns:
        The records of its rounds.

    Raises:
        VerificationError: A patch leads to other weights than its round had.
        TrainingError: This machine exports another graph than the run had.
        DpuError: A patch is damaged.
        OSError: Files cannot be read or written.
    """
    run_id, records = read_checkpoints(folder, config.data.root)
    config = replace(config, run=replace(config.run, id=run_id))
    model = folder / MODEL_NAME
    run = RestoredRun(config, runs_dir, source, model if model.exists() else None)
    run.write(_rounds(folder, run.init, records))
    return records


def _rounds(
    folder: Path, init: Weights, records: Sequence[RoundRecord]
) -> Iterator[tuple[RoundRecord, Weights, Weights | None]]:
    known = {init.fingerprint: init}
    deployed, shadow = init, None
    for record in records:
        if record.outcome is Outcome.UPDATED:
            patch = open_patch((folder / patch_name(record.round)).read_bytes())
            deployed = apply_patch(known[record.parent], patch, model=record.model)
            known = {w.fingerprint: w for w in (init, deployed)}
        if record is records[-1] and (folder / SHADOW_FILE).exists():
            patch = open_patch((folder / SHADOW_FILE).read_bytes())
            shadow = apply_patch(init, patch, model=record.model)
        if deployed.fingerprint != record.target:
            raise VerificationError(
                f"the patch of round {record.round} leads to "
                f"{deployed.fingerprint[:12]}, its record says {record.target[:12]}",
                expected=record.target,
                actual=deployed.fingerprint,
            )
        yield record, deployed, shadow
