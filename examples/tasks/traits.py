# SPDX-License-Identifier: Apache-2.0
"""Several labels at once: what is true of a handwritten digit.

cd examples/tasks && dpu-train run traits.toml
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

TRAITS = {
    "even": {0, 2, 4, 6, 8},
    "five or more": {5, 6, 7, 8, 9},
    "has a loop": {0, 6, 8, 9},
    "prime": {2, 3, 5, 7},
}


def network(shape, traits, *, hidden=96):
    """Return a network that gives one logit for each trait."""
    width = int(np.prod(shape))
    layers = [nn.Flatten(), nn.Linear(width, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, traits))


def data():
    """Return training samples, test samples, the traits, and how raw values scale."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    inputs = torch.from_numpy(digits.images[order, None].astype(np.uint8))
    found = [[digit in those for those in TRAITS.values()] for digit in digits.target]
    labels = torch.tensor(found, dtype=torch.float32)[order]
    train, test = (inputs[:1400], labels[:1400]), (inputs[1400:], labels[1400:])
    return train, test, list(TRAITS), {"scale": 1 / 16}
