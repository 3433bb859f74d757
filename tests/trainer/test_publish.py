# SPDX-License-Identifier: Apache-2.0
"""What a loop publishes is what devices will compute, or it is refused."""

import copy
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import trainer
from edge_runtime.errors import (
    ConfigError,
    DpuError,
    ExportError,
    FrozenWeightChangedError,
    RoundError,
    TrainingError,
)
from edge_runtime.formats.contract_file import parse_contract
from edge_runtime.formats.init_weights import read_init_spec
from edge_runtime.formats.model_folder import list_rounds
from edge_runtime.formats.weights import read_weights
from edge_runtime.update.golden import read_golden
from packager.build import pack_round
from packager.rounds.folder import read_round
from trainer.export.tensors import load_weights, weights_of
from trainer.folder.contract import make_contract
from trainer.folder.once import run_lock
from trainer.method.updater import PartialUpdater
from trainer.publish import publish_round, start_run

INPUTS = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
LABELS = INPUTS[:, :3].argmax(1)
CONTRACT = make_contract((6,), ["a", "b", "c"])


def net():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


class Half(nn.Module):
    """Computes in float16."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3).half()

    def forward(self, x):
        return self.layer(x.half()).float()


def test_a_network_in_half_precision_is_started_with_the_tolerance_of_its_contract(
    tmp_path,
):
    samples = {"golden_inputs": 3 * INPUTS, "golden_labels": LABELS}
    with pytest.raises(ExportError, match=r"allowed are 1e-06; weights of few bits"):
        tight = make_contract((6,), ["a", "b", "c"], output_tolerance=1e-6)
        start_run(tmp_path / "no", Half, contract=tight, **samples)
    wide = make_contract((6,), ["a", "b", "c"], output_tolerance=0.02)
    start_run(tmp_path / "yes", Half, contract=wide, **samples)
    contract = (tmp_path / "yes" / "model" / "contract.json").read_bytes()
    assert parse_contract(contract).output_tolerance == 0.02


def test_golden_tensors_that_numpy_cannot_hold_are_taken_with_their_values(tmp_path):
    inputs = torch.from_numpy(INPUTS).bfloat16().requires_grad_()
    start_run(tmp_path, net, contract=CONTRACT, golden_inputs=inputs)
    golden = read_golden((tmp_path / "model" / "golden.npz").read_bytes())
    np.testing.assert_array_equal(golden.inputs[0], inputs.detach().float().numpy())


def start(tmp_path, build=net):
    """Start a run; the export of the usual network is made once and copied."""
    kept = (tmp_path if build is not net else tmp_path.parent / "started") / "run"
    if not kept.exists():
        start_run(
            kept,
            build,
            contract=CONTRACT,
            golden_inputs=INPUTS,
            golden_labels=LABELS,
        )
    run = tmp_path / "run"
    if kept != run:
        shutil.copytree(kept, run)
    model = build()
    load_weights(model, read_init_spec(run / "model").generate())
    return model


def train(model, optimizer, steps=3):
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(
            model(torch.from_numpy(INPUTS)), torch.from_numpy(LABELS)
        )
        loss.backward()
        optimizer.step()


def one_round(model, *, ratio=0.2, **options):
    """Train a round around any module; return the masks."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    updater = PartialUpdater(model.named_parameters(), ratio=ratio, **options)
    updater.attach(optimizer)
    train(model, optimizer)
    updater.select()
    train(model, optimizer)
    return updater.finish()


# State that the weight file does not bring ------------------------------------------


def closed(module):
    """Hold a value where only two functions see it."""
    value = 0.0

    def add():
        nonlocal value
        value += 0.5

    return lambda: value, add


