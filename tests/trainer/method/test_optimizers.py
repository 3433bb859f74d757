# SPDX-License-Identifier: Apache-2.0
"""Optimizers of all kinds: what is measured is the step that the loop takes."""

import warnings

import pytest
import schedulefree
import torch
from torch import nn
from torch.nn import functional

from edge_runtime.errors import TrainingError
from trainer.method.updater import PartialUpdater

torch.set_num_threads(1)
GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(64, 8, generator=GENERATOR)
LABELS = INPUTS[:, :4].argmax(1)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def train(model, optimizer, step, steps=4):
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(INPUTS), LABELS).backward()
        step()


def a_round(make, compiled=lambda step: step):
    """One round; what was measured, the masks, and the weights at its end."""
    model = net()
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = make(model.parameters())
    updater = PartialUpdater(model.named_parameters(), ratio=0.1).attach(optimizer)
    step = compiled(optimizer.step)
    train(model, optimizer, step)
    measured = {n: t.clone() for n, t in updater.loss_drop.items()}
    updater.select()
    train(model, optimizer, step)
    masks = updater.finish()
    for name, mask in masks.items():
        assert torch.equal(
            dict(model.named_parameters())[name][~mask], base[name][~mask]
        )
    return measured, masks


# Compiled steps ----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_compiled_step_is_measured_as_an_eager_one(kind, backend):
    def make(parameters):
        return kind(parameters, lr=0.01)

    torch._dynamo.reset()
    eager, masks = a_round(make)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        found, others = a_round(make, lambda step: torch.compile(step, backend=backend))
    for name, wanted in eager.items():
        assert wanted.abs().max() > 0
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-7)
        assert torch.equal(masks[name], others[name])


# Optimizers around others ------------------------------------------------------------


class Lookahead(torch.optim.Optimizer):
    """An optimizer itself: the weights go half of the way of the inner one's steps."""

    def __init__(self, inner):
        self.optimizer = inner
        super().__init__(inner.param_groups, {})
        self.slow = [
            p.detach().clone() for g in inner.param_groups for p in g["params"]
        ]

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step()
        params = [p for group in self.param_groups for p in group["params"]]
        for slow, p in zip(self.slow, params, strict=True):
            p.copy_(slow.lerp_(p, 0.5))


def test_of_an_optimizer_around_another_the_outer_step_is_measured():
    inner, _ = a_round(lambda p: torch.optim.SGD(p, lr=0.1))
    model = net()
    outer = Lookahead(torch.optim.SGD(model.parameters(), lr=0.1))
    updater = PartialUpdater(model.named_parameters(), ratio=0.1).attach(outer)
    train(model, outer, outer.step, steps=1)
    once = {n: t.clone() for n, t in updater.loss_drop.items()}
    model = net()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = PartialUpdater(model.named_parameters(), ratio=0.1).attach(plain)
    train(model, plain, plain.step, steps=1)
    for name, whole in updater.loss_drop.items():
        torch.testing.assert_close(once[name], whole / 2)
    assert inner.keys() == once.keys()


def test_a_round_with_an_optimizer_around_another_is_frozen_as_any():
    a_round(lambda p: Lookahead(torch.optim.Adam(p, lr=0.01)))


class Unhooked(torch.optim.Optimizer):
    """As some wrappers of torch.distributed: its constructor calls no other."""

    def __init__(self, inner):
        self.optim = inner
        self.param_groups = inner.param_groups

    def step(self, closure=None):
        self.optim.step()


def test_an_optimizer_that_runs_no_hooks_is_refused_by_name():
    model = net()
    updater = PartialUpdater(model.named_parameters(), ratio=0.1)
    with pytest.raises(TrainingError, match=r"Unhooked .* runs no step hooks"):
        updater.attach(Unhooked(torch.optim.SGD(model.parameters(), lr=0.1)))


# Schedule-free -----------------------------------------------------------------------


@pytest.mark.parametrize("switches", [True, False])
@pytest.mark.parametrize("kind", ["AdamWScheduleFree", "SGDScheduleFree"])
def test_schedule_free_optimizers_stay_frozen_in_both_of_their_weights(kind, switches):
    model = net()
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = getattr(schedulefree, kind)(model.parameters(), lr=0.05)
    updater = PartialUpdater(model.named_parameters(), ratio=0.1).attach(optimizer)
    optimizer.train()
    train(model, optimizer, optimizer.step)
    if switches:
        optimizer.eval()
    updater.select()
    optimizer.train()
    train(model, optimizer, optimizer.step)
    masks = updater.finish()
    assert not any(group["train_mode"] for group in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        if name in masks:
            moved = parameter.detach() != base[name]
            assert moved.any()
            assert not (moved & ~masks[name]).any()


def test_a_schedule_free_round_selects_by_the_weights_that_are_evaluated():
    seen = {}

    def score(evidence):
        seen.update({n: t.clone() for n, t in evidence.current.items()})
        return evidence.loss_drop

    model = net()
    optimizer = schedulefree.SGDScheduleFree(model.parameters(), lr=0.5)
    updater = PartialUpdater(model.named_parameters(), ratio=0.1, score=score)
    updater.attach(optimizer)
    optimizer.train()
    train(model, optimizer, optimizer.step)
    optimizer.eval()
    evaluated = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.train()
    updater.select()
    for name, found in seen.items():
        torch.testing.assert_close(found, evaluated[name])


# Parameters that cannot be selected from ---------------------------------------------


def complex_parameter():
    return nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))


def sharded():
    parameter = nn.Parameter(torch.zeros(3, 3))
    parameter.ds_id = 0  # as ZeRO-3 marks its own
    return parameter


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (complex_parameter, "is complex"),
        (lambda: nn.LazyLinear(4).weight, "is lazy"),
        (lambda: nn.Linear(4, 4, device="meta").weight, "has no data"),
        (sharded, "is sharded"),
    ],
)
def test_odd_parameters_are_refused_by_name_at_the_start(make, words):
    named = [("a.weight", nn.Parameter(torch.zeros(4, 4))), ("b.weight", make())]
    with pytest.raises(TrainingError, match=rf"'b\.weight' {words}"):
        PartialUpdater(named, ratio=0.5)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_selected_weight_that_is_no_number_ends_the_round(value):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = PartialUpdater(model.named_parameters(), ratio=0.1).attach(optimizer)
    train(model, optimizer, optimizer.step)
    masks = updater.select()
    train(model, optimizer, optimizer.step)
    with torch.no_grad():
        model[0].weight[tuple(masks["0.weight"].nonzero()[0])] = value
    with pytest.raises(TrainingError, match=r"'0\.weight' are no numbers"):
        updater.finish()
