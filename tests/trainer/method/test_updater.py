# SPDX-License-Identifier: Apache-2.0
import copy
import io
import itertools
import math
from functools import partial

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from edge_runtime.errors import (
    FrozenWeightChangedError,
    StepNotObservedError,
    TrainingError,
)
from trainer.method.phase import Phase
from trainer.method.scores import DPU, GCPU, LCPU, magnitude_scores
from trainer.method.selectable import is_weight
from trainer.method.selection import random_masks
from trainer.method.subspace import SubspaceUpdater
from trainer.method.updater import PartialUpdater

torch.set_num_threads(1)

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)
    )


def train(model, *optimizers, steps=5, seed=0, schedulers=()):
    """Stand for somebody's loop, which knows nothing of partial updating."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        inputs = torch.randn(32, 8, generator=generator)
        labels = inputs[:, :4].argmax(1)
        for optimizer in optimizers:
            optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        for stepper in (*optimizers, *schedulers):
            stepper.step()


def set_gradients(parameter, *values):
    parameter.grad = torch.tensor(values).view_as(parameter)


def same_bits(a, b):
    kind = BITS[a.dtype]
    return a.detach().contiguous().view(kind) == b.detach().contiguous().view(kind)


def started(ratio=0.1, make=torch.optim.Adam, **options):
    """Return a model, its attached optimizer and updater."""
    model = small_model()
    optimizer = make(model.parameters(), **{"lr": 0.01} | options)
    updater = PartialUpdater(model.named_parameters(), ratio=ratio).attach(optimizer)
    return model, optimizer, updater


# The paper's update rule, written out plainly: own Adam, per-layer accumulation,
# argsort, rewinding, masked increments. Shares no code with the trainer.

EPOCHS = 3
LAM = {"dpu": 0.5, "gcpu": 1.0, "lcpu": 0.0}


def learning_rate(epoch):
    return 5e-3 * 0.1 ** (epoch // 2)


def transcription(layers, biases, batches, ratio, lam):
    """Run one round; return loss drops, masks and final weights, one per layer."""
    everything = layers + biases
    start = [w.clone() for w in layers]
    lc = [torch.zeros_like(w) for w in layers]
    m = [torch.zeros_like(w) for w in everything]
    v = [torch.zeros_like(w) for w in everything]
    masks = None
    t = 0
    for phase in ("first step", "second step"):
        for epoch, batch in itertools.product(range(EPOCHS), batches):
            leaves = [w.clone().requires_grad_() for w in everything]
            h = batch[0]
            for i in range(len(layers)):
                h = h @ leaves[i].T + leaves[len(layers) + i]
                h = h.clamp(min=0) if i + 1 < len(layers) else h
            loss = -h.log_softmax(1)[torch.arange(len(h)), batch[1]].mean()
            gradients = torch.autograd.grad(loss, leaves)
            t += 1
            for i, g in enumerate(gradients):
                m[i] = 0.9 * m[i] + 0.1 * g
                v[i] = 0.999 * v[i] + 0.001 * g * g
                m_hat, v_hat = m[i] / (1 - 0.9**t), v[i] / (1 - 0.999**t)
                dw = -learning_rate(epoch) * m_hat / (v_hat.sqrt() + 1e-8)
                if i < len(layers) and phase == "second step":
                    dw = dw * masks[i]
                if i < len(layers) and phase == "first step":
                    lc[i] -= dw * g
                everything[i] = everything[i] + dw
        if phase == "first step":
            masks, everything[: len(layers)] = select_and_rewind(
                start, everything[: len(layers)], lc, ratio, lam
            )
    return lc, masks, everything


def select_and_rewind(start, trained, lc, ratio, lam):
    gc = [(w - s) ** 2 for w, s in zip(trained, start, strict=True)]
    gc_sum, lc_sum = sum(c.sum().item() for c in gc), sum(c.sum().item() for c in lc)
    metric = torch.cat(
        [
            (lam * a / gc_sum + (1 - lam) * b / lc_sum).flatten()
            for a, b in zip(gc, lc, strict=True)
        ]
    )
    chosen = torch.argsort(metric, descending=True)[: int(ratio * len(metric))]
    flat = torch.zeros(len(metric), dtype=torch.bool)
    flat[chosen] = True
    parts = flat.split([w.numel() for w in trained])
    masks = [part.view_as(w) for part, w in zip(parts, trained, strict=True)]
    rewound = [
        w * mask + s * ~mask for w, mask, s in zip(trained, masks, start, strict=True)
    ]
    return masks, rewound


@pytest.mark.parametrize(
    ("method", "score"), [("dpu", DPU), ("gcpu", GCPU), ("lcpu", LCPU)]
)
def test_a_round_on_digits_equals_the_papers_update_rule(method, score):
    torch.manual_seed(1)
    digits = load_digits()
    inputs = torch.tensor(digits.data[:640]) / 16
    batches = list(
        zip(inputs.split(64), torch.tensor(digits.target[:640]).split(64), strict=True)
    )
    # float64: rounding cannot decide which of two near scores is chosen.
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).double()
    linear = [model[0], model[2]]
    optimizer = torch.optim.Adam(model.parameters())
    updater = PartialUpdater(model.named_parameters(), ratio=0.02, score=score)
    updater.attach(optimizer)
    lc, expected_masks, expected = transcription(
        [layer.weight.detach().clone() for layer in linear],
        [layer.bias.detach().clone() for layer in linear],
        batches,
        0.02,
        LAM[method],
    )

    def fit():
        for epoch, (x, y) in itertools.product(range(EPOCHS), batches):
            optimizer.param_groups[0]["lr"] = learning_rate(epoch)
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    fit()
    for name, drop in zip(("0.weight", "2.weight"), lc, strict=True):
        torch.testing.assert_close(updater.loss_drop[name], drop)
    updater.select()
    fit()
    masks = list(updater.finish().values())
    assert updater.summary() == "47 of 2368 weights (1.98 %) in 2 tensors"
    assert all(torch.equal(a, b) for a, b in zip(masks, expected_masks, strict=True))
    reached = [layer.weight for layer in linear] + [layer.bias for layer in linear]
    for mine, theirs in zip(reached, expected, strict=True):
        torch.testing.assert_close(mine.detach(), theirs)


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {}),
    "sgd_nesterov_decay": (
        torch.optim.SGD,
        {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
    ),
    "sgd_fused": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    "adam": (torch.optim.Adam, {}),
    "adam_decay": (torch.optim.Adam, {"weight_decay": 1e-2}),
    "adam_fused": (torch.optim.Adam, {"fused": True}),
    "adam_foreach": (torch.optim.Adam, {"foreach": True, "amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    "adagrad": (torch.optim.Adagrad, {}),
    "rprop": (torch.optim.Rprop, {}),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_unselected_weights_equal_the_base_bit_for_bit(kind):
    make, options = OPTIMIZERS[kind]
    model, optimizer, updater = started(make=make, **options)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer, schedulers=[schedule])
    updater.select()
    rewound = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer, schedulers=[schedule])
    masks = updater.finish()
    assert sum(int(mask.sum()) for mask in masks.values()) == int(0.1 * 192)
    for name, mask in masks.items():
        now = model.get_parameter(name)
        assert same_bits(now, base[name])[~mask].all()
        assert same_bits(rewound[name], base[name])[~mask].all()
        assert not torch.equal(now[mask], rewound[name][mask])


def test_the_dense_part_trains_in_both_phases_and_is_not_rewound():
    model, optimizer, updater = started()
    base = model[0].bias.detach().clone()
    train(model, optimizer)
    full = model[0].bias.detach().clone()
    updater.select()
    assert torch.equal(model[0].bias, full)
    assert not torch.equal(base, full)
    train(model, optimizer)
    updater.finish()
    assert not torch.equal(model[0].bias, full)


@pytest.mark.parametrize("value", [-0.0, math.nan, math.inf])
def test_odd_base_values_survive_as_bits(value):
    weight = nn.Parameter(torch.tensor([[1.0, value, 2.0]]))
    bits = weight.detach().clone()
    optimizer = torch.optim.SGD([weight], lr=0.1, weight_decay=0.1)
    updater = PartialUpdater([("w", weight)], ratio=0.4).attach(optimizer)
    updater.select({"w": torch.tensor([[1.0, 0, 0]])})
    set_gradients(weight, 1.0, 1.0, 1.0)
    optimizer.step()
    updater.finish()
    assert same_bits(weight, bits).tolist() == [[False, True, True]]


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("ratio", [0.02, 0.5])
def test_few_and_many_selected_weights_are_left_alone_and_the_rest_rewound(
    ratio, memory
):
    random = torch.Generator().manual_seed(1)
    kernel = torch.randn(8, 4, 5, 5, generator=random)
    kernel[0, 0, 0, :3] = torch.tensor([-0.0, math.nan, math.inf])
    kernel = nn.Parameter(kernel.to(memory_format=memory))
    base = kernel.detach().clone()
    optimizer = torch.optim.SGD([kernel], lr=0.1)
    updater = PartialUpdater([("w", kernel)], ratio=ratio).attach(optimizer)
    scores = torch.rand(kernel.shape, generator=random)
    scores[0, 0, 0, :3] = 0  # what is selected has to stay a number
    masks = updater.select({"w": scores})
    for _ in range(2):
        kernel.grad = torch.ones_like(kernel)
        optimizer.step()
    updater.finish()
    stepped = base - 0.1 - 0.1
    wanted = torch.where(masks["w"], stepped, base)
    assert same_bits(kernel, wanted).all()
    assert int(masks["w"].sum()) == int(ratio * base.numel())


def test_finish_sees_a_changed_sign_of_zero():
    weight = nn.Parameter(torch.tensor([[1.0, -0.0]]))
    updater = PartialUpdater([("w", weight)], ratio=0.5)
    updater.select({"w": torch.tensor([[1.0, 0]])})
    with torch.no_grad():
        weight[0, 1] = 0.0
    with pytest.raises(FrozenWeightChangedError, match="1 weights of 'w'") as caught:
        updater.finish()
    assert (caught.value.tensor, caught.value.count) == ("w", 1)


def test_a_foreign_write_is_raised_at_the_next_step():
    model, optimizer, updater = started()
    train(model, optimizer)
    updater.select()
    train(model, optimizer)
    with torch.no_grad():
        model[3].weight.mul_(2)
    frozen = int((~updater.masks["3.weight"]).sum())
    with pytest.raises(FrozenWeightChangedError) as caught:
        train(model, optimizer)
    assert (caught.value.tensor, caught.value.count) == ("3.weight", frozen)


def test_a_write_to_selected_weights_alone_is_allowed():
    model, optimizer, updater = started()
    train(model, optimizer)
    updater.select()
    train(model, optimizer)
    with torch.no_grad():
        model[3].weight[updater.masks["3.weight"]] += 1
    train(model, optimizer)
    updater.finish()


def test_training_with_another_optimizer_after_selection_is_raised():
    model, optimizer, updater = started()
    train(model, optimizer)
    updater.select()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(FrozenWeightChangedError, match=r"made later.* attach that"):
        updater.finish()


def test_a_new_optimizer_may_be_attached_for_the_sparse_phase():
    model, optimizer, updater = started()
    train(model, optimizer)
    updater.select()
    second = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, updater.attach(second) and second)
    updater.finish()
    assert not torch.equal(model[0].weight, updater.base["0.weight"])


class Lookahead:
    """Writes the weights around the optimizer that it holds."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.slow = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]

    def zero_grad(self):
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self):
        self.optimizer.step()
        for slow, p in zip(
            self.slow, self.optimizer.param_groups[0]["params"], strict=True
        ):
            p.copy_(slow.lerp_(p, 0.5))


