# SPDX-License-Identifier: Apache-2.0
"""What people's own loops do: mixed precision, schedulers, closures, tied weights."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from edge_runtime.errors import TrainingError
from trainer.method.scores import fisher_scores, magnitude_scores
from trainer.method.updater import PartialUpdater

torch.set_num_threads(1)


class Tied(nn.Module):
    """Embedding and output share one matrix, as in language models."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def batches(count=6):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        inputs = torch.randn(32, 8, generator=generator)
        yield inputs, inputs[:, :4].argmax(1)


def round_of(model, train, *optimizers):
    """One round around somebody's ``train``; returns base, masks and what changed."""
    updater = PartialUpdater(model.named_parameters(), ratio=0.1).attach(*optimizers)
    base = {name: tensor.clone() for name, tensor in updater.base.items()}
    train()
    updater.select()
    train()
    masks = updater.finish()
    named = dict(model.named_parameters())
    moved = {
        name: named[name].detach().view(torch.int32) != tensor.view(torch.int32)
        for name, tensor in base.items()
    }
    assert not any(bool((moved[name] & ~masks[name]).any()) for name in masks)
    assert any(bool(m.any()) for m in moved.values())
    return base, masks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_with_a_loss_scale_selects_and_freezes(dtype):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=2)
    skipped = []

    def train():
        for inputs, labels in batches(40):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = functional.cross_entropy(model(inputs), labels)
            scaler.scale(loss).backward()
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            skipped.append(scaler.get_scale() < scale)

    round_of(model, train, optimizer)
    assert any(skipped) == (dtype == torch.float16)


def test_a_loss_scale_does_not_change_what_is_selected():
    def masks_with(scale):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)

        def train():
            for inputs, labels in batches():
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(inputs), labels)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

        return round_of(model, train, optimizer)[1]

    plain, scaled = masks_with(1), masks_with(2.0**12)
    assert all(torch.equal(plain[name], scaled[name]) for name in plain)


def test_schedulers_and_parameter_groups_stay_the_loops_own():
    model = net()
    optimizer = torch.optim.SGD(
        [
            {"params": model[0].parameters(), "lr": 0.1},
            {"params": model[2].parameters(), "lr": 0.01, "weight_decay": 0.1},
        ],
        momentum=0.9,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=12)
    rates = []

    def train():
        for inputs, labels in batches():
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            schedule.step()
            rates.append(schedule.get_last_lr()[0])

    round_of(model, train, optimizer)
    assert rates.index(max(rates)) in range(2, 5)  # one cycle over both phases


def test_closures_that_are_called_many_times_freeze_rightly():
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=4)

    def train():
        for inputs, labels in batches(2):

            def closure(inputs=inputs, labels=labels):
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(inputs), labels)
                loss.backward()
                return loss

            optimizer.step(closure)

    round_of(model, train, optimizer)


def test_tied_weights_are_one_tensor_for_selection_and_freeze():
    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def train():
        for start in range(3):
            tokens = torch.arange(start, start + 9)
            optimizer.zero_grad()
            functional.cross_entropy(model(tokens), (tokens + 1) % 12).backward()
            optimizer.step()

    _, masks = round_of(model, train, optimizer)
    assert list(masks) == ["embed.weight"]
    assert int(masks["embed.weight"].sum()) == int(0.1 * 96)
    assert model.head.weight is model.embed.weight


def test_a_frozen_layer_needs_no_optimizer():
    model = net()
    model[0].requires_grad_(False)
    optimizer = torch.optim.Adam(model[2].parameters(), 1e-2)

    def train():
        for inputs, labels in batches():
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()

    _, masks = round_of(model, train, optimizer)
    assert list(masks) == ["2.weight"]


def test_a_layer_that_is_thawed_later_is_refused():
    model = net()
    updater = PartialUpdater(model.named_parameters(), ratio=0.1)
    with pytest.raises(TrainingError, match=r"no attached optimizer owns 0\.weight"):
        updater.attach(torch.optim.Adam(model[2].parameters()))


@pytest.mark.parametrize("kind", ["magnitude", "fisher"])
def test_magnitude_and_fisher_are_one_line_each(kind):
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    updater = PartialUpdater(model.named_parameters(), ratio=0.1).attach(optimizer)
    for inputs, labels in batches():
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    named = {n: p for n, p in model.named_parameters() if n in updater.base}
    if kind == "magnitude":
        scores = magnitude_scores(named)
    else:
        scores = fisher_scores(model, batches(), updater.base)
    masks = updater.select(scores)
    assert set(scores) == set(masks)
    floor = min(float(scores[name][mask].min()) for name, mask in masks.items())
    assert all(float(scores[n][~m].max()) <= floor for n, m in masks.items())
