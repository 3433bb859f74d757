"""What each of two processes does in test_parallel.py; the argument is a folder."""

import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from trainer.cli import main as cli
from trainer.config import make_config
from trainer.parallel import by_first, processes, share
from trainer.rounds import run_rounds
from trainer.updater import PartialUpdater

BATCH_NORM = {
    "run": {"name": "norm", "rounds": 2, "seed": 1},
    # The last batch of 33 samples has one sample, that of 51 three: too few for two.
    "data": {"set": "digits", "initial": 51, "growth": 50, "validation": 100},
    "model": {"name": "small_cnn", "channels": [4, 4], "hidden": 8},
    "update": {"ratio": 0.05},
    "train": {"epochs": 3, "batch": 16, "lr": 1e-2},
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


def main(out):
    torch.set_num_threads(1)
    with pytest.raises(SystemExit, match="0"):
        cli(["run", str(out / "tiny.toml"), "--runs", str(out), "--json"])
    with processes():  # the same ones again
        rank = distributed.get_rank()
        records = run_rounds(make_config(BATCH_NORM), out)
        mask, weight = select_by_different_scores()
        seen = {
            "records": [(r.target, dict(r.metrics)) for r in records],
            "mask": mask,
            "weight": weight,
            "shares": shares(),
            "first": by_first(lambda: rank),
        }
        torch.save(seen, out / f"rank_{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