def test_an_optimizer_around_the_attached_one_is_detected():
    model, optimizer, _ = started()
    outer = Lookahead(optimizer)
    updater = PartialUpdater(model.named_parameters(), ratio=0.1).attach(outer)
    train(model, outer)
    updater.select()
    with pytest.raises(FrozenWeightChangedError):
        train(model, outer)


def test_the_optimizer_inside_a_wrapper_is_attached():
    class Wrapper:  # as Accelerate and Lightning do
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = small_model()
    optimizer = torch.optim.Adam(model.parameters())
    updater = PartialUpdater(model.named_parameters(), ratio=0.1)
    updater.attach(Wrapper(optimizer))
    train(model, optimizer)
    updater.select()


def test_loss_drop_sums_the_steps_really_taken_times_the_gradient():
    weight = nn.Parameter(torch.tensor([[1.0, 2.0]]))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.5)
    updater = PartialUpdater([("w", weight)]).attach(optimizer)
    set_gradients(weight, 1.0, -2.0)
    optimizer.step()  # steps by -0.1 * (1, -2)
    set_gradients(weight, 2.0, 4.0)
    optimizer.step()  # steps by -0.1 * (2.5, 3)
    expected = torch.tensor([[0.1 * 1 + 0.25 * 2, 0.2 * 2 + 0.3 * 4]])
    torch.testing.assert_close(updater.loss_drop["w"], expected)


