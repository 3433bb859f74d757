# SPDX-License-Identifier: Apache-2.0
"""The subspace updater steps coefficients, and leaves what devices will compute."""

import copy
import io

import numpy as np
import pytest
import schedulefree
import torch
from torch import nn
from torch.nn import functional

from edge_runtime.errors import (
    FrozenWeightChangedError,
    StepNotObservedError,
    TrainingError,
)
from edge_runtime.formats.init_weights import philox
from edge_runtime.formats.subspace_moves import move_weights
from trainer.export.tensors import weights_of
from trainer.method.movement import best_scale, quantise
from trainer.method.phase import Phase
from trainer.method.subspace import SubspaceUpdater

torch.set_num_threads(1)
GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(64, 8, generator=GENERATOR)
LABELS = INPUTS[:, :4].argmax(1)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 4))


def train(model, optimizer, steps=5):
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(INPUTS), LABELS).backward()
        optimizer.step()


def started(make=torch.optim.Adam, *, size=64, **options):
    model = net()
    optimizer = make(model.parameters(), lr=0.01)
    options = {"coefficients": size, "seed": 3} | options
    updater = SubspaceUpdater(model.named_parameters(), **options)
    return model, optimizer, updater.attach(optimizer)


# The same, written out plainly: a matrix from coefficients to weights, and autograd.


