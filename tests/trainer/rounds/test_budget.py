# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import ConfigError, TrainingError
from edge_runtime.formats.model_folder import METRICS_NAME
from packager.build import pack_round
from packager.rounds.folder import read_round
from packager.size import patch_size
from trainer.config import make_config
from trainer.folder.record import read_round_record
from trainer.rounds.budget import AIM, CLOSE, find_k
from trainer.rounds.schedule import run_rounds

torch.set_num_threads(1)


def config_of(budget, **update):
    return make_config(
        {
            "run": {"name": "t", "rounds": 3},
            "data": {"set": "digits", "initial": 150, "growth": 50, "validation": 200},
            "model": {"name": "mlp", "hidden": [48, 48]},
            "update": {"budget": budget} | update,
            "train": {"epochs": 4, "batch": 32, "lr": 1e-2},
        }
    )


@pytest.mark.parametrize(
    ("budget", "options"),
    [
        ("3KB", {}),
        ("2KiB", {"dense": "freeze", "mantissa_bits": 10}),
        ("1500", {"dense": "budget", "method": "gcpu"}),
    ],
)
def test_real_patches_are_never_over_the_budget_and_use_95_percent_of_it(
    tmp_path, budget, options
):
    limit = {"3KB": 3000, "2KiB": 2048, "1500": 1500}[budget]
    config = config_of(budget, **options)
    records = run_rounds(config, tmp_path, pack=patch_size)
    sizes = []
    for record in records:
        patch = pack_round(read_round(tmp_path / "t" / f"round_{record.round:02d}"))
        if patch is not None:
            assert record.metrics["patch_bytes"] == len(patch.data)
            sizes.append(len(patch.data))
            share = record.metrics["selected"] / record.metrics["weights"]
            assert record.ratio == share
    assert len(sizes) > 1
    assert max(sizes) <= limit
    assert min(sizes) >= 0.95 * limit


def test_fine_tuning_again_with_fewer_weights_brings_a_patch_below_the_limit(tmp_path):
    calls = []

    def growing(base, target):
        """As if fine-tuned values took 30 % more than rewound ones."""
        calls.append(size := patch_size(base, target))
        final = len({*calls}) > 4
        return int(size * 1.3) if final else size

    (record, *_) = run_rounds(config_of("3KB"), tmp_path, pack=growing)
    assert 0.95 * 3000 <= record.metrics["patch_bytes"] <= 3000


def test_a_budget_below_the_dense_part_is_refused(tmp_path):
    with pytest.raises(TrainingError, match=r"budget is 300 bytes, but \d+ are needed"):
        run_rounds(config_of("300"), tmp_path, pack=patch_size)


def test_a_first_round_over_its_budget_is_told_of_first_budget_not_of_what_is_set(
    tmp_path,
):
    words = r'choose update\.dense = "budget", or a larger update\.first_budget$'
    with pytest.raises(TrainingError, match=words):
        run_rounds(config_of("300", dense="freeze"), tmp_path, pack=patch_size)
    words = r"choose a larger update\.first_budget$"
    with pytest.raises(TrainingError, match=words):
        run_rounds(config_of("9", dense="budget"), tmp_path, pack=patch_size)


@pytest.mark.parametrize("cause", ["dense part", "fine-tuning"])
def test_a_start_anew_without_a_patch_within_the_budget_leaves_the_round_to_another(
    tmp_path, cause
):
    reports, init = [], []

    def pack(base, target):
        init.append(base.fingerprint)
        anew = reports and reports[-1].round == 1 and base.fingerprint == init[0]
        tuned = cause == "fine-tuning" and reports[-1].phase == "sparse"
        return patch_size(base, target) + (9999 if anew and tuned else 0)

    update = {"dense": "freeze", "first_budget": "3KB", "reinit": 1}
    run_rounds(
        config_of("400" if cause == "dense part" else "3KB", **update),
        tmp_path,
        pack=pack,
        progress=reports.append,
    )
    record = read_round_record(tmp_path / "t" / "round_01")
    lines = (tmp_path / "t" / "round_01" / METRICS_NAME).read_text().splitlines()
    starts = [json.loads(line)["start"] for line in lines]
    assert {*starts} == {"init", "deployed"}
    assert record.tried_reinit
    assert not record.reinitialised
    assert record.metrics["changed"]  # what was deployed went on


def test_a_budget_for_everything_selects_everything(tmp_path):
    record = run_rounds(config_of("1MB"), tmp_path, pack=patch_size)[0]
    assert record.metrics["selected"] == record.metrics["weights"]


def test_a_budget_without_a_packer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="pass pack="):
        run_rounds(config_of("3KB"), tmp_path)


@given(
    each=st.floats(0.5, 9),
    dense=st.integers(100, 5000),
    total=st.integers(10, 10**6),
    first=st.floats(0.001, 1),
    room=st.floats(1, 50),
    bend=st.floats(0.8, 1.0),
)
def test_the_search_ends_close_below_the_limit(each, dense, total, first, room, bend):
    calls = []

    def size_of(k):
        calls.append(k)
        return dense + int(each * k**bend)

    limit = int(dense * room) + 10
    found = find_k(size_of, max(1, int(first * total)), total, limit)
    assert 1 <= found <= total
    assert size_of(found) <= limit or found == 1
    fits = size_of(total) <= (AIM + CLOSE) * limit
    tight = size_of(found) >= (AIM - CLOSE) * limit - 2 * each - 2
    assert fits or tight or limit < 200 + dense + 100 * each
    assert len(set(calls)) <= 20