def test_gradients_of_a_closure_are_counted():
    models = [small_model(), small_model()]
    drops = []
    for model, with_closure in zip(models, (False, True), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        updater = PartialUpdater(model.named_parameters()).attach(optimizer)
        inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))

        def closure(optimizer=optimizer, model=model, inputs=inputs):
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        drops.append(updater.loss_drop)
    assert drops[0]["0.weight"].sum() > 0
    for name in drops[0]:
        assert torch.equal(drops[0][name], drops[1][name])


class Twice(torch.optim.SGD):
    """Its hooks fire twice a step; it decays before and after the inner one."""

    def step(self, closure=None):
        self._decay()
        loss = super().step(closure)
        self._decay()
        return loss

    @torch.no_grad()
    def _decay(self):
        for p in self.param_groups[0]["params"]:
            p.mul_(self.param_groups[0]["decay"])


def test_a_step_that_fires_the_hooks_twice_is_counted_once():
    models = [small_model(), small_model()]
    drops = []
    for model, kind in zip(models, (torch.optim.SGD, Twice), strict=True):
        groups = [{"params": list(model.parameters()), "decay": 1.0}]
        optimizer = kind(groups, lr=0.1)
        updater = PartialUpdater(model.named_parameters()).attach(optimizer)
        train(model, optimizer)
        drops.append(updater.loss_drop)
    for name in drops[0]:
        assert torch.equal(drops[0][name], drops[1][name])


