# SPDX-License-Identifier: Apache-2.0
"""One run in several processes: ``torchrun --nproc-per-node 4 -m trainer run RECIPE``.

Every process draws the same global batches and trains on its share of each;
DistributedDataParallel averages the gradients. What decides (masks, accuracies, the
buffers of BatchNorm) is the same in all of them, and the first one alone writes. The
processes must see the same folders.

In a single process nothing here does anything.
"""

import atexit
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from edge_runtime.errors import ConfigError, TrainingError
from trainer.trees import each

T = TypeVar("T")
_CPU = torch.device("cpu")
_told: Counter[str] = Counter()  # what the first process told the others, how often


def is_first() -> bool:
    """Tell whether this process is the one that writes and reports."""
    if distributed.is_initialized():
        return bool(distributed.get_rank() == 0)
    return int(os.environ.get("RANK", "0")) == 0


def is_alone() -> bool:
    """Tell whether no other process shares the training."""
    return _count() == 1


@contextmanager
def processes(device: torch.device = _CPU) -> Iterator[None]:
    """Join the processes that torchrun started, if it did, until the program ends.

    Args:
        device: What they train on; each takes a GPU of its own.

    Raises:
        ConfigError: There are fewer GPUs than processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        backend = "gloo"
        if device.type == "cuda":
            _take_gpu(int(os.environ["LOCAL_RANK"]))
            backend = "cpu:gloo,cuda:nccl"
        distributed.init_process_group(backend)
        # Not sooner: a second group would find the addresses of the first, and hang.
        atexit.register(distributed.destroy_process_group)
    yield
    _wait()  # or the first to leave takes the connections from the others


@contextmanager
def first_before_others() -> Iterator[None]:
    """Let the first process finish a block (a download) before the others start it."""
    if not is_first():
        _wait()
    yield
    if is_first():
        _wait()


def by_first(action: Callable[[], T]) -> T:
    """Run an action in the first process; return its result in every process."""
    if is_alone():
        return action()
    result = [action() if is_first() else None]
    distributed.broadcast_object_list(result)
    return result[0]  # type: ignore[return-value]


def told_by_first(what: str, action: Callable[[], str]) -> str:
    """Run an action in the first process; return its text in every process.

    Unlike :func:`by_first` the first process waits for nobody, so that loops which call
    this in all processes are right, and those which call it in the first one alone.

    Args:
        what: Names the action; its n-th call here is the first process' n-th call.
        action: Returns what the others are told.

    Raises:
        TrainingError: The first process failed, or no process group is there yet.
    """
    if is_alone():
        if not is_first():
            raise TrainingError(
                f"process {os.environ['RANK']} would write what the first one writes: "
                "call torch.distributed.init_process_group() before, and "
                "destroy_process_group() after the last round"
            )
        return action()
    store = distributed.distributed_c10d._get_default_store()
    _told[what] += 1
    key = f"dpu-edge/{what}/{_told[what]}"
    if not is_first():
        fine, _, text = store.get(key).decode().partition(" ")
        if fine != "yes":
            raise TrainingError(f"the first process refused: {text}")
        return text
    try:
        text = action()
    except Exception as err:
        # Whatever it is: the others wait, and may go on where the first one does.
        store.set(key, f"no {type(err).__name__}: {err}")
        raise
    store.set(key, f"yes {text}")
    return text


def data_parallel(model: nn.Module) -> nn.Module:
    """Wrap a network so that its gradients are those of the whole global batch."""
    if is_alone():
        return model
    # Buffers are copied once an epoch, by copy_buffers().
    return DistributedDataParallel(model, broadcast_buffers=False)


def share(inputs: Tensor, labels: Any) -> tuple[Tensor, Any, float]:
    """Return this process' part of a global batch, and the weight of its mean loss.

    The average of the weighted losses over all processes is the global mean. A batch
    too small for two samples a process goes to all of them whole, as BatchNorm cannot
    train on one.

    Args:
        inputs: (B, ...).
        labels: (B, ...), or several such tensors (:mod:`trainer.trees`).
    """
    count = _count()
    if count == 1 or len(inputs) < 2 * count:
        return inputs, labels, 1.0
    mine = slice(distributed.get_rank(), None, count)
    weight = len(inputs[mine]) * count / len(inputs)
    return inputs[mine], each(lambda part: part[mine], labels), weight


def mean(value: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes."""
    return total(value) / _count()


def total(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    if not is_alone():
        distributed.all_reduce(value)
    return value


def gathered(value: T) -> list[T]:
    """Return what each process has, in the same order everywhere."""
    if is_alone():
        return [value]
    found: list[Any] = [None] * _count()
    distributed.all_gather_object(found, value)
    return found


def is_mine(index: int) -> bool:
    """Tell whether this process is the one to do the piece of work with an index."""
    return is_alone() or index % _count() == distributed.get_rank()


def copy_buffers(model: nn.Module) -> None:
    """Give all processes the buffers (BatchNorm statistics) of the first."""
    if not is_alone():
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)


def masks_of_first(masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the first process' masks in all of them.

    Scores that differ in their last bits would otherwise part the processes for good.
    """
    if is_alone():
        return masks
    sent = {name: mask.to(torch.uint8) for name, mask in masks.items()}
    for mask in sent.values():
        distributed.broadcast(mask, 0)
    return {name: mask.bool() for name, mask in sent.items()}


def of_first(value: Tensor) -> Tensor:
    """Return the first process' tensor in all of them."""
    if not is_alone():
        value = value.clone()
        distributed.broadcast(value, 0)
    return value


def _take_gpu(number: int) -> None:
    found = torch.cuda.device_count()
    if number >= found:
        raise ConfigError(
            f"process {number} of this machine (from 0) has no GPU, as there are only "
            f'{found}; start {found} with --nproc-per-node, or set train.device = "cpu"'
        )
    torch.cuda.set_device(number)


def _count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def _wait() -> None:
    if not is_alone():
        distributed.barrier()
