# SPDX-License-Identifier: Apache-2.0
"""Regression on a table: how far diabetes will go in a year, from ten measurements.

cd examples/tasks && dpu-train run diabetes.toml
"""

import numpy as np
import torch
from sklearn.datasets import load_diabetes
from torch import nn


class Units(nn.Module):
    """From numbers around 0 to those of the target: constants of the graph."""

    def __init__(self, middle, spread):
        super().__init__()
        self.middle, self.spread = middle, spread

    def forward(self, values):
        """Return values in the target's units."""
        return values * self.spread + self.middle


def network(shape, values, *, hidden=64):
    """Return a network for ``shape`` measurements that gives ``values`` numbers."""
    return nn.Sequential(
        nn.Linear(*shape, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, values),
        Units(middle=150.0, spread=75.0),
    )


def data():
    """Return training samples, test samples and what the network's numbers are."""
    inputs, target = load_diabetes(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(inputs))
    inputs = torch.from_numpy((20 * inputs[order]).astype(np.float32))
    target = torch.from_numpy(target[order])[:, None]
    return (inputs[:342], target[:342]), (inputs[342:], target[342:]), ["progression"]