def test_a_step_that_writes_around_its_inner_step_stays_frozen():
    model = small_model()
    groups = [{"params": list(model.parameters()), "decay": 0.9}]
    optimizer = Twice(groups, lr=0.1)
    updater = PartialUpdater(model.named_parameters(), ratio=0.1).attach(optimizer)
    train(model, optimizer)
    updater.select()
    train(model, optimizer)
    updater.finish()


@pytest.mark.parametrize("selected", [False, True])
def test_a_step_after_one_that_failed_is_measured_and_frozen_as_any_other(selected):
    model, optimizer, updater = started(make=torch.optim.SGD, lr=0.1)
    train(model, optimizer)
    if selected:
        updater.select()

    def fail(*_):
        handle.remove()
        with torch.no_grad():
            next(model.parameters()).add_(1)
        raise KeyboardInterrupt

    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        train(model, optimizer)
    measured = {n: t.clone() for n, t in updater.loss_drop.items()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer, steps=1)
    for name, drop in measured.items():
        parameter = dict(model.named_parameters())[name]
        step = before[name] - parameter.detach()
        expected = drop + step * parameter.grad
        torch.testing.assert_close(updater.loss_drop[name], expected)
    if selected:
        updater.finish()


def test_a_last_step_that_failed_half_way_moves_no_frozen_weight():
    model, optimizer, updater = started(make=torch.optim.SGD, lr=0.1)
    train(model, optimizer)
    updater.select()

    def fail(*_):
        with torch.no_grad():
            next(model.parameters()).add_(1)
        raise KeyboardInterrupt

    optimizer.register_step_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        train(model, optimizer)
    for name, mask in updater.finish().items():
        parameter = dict(model.named_parameters())[name]
        assert torch.equal(parameter[~mask], updater.base[name][~mask])


def test_an_updater_that_was_detached_follows_the_optimizer_once_it_is_attached_again():
    model, optimizer, updater = started(make=torch.optim.SGD, lr=0.1)
    train(model, optimizer, steps=1)
    updater.detach()
    updater.attach(optimizer)
    train(model, optimizer, steps=1)
    updater.select()
    train(model, optimizer)
    updater.finish()


def test_a_step_skipped_by_mixed_precision_counts_zero():
    model, optimizer, updater = started(fused=True)  # torch skips inside the step
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def step(factor):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(4, 8)).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()

    inputs = torch.randn(4, 8)
    model.eval()
    step(1.0)
    counted = {name: drop.clone() for name, drop in updater.loss_drop.items()}
    before = model[0].weight.detach().clone()
    step(math.inf)
    assert not model[0].weight.grad.isfinite().all()
    assert torch.equal(model[0].weight, before)
    assert all(torch.equal(updater.loss_drop[n], d) for n, d in counted.items())
    assert counted["0.weight"].abs().sum() > 0
    assert model(inputs).isfinite().all()
    updater.select()


