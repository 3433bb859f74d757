# SPDX-License-Identifier: Apache-2.0
"""Train in one process, then in two that torchrun's launcher starts.

See test_parallel.py. The argument is a folder that holds tiny.toml.
"""

import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel

from edge_runtime.errors import DpuError
from packager.size import patch_size
from trainer.cli import main as cli
from trainer.config import load_config, make_config
from trainer.folder.contract import make_contract
from trainer.method.batchnorm import FoldedBatchNorm
from trainer.method.updater import PartialUpdater
from trainer.parallel import by_first, processes, share
from trainer.publish import publish_round, start_run
from trainer.rounds.schedule import run_rounds

# Everything at once: BatchNorm, a re-initialised model that is worse than what is
# deployed, then an update with frozen BatchNorm and few bits, within a budget.
EVERYTHING = {
    "run": {"name": "all", "rounds": 2, "seed": 1},
    # The last batch of 99 samples has three samples, that of 129 one: too few for two.
    "data": {"set": "digits", "initial": 99, "growth": 30, "validation": 100},
    "model": {"name": "mlp", "hidden": [16], "batch_norm": True},
    "update": {
        "first": "full",
        "reinit": 1,
        "budget": "500",
        "dense": "freeze",
        "mantissa_bits": 7,
    },
    "train": {"epochs": 6, "batch": 16, "lr": 1e-2},
}


# All weights move, and the processes start from one network.
MOVED = {
    "run": {"name": "moved", "rounds": 2, "seed": 1},
    "data": {"set": "digits", "initial": 99, "growth": 30, "validation": 100},
    "model": {"name": "mlp", "hidden": [16]},
    "update": {"method": "subspace", "coefficients": 128, "dense": "freeze"},
    "train": {"epochs": 4, "batch": 16, "lr": 1e-2},
}


# One tensor trains alone: the other has no gradients that processes could wait for.
NAMED = MOVED | {
    "run": {"name": "named", "rounds": 2, "seed": 1},
    "update": {"method": "named", "tensors": "3.weight", "dense": "freeze"},
}


def select_by_different_scores():
    """Select by scores that differ from process to process."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    updater = PartialUpdater(model.named_parameters(), ratio=0.25)
    torch.manual_seed(distributed.get_rank())
    masks = updater.select({"weight": torch.rand(8, 8)})
    return masks["weight"], model.weight.detach()


def shares():
    """Return the shares of batches of 1 to 9 samples, with their weights."""
    found = {}
    for size in range(1, 10):
        inputs, _, weight = share(torch.arange(size), torch.zeros(size))
        found[size] = inputs.tolist(), weight
    return found


INPUTS = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
LABELS = INPUTS[:, :3].argmax(1)


def own_net():
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)
    )


def own_loop(run, *, first_alone, rounds=3):
    """Somebody's loop under DistributedDataParallel: one wrapper, several rounds."""
    rank = distributed.get_rank()
    net = start_run(
        run,
        own_net,
        contract=make_contract((6,), ["a", "b", "c"]),
        golden_inputs=INPUTS[:8].numpy(),
        golden_labels=LABELS[:8].numpy(),
    )
    model = DistributedDataParallel(net)
    mine = slice(rank, None, 2)

    def train():
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(INPUTS[mine]), LABELS[mine]).backward()
            optimizer.step()

    seen = []
    for number in range(rounds):
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        updater = PartialUpdater(net.named_parameters(), ratio=0.2).attach(optimizer)
        train()
        updater.select()
        train()
        masks = updater.finish()
        if not first_alone:
            if number == 1:  # all of them learn that the first one refuses
                none = {name: torch.zeros_like(mask) for name, mask in masks.items()}
                with pytest.raises(DpuError, match="outside of its mask"):
                    publish_round(run, model, none)
            seen.append(publish_round(run, model, masks))
        elif rank == 0:
            publish_round(run, net, masks)
    return seen, {name: p.detach() for name, p in net.named_parameters()}


def folded():
    """Somebody's loop with folded BatchNorm; each process has a loader of its own."""
    net = own_net()
    model = DistributedDataParallel(net)
    mine = slice(distributed.get_rank(), None, 2)
    seen = []
    for number in range(2):
        norms = FoldedBatchNorm(net)
        if number:
            norms.unfold([(INPUTS[mine], LABELS[mine])])
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(INPUTS[mine]), LABELS[mine]).backward()
            optimizer.step()
        norms.fold()
        seen.append({name: value.clone() for name, value in net.state_dict().items()})
    return seen


def main(out):
    torch.set_num_threads(1)
    with pytest.raises(SystemExit, match="0"):
        cli(["run", str(out / "tiny.toml"), "--runs", str(out), "--json"])
    with processes():  # the same ones again
        rank = distributed.get_rank()
        records = run_rounds(make_config(EVERYTHING), out, pack=patch_size)
        moved = run_rounds(make_config(MOVED), out)
        named = run_rounds(make_config(NAMED), out)
        mask, weight = select_by_different_scores()
        seen = {
            "records": [(r.target, dict(r.metrics)) for r in records],
            "moved": [r.target for r in moved],
            "named": [r.target for r in named],
            "mask": mask,
            "weight": weight,
            "shares": shares(),
            "first": by_first(lambda: rank),
            "together": own_loop(out / "together", first_alone=False),
            "alone": own_loop(out / "alone", first_alone=True),
            "folded": folded(),
        }
        torch.save(seen, out / f"rank_{rank}.pt")


def launch(out):
    torch.set_num_threads(1)
    run_rounds(load_config(out / "tiny.toml"), out / "one")
    # What torchrun calls. Forked, as imports and a first export take most of the time.
    launched = LaunchConfig(
        1,
        1,
        nproc_per_node=2,
        start_method="fork",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="test",
        max_restarts=0,
    )
    elastic_launch(launched, main)(out)


if __name__ == "__main__":
    launch(Path(sys.argv[1]))
