# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch import nn

from trainer.data.samples import Samples, batches
from trainer.recipe.schema import TrainConfig
from trainer.rounds.loop import (
    cpu_settings,
    evaluate,
    learning_rate,
    make_optimizer,
    recompute_batchnorm,
    train_epoch,
)

torch.set_num_threads(1)


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 1, 2, 2, generator=generator)
    return Samples(inputs, (inputs.flatten(1).sum(1) > 0).long())


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_training_learns(samples, optimizer):
    model, config = linear(), TrainConfig(epochs=1, optimizer=optimizer, lr=0.1)
    steps = make_optimizer(model, config)
    losses = [train_epoch(model, steps, batches(samples, 16)) for _ in range(20)]
    assert losses[-1] < losses[0] / 2
    assert evaluate(model, samples) > 0.9


def test_a_cpu_evaluates_in_batches_that_stay_in_its_cache():
    sizes = []

    class Sees(nn.Module):
        def forward(self, x):
            sizes.append(len(x))
            return x.flatten(1)

    inputs = torch.eye(300, 3).view(300, 3, 1, 1)
    labels = torch.arange(300) % 3
    labels[3:] = 0  # all logits equal: the first class is the answer
    assert evaluate(Sees(), Samples(inputs, labels)) == 1
    assert sizes == [128, 128, 44]


def test_the_loss_is_the_mean_over_samples(samples):
    model = linear()
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.no_grad():
        whole = nn.functional.cross_entropy(model(samples.inputs), samples.labels)
    found = train_epoch(model, still, batches(samples, 24))  # 24, 24, 16
    assert found == pytest.approx(float(whole), rel=1e-5)


def test_step_drops_after_each_third_and_never_more_than_twice():
    config = TrainConfig(epochs=30, lr=1.0, factor=0.1)
    rates = [learning_rate(config, epoch, 30) for epoch in (0, 9, 10, 19, 20, 29)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert learning_rate(config, 19, 20) == pytest.approx(0.01)
    assert learning_rate(config, 0, 1) == 1.0


def test_cosine_goes_down_and_constant_stays():
    cosine = TrainConfig(epochs=10, lr=2.0, schedule="cosine")
    rates = [learning_rate(cosine, epoch, 10) for epoch in range(10)]
    assert rates[0] == 2.0
    assert rates[5] == pytest.approx(1.0)
    assert rates == sorted(rates, reverse=True)
    constant = TrainConfig(epochs=10, lr=2.0, schedule="constant")
    assert learning_rate(constant, 9, 10) == 2.0


def test_frozen_parameters_are_not_given_to_the_optimizer():
    model = linear()
    model[1].bias.requires_grad_(False)
    (group,) = make_optimizer(model, TrainConfig(epochs=1)).param_groups
    assert [p.dim() for p in group["params"]] == [2]


def test_recomputes_batchnorm_as_the_mean_over_batches():
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Flatten(), norm, nn.Dropout(0.5))
    norm.running_mean.fill_(9.0)
    inputs = torch.randn(32, 1, 2, 2)
    recompute_batchnorm(model, batches(Samples(inputs, torch.zeros(32)), 16))
    flat = inputs.flatten(1)
    halves = torch.stack([flat[:16].var(0), flat[16:].var(0)])
    torch.testing.assert_close(norm.running_mean, flat.mean(0))
    torch.testing.assert_close(norm.running_var, halves.mean(0))
    assert norm.momentum == 0.1


def test_recomputing_leaves_a_model_without_batchnorm_alone(samples):
    model = linear()
    before = [p.clone() for p in model.parameters()]
    recompute_batchnorm(model, batches(samples, 16))
    assert all(map(torch.equal, before, model.parameters()))


def test_denormals_are_flushed_within_the_block_only():
    tiny = torch.tensor(1e-40)
    with cpu_settings(threads=1):
        assert float(tiny * 0.5) == 0.0
    assert math.isclose(float(tiny * 0.5), 5e-41, rel_tol=1e-3)