def test_several_optimizers_and_groups_share_one_selection():
    model = small_model()
    first = torch.optim.Adam(model[0].parameters(), lr=0.01)
    second = torch.optim.SGD(
        [{"params": [model[3].weight], "lr": 0.1}, {"params": [model[3].bias]}], lr=0.01
    )
    dense = torch.optim.SGD(model[1].parameters(), lr=0.01)
    updater = PartialUpdater(model.named_parameters(), ratio=0.3)
    updater.attach(first, second, dense)
    train(model, first, second, dense)
    assert all(drop.any() for drop in updater.loss_drop.values())
    updater.select()
    train(model, first, second, dense)
    masks = updater.finish()
    assert all(mask.any() for mask in masks.values())


def test_frozen_parameters_are_not_selectable():
    model = small_model()
    model[0].requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters())
    updater = PartialUpdater(model.named_parameters(), ratio=0.5).attach(optimizer)
    train(model, optimizer)
    updater.select()
    assert updater.summary() == "32 of 64 weights (50.00 %) in 1 tensors"


def test_bfloat16_channels_last_and_sparse_gradients_work():
    conv = nn.Conv2d(3, 4, 3).to(torch.bfloat16).to(memory_format=torch.channels_last)
    table = nn.Embedding(6, 5, sparse=True)
    named = [("conv", conv.weight), ("table", table.weight)]
    dense = torch.optim.SGD(conv.parameters(), lr=0.1, momentum=0.9)
    sparse = torch.optim.SparseAdam(table.parameters(), lr=0.1)
    updater = PartialUpdater(named, ratio=0.2).attach(dense, sparse)

    def step():
        images = torch.ones(2, 3, 4, 4, dtype=torch.bfloat16)
        loss = conv(images).square().mean() + table(torch.tensor([1, 3, 3])).sum()
        loss.backward()
        dense.step()
        sparse.step()

    step()
    assert updater.loss_drop["conv"].dtype == torch.float32
    expected = (updater.base["table"] - table.weight.detach())[:, 0] * torch.tensor(
        [0, 1, 0, 2, 0, 0]
    )
    torch.testing.assert_close(updater.loss_drop["table"][:, 0], expected)
    assert expected.any()
    base = {name: tensor.clone() for name, tensor in updater.base.items()}
    updater.select()
    step()
    masks = updater.finish()
    assert all(mask.any() for mask in masks.values())
    for name, p in named:
        assert same_bits(p, base[name])[~masks[name]].all()


def test_scores_of_any_method_need_no_full_phase():
    model, optimizer, updater = started()
    masks = updater.select(magnitude_scores(updater.base))
    best = torch.cat([p.abs().flatten() for p in updater.base.values()]).topk(19)
    assert sum(int(mask.sum()) for mask in masks.values()) == 19
    assert (
        min(updater.base[n][m].abs().min() for n, m in masks.items() if m.any())
        == (best.values[-1])
    )
    train(model, optimizer)
    updater.finish()


def test_equal_scores_are_taken_in_the_models_order_not_the_callers():
    _, _, updater = started()
    ones = {n: torch.ones_like(t) for n, t in reversed(list(updater.base.items()))}
    masks = updater.select(ones)
    assert masks["0.weight"].flatten().nonzero().flatten().tolist() == list(range(19))
    assert updater.summary() == "19 of 192 weights (9.90 %) in 1 tensors"


def test_masks_are_taken_as_they_are_and_need_no_ratio():
    model, optimizer, updater = started(ratio=None)
    chosen = random_masks(updater.base, 0.1, torch.Generator().manual_seed(0))
    assert updater.summary() == "192 weights in 2 tensors, none selected"
    updater.select(masks=chosen)
    train(model, optimizer)
    masks = updater.finish()
    assert all(torch.equal(masks[n], chosen[n]) for n in chosen)


def test_buffers_of_the_full_phase_are_given_back():
    model, optimizer, updater = started()
    train(model, optimizer)
    updater.select()
    assert not updater.loss_drop
    assert updater.phase is Phase.SPARSE


def test_hooks_are_gone_after_finish():
    model, optimizer, updater = started()
    train(model, optimizer)
    updater.select()
    masks = updater.finish()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    train(model, optimizer)
    assert updater.phase is Phase.DONE
    now = model[0].weight.detach()
    frozen = ~masks["0.weight"]
    assert not torch.equal(now[frozen], updater.base["0.weight"][frozen])


