# SPDX-License-Identifier: Apache-2.0
"""How steps are computed changes how fast they are, and little of what they give."""

from functools import partial

import pytest
import torch
from torch import nn

from edge_runtime.errors import ConfigError
from trainer.data.samples import Samples, batches
from trainer.method.updater import PartialUpdater
from trainer.recipe.schema import TrainConfig
from trainer.rounds.loop import make_optimizer, train_epoch
from trainer.rounds.speed import arranged, arranger, autocast, compiled, computing

CPU = torch.device("cpu")
IMAGES = Samples(
    torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
    torch.arange(32) % 4,
)


def config(**keys):
    # Not Adam: of a bias before BatchNorm, it makes steps of rounding errors.
    return TrainConfig(epochs=1, optimizer="sgd", lr=0.05, **keys)


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(8 * 36, 4))


def trained(options):
    """Return the weights after a few steps, and the loss."""
    model = arranged(network(), options)
    optimizer = make_optimizer(model, options)
    forward, how = compiled(model, options), autocast(options, CPU)
    with computing(options, CPU):
        loss = train_epoch(forward, optimizer, batches(IMAGES, 8), autocast=how)
    return {n: p.detach().clone() for n, p in model.named_parameters()}, loss


@pytest.fixture(scope="module")
def plain():
    return trained(config())


@pytest.mark.parametrize(
    ("options", "apart"),
    [
        ({"channels_last": True}, 1e-3),
        ({"deterministic": True}, 0),
        ({"precision": "bf16"}, 0.1),
    ],
)
def test_an_option_gives_the_same_network_up_to_its_precision(plain, options, apart):
    weights, loss = trained(config(**options))
    assert loss == pytest.approx(plain[1], rel=max(apart, 1e-7))
    for name, expected in plain[0].items():
        assert weights[name].dtype == torch.float32
        torch.testing.assert_close(weights[name], expected, atol=apart, rtol=apart)
    if options.get("precision"):  # it was really computed in fewer bits
        assert any(not torch.equal(weights[n], e) for n, e in plain[0].items())


def test_a_compiled_network_trains_the_weights_of_the_plain_one(plain, monkeypatch):
    # Traced and differentiated as always; without the C++ compiler, which takes long.
    eager = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", eager)
    weights, loss = trained(config(compile=True))
    assert loss == pytest.approx(plain[1], rel=1e-3)
    assert weights.keys() == plain[0].keys()
    for name, expected in plain[0].items():
        torch.testing.assert_close(weights[name], expected, atol=1e-3, rtol=1e-3)


def test_weights_in_channels_last_are_selected_and_frozen_as_any_others():
    options = config(channels_last=True)
    masks = []
    for model in (network(), arranged(network(), options)):
        optimizer = make_optimizer(model, options)
        updater = PartialUpdater(model.named_parameters(), ratio=0.1).attach(optimizer)
        scores = {n: b.abs() for n, b in updater.base.items()}
        masks.append(updater.select(scores))
        train_epoch(model, optimizer, batches(IMAGES, 8))
        updater.finish()  # or it raises
    for name, mask in masks[0].items():
        assert torch.equal(mask, masks[1][name])


def test_images_take_the_layout_of_the_kernels_that_see_them():
    last = arranged(network(), config(channels_last=True))
    inputs = IMAGES.inputs
    assert arranger(last)(inputs).is_contiguous(memory_format=torch.channels_last)
    assert arranger(network())(inputs) is inputs
    rows = torch.zeros(2, 5)
    assert arranger(last)(rows) is rows


def test_settings_of_the_process_come_back():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    with computing(config(deterministic=True), CPU):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.allow_tf32
    assert not torch.are_deterministic_algorithms_enabled()
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark) == before


def test_tf32_without_a_gpu_is_refused():
    with (
        pytest.raises(ConfigError, match="for GPUs alone"),
        computing(config(precision="tf32"), CPU),
    ):
        pass