HOLDERS = {
    "buffer": (
        lambda m: m.register_buffer("shift", torch.zeros(6), persistent=False),
        lambda m: m.shift,
        lambda m: m.shift.add_(0.5),
        "it has 'shift'",
    ),
    "attribute": (
        lambda m: setattr(m, "shift", torch.zeros(6)),
        lambda m: m.shift,
        lambda m: setattr(m, "shift", m.shift + 0.5),
        "it has 'shift'",
    ),
    "dictionary": (
        lambda m: setattr(m, "state", {"shifts": [0.0], "shift": torch.zeros(6)}),
        lambda m: m.state["shift"] + m.state["shifts"][0],
        lambda m: m.state.update(shifts=[m.state["shifts"][0] + 0.5]),
        "it has 'state'",
    ),
    "number": (
        lambda m: setattr(m, "shift", 0.0),
        lambda m: m.shift,
        lambda m: setattr(m, "shift", m.shift + 0.5),
        "outside of its state dict that training",
    ),
    "closure": (
        lambda m: setattr(m, "closed", closed(m)),
        lambda m: m.closed[0](),
        lambda m: m.closed[1](),
        "outside of its state dict that training",
    ),
}


class Drifting(nn.Module):
    """Eval reads what training changes, and the state dict does not have it."""

    def __init__(self, holder):
        super().__init__()
        self.fc = nn.Linear(6, 3)
        make, self.read, self.change, _ = HOLDERS[holder]
        make(self)

    def forward(self, x):
        if self.training:
            self.change(self)
        return self.fc(x - self.read(self))


@pytest.mark.parametrize("holder", HOLDERS)
def test_state_outside_of_the_state_dict_is_refused_by_the_name_of_the_output(
    tmp_path, holder
):
    model = start(tmp_path, lambda: Drifting(holder))
    masks = one_round(model)
    with pytest.raises(ExportError, match=r"output 'output' ") as caught:
        publish_round(tmp_path / "run", model, masks)
    assert HOLDERS[holder][-1] in str(caught.value)
    assert list_rounds(tmp_path / "run") == []


class Switched(nn.Module):
    """It turns bad after it was exported."""

    bad = ""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        if self.bad == "random" and not self.training:
            x = x + torch.rand_like(x)
        if self.bad == "writes" and not self.training:
            with torch.no_grad():
                self.fc.bias += 1
        return self.fc(x)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("random", r"another answer .* each time.*random_outputs=\('output',\)"),
        ("writes", r"forward changes 'fc.bias' in eval mode"),
    ],
)
def test_what_eval_does_beside_answering_is_told_from_state(tmp_path, bad, words):
    model = start(tmp_path, Switched)
    masks = one_round(model)
    model.bad = bad
    with pytest.raises(ExportError, match=words):
        publish_round(tmp_path / "run", model, masks)
    assert list_rounds(tmp_path / "run") == []


def test_a_loop_in_lower_precision_is_proved_in_the_models_own(tmp_path):
    model = start(tmp_path)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            publish_round(tmp_path / "run", model, one_round(model))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_modes_of_all_modules_are_as_they_were(tmp_path):
    model = start(tmp_path)
    masks = one_round(model)
    model[0].eval()
    before = [module.training for module in model.modules()]
    publish_round(tmp_path / "run", model, masks)
    assert [module.training for module in model.modules()] == before


# Weights that are not what finish() verified -----------------------------------------


def test_weights_outside_of_the_masks_are_refused_and_the_chain_goes_on(tmp_path):
    run = tmp_path / "run"
    model = start(tmp_path)
    publish_round(run, model, one_round(model))
    best = copy.deepcopy(model.state_dict())
    for value in best.values():
        value += 0.01
    masks = one_round(model)
    model.load_state_dict(best)  # "keep the best": it was another one
    with pytest.raises(FrozenWeightChangedError, match="round_00") as refused:
        publish_round(run, model, masks)
    assert len(list_rounds(run)) == 1
    as_it_says(refused, model)
    record = publish_round(run, model, one_round(model))
    assert record.round == 1
    assert pack_round(read_round(run / "round_01")) is not None


def as_it_says(refused, model):
    """Put weights back with the line of Python that a refusal says."""
    (line,) = re.findall(r"(trainer\.load_\w+\(.*), read_\w+ from", str(refused.value))
    names = {"read_weights": read_weights, "read_init_spec": read_init_spec}
    eval(line, names | {"trainer": trainer, "model": model, "Path": Path})


def test_a_model_that_was_trained_before_the_updater_was_made_is_refused(tmp_path):
    run = tmp_path / "run"
    model = start(tmp_path)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    masks = one_round(model)
    with pytest.raises(FrozenWeightChangedError, match="outside of its mask") as told:
        publish_round(run, model, masks)
    as_it_says(told, model)
    assert publish_round(run, model, one_round(model)).round == 0