def test_a_detached_round_neither_measures_nor_freezes():
    model, optimizer, updater = started()
    updater.detach()
    train(model, optimizer)
    with pytest.raises(StepNotObservedError):
        updater.select()


@pytest.mark.parametrize("interrupted_in", [Phase.FULL, Phase.SPARSE])
def test_a_resumed_round_ends_like_an_uninterrupted_one(interrupted_in):
    def save(*objects):
        file = io.BytesIO()
        torch.save([each.state_dict() for each in objects], file)
        file.seek(0)
        return torch.load(file)

    def run(interrupted_in=None):
        objects = started()
        for phase in (Phase.FULL, Phase.SPARSE):
            train(*objects[:2], seed=1)
            if phase is interrupted_in:
                states = save(*objects)
                objects = started()
                train(*objects[:2], seed=9)  # whatever it held before is replaced
                for each, state in zip(objects, states, strict=True):
                    each.load_state_dict(state)
            train(*objects[:2], seed=2)
            if phase is Phase.FULL:
                objects[2].select()
        return objects[0], objects[2].finish()

    model, masks = run(interrupted_in)
    expected, expected_masks = run()
    for name, p in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), p)
    assert all(torch.equal(masks[n], expected_masks[n]) for n in masks)


def test_resuming_without_the_models_weights_is_raised():
    model, optimizer, updater = started()
    train(model, optimizer)
    updater.select()
    state = updater.state_dict()
    other = small_model(seed=1)
    optimizer = torch.optim.Adam(other.parameters())
    resumed = PartialUpdater(other.named_parameters(), ratio=0.1).attach(optimizer)
    resumed.load_state_dict(state)
    with pytest.raises(FrozenWeightChangedError):
        train(other, optimizer)


def resumed_beside_a_frozen_layer(make, *, kept=True, moved=False):
    """Resume in a process that draws other random values for a frozen layer."""

    def build(seed):
        model = nn.Sequential(nn.Linear(8, 8), *small_model(seed=seed))
        model[0].requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        updater = make(model.named_parameters()).attach(optimizer)
        return model, optimizer, updater

    first = build(1)
    train(*first[:2])
    states = copy.deepcopy([each.state_dict() for each in first])
    if not kept:  # as earlier versions did
        del states[2]["still"]
    model, optimizer, updater = second = build(2)
    for each, state in zip(second, states, strict=True):
        each.load_state_dict(state)
    updater.select()
    if moved:
        with torch.no_grad():
            model[0].weight += 1
    train(model, optimizer)
    return updater.finish()


MAKERS = [
    partial(PartialUpdater, ratio=0.5),
    partial(SubspaceUpdater, coefficients=64),
]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("kept", [True, False])
def test_a_round_with_a_frozen_layer_is_resumed_where_the_layer_was_drawn_anew(
    make, kept
):
    assert resumed_beside_a_frozen_layer(make, kept=kept)


@pytest.mark.parametrize("make", MAKERS)
def test_a_frozen_layer_that_moves_after_resuming_is_found(make):
    with pytest.raises(FrozenWeightChangedError, match=r"0\.weight"):
        resumed_beside_a_frozen_layer(make, moved=True)


def test_the_state_of_an_updater_that_froze_other_layers_is_refused():
    model, _, updater = started()
    model[0].requires_grad_(False)
    other = PartialUpdater(
        model.named_parameters(),
        ratio=0.1,
        selectable=lambda name, _: name == "3.weight",
    )
    state = other.state_dict() | {"base": updater.base}
    with pytest.raises(TrainingError, match=r"has to stay the same: 0\.weight"):
        updater.load_state_dict(state | {"loss_drop": updater.loss_drop})


def test_rejects_the_state_of_another_model():
    _, _, updater = started()
    other = PartialUpdater([("w", nn.Parameter(torch.ones(2, 2)))])
    with pytest.raises(TrainingError, match=r"too few: 0\.weight, 3\.weight, w"):
        other.load_state_dict(updater.state_dict())


def test_select_without_a_step_is_raised():
    model, _, updater = started()
    train(model, torch.optim.Adam(model.parameters()))  # not the attached one
    with pytest.raises(StepNotObservedError, match="attach the optimizer that"):
        updater.select()


def test_rejects_a_weight_that_no_optimizer_owns():
    model = small_model()
    updater = PartialUpdater(model.named_parameters(), ratio=0.1)
    partial = torch.optim.Adam(model[0].parameters())
    with pytest.raises(TrainingError, match=r"no attached optimizer owns 3\.weight"):
        updater.attach(partial)
    assert not partial._optimizer_step_post_hooks