def matrix(sizes, size, taps, seed):
    """Row i is weight i; the rows between tensors are left out."""
    starts, stop = [], 0
    for count in sizes:
        starts.append(stop)
        stop += -(-count // 64) * 64
    words = [
        philox(seed, f"subspace {tap}").random_raw(stop // 64) for tap in range(taps)
    ]
    rows = []
    for first, count in zip(starts, sizes, strict=True):
        table = torch.zeros(count, size)
        for i in range(first, first + count):
            for tap in range(taps):
                sign = 1 - 2 * (int(words[tap][i // 64]) >> (i % 64) & 1)
                table[i - first, (i + tap * (i // size + 1)) % size] += sign
        rows.append(table)
    return rows


class Plain(nn.Module):
    """The network with its weights as a function of coefficients."""

    def __init__(self, size, taps, seed):
        super().__init__()
        self.net = net()
        names = ["0.weight", "2.weight"]
        base = {n: p.detach().clone() for n, p in self.net.named_parameters()}
        self.base = {n: base[n] for n in names}
        self.rows = matrix([self.base[n].numel() for n in names], size, taps, seed)
        together = torch.cat([self.base[n].flatten() for n in names]).square().mean()
        self.relative = [
            float((self.base[n].square().mean() / together).sqrt()) for n in names
        ]
        self.coefficients = nn.Parameter(torch.zeros(size))
        self.biases = nn.ParameterList([base["0.bias"], base["2.bias"]])

    def weights(self):
        moves = zip(self.base.values(), self.rows, self.relative, strict=True)
        return [b + r * (P @ self.coefficients).view_as(b) for b, P, r in moves]

    def forward(self, x):
        first, second = self.weights()
        hidden = functional.linear(x, first, self.biases[0]).relu()
        return functional.linear(hidden, second, self.biases[1])


MAKERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "sgd with decay": lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam, fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adam with decay": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
}


@pytest.mark.parametrize("taps", [1, 2, 3])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_optimizer_steps_the_coefficients_as_if_they_were_its_parameters(
    make, taps
):
    plain = Plain(128, taps, 3)
    train(plain, make([plain.coefficients, *plain.biases]))
    model = net()
    optimizer = make(model.parameters())
    updater = SubspaceUpdater(
        model.named_parameters(), coefficients=128, taps=taps, seed=3
    )
    updater.attach(optimizer)
    train(model, optimizer)
    for found, expected in zip((model[0], model[2]), plain.weights(), strict=True):
        torch.testing.assert_close(found.weight, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[0].bias, plain.biases[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("bits", "taps"), [(1, 1), (1, 2), (4, 2), (8, 4)])
def test_a_device_that_moves_the_base_gets_the_very_weights(bits, taps):
    model, optimizer, updater = started(bits=bits, taps=taps)
    base = weights_of(model)
    train(model, optimizer)
    updater.select()
    train(model, optimizer)
    movement = updater.finish()
    moved = move_weights(base, [movement.term(base.layout)])
    found = weights_of(model)
    for name in ("0.weight", "2.weight"):
        assert found[name].tobytes() == moved[name].tobytes()
        assert found[name].tobytes() != base[name].tobytes()
        assert not movement[name].any()
    assert updater.phase is Phase.DONE


def test_after_select_the_weights_are_those_that_devices_will_have():
    model, optimizer, updater = started(taps=2)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer)
    scales = updater.select()
    for _ in range(2):
        for name in ("0.weight", "2.weight"):
            step = (dict(model.named_parameters())[name].detach() - base[name]).abs()
            assert set(
                torch.round(step / scales[name], decimals=2).unique().tolist()
            ) == {
                0.0,
                2.0,
            }
        train(model, optimizer)


def test_gradients_are_the_loops_own_again_after_the_step():
    model, optimizer, _ = started()
    functional.cross_entropy(model(INPUTS), LABELS).backward()
    before = {n: (p.grad, p.grad.clone()) for n, p in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is before[name][0]
        assert torch.equal(parameter.grad, before[name][1])


def test_a_closure_is_evaluated_at_the_weights():
    def losses(*, closed):
        model, optimizer, _ = started()
        found = []

        def closure():
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(INPUTS), LABELS)
            loss.backward()
            found.append(float(loss.detach()))
            return loss

        for _ in range(4):
            optimizer.step(closure) if closed else (closure(), optimizer.step())
        return found

    assert losses(closed=True) == losses(closed=False)


def interrupt(model, optimizer):
    """Have the next step fail after it has written to the weights."""

    def fail(*_):
        handle.remove()
        with torch.no_grad():
            model[0].weight.add_(1)
        raise KeyboardInterrupt

    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        train(model, optimizer)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("selected", [False, True])
def test_a_step_that_failed_half_way_leaves_the_weights_as_they_were(
    set_to_none, selected
):
    model, optimizer, updater = started()
    train(model, optimizer)
    if selected:
        updater.select()
    before = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    interrupt(model, optimizer)
    optimizer.zero_grad(set_to_none=set_to_none)
    functional.cross_entropy(model(INPUTS), LABELS).backward()
    with pytest.raises(
        TrainingError, match=r"failed half way.*compute gradients again"
    ):
        optimizer.step()
    assert torch.equal(model[0].weight, before[0])
    assert torch.equal(model[2].weight, before[1])
    train(model, optimizer)
    if not selected:
        updater.select()
    updater.finish()


@pytest.mark.parametrize("way", ["detach", "load"])
def test_what_gives_a_round_up_after_a_failed_step_finds_the_weights(way):
    model, optimizer, updater = started()
    train(model, optimizer)
    before, state = weights_of(model), copy.deepcopy(updater.state_dict())
    interrupt(model, optimizer)
    updater.detach() if way == "detach" else updater.load_state_dict(state)
    assert np.array_equal(weights_of(model)["0.weight"], before["0.weight"])
    assert np.array_equal(weights_of(model)["2.weight"], before["2.weight"])


class TwoEvaluations(torch.optim.Optimizer):
    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure):
        closure()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.sub_(0.01 * parameter.grad)
        return closure()


def test_a_closure_that_a_step_evaluates_twice_is_refused_and_moves_nothing():
    model = net()
    optimizer = TwoEvaluations(model.parameters())
    updater = SubspaceUpdater(model.named_parameters(), coefficients=64, seed=3)
    updater.attach(optimizer, elementwise=True)
    before = model[0].weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(INPUTS), LABELS)
        loss.backward()
        return loss

    with pytest.raises(TrainingError, match="evaluates its closure twice a step"):
        optimizer.step(closure)
    assert torch.equal(model[0].weight, before)


class Nested(torch.optim.SGD):
    """A step that calls another one: its hooks fire twice."""

    def step(self, closure=None):
        return super().step(closure)


def test_a_step_within_a_step_moves_the_coefficients_once():
    def after(make):
        model = net()
        optimizer = make(model.parameters(), lr=0.01)
        updater = SubspaceUpdater(model.named_parameters(), coefficients=64, seed=3)
        updater.attach(optimizer, elementwise=True)
        train(model, optimizer)
        return weights_of(model).fingerprint

    assert after(torch.optim.SGD) == after(Nested)


def test_a_state_of_the_first_phase_is_taken_by_an_updater_that_has_settled():
    model, optimizer, updater = started(make=torch.optim.SGD)
    train(model, optimizer)
    state = copy.deepcopy(updater.state_dict())
    model_state = copy.deepcopy(model.state_dict())
    train(model, optimizer)
    expected = weights_of(model).fingerprint
    updater.select()
    train(model, optimizer)
    model.load_state_dict(model_state)
    updater.load_state_dict(state)
    with pytest.raises(TrainingError, match=r"nothing has moved for good before"):
        updater.movement()
    train(model, optimizer)
    assert weights_of(model).fingerprint == expected


def test_a_step_without_gradients_moves_nothing():
    model, optimizer, updater = started()
    before = weights_of(model).fingerprint
    optimizer.step()
    assert weights_of(model).fingerprint == before
    with pytest.raises(StepNotObservedError, match="found none that moved anything"):
        updater.select()


def test_no_state_of_the_coefficients_stays_with_the_optimizer():
    model, optimizer, updater = started()
    train(model, optimizer)
    updater.select()
    updater.finish()
    held = {id(p) for p in optimizer.state}
    assert id(model[0].weight) not in held
    assert id(model[0].bias) in held
    train(model, optimizer)  # a loop of its own again


def test_training_goes_on_from_a_saved_state_to_the_same_bits():
    def after(interrupted):
        model, optimizer, updater = started(make=torch.optim.SGD)
        train(model, optimizer)
        if interrupted == "full":
            model, optimizer, updater = resumed(model, updater)
        train(model, optimizer)
        updater.select()
        train(model, optimizer)
        if interrupted == "sparse":
            model, optimizer, updater = resumed(model, updater)
        train(model, optimizer)
        updater.finish()
        return weights_of(model).fingerprint

    def resumed(model, updater):
        file = io.BytesIO()
        torch.save([model.state_dict(), updater.state_dict()], file)
        file.seek(0)
        weights, state = torch.load(file)
        model, optimizer, updater = started(make=torch.optim.SGD)
        model.load_state_dict(weights)
        updater.load_state_dict(state)
        return model, optimizer, updater

    assert after("full") == after("sparse") == after("")


@pytest.mark.parametrize("settled", [False, True])
def test_training_goes_on_with_adams_moments_to_the_same_bits(settled):
    def after(*, resumed):
        model, optimizer, updater = started()
        train(model, optimizer)
        if settled:
            updater.select()
            train(model, optimizer)
        if resumed:
            saved = [copy.deepcopy(o.state_dict()) for o in (model, updater, optimizer)]
            model, optimizer, updater = started()
            for one, state in zip((model, updater, optimizer), saved, strict=True):
                one.load_state_dict(state)
        train(model, optimizer)
        return weights_of(model).fingerprint

    assert after(resumed=True) == after(resumed=False)


@pytest.mark.parametrize("option", ["seed", "bits", "taps"])
def test_a_state_of_another_seed_other_taps_or_bits_is_refused(option):
    model, optimizer, updater = started()
    train(model, optimizer)
    state, before = updater.state_dict(), weights_of(net()).fingerprint
    model, _, other = started(**{option: 1 if option == "taps" else 2})
    with pytest.raises(TrainingError, match=f"the state is of {option}="):
        other.load_state_dict(state)
    assert weights_of(model).fingerprint == before
    del state[option]  # as earlier versions saved it
    other.load_state_dict(state)


# What is refused ---------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 3])
def test_coefficients_that_are_no_numbers_are_refused_at_select_with_any_bits(bits):
    model, optimizer, updater = started(bits=bits)
    train(model, optimizer, 1)
    model[0].weight.grad.fill_(torch.nan)
    optimizer.step()
    with pytest.raises(TrainingError, match="no numbers any more"):
        updater.select()


class Words(nn.Module):
    """A network whose embedding may have sparse gradients."""

    def __init__(self, *, sparse):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(40, 8, sparse=sparse), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.words(x))


def test_sparse_gradients_move_weights_as_dense_ones_do():
    def after(*, sparse):
        model = Words(sparse=sparse)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        updater = SubspaceUpdater(model.named_parameters(), coefficients=64)
        updater.attach(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            functional.cross_entropy(model(LABELS), LABELS).backward()
            optimizer.step()
        updater.select()
        updater.finish()
        return weights_of(model)["words.weight"]

    np.testing.assert_allclose(after(sparse=True), after(sparse=False), rtol=1e-5)


def test_parameters_with_holes_are_taken_where_others_have_room_or_refused_by_name():
    holes = nn.Parameter(torch.randn(20, 40)[:, ::2])
    with pytest.raises(TrainingError, match="w have holes between their elements"):
        SubspaceUpdater([("w", holes)], coefficients=64)
    whole = nn.Parameter(torch.randn(8, 8))
    SubspaceUpdater([("w", holes), ("v", whole)], coefficients=64)


def test_a_parameter_that_is_given_twice_is_refused_by_both_of_its_names():
    model = net()
    pairs = [("a", model[0].weight), ("b", model[0].weight)]
    with pytest.raises(TrainingError, match="'a' and 'b' are one parameter"):
        SubspaceUpdater(pairs, coefficients=64)


class Sam(torch.optim.SGD):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.LBFGS(p),
        lambda p: torch.optim.ASGD(p),
        lambda p: torch.optim.Adafactor(p),
        lambda p: schedulefree.AdamWScheduleFree(p),
        lambda p: Sam(p, lr=0.1),
    ],
)
def test_an_optimizer_that_may_not_step_each_element_by_itself_is_refused(make):
    model = net()
    optimizer = make(model.parameters())
    updater = SubspaceUpdater(model.named_parameters(), coefficients=64)
    with pytest.raises(TrainingError, match=type(optimizer).__name__):
        updater.attach(optimizer)


def test_one_that_is_known_to_be_right_is_taken():
    model = net()
    optimizer = Sam(model.parameters(), lr=0.1)
    updater = SubspaceUpdater(model.named_parameters(), coefficients=64)
    updater.attach(optimizer, elementwise=True)
    train(model, optimizer)
    updater.select()
    updater.finish()


def test_weights_that_share_coefficients_need_one_group_of_one_optimizer():
    model = net()
    updater = SubspaceUpdater(model.named_parameters(), coefficients=64)
    apart = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]
    with pytest.raises(TrainingError, match="one attached optimizer that owns every"):
        updater.attach(*apart)
    groups = [{"params": model[0].parameters(), "lr": 0.2}]
    groups += [{"params": model[2].parameters()}]
    with pytest.raises(TrainingError, match="groups of different 'lr'"):
        updater.attach(torch.optim.SGD(groups, lr=0.1))


def test_groups_that_a_scheduler_parts_later_are_refused_at_the_step():
    model = net()
    groups = [{"params": model[i].parameters()} for i in (0, 2)]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    SubspaceUpdater(model.named_parameters(), coefficients=64).attach(optimizer)
    schedule = [lambda _: 1.0, lambda epoch: 0.5**epoch]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    train(model, optimizer)
    scheduler.step()
    with pytest.raises(TrainingError, match="groups of different 'lr'"):
        train(model, optimizer)


def test_adagrad_keeps_a_state_and_begins_anew_with_it():
    model = net()
    options = {"lr": 0.01, "initial_accumulator_value": 0.5}
    optimizer = torch.optim.Adagrad(model.parameters(), **options)
    train(model, optimizer)
    updater = SubspaceUpdater(model.named_parameters(), coefficients=64)
    updater.attach(optimizer)
    for name in updater.base:
        state = optimizer.state[dict(model.named_parameters())[name]]
        assert float(state["step"]) == 0
        assert (state["sum"] == 0.5).all()


def test_groups_that_differ_by_names_alone_share_coefficients():
    model = net()
    groups = [{"params": list(model[i].named_parameters())} for i in (0, 2)]
    groups[1]["name"] = "head"
    optimizer = torch.optim.Adam(groups, lr=0.01)
    updater = SubspaceUpdater(model.named_parameters(), coefficients=64)
    updater.attach(optimizer)
    train(model, optimizer)
    updater.select()
    updater.finish()


def test_a_memory_format_that_changes_under_the_updater_is_refused_at_the_step():
    model = nn.Conv2d(3, 8, 3)
    updater = SubspaceUpdater(model.named_parameters(), coefficients=64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    updater.attach(optimizer)
    model.to(memory_format=torch.channels_last)
    before = model.weight.detach().clone()
    model(torch.ones(1, 3, 4, 4)).sum().backward()
    gradient = model.weight.grad.clone()
    with pytest.raises(TrainingError, match=r"'weight' lies in memory.*memory_format"):
        optimizer.step()
    assert torch.equal(model.weight, before)
    assert torch.equal(model.weight.grad, gradient)


@pytest.mark.parametrize("seed", [-3, 2**63])
def test_a_seed_that_no_patch_holds_is_refused_before_training(seed):
    with pytest.raises(TrainingError, match=rf"from 0 to 2\*\*63 - 1, found {seed}"):
        started(seed=seed)


def test_biases_may_be_in_another_optimizer():
    model = net()
    weights = [model[0].weight, model[2].weight]
    biases = [model[0].bias, model[2].bias]
    two = torch.optim.Adam(weights, lr=0.01), torch.optim.SGD(biases, lr=0.01)
    updater = SubspaceUpdater(model.named_parameters(), coefficients=64).attach(*two)
    train(model, two[0])
    assert "64 coefficients of 1 bit" in updater.summary()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficients": 0}, "multiple of 64"),
        ({"coefficients": 100}, "multiple of 64"),
        ({"coefficients": 384}, "at most 360 of 1 bits"),
        ({"coefficients": 64, "bits": 9}, "1 to 8 bits"),
        ({"coefficients": 64, "taps": 5}, "1 to 4 taps"),
        ({"coefficients": 64, "selectable": lambda *_: False}, "at most 0 "),
    ],
)
def test_options_that_no_patch_can_have_are_refused(options, message):
    with pytest.raises(TrainingError, match=message):
        SubspaceUpdater(net().named_parameters(), **options)


def test_weights_in_half_precision_are_refused():
    with pytest.raises(TrainingError, match=r"torch.bfloat16 .* under autocast"):
        SubspaceUpdater(net().bfloat16().named_parameters(), coefficients=64)


@pytest.mark.parametrize("both", [True, False])
def test_the_best_epoch_is_gone_back_to_by_both_states(both):
    model, optimizer, updater = started()
    train(model, optimizer)
    updater.select()
    train(model, optimizer)
    best = copy.deepcopy((model.state_dict(), updater.state_dict()))
    train(model, optimizer)
    model.load_state_dict(best[0])
    if both:
        updater.load_state_dict(best[1])
        updater.finish()
        kept = model.state_dict()
        assert all(torch.equal(kept[n], t) for n, t in best[0].items())
    else:
        with pytest.raises(FrozenWeightChangedError, match="the updater's state with"):
            updater.finish()


def test_what_something_else_wrote_is_found():
    model, optimizer, updater = started()
    train(model, optimizer)
    updater.select()
    with torch.no_grad():
        model[2].weight[1, 3] += 1
    with pytest.raises(FrozenWeightChangedError, match=r"1 weights of '2\.weight'"):
        updater.finish()


def test_a_layer_that_thaws_is_found():
    model = net()
    model[2].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = SubspaceUpdater(model.named_parameters(), coefficients=64)
    updater.attach(optimizer)
    model[2].weight.requires_grad_(True)
    train(model, optimizer)
    updater.select()
    with pytest.raises(FrozenWeightChangedError, match=r"2\.weight"):
        updater.finish()


def test_phases_come_in_order():
    model, optimizer, updater = started()
    with pytest.raises(TrainingError, match="finish"):
        updater.finish()
    with pytest.raises(TrainingError, match="before select"):
        updater.movement()
    train(model, optimizer)
    updater.select()
    with pytest.raises(TrainingError, match="select"):
        updater.select()


# Scales ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_the_scale_of_coefficients_is_about_the_best_one(bits):
    values = torch.randn(4096, generator=torch.Generator().manual_seed(1))

    def cost(unit):
        return float((quantise(values, unit, bits) * unit - values).square().sum())

    found = cost(best_scale(values, bits))
    assert found <= 1.05 * min(cost(float(u)) for u in np.geomspace(1e-3, 3, 400))


def test_quantised_coefficients_are_odd_integers_within_their_bits():
    values = torch.linspace(-99, 99, 1001)
    for bits in (1, 2, 5):
        found = quantise(values, 0.5, bits)
        assert torch.equal(found % 2, torch.ones_like(found))
        assert found.abs().max() == 2**bits - 1
    assert quantise(torch.zeros(3), 1.0, 1).tolist() == [1, 1, 1]


# Memory of other layouts -------------------------------------------------------------


def test_weights_in_channels_last_order_move_as_others():
    def trained(memory_format):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 4, 4)
        ).to(memory_format=memory_format)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        updater = SubspaceUpdater(model.named_parameters(), coefficients=192)
        updater.attach(optimizer)
        images = torch.randn(16, 4, 4, 4, generator=torch.Generator().manual_seed(2))
        labels = torch.arange(16) % 4
        for phase in range(2):
            for _ in range(3):
                optimizer.zero_grad()
                functional.cross_entropy(model(images), labels).backward()
                optimizer.step()
            updater.select() if phase == 0 else updater.finish()
        return [p.detach().clone() for p in model.parameters()]

    plain, other = trained(torch.contiguous_format), trained(torch.channels_last)
    for one, two in zip(plain, other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_coefficients_that_no_tensor_has_room_for_lie_in_several():
    model, optimizer, updater = started(size=320)  # of 240 and 120 weights
    train(model, optimizer)
    updater.select()
    train(model, optimizer)
    updater.finish()