def test_parameters_that_were_exchanged_for_others_are_refused(tmp_path):
    model = start(tmp_path)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    updater = PartialUpdater(model.named_parameters(), ratio=0.2).attach(optimizer)
    train(model, optimizer)
    updater.select()
    other = {name: value + 1 for name, value in model.state_dict().items()}
    model.load_state_dict(other, assign=True)
    with pytest.raises(FrozenWeightChangedError):
        publish_round(tmp_path / "run", model, updater.finish())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_never_become_a_round(tmp_path, value):
    model = start(tmp_path)
    masks = one_round(model)
    (name, mask), *_ = masks.items()
    with torch.no_grad():
        weight = dict(model.named_parameters())[name]
        weight[tuple(mask.nonzero()[0])] = value
    with pytest.raises(TrainingError, match="no numbers"):
        publish_round(tmp_path / "run", model, masks)
    assert list_rounds(tmp_path / "run") == []


# Layers that thaw --------------------------------------------------------------------


def thawed_round(model, **options):
    model[0].requires_grad_(False)
    optimizer = torch.optim.Adam(model[2].parameters(), lr=0.01)
    updater = PartialUpdater(model.named_parameters(), ratio=0.2, **options)
    updater.attach(optimizer)
    train(model, optimizer)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters())})
    train(model, optimizer)
    updater.select()
    train(model, optimizer)
    return updater.finish()


def test_a_layer_that_thaws_after_the_updater_was_made_is_named(tmp_path):
    model = start(tmp_path)
    with pytest.raises(FrozenWeightChangedError, match=r"'0\.weight'.*thawed.*dense="):
        thawed_round(model)


def test_a_layer_that_is_said_to_be_dense_is_sent_whole(tmp_path):
    model = start(tmp_path)
    masks = thawed_round(model, dense=["0.weight"])
    with pytest.raises(FrozenWeightChangedError, match=r"dense=\['0\.weight'\]"):
        publish_round(tmp_path / "run", model, masks)
    publish_round(tmp_path / "run", model, masks, dense=["0.weight"])
    assert pack_round(read_round(tmp_path / "run" / "round_00")) is not None


# Modules around the network ----------------------------------------------------------


class Wrapper(nn.Module):
    def __init__(self, inner, **more):
        super().__init__()
        self.net = inner
        for name, module in more.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize(
    "wrap",
    [
        Wrapper,
        nn.DataParallel,
        lambda m: torch.compile(m, backend="eager"),
        lambda m: Wrapper(torch.compile(m, backend="eager")),
        lambda m: Wrapper(m, loss=nn.CrossEntropyLoss(), metric=nn.Linear(2, 2)),
        lambda m: nn.DataParallel(Wrapper(m)),
    ],
)
def test_the_network_is_found_inside_of_a_module_around_it(tmp_path, wrap):
    model = start(tmp_path)
    around = wrap(model)
    masks = one_round(around)
    record = publish_round(tmp_path / "run", around, masks)
    assert record.target == weights_of(model).fingerprint
    assert pack_round(read_round(tmp_path / "run" / "round_00")) is not None


def test_a_network_with_a_compiled_part_is_found_by_its_plain_names(tmp_path):
    model = start(tmp_path)
    expected = model.state_dict().keys()
    model[0] = torch.compile(model[0], backend="eager")
    assert model.state_dict().keys() != expected
    record = publish_round(tmp_path / "run", model, one_round(model))
    written = read_weights(tmp_path / "run" / "round_00" / "weights.safetensors")
    assert set(written) == set(expected)
    assert record.round == 0


def test_masks_of_the_bare_network_fit_the_module_around_it(tmp_path):
    model = start(tmp_path)
    masks = one_round(model)
    publish_round(tmp_path / "run", Wrapper(model), masks)


def test_of_student_and_teacher_the_one_with_the_masks_is_taken(tmp_path):
    student = start(tmp_path)
    both = Wrapper(student, teacher=copy.deepcopy(student))
    masks = one_round(student)
    named = {f"net.{name}": mask for name, mask in masks.items()}
    record = publish_round(tmp_path / "run", both, named)
    assert record.target == weights_of(student).fingerprint