def test_rejects_what_is_no_optimizer():
    with pytest.raises(TrainingError, match=r"expected a torch\.optim\.Optimizer"):
        PartialUpdater(small_model().named_parameters()).attach(small_model())


def test_rejects_an_optimizer_that_maximises():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), maximize=True)
    with pytest.raises(TrainingError, match="maximize=True"):
        PartialUpdater(model.named_parameters()).attach(optimizer)


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, math.nan])
def test_rejects_a_ratio_out_of_range(ratio):
    with pytest.raises(TrainingError, match="above 0 and at most 1"):
        PartialUpdater(small_model().named_parameters(), ratio=ratio)


def test_rejects_a_ratio_that_selects_no_weight():
    with pytest.raises(TrainingError, match=r"ratio 0\.005 of 192 .* selects none"):
        PartialUpdater(small_model().named_parameters(), ratio=0.005)


def test_rejects_a_model_without_selectable_weights():
    with pytest.raises(TrainingError, match="at least one selectable weight"):
        PartialUpdater(nn.BatchNorm1d(4).named_parameters())


def test_selectable_can_be_chosen():
    def is_bias(name, p):
        return name.endswith("bias") and not is_weight(name, p)

    updater = PartialUpdater(
        small_model().named_parameters(), ratio=1, selectable=is_bias
    )
    assert list(updater.base) == ["0.bias", "1.bias", "3.bias"]


def test_rejects_selecting_without_a_ratio():
    model, optimizer, updater = started(ratio=None)
    train(model, optimizer)
    with pytest.raises(TrainingError, match="pass ratio="):
        updater.select()


def test_rejects_scores_that_do_not_fit():
    _, _, updater = started()
    scores = magnitude_scores(updater.base)
    with pytest.raises(TrainingError, match=r"too few: 3\.weight"):
        updater.select({"0.weight": scores["0.weight"]})
    with pytest.raises(TrainingError, match=r"shape \(16, 8\) for '0\.weight'"):
        updater.select(scores | {"0.weight": torch.ones(8, 16)})
    with pytest.raises(TrainingError, match=r"expected torch\.bool of shape"):
        updater.select(masks=scores)
    assert updater.phase is Phase.FULL


def test_rejects_calls_out_of_order():
    _, _, updater = started()
    with pytest.raises(TrainingError, match=r"sparse phase, found full: finish\(\)"):
        updater.finish()
    updater.select(magnitude_scores(updater.base))
    with pytest.raises(TrainingError, match=r"full phase, found sparse: select\(\)"):
        updater.select()
    updater.finish()
    with pytest.raises(TrainingError, match="found done"):
        updater.finish()


# Narrowing ----------------------------------------------------------------------------


def narrowed(seed=1, stop=None):
    """Select four times as many, train, narrow, train; maybe through a saved state."""
    model, optimizer, updater = started(0.1)
    train(model, optimizer)
    wide = {n: m.clone() for n, m in updater.select(keep=4).items()}
    train(model, optimizer, seed=seed)
    if stop is not None:
        states = [s.state_dict() for s in (model, optimizer, updater)]
        torch.save(states, stop)
        stop.seek(0)
        model, optimizer, updater = started(0.1)
        for part, state in zip(
            (model, optimizer, updater), torch.load(stop), strict=True
        ):
            part.load_state_dict(state)
    masks = {n: m.clone() for n, m in updater.narrow().items()}
    train(model, optimizer, seed=seed + 1)
    updater.finish()
    return model, wide, masks


def count(masks):
    return sum(int(mask.sum()) for mask in masks.values())


def test_narrowing_keeps_the_best_of_what_was_selected():
    model, wide, masks = narrowed()
    assert count(wide) == 4 * count(masks) == 4 * int(0.1 * 192)
    base = dict(small_model().named_parameters())
    trained = dict(model.named_parameters())
    for name, mask in masks.items():
        assert not (mask & ~wide[name]).any()
        assert same_bits(trained[name], base[name])[~mask].all()
        assert not same_bits(trained[name], base[name])[mask].all()


