# SPDX-License-Identifier: Apache-2.0
import copy
import pickle

import pytest
import torch
from torch import nn

from edge_runtime.errors import TrainingError
from trainer import FoldedBatchNorm

torch.set_num_threads(1)


class Forks(nn.Module):
    """The convolution's output is normalised, and also goes around."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        found = self.conv(x)
        return self.head((self.norm(found).relu() + found).mean((2, 3)))


def plain():
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(64, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)),
    )


def trained(make=plain, steps=30):
    """A network whose statistics are far from 0 and 1, and its training batches."""
    torch.manual_seed(0)
    model = make()
    batches = [(torch.randn(32, 2, 6, 6) * 3 + 2, torch.randint(3, (32,)))] * 4
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(steps):
        for inputs, labels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.train()(inputs), labels).backward()
            optimizer.step()
    return model, batches


def answers(model, batches):
    with torch.no_grad():
        return model.eval()(batches[0][0])


def statistics(model):
    return [b.clone() for n, b in model.named_buffers() if "running" in n]


@pytest.mark.parametrize("make", [plain, Forks])
def test_a_folded_network_is_the_same_function_with_the_old_statistics(make):
    torch.manual_seed(0)
    old = statistics(make())
    model, batches = trained(make)
    expected = answers(model, batches)
    norms = FoldedBatchNorm(make())
    norms = FoldedBatchNorm(fresh := make())
    fresh.load_state_dict(model.state_dict())
    norms.fold()
    assert all(map(torch.equal, statistics(fresh), old))
    torch.testing.assert_close(answers(fresh, batches), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained_before", [True, False])
def test_what_did_not_move_between_unfold_and_fold_keeps_its_bits(trained_before):
    model, batches = trained(steps=3 if trained_before else 1)
    FoldedBatchNorm(model).fold()
    before = copy.deepcopy(model.state_dict())
    norms = FoldedBatchNorm(model)
    if trained_before:
        norms.unfold(batches)
        with torch.no_grad():
            model[1].weight[0] *= 2  # one channel of four
    norms.fold()
    for name, tensor in model.state_dict().items():
        still = tensor == before[name]
        if trained_before and name in ("1.weight", "1.bias"):
            assert not still[0]
            still = still[1:]
        assert still.all(), name


@pytest.mark.parametrize(
    "call",
    [
        lambda norms, bad: norms.unfold([(bad, None)]),
        lambda norms, bad: norms.idle_biases(bad),
    ],
)
def test_what_fails_half_way_leaves_the_model_as_it_was(call):
    model, _ = trained(steps=1)
    model.train()
    with pytest.raises(RuntimeError):
        call(FoldedBatchNorm(model), torch.randn(2, 9))
    assert model.training
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def test_arrays_fold_as_the_network_does():
    model, _ = trained()
    norms = FoldedBatchNorm(fresh := plain())
    arrays = {n: t.numpy().copy() for n, t in model.state_dict().items()}
    found = norms.folded(arrays)
    fresh.load_state_dict(model.state_dict())
    norms.fold()
    for name, tensor in fresh.state_dict().items():
        assert found[name].tobytes() == tensor.numpy().tobytes()


def test_unfolding_gives_the_same_function_and_the_statistics_of_the_inputs():
    model, batches = trained()
    norms = FoldedBatchNorm(folded := plain())
    folded.load_state_dict(model.state_dict())
    norms.fold()
    expected = answers(model, batches)
    FoldedBatchNorm(folded).unfold(batches)
    torch.testing.assert_close(answers(folded, batches), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        inputs = folded[0](batches[0][0]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(folded[1].running_mean, inputs.mean(1))
    torch.testing.assert_close(folded[1].running_var, inputs.var(1, unbiased=False))


def test_a_folded_network_refuses_to_train_until_it_is_unfolded():
    model, batches = trained()
    norms = FoldedBatchNorm(model)
    norms.fold()
    model.eval()(batches[0][0])
    with pytest.raises(TrainingError, match=r"unfold\(batches\) before training"):
        model.train()(batches[0][0])
    FoldedBatchNorm(model).unfold(batches)
    model.train()(batches[0][0])


def test_a_bias_that_batchnorm_takes_away_is_found_by_what_runs_not_by_order():
    model, batches = trained()
    found = FoldedBatchNorm(model).idle_biases(batches[0][0])
    assert [id(b) for b in found] == [id(model[0].bias), id(model[4].bias)]
    apart = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4))
    assert FoldedBatchNorm(apart).idle_biases(torch.randn(3, 4)) == []


def test_modules_without_scale_or_statistics_are_left_alone():
    model = nn.Sequential(
        nn.BatchNorm1d(3, affine=False),
        nn.BatchNorm1d(3, track_running_stats=False),
        nn.BatchNorm1d(3).bfloat16(),
    )
    before = copy.deepcopy(model.state_dict())
    norms = FoldedBatchNorm(model)
    norms.fold()
    assert norms.modules == {}
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_modules_that_share_scale_and_shift_are_left_alone():
    model = nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(3)))
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    norms = FoldedBatchNorm(model)
    inputs = 3 * torch.randn(32, 4) + 2
    model.train()(inputs)
    with torch.no_grad():
        model[0].weight.mul_(2)
        expected = model.eval()(inputs)
        norms.fold()
        torch.testing.assert_close(model(inputs), expected)
    assert list(norms.modules) == ["2"]


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_copy_of_a_folded_model_trains_once_it_is_unfolded(again):
    model, batches = trained(steps=1)
    FoldedBatchNorm(model).fold()
    other = again(model)
    FoldedBatchNorm(other).fold()  # no second guard
    with pytest.raises(TrainingError, match=r"unfold\(batches\) before training"):
        other.train()(batches[0][0])
    FoldedBatchNorm(other).unfold(batches)
    other.train()(batches[0][0])
    with pytest.raises(TrainingError, match=r"unfold\(batches\) before training"):
        model.train()(batches[0][0])


def test_unfold_without_a_batch_is_refused():
    model, batches = trained(steps=1)
    FoldedBatchNorm(model).fold()
    used_up = iter(batches)
    list(used_up)
    with pytest.raises(TrainingError, match="found none"):
        FoldedBatchNorm(model).unfold(used_up)
    with pytest.raises(TrainingError, match=r"unfold\(batches\) before training"):
        model.train()(batches[0][0])