def test_two_networks_that_would_fit_are_named(tmp_path):
    student = start(tmp_path)
    both = Wrapper(student, teacher=copy.deepcopy(student))
    with pytest.raises(TrainingError, match="net, teacher"):
        publish_round(tmp_path / "run", both, one_round(student))


def test_another_network_is_refused_by_what_it_lacks(tmp_path):
    start(tmp_path)
    other = nn.Sequential(nn.Linear(6, 3))
    with pytest.raises(TrainingError, match=r"lacks 2, such as .*2\."):
        publish_round(tmp_path / "run", other, one_round(other))


def test_a_network_of_another_shape_is_refused_by_its_tensor(tmp_path):
    start(tmp_path)
    other = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ExportError, match=r"'0\.bias': the model has"):
        publish_round(tmp_path / "run", other, one_round(other))


def test_a_part_of_another_type_is_refused_by_its_tensor(tmp_path):
    model = start(tmp_path)
    masks = one_round(model)
    with pytest.raises(ExportError, match=r"'0\.bias': the model has BF16 \[16\]"):
        publish_round(tmp_path / "run", Wrapper(model.bfloat16()), masks)


def test_masks_of_the_module_around_fit_the_bare_network(tmp_path):
    model = start(tmp_path)
    masks = one_round(Wrapper(Wrapper(model)))
    record = publish_round(tmp_path / "run", model, masks)
    assert record.ratio == pytest.approx(0.2, abs=0.01)


def test_masks_beside_the_network_count_for_nothing(tmp_path):
    model = start(tmp_path)
    around = Wrapper(model, metric=nn.Linear(8, 8))
    masks = one_round(around)
    assert "metric.weight" in masks
    publish_round(tmp_path / "run", around, masks)
    published = read_weights(tmp_path / "run/round_00/selection.safetensors")
    assert set(published) == {"0.weight", "2.weight"}


def test_a_mask_of_an_unknown_tensor_is_named(tmp_path):
    model = start(tmp_path)
    masks = {"9.weight": torch.ones(2, 2, dtype=torch.bool), **one_round(model)}
    with pytest.raises(TrainingError, match=r"'9\.weight', which the run's network"):
        publish_round(tmp_path / "run", model, masks)


# What goes in, as people state it ---------------------------------------------------


@pytest.mark.parametrize("as_given", [np.float32, torch.tensor, list])
def test_numbers_of_a_contract_may_be_arrays_and_tensors(tmp_path, as_given):
    contract = make_contract(
        tuple(np.array([6])),
        range(3),
        mean=as_given([0.5] * 6),
        std=2.0,
        scale=np.float32(0.25),
        dtype=torch.float32,
    )
    start_run(tmp_path / "run", net, contract=contract, golden_inputs=INPUTS)
    written = parse_contract((tmp_path / "run/model/contract.json").read_bytes())
    assert (written.classes, written.inputs) == (("0", "1", "2"), contract.inputs)
    assert (written.inputs[0].mean, written.inputs[0].std) == ((0.5,) * 6, (2.0,))


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        (6, {}, r"shape of an input is 6, expected the sizes"),
        ((6,), {"classes": 3}, r"classes is 3, expected the name of each"),
        ((6,), {"classes": np.int64(3)}, r"classes is 3, expected the name of each"),
        ((6,), {"accuracy_floor": 90}, r"accuracy_floor is 90, expected a share"),
        ((6,), {"scale": 0}, r"'scale' is 0.*, expected a number other than 0"),
        ((6,), {"dtype": "floats"}, r"'dtype' is 'floats', expected one of float16"),
        ((6,), {"layout": "nhwc"}, r"layout is 'nhwc', expected NCHW or NHWC"),
    ],
)
def test_a_contract_that_devices_would_refuse_is_refused_before_training(
    shape, options, words
):
    with pytest.raises(DpuError, match=words):
        make_contract(shape, **options)


# A run that goes on, and one that others write --------------------------------------