def test_narrowing_ranks_by_what_the_selected_weights_did_in_both_phases():
    model, optimizer, updater = started(0.1)
    base = {n: b.clone() for n, b in updater.base.items()}
    train(model, optimizer)
    first = {n: d.clone() for n, d in updater.loss_drop.items()}
    wide = updater.select(keep=3)
    assert all(torch.equal(updater.loss_drop[n], first[n]) for n in first)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n in base}
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(3))
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()
    named = {n: p.detach().clone() for n, p in model.named_parameters() if n in base}
    drop = {
        n: (first[n] + (before[n] - named[n]) * dict(model.named_parameters())[n].grad)
        for n in base
    }
    lc = sum(float(d[wide[n]].sum()) for n, d in drop.items())
    gc = sum(float((named[n] - base[n]).square().sum()) for n in base)
    scores = {
        n: torch.where(
            wide[n],
            0.5 * (named[n] - base[n]).square() / gc + 0.5 * drop[n] / abs(lc),
            -1.0,
        )
        for n in base
    }
    ranked = torch.cat([scores[n].flatten() for n in base]).sort(descending=True)[0]
    masks = updater.narrow()
    k = int(0.1 * 192)
    for name, mask in masks.items():
        assert torch.equal(mask, scores[name] >= ranked[k - 1])


def test_scores_of_minus_infinity_narrow_to_what_was_selected():
    model, optimizer, updater = started(ratio=0.1)
    train(model, optimizer)
    wide = {n: mask.clone() for n, mask in updater.select(keep=4).items()}
    low = {n: torch.full_like(b, -torch.inf) for n, b in updater.base.items()}
    for name, mask in updater.narrow(low).items():
        assert not (mask & ~wide[name]).any()


def test_whole_numbers_are_refused_as_scores_by_narrow_as_by_select():
    model, optimizer, updater = started(ratio=0.1)
    train(model, optimizer)
    updater.select(keep=4)
    ranks = {n: torch.ones(b.shape, dtype=torch.int64) for n, b in updater.base.items()}
    with pytest.raises(TrainingError, match=r"floating-point scores.*torch\.int64"):
        updater.narrow(ranks)


def test_narrowing_goes_on_from_a_saved_state():
    (plain, wide, masks), (other, _, found) = narrowed(), narrowed(stop=io.BytesIO())
    assert count(wide) > count(masks)
    for name in masks:
        assert torch.equal(masks[name], found[name])
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        assert same_bits(a, b).all()


def test_a_wide_selection_is_not_finished_before_it_is_narrowed():
    model, optimizer, updater = started(0.1)
    train(model, optimizer)
    updater.select(keep=4)
    with pytest.raises(StepNotObservedError, match="sparse phase"):
        updater.narrow()
    train(model, optimizer)
    with pytest.raises(TrainingError, match=r"call narrow\(\)"):
        updater.finish()
    updater.narrow()
    with pytest.raises(TrainingError, match=r"after select\(keep=\.\.\.\)"):
        updater.narrow()
    train(model, optimizer)
    updater.finish()


@pytest.mark.parametrize(
    "options",
    [{"keep": 0.5}, {"keep": math.nan}, {"keep": 2, "masks": {}}],
)
def test_keep_is_at_least_one_and_chosen_by_scores(options):
    model, optimizer, updater = started(0.1)
    train(model, optimizer)
    with pytest.raises(TrainingError, match="expected at least 1, and no masks"):
        updater.select(**options)


def test_everything_is_kept_where_there_is_no_more():
    model, optimizer, updater = started(0.4)
    train(model, optimizer)
    assert count(updater.select(keep=math.inf)) == 192
    train(model, optimizer)
    assert count(updater.narrow()) == int(0.4 * 192)


def test_a_weight_that_is_given_twice_is_refused_by_both_of_its_names():
    model = small_model()
    model.register_module("tied", model[0])
    pairs = model.named_parameters(remove_duplicate=False)
    with pytest.raises(TrainingError, match=r"'0.weight' and 'tied.weight' are one"):
        PartialUpdater(pairs, ratio=0.1)
    PartialUpdater(model.named_parameters(), ratio=0.1)


@pytest.mark.parametrize("updater", [PartialUpdater, SubspaceUpdater])
@pytest.mark.parametrize(
    "given",
    [
        nn.Module.parameters,
        lambda model: model,
        lambda _: nn.Linear(6, 2).parameters(),  # each of two rows
    ],
)
def test_parameters_without_names_are_refused_with_what_gives_them(updater, given):
    options = {"ratio": 0.1} if updater is PartialUpdater else {"coefficients": 64}
    with pytest.raises(TrainingError, match=r"as model\.named_parameters\(\) gives"):
        updater(given(small_model()), **options)
