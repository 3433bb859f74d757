# SPDX-License-Identifier: Apache-2.0
"""Init recipes: what is regenerated from a seed and what is stored."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from edge_runtime.errors import TrainingError
from edge_runtime.formats.init_weights import read_init_spec, write_init_spec
from trainer.export.init_recipe import make_init_spec
from trainer.export.tensors import load_weights, weights_of

torch.set_num_threads(1)


def convnet():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 36, 96),
        nn.ReLU(),
        nn.Linear(96, 10),
    )


class Odd(nn.Module):
    """Tensors that a uniform distribution would spoil."""

    def __init__(self):
        super().__init__()
        self.padded = nn.Embedding(50, 8, padding_idx=0)
        self.shifted = nn.Parameter(torch.empty(200).normal_(1.0, 0.02))
        self.identity = nn.Parameter(torch.eye(20) + 0.1 * torch.randn(20, 20))
        self.table = nn.Parameter(torch.arange(100.0))
        self.minus_zero = nn.Parameter(torch.full((100,), -0.0))
        self.small = nn.Parameter(torch.randn(20))
        self.brain = nn.Parameter(torch.randn(100).bfloat16())
        self.long = nn.Parameter(torch.randn(100).double())
        self.register_buffer("count", torch.tensor((1 << 60) + 1))
        self.register_buffer("ones", torch.ones(3, dtype=torch.bfloat16))
        self.register_buffer("mask", torch.full((4,), -math.inf))
        self.register_buffer("empty", torch.empty(0))
        self.register_buffer("normal", torch.randn(100, 9))


def kinds(recipe):
    return {name: init.kind for name, init in recipe.tensors.items()}


def test_random_tensors_are_regenerated_and_constants_stated():
    assert kinds(make_init_spec(convnet, 1)) == {
        "0.weight": "uniform",
        "0.bias": "file",
        "1.weight": "constant",
        "1.bias": "constant",
        "1.running_mean": "constant",
        "1.running_var": "constant",
        "4.weight": "uniform",
        "4.bias": "uniform",
        "6.weight": "uniform",
        "6.bias": "file",
    }


def test_regenerated_tensors_have_the_spread_of_the_modules_own_init():
    recipe = make_init_spec(convnet, 1)
    weights = recipe.generate()
    fan_in = {"0.weight": 9, "4.weight": 576, "4.bias": 576, "6.weight": 96}
    for name, count in fan_in.items():
        # torch: uniform in +-1/sqrt(fan_in). Five standard errors of 4 builds.
        limit, size = 1 / math.sqrt(count), weights[name].size
        error = 5 * math.sqrt(0.2 / (4 * size))
        assert recipe.tensors[name].value == pytest.approx(limit, rel=error)
        spread = weights[name].std(dtype=np.float64)
        assert spread == pytest.approx(limit / math.sqrt(3), rel=3 * error)
    assert (weights["1.running_var"] == 1).all()


def test_a_normal_init_keeps_its_standard_deviation():
    def build():
        layer = nn.Linear(64, 64)
        nn.init.normal_(layer.weight, std=0.3)
        return layer

    weights = make_init_spec(build, 5).generate()
    assert weights["weight"].std() == pytest.approx(0.3, rel=0.03)


def test_what_a_uniform_distribution_would_spoil_is_stored():
    recipe = make_init_spec(Odd, 3)
    expected = dict.fromkeys(weights_of(Odd()), "file")
    expected |= {"normal": "uniform", "ones": "constant", "minus_zero": "constant"}
    assert kinds(recipe) == expected
    weights = recipe.generate()
    assert (weights["padded.weight"][0] == 0).all()
    assert weights["count"] == (1 << 60) + 1
    assert weights["minus_zero"].view(np.uint32).tolist() == [1 << 31] * 100
    assert weights["ones"].tolist() == [0x3F80] * 3


def test_the_same_build_and_seed_give_the_same_recipe(tmp_path):
    first, again = make_init_spec(Odd, 3), make_init_spec(Odd, 3)
    assert first.tensors == again.tensors
    assert first.generate().fingerprint == again.generate().fingerprint
    assert make_init_spec(Odd, 4).generate().fingerprint != first.generate().fingerprint
    write_init_spec(first, tmp_path)
    read = read_init_spec(tmp_path)
    assert read.generate().fingerprint == first.generate().fingerprint


def test_keep_stores_the_build_as_it_is():
    torch.manual_seed(11)
    expected = weights_of(convnet())
    recipe = make_init_spec(convnet, 11, keep=True)
    assert set(kinds(recipe).values()) == {"file"}
    assert recipe.generate().fingerprint == expected.fingerprint


def test_loaded_weights_are_stored_without_being_told():
    loaded = convnet().state_dict()

    def build():
        model = convnet()
        model.load_state_dict(loaded)
        return model

    recipe = make_init_spec(build, 1)
    assert recipe.generate().fingerprint == weights_of(build()).fingerprint


def test_the_global_random_state_stays():
    state = torch.get_rng_state()
    make_init_spec(convnet, -1)
    assert torch.equal(torch.get_rng_state(), state)


def test_refuses_a_build_that_changes_its_architecture():
    widths = iter(range(4, 20))
    with pytest.raises(TrainingError, match="same architecture"):
        make_init_spec(lambda: nn.Linear(next(widths), 4), 1)


def test_a_model_trains_from_regenerated_weights():
    model = convnet()
    load_weights(model, make_init_spec(convnet, 1).generate())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1, 8, 8, generator=generator)
    y = (x.mean((1, 2, 3)) > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Ten classes, untrained: the logarithm of ten, give or take the init's size.
    assert losses[0] == pytest.approx(math.log(10), abs=1)
    assert losses[-1] < losses[0] / 4