@pytest.mark.parametrize("rounds", [0, 1])
def test_start_run_on_a_run_that_exists_says_how_to_go_on_and_its_line_works(
    tmp_path, rounds
):
    run = tmp_path / "run"
    model = start(tmp_path)
    for _ in range(rounds):
        publish_round(run, model, one_round(model))
    with pytest.raises(TrainingError, match="was started before") as told:
        start_run(run, net, contract=CONTRACT, golden_inputs=INPUTS)
    again = net()
    as_it_says(told, again)
    assert weights_of(again).data == weights_of(model).data
    assert publish_round(run, again, one_round(again)).round == rounds


def test_a_round_of_a_run_that_nobody_started_is_refused_and_leaves_no_folder(tmp_path):
    model = net()
    with pytest.raises(TrainingError, match=r"no run was started.* call start_run"):
        publish_round(tmp_path / "run", model, one_round(model))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("build", [net(), lambda: None])
def test_what_builds_no_network_is_refused_with_what_would(tmp_path, build):
    with pytest.raises(TrainingError, match=r"give the network's class, or lambda"):
        start_run(tmp_path / "run", build, contract=CONTRACT, golden_inputs=INPUTS)


def test_while_a_run_is_being_trained_publish_round_refuses_and_writes_nothing(
    tmp_path,
):
    run = tmp_path / "run"
    model = start(tmp_path)
    masks = one_round(model)
    (part := run / ".round_00.part").mkdir()  # what the other process writes
    with (
        run_lock(run),
        pytest.raises(ConfigError, match="another process is training or publishing"),
    ):
        publish_round(run, model, masks)
    assert not list_rounds(run)
    assert part.exists()
    assert publish_round(run, model, masks).round == 0
    assert not part.exists()


def test_a_run_that_another_process_starts_is_not_started_again(tmp_path):
    with (
        run_lock(tmp_path / "run"),
        pytest.raises(ConfigError, match="another process is training or publishing"),
    ):
        start_run(tmp_path / "run", net, contract=CONTRACT, golden_inputs=INPUTS)
    assert not (tmp_path / "run").exists()


def test_a_round_is_not_published_after_weights_of_another_round(tmp_path):
    run = tmp_path / "run"
    model = start(tmp_path)
    publish_round(run, model, one_round(model))
    publish_round(run, model, one_round(model))
    shutil.copy(run / "round_00" / "weights.safetensors", run / "round_01")
    with pytest.raises(RoundError, match=r"round_01/weights\.safetensors is damaged"):
        publish_round(run, model, one_round(model))


def test_a_loop_that_published_an_average_goes_on_from_it(tmp_path):
    model = start(tmp_path)
    for number in range(2):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        updater = PartialUpdater(model.named_parameters(), ratio=0.2).attach(optimizer)
        train(model, optimizer)
        updater.select()
        average = AveragedModel(model)
        for _ in range(2):
            train(model, optimizer)
            average.update_parameters(model)
        masks = updater.finish()
        updater.rewind(average.module.named_parameters())
        assert publish_round(tmp_path / "run", average, masks).round == number
        model.load_state_dict(average.module.state_dict())


def test_metrics_may_be_tensors_and_numpy_numbers(tmp_path):
    model = start(tmp_path)
    metrics = {
        "a": torch.tensor(0.5, requires_grad=True),
        "b": np.float32(0.25),
        "c": torch.tensor([3]),
        "d": 4,
    }
    record = publish_round(
        tmp_path / "run",
        model,
        one_round(model),
        samples=torch.tensor(64),
        metrics=metrics,
    )
    assert record.metrics == {"a": 0.5, "b": 0.25, "c": 3, "d": 4}
    assert record.samples == 64


@pytest.mark.parametrize(
    "value", [float("nan"), torch.tensor(np.inf), torch.ones(2), None, "0.5", 1j]
)
def test_a_metric_that_is_no_number_is_named_before_anything_is_proved(tmp_path, value):
    with pytest.raises(TrainingError, match=r"metric 'iou' is .* expected one finite"):
        publish_round(tmp_path, nn.Module(), {}, metrics={"iou": value})
    with pytest.raises(TrainingError, match="samples is"):
        publish_round(tmp_path, nn.Module(), {}, samples=value)
