# SPDX-License-Identifier: Apache-2.0
"""The training loop: short, plain, and to be replaced by your own."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from edge_runtime.errors import ConfigError
from edge_runtime.update.metrics import Metric, Sums
from trainer import parallel
from trainer.data.samples import Samples, batches
from trainer.recipe.schema import TrainConfig
from trainer.rounds.objective import ACCURACY, Judge, Loss
from trainer.rounds.speed import Autocast, arranger
from trainer.trees import concatenated, leaves

# Of one evaluation batch: at most 27 images of 224x224 pixels. What the network holds
# on its way is a multiple of its input; on a CPU it should stay in the cache, which
# makes ResNet20 twice to three times as fast as in batches of 1000.
EVALUATION_SAMPLES = {"cpu": 128}
MOST_EVALUATION_SAMPLES, EVALUATION_BYTES = 1000, 1 << 24


def choose_device(name: str) -> torch.device:
    """Return where to train: ``cpu``, ``cuda``, or what there is for ``auto``.

    Raises:
        ConfigError: There is no such device.
    """
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ConfigError(
            'train.device is "cuda", but torch finds no GPU; choose "auto" or "cpu"'
        )
    return torch.device("cuda" if found and name != "cpu" else "cpu")


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: Iterable[tuple[Tensor, Any]],
    loss_of: Loss = functional.cross_entropy,
    autocast: Autocast = nullcontext,
) -> float:
    """Train on every batch once and return the mean loss a sample.

    Among several processes each trains on its share of every batch.

    Args:
        model: Returns what ``loss_of`` takes, such as logits (B, classes).
        optimizer: Of the model's parameters.
        epoch: Batches of inputs (B, ...) and labels, such as (B,) int64.
        loss_of: From what the model returns and the labels to the mean loss.
        autocast: Gives what a forward pass and its loss are computed in.
    """
    model.train()
    arrange = arranger(model)
    total: Tensor | float = 0.0  # becomes a tensor where the losses are
    count = 0
    for inputs, labels in epoch:
        optimizer.zero_grad()
        mine, targets, weight = parallel.share(inputs, labels)
        with autocast():
            loss = loss_of(model(arrange(mine)), targets) * weight
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total = total + loss.detach() * len(inputs)
        count += len(inputs)
    parallel.copy_buffers(model)
    return float(parallel.mean(torch.as_tensor(total))) / count


@torch.no_grad()
def evaluate(model: nn.Module, samples: Samples, judge: Judge = ACCURACY) -> float:
    """Return how good a model is on prepared samples; for accuracy a share, 0 to 1.

    Several processes share the batches, or leave them to the first where the metric is
    a function of your own, which gets all at once; all processes must call it.
    """
    metric = judge.metric
    if not isinstance(metric, Metric):
        model.eval()
        size = _evaluation_size(samples)
        return parallel.by_first(lambda: _own_score(model, samples, size, metric))
    return metric.value(np.sum(batch_sums(model, samples, metric), axis=0))


@torch.no_grad()
def batch_sums(
    model: nn.Module, samples: Samples, metric: Metric, *, count: int = 1
) -> list[Sums]:
    """Return what a metric adds up, of each batch of prepared samples.

    Several processes share the batches; all of them must call it.

    Args:
        model: To be evaluated.
        samples: Prepared ones.
        metric: One that devices know.
        count: How many batches are wanted at least.
    """
    model.eval()
    size = min(_evaluation_size(samples), max(1, len(samples) // count))
    mine = [
        metric.sums(next(leaves(model(inputs))).cpu().numpy(), labels.cpu().numpy())
        for index, (inputs, labels) in enumerate(batches(samples, size))
        if parallel.is_mine(index)
    ]
    # A process that had no batch does not know what the sums look like.
    return [sums for process in parallel.gathered(mine) for sums in process]


def _evaluation_size(samples: Samples) -> int:
    one = 4 * math.prod(samples.inputs.shape[1:])  # bytes, as float32
    device = next(leaves(samples.labels)).device.type
    most = EVALUATION_SAMPLES.get(device, MOST_EVALUATION_SAMPLES)
    return max(1, min(most, EVALUATION_BYTES // one))


def _own_score(
    model: nn.Module, samples: Samples, size: int, own: Callable[[Any, Any], Any]
) -> float:
    pairs = [(model(inputs), labels) for inputs, labels in batches(samples, size)]
    return float(own(*concatenated(pairs)))


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the recipe's optimizer of all the model's trainable parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Fused: one pass over the weights; on CPU about a third of the default's time.
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            fused=True,
        )
    return torch.optim.Adam(
        parameters, config.lr, weight_decay=config.weight_decay, fused=True
    )


def learning_rate(
    config: TrainConfig, epoch: int, epochs: int, start: float | None = None
) -> float:
    """Return the learning rate of one epoch of a phase.

    Args:
        config: The recipe's schedule.
        epoch: 0 for the first one.
        epochs: Length of the phase.
        start: Learning rate at the start of the phase; default: the recipe's.
    """
    lr = config.lr if start is None else start
    if config.schedule == "step":
        return lr * config.factor ** (3 * epoch // epochs)
    if config.schedule == "cosine":
        return lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
    return lr


@torch.no_grad()
def recompute_batchnorm(model: nn.Module, epoch: Iterable[tuple[Tensor, Any]]) -> None:
    """Set the running statistics of BatchNorm to those of the current weights.

    After rewinding, the statistics are still those of the fully trained network, and
    with them the rewound one is no better than chance.

    Args:
        model: Changed in place; left alone where it has no BatchNorm.
        epoch: Batches of training samples; the statistics are the mean over them.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    for inputs, _ in epoch:
        model(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@contextmanager
def cpu_settings(threads: int) -> Iterator[None]:
    """Train on a number of CPU threads, with denormal floats taken as zero.

    The number of threads decides the order of sums, so a recipe names it: runs are the
    same on machines with more cores. For small networks one thread is the fastest too:
    on two busy cores the digits recipe took 9 s of CPU time with one, 110 s with two.

    The moments of dead units decay into denormals, and Adam then takes two to three
    times as long, for the same results.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
