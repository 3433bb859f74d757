# SPDX-License-Identifier: Apache-2.0
"""Real PEFT: a network with adapters is a run of its own, or is merged first."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from edge_runtime.errors import FrozenWeightChangedError, TrainingError
from edge_runtime.formats.weights import read_weights
from packager.build import pack_round
from packager.rounds.folder import read_round
from trainer.data.vision import torchvision  # noqa: F401 - before transformers
from trainer.folder.contract import make_contract
from trainer.method.updater import PartialUpdater
from trainer.publish import publish_round, start_run

with warnings.catch_warnings():  # those of transformers, which it imports
    warnings.simplefilter("ignore")
    from peft import LoraConfig, get_peft_model

torch.set_num_threads(1)
INPUTS = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
LABELS = INPUTS[:, :3].argmax(1)
LORA = LoraConfig(r=4, target_modules=["0", "2"])


def plain():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))


def start(run, build):
    return start_run(
        run,
        build,
        contract=make_contract((16,), ["a", "b", "c"]),
        golden_inputs=INPUTS,
        golden_labels=LABELS,
    )


def one_round(model):
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.01
    )
    updater = PartialUpdater(model.named_parameters(), ratio=0.2).attach(optimizer)
    for phase in range(2):
        for _ in range(4):
            optimizer.zero_grad()
            answers = model(torch.from_numpy(INPUTS))
            functional.cross_entropy(answers, torch.from_numpy(LABELS)).backward()
            optimizer.step()
        if not phase:
            updater.select()
    return updater.finish()


def test_a_run_of_a_network_with_adapters_selects_among_the_adapters_alone(tmp_path):
    run = tmp_path / "run"
    model = start(run, lambda: get_peft_model(plain(), LORA))
    for number in range(2):
        masks = one_round(model)
        assert masks
        assert all("lora_" in name for name in masks)
        publish_round(run, model, masks)
        assert pack_round(read_round(run / f"round_{number:02d}")) is not None
    first, second = (
        read_weights(run / f"round_{number:02d}" / "weights.safetensors")
        for number in range(2)
    )
    changed = {n for n in first if not np.array_equal(first[n], second[n])}
    assert changed == set(masks)


def test_adapters_that_the_run_does_not_know_are_refused_with_the_ways_that_work(
    tmp_path,
):
    run = tmp_path / "run"
    model = start(run, plain)
    adapted = get_peft_model(model, LORA)
    masks = one_round(adapted)
    with pytest.raises(TrainingError, match=r"build\(\) returning.*merge_and_unload"):
        publish_round(run, adapted, masks)
    merged = adapted.merge_and_unload()
    with pytest.raises(TrainingError, match=r"lora_.* does not have"):
        publish_round(run, merged, masks)
    with pytest.raises(FrozenWeightChangedError, match=r"dense=\['0\.weight'\]"):
        publish_round(run, merged, {})
    publish_round(run, merged, {}, dense=["0.weight", "2.weight"])
    assert pack_round(read_round(run / "round_00")) is not None
