# SPDX-License-Identifier: Apache-2.0
"""A run goes on from its committed patches as if it had never been away."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest

from edge_runtime.errors import DpuError
from edge_runtime.formats.model_folder import round_name
from tools.paper.checkpoints import RUN_FILE, SHADOW_FILE, keep, patch_name, restore
from tools.paper.replay import replay
from trainer.config import load_config
from trainer.data.sources import load_source
from trainer.rounds.schedule import run_rounds

# Every second round tries a fresh start; what it comes to goes on unseen.
KNOBS = ["train.epochs=3", "update.chain='shadow'", "update.reinit=2"]
ROUNDS = 4
RECIPE = Path(str(files("trainer"))) / "recipes" / "digits.toml"


def config(rounds):
    return load_config(RECIPE, [*KNOBS, f"run.rounds={rounds}"], name="kept")


@pytest.fixture(scope="module")
def source():
    return load_source(config(ROUNDS).data)


@pytest.fixture(scope="module")
def run(tmp_path_factory, source):
    """Checkpoints of all rounds but the last, and the records of the whole run."""
    root = tmp_path_factory.mktemp("run")
    records = run_rounds(config(ROUNDS - 1), root / "runs", source=source)
    keep(root / "kept", root / "runs" / "kept", records)
    return root / "kept", run_rounds(config(ROUNDS), root / "runs", source=source)


def test_a_restored_run_goes_on_as_the_run_itself_did(run, source, tmp_path):
    kept, records = run
    assert (kept / SHADOW_FILE).exists()  # else this would show half of it
    assert restore(kept, config(ROUNDS), tmp_path, source) == records[:-1]
    assert run_rounds(config(ROUNDS), tmp_path, source=source)[-1].target == (
        records[-1].target
    )


def test_what_was_kept_is_a_fraction_of_the_weights(run):
    kept, records = run
    size = sum(path.stat().st_size for path in kept.glob("*.dpu"))
    assert "root" not in (kept / RUN_FILE).read_text()  # a path of one machine
    assert size < 0.1 * ROUNDS * 4 * records[0].metrics["weights"]


def test_a_device_that_gets_the_patches_measures_what_the_trainer_did(
    run, source, tmp_path
):
    kept, records = run
    rows = list(replay(kept, config(ROUNDS), source, tmp_path))
    assert [row.round for row in rows] == list(range(ROUNDS - 1))
    assert all(row.equal for row in rows)
    sent = {row.round: row.size for row in rows if row.size}
    assert sent == {n: (kept / patch_name(n)).stat().st_size for n in sent}
    for row, record in zip(rows, records, strict=False):
        assert row.device == pytest.approx(100 * record.metrics["test_accuracy"])


def test_an_int8_run_is_restored_and_replayed_with_the_scales_it_was_trained_with(
    source, tmp_path
):
    knobs = ["model.deploy=int8", "train.epochs=1", "run.rounds=2"]
    small = load_config(RECIPE, knobs, name="kept")
    records = run_rounds(small, tmp_path / "runs", source=source)
    keep(tmp_path / "kept", tmp_path / "runs" / "kept", records)
    (tmp_path / "work").mkdir()
    rows = list(replay(tmp_path / "kept", small, source, tmp_path / "work"))
    assert rows
    for row in rows:
        assert row.equal
        assert row.device == pytest.approx(row.test)


@pytest.mark.parametrize("change", ["damaged", "exchanged", "cut", "emptied", "record"])
def test_checkpoints_that_were_changed_are_refused(run, source, tmp_path, change):
    kept = shutil.copytree(run[0], tmp_path / "kept")
    last = max(kept.glob("round_*.dpu"))
    if change == "damaged":
        data = bytearray(last.read_bytes())
        data[len(data) // 2] ^= 1
        last.write_bytes(data)
    elif change == "exchanged":
        shutil.copy(kept / patch_name(0), last)
    elif change in ("cut", "emptied"):
        text = "{}" if change == "emptied" else (kept / RUN_FILE).read_text()[:-9]
        (kept / RUN_FILE).write_text(text)
    else:
        about = json.loads((kept / RUN_FILE).read_text())
        about["rounds"][-1]["target"] = "0" * 64
        (kept / RUN_FILE).write_text(json.dumps(about))
    with pytest.raises(DpuError):
        restore(kept, config(ROUNDS), tmp_path / "runs", source)


def test_a_folder_with_rounds_is_left_as_it_is(run, source, tmp_path):
    kept, _ = run
    restore(kept, config(ROUNDS), tmp_path, source)
    record = tmp_path / "kept" / round_name(0) / "round.json"
    before = record.stat()
    with pytest.raises(DpuError, match="has rounds already"):
        restore(kept, config(ROUNDS), tmp_path, source)
    assert record.stat() == before
