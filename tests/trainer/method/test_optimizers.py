# SPDX-License-Identifier: Apache-2.0
"""Optimizers of all kinds: what is measured is the step that the loop takes."""

import warnings

import pytest
import schedulefree
import torch
from torch import distributed, nn
from torch.distributed.algorithms.model_averaging.averagers import (
    PeriodicModelAverager,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
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


@pytest.fixture
def alone():
    """A process group of this process alone."""
    distributed.init_process_group(
        "gloo", store=distributed.HashStore(), rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def test_an_optimizer_that_runs_no_hooks_is_refused_by_name(alone):
    model = net()
    updater = PartialUpdater(model.named_parameters(), ratio=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = PeriodicModelAverager(period=2)
    with pytest.raises(TrainingError, match=r"PostLocalSGD.* runs no step hooks"):
        updater.attach(PostLocalSGDOptimizer(optimizer, averager))


def test_an_optimizer_whose_state_is_shared_out_is_as_any(alone):
    a_round(lambda p: ZeroRedundancyOptimizer(p, torch.optim.Adam, lr=0.01))


# Several evaluations a step ----------------------------------------------------------


def loss_of(model):
    return functional.cross_entropy(model(INPUTS), LABELS)


def closure_of(model, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_is_measured_over_its_step_and_descends_with_what_is_selected(search):
    model = net()
    for parameter in (model[0].bias, model[2].bias):
        parameter.requires_grad_(False)  # so that the weights' drop is the whole one
    optimizer = torch.optim.LBFGS(
        [model[0].weight, model[2].weight], 0.1, max_iter=5, line_search_fn=search
    )
    updater = PartialUpdater(model.named_parameters(), ratio=0.2).attach(optimizer)
    closure = closure_of(model, optimizer)
    losses = [float(loss_of(model).detach())]
    for _ in range(2):
        optimizer.step(closure)
    losses.append(float(loss_of(model).detach()))
    measured = sum(float(drop.sum()) for drop in updater.loss_drop.values())
    assert measured == pytest.approx(losses[0] - losses[1], rel=0.25)
    updater.select()
    losses.append(float(loss_of(model).detach()))
    for _ in range(3):
        optimizer.step(closure)
        losses.append(float(loss_of(model).detach()))
    updater.finish()
    assert losses[2:] == sorted(losses[2:], reverse=True)
    assert losses[-1] < 0.7 * losses[2]


class SAM(torch.optim.Optimizer):
    """Climbs first, and steps from where it was with the gradient from above."""

    def __init__(self, parameters, base):
        super().__init__(parameters, {"rho": 0.05})
        self.base = base(self.param_groups)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self):
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            self.state[p]["old"] = p.data.clone()
            p.add_(0.05 * p.grad / norm)

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old"]
        self.base.step()

    def step(self, closure=None):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


def test_sam_is_measured_by_the_step_it_takes_whichever_way_it_is_called():
    measured, masks = {}, {}
    for way in ("step", "two steps"):
        model = net()
        sam = SAM(model.parameters(), lambda p: torch.optim.SGD(p, lr=0.1))
        outer = sam if way == "step" else sam.base
        updater = PartialUpdater(model.named_parameters(), ratio=0.1).attach(outer)
        closure = closure_of(model, sam)

        def train(sam=sam, closure=closure, way=way):
            for _ in range(4):
                closure()
                if way == "step":
                    sam.step(closure)
                else:
                    sam.first_step()
                    closure()
                    sam.second_step()

        train()
        measured[way] = {n: t.clone() for n, t in updater.loss_drop.items()}
        updater.select()
        train()
        masks[way] = updater.finish()
    for name, drop in measured["step"].items():
        assert float(drop.sum()) > 0
        torch.testing.assert_close(measured["two steps"][name], drop)
        assert torch.equal(masks["step"][name], masks["two steps"][name])


# Schedule-free -----------------------------------------------------------------------


@pytest.mark.parametrize("switches", [True, False])
@pytest.mark.parametrize("kind", ["AdamWScheduleFree", "SGDScheduleFree"])
def test_schedule_free_optimizers_stay_frozen_in_both_of_their_weights(kind, switches):
    model = net()
    with torch.no_grad():
        model[0].weight[model[0].weight < 0] = -0.0  # as pruning leaves them
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = getattr(schedulefree, kind)(model.parameters(), lr=0.05)
    updater = PartialUpdater(model.named_parameters(), ratio=0.1).attach(optimizer)
    optimizer.train()
    train(model, optimizer, optimizer.step)
    if switches:
        optimizer.eval()
    updater.select()
    optimizer.train()
    for _ in range(2):
        train(model, optimizer, optimizer.step)
        if switches:  # to evaluate between epochs
            optimizer.eval()
            loss_of(model)
            optimizer.train()
    masks = updater.finish()
    assert not any(group["train_mode"] for group in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        if name in masks:
            moved = parameter.detach().view(torch.int32) != base[name].view(torch.int32)
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


def test_parameters_that_fsdp_shards_are_refused_by_name(alone):
    model = net()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(TrainingError, match=r"'0\.weight' is sharded.*Distributed"):
        PartialUpdater(model.named_parameters(), ratio=0.5)


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
