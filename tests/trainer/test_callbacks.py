# SPDX-License-Identifier: Apache-2.0
"""Real Lightning and a real Hugging Face Trainer."""

import copy
import os
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
)
from torch.utils.data import DataLoader, TensorDataset

from edge_runtime.errors import TrainingError
from trainer.callbacks import lightning_callback, transformers_callback
from trainer.data.vision import torchvision  # noqa: F401 - before both libraries
from trainer.method.updater import PartialUpdater

with warnings.catch_warnings():  # theirs, about each other
    warnings.simplefilter("ignore")
    import lightning
    from accelerate import Accelerator
    from transformers import Trainer, TrainingArguments

torch.set_num_threads(1)
os.environ["HF_HUB_OFFLINE"] = "1"

# What the libraries warn about on a small CPU job.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*num_workers"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step"),
    pytest.mark.filterwarnings("ignore:.*treespec"),
]


def samples():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 8, generator=generator)
    return TensorDataset(inputs, inputs[:, :4].argmax(1))


class Module(lightning.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, _index):
        inputs, labels = batch
        return functional.cross_entropy(self.net(inputs), labels)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


class Classifier(nn.Module):
    """As the Hugging Face Trainer wants a model: the loss comes with the outputs."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, inputs, labels=None):
        logits = self.net(inputs)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def fit(tmp_path, module, *callbacks, epochs=4, resume=None, **options):
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, DataLoader(samples(), 16), ckpt_path=resume, weights_only=False)
    return trainer


def hugging_face(tmp_path, model, *callbacks, **options):
    rows = [{"inputs": x, "labels": y} for x, y in samples()]
    options = {"save_strategy": "no"} | options
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=4,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    return Trainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=list(callbacks),
    )


def check(before, after, masks):
    """Only what was selected changed, and most of that did."""
    changed = 0
    for name, mask in masks.items():
        moved = before[name].view(torch.int32) != after[name].view(torch.int32)
        assert not (moved & ~mask).any()
        changed += int(moved.sum())
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == int(0.1 * total)
    assert changed > 0.05 * total


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_lightning_fit_is_a_round(tmp_path, precision):
    module, update = Module(net()), lightning_callback(full_epochs=2, ratio=0.1)
    before = state_of(module)
    fit(tmp_path, module, update, precision=precision, gradient_clip_val=1.0)
    check(before, state_of(module), update.masks)
    assert sorted(update.masks) == ["net.0.weight", "net.2.weight"]


@pytest.mark.parametrize("stop", [1, 3])
def test_a_lightning_checkpoint_goes_on_within_the_round(tmp_path, stop):
    whole, update = Module(net()), lightning_callback(full_epochs=2, ratio=0.1)
    fit(tmp_path, whole, update)

    class Stop(lightning.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == stop - 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    fit(tmp_path, Module(net()), lightning_callback(full_epochs=2, ratio=0.1), Stop())
    resumed, again = Module(net()), lightning_callback(full_epochs=2, ratio=0.1)
    fit(tmp_path, resumed, again, resume=tmp_path / "half.ckpt")
    for name, mask in update.masks.items():
        assert torch.equal(again.masks[name], mask)
    expected, found = state_of(whole), state_of(resumed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_callback_that_went_on_from_a_checkpoint_begins_the_next_fit_as_a_new_round(
    tmp_path,
):
    class Keep(lightning.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:  # of the sparse phase
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    def callback():
        return lightning_callback(full_epochs=1, ratio=0.1)

    fit(tmp_path, Module(net()), callback(), Keep(), epochs=3)
    module, update, other = Module(net()), callback(), callback()
    fit(tmp_path, module, update, epochs=3, resume=tmp_path / "half.ckpt")
    twin = copy.deepcopy(module)
    fit(tmp_path, module, update, epochs=2)
    fit(tmp_path, twin, other, epochs=2)
    for name, mask in other.masks.items():
        assert torch.equal(update.masks[name], mask)
    expected, found = state_of(twin), state_of(module)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_fit_that_ends_in_the_full_phase_is_refused(tmp_path):
    update = lightning_callback(full_epochs=4, ratio=0.1)
    with pytest.raises(TrainingError, match="ended within the full phase of 4 epochs"):
        fit(tmp_path, Module(net()), update)


SCHEDULE_FREE = {
    "optim": "schedule_free_adamw",
    "lr_scheduler_type": "constant",
    "eval_strategy": "epoch",
}


@pytest.mark.parametrize(
    "options", [{}, {"bf16": True, "weight_decay": 0.1}, SCHEDULE_FREE]
)
def test_a_hugging_face_train_is_a_round(tmp_path, options):
    model, update = Classifier(net()), transformers_callback(full_epochs=2, ratio=0.1)
    before = state_of(model)
    hugging_face(tmp_path, model, update, **options).train()
    check(before, state_of(model), update.masks)


def test_a_hugging_face_checkpoint_is_refused(tmp_path):
    update = transformers_callback(full_epochs=2, ratio=0.1)
    trainer = hugging_face(tmp_path, Classifier(net()), update)
    trainer.state.global_step = 3
    with pytest.raises(TrainingError, match="start the round again"):
        update.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_each_phase_has_the_whole_schedule_of_the_learning_rate(tmp_path):
    rates = {}
    for one_schedule in (False, True):
        update = transformers_callback(
            full_epochs=2, ratio=0.1, one_schedule=one_schedule
        )
        trainer = hugging_face(tmp_path, Classifier(net()), update)
        seen = rates[one_schedule] = []
        step = trainer.create_optimizer().step

        def record(*args, _seen=seen, _step=step, _trainer=trainer, **options):
            _seen.append(_trainer.optimizer.param_groups[0]["lr"])
            return _step(*args, **options)

        trainer.optimizer.step = record
        trainer.train()
    half = len(rates[False]) // 2
    assert rates[False][half] == rates[False][0] == 1e-2
    assert rates[False][:half] == rates[False][half:]
    assert rates[True][half] <= 0.5e-2


def test_the_best_model_is_one_that_a_patch_can_carry(tmp_path):
    model, update = Classifier(net()), transformers_callback(full_epochs=2, ratio=0.1)
    before = state_of(model)
    trainer = hugging_face(
        tmp_path,
        model,
        update,
        load_best_model_at_end=True,
        eval_strategy="epoch",
        save_strategy="epoch",
        metric_for_best_model="worse",
        greater_is_better=False,
    )
    calls = iter(range(100))  # it gets worse with every evaluation
    trainer.compute_metrics = lambda _: {"worse": next(calls)}
    trainer.train()
    check(before, state_of(model), update.masks)
    assert trainer.state.best_metric == 2  # the first evaluation of the fine-tuning


def test_a_loop_around_accelerate_is_a_round():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    inner = net()
    before = state_of(inner)
    model, optimizer, loader = accelerator.prepare(
        inner, torch.optim.AdamW(inner.parameters(), 1e-2), DataLoader(samples(), 16)
    )
    updater = PartialUpdater(model.named_parameters(), ratio=0.1).attach(optimizer)
    for phase in range(2):
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(functional.cross_entropy(model(inputs), labels))
                optimizer.step()
                optimizer.zero_grad()
        if not phase:
            updater.select()
    check(before, state_of(inner), updater.finish())


def averages():
    callbacks = lightning.pytorch.callbacks
    return {
        "mean": lambda: callbacks.WeightAveraging(),
        "moving": lambda: callbacks.EMAWeightAveraging(decay=0.9),
        "each epoch": lambda: callbacks.StochasticWeightAveraging(1e-2, 1),
    }


@pytest.mark.filterwarnings("ignore:.*Swapping scheduler")
@pytest.mark.parametrize("ours_is", ["first", "last"])
@pytest.mark.parametrize("kind", averages())
def test_averages_of_weights_are_those_of_the_sparse_phase(tmp_path, kind, ours_is):
    module, update = Module(net()), lightning_callback(full_epochs=2, ratio=0.1)
    before = state_of(module)
    callbacks = [update, averages()[kind]()][:: 1 if ours_is == "first" else -1]
    last = {}

    class Last(lightning.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            last.update(state_of(pl_module))

    fit(tmp_path, module, *callbacks, Last(), epochs=6)
    check(before, state_of(module), update.masks)
    # The module holds averages, not the weights of the last step.
    assert not torch.equal(last["net.0.weight"], module.net[0].weight)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
        {"avg_fn": get_ema_avg_fn(0.9)},  # rounds also what stays the same
    ],
)
def test_averages_of_a_loop_of_ones_own_begin_after_select(how):
    model = net()
    with torch.no_grad():
        model[0].weight[model[0].weight < 0] = -0.0  # as pruning leaves them
    base = state_of(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    updater = PartialUpdater(model.named_parameters(), ratio=0.1).attach(optimizer)
    inputs, labels = samples().tensors

    def train(average=None):
        for _ in range(4):
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            if average is not None:
                average.update_parameters(model)

    train()
    with pytest.raises(TrainingError, match="comes after select"):
        updater.rewind(model.named_parameters())
    updater.select()
    average = AveragedModel(model, **how)
    train(average)
    masks = updater.finish()
    with pytest.raises(TrainingError, match=r"no '0.weight' .* \.module"):
        updater.rewind(average.named_parameters())
    averaged = state_of(average.module)
    updater.rewind(average.module.named_parameters())
    check(base, state_of(average.module), masks)
    for name, mask in masks.items():
        assert torch.equal(state_of(average.module)[name][mask], averaged[name][mask])
        torch.testing.assert_close(averaged[name][~mask], base[name][~mask])


def test_an_embedding_that_writes_its_weights_is_refused_at_the_start(tmp_path):
    class Embedded(Module):
        def __init__(self):
            super().__init__(net())
            self.words = nn.Embedding(5, 4, max_norm=1.0)

    update = lightning_callback(full_epochs=2, ratio=0.1)
    with pytest.raises(TrainingError, match="'words' has max_norm"):
        fit(tmp_path, Embedded(), update)
