# SPDX-License-Identifier: Apache-2.0
"""Your own network, optimizer and loop, with three lines of ours around them.

    python examples/own_loop.py --runs runs

Writes ``runs/own_loop`` with a first deployment and two updates, and says after each
round what devices will get. Then ``dpu-pack own_loop/round_00 --bundle`` and so on.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from trainer import PartialUpdater, make_contract, publish_round, start_run

digits = load_digits()
images = digits.images[:, None].astype(np.uint8)  # as a camera would give them
labels = torch.from_numpy(digits.target)
inputs = torch.from_numpy(images).float() / 16  # what the contract below says
held_out = slice(1500, None)  # never trained on


def build():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 64, 10),
    )


def train(model, optimizer, samples, epochs):  # nothing in it is ours
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for batch in torch.randperm(samples).split(32):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        print(f"\r  epoch {epoch + 1}/{epochs}  loss {total / samples:.4f}", end="")
    print()


@torch.no_grad()
def accuracy(model):
    model.eval()
    return (model(inputs[held_out]).argmax(1) == labels[held_out]).double().mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--epochs", type=int, default=8, help="of each of two phases")
    options = parser.parse_args()
    if options.epochs < 1:
        parser.error(f"found --epochs {options.epochs}, expected 1 or more")
    torch.manual_seed(0)
    torch.set_num_threads(1)

    model = start_run(
        options.runs / "own_loop",
        build,
        contract=make_contract((1, 8, 8), list("0123456789"), scale=1 / 16),
        golden_inputs=images[held_out][:64],
        golden_labels=digits.target[held_out][:64],
    )
    for samples in (500, 1000, 1500):  # one round each: the data grow
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        updater = PartialUpdater(model.named_parameters(), ratio=0.02)
        updater.attach(optimizer)
        train(model, optimizer, samples, options.epochs)  # every weight trains
        updater.select()  # keep the best 2 %, rewind the rest
        train(model, optimizer, samples, options.epochs)  # only those move
        masks = updater.finish()  # raises if any other weight changed
        record = publish_round(options.runs / "own_loop", model, masks, samples=samples)
        print(f"round {record.round}: {record.outcome}, {accuracy(model):.1%} right")


if __name__ == "__main__":
    main()
