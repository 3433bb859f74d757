# SPDX-License-Identifier: Apache-2.0
"""Your own network and data for ``dpu-train``: two functions that a recipe names.

    cd examples && dpu-train run own_model.toml

Both are called by name, ``own_model:network`` and ``own_model:data``, so they may stand
in any module that Python finds from where ``dpu-train`` is started.
"""

import numpy as np
import torch
from torch import nn

CLASSES = ["still", "walking", "running"]
LENGTH = 32  # readings of an accelerometer, three axes


def network(shape, classes, *, channels=8):
    """Return a network for inputs of ``shape``; ``channels`` is a key of [model]."""
    axes, length = shape
    return nn.Sequential(
        nn.Conv1d(axes, channels, 5, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(channels * length, classes),
    )


def data():
    """Return training samples, test samples and the names of the classes."""
    return _recordings(6000, seed=1), _recordings(1000, seed=2), CLASSES


def _recordings(count, seed):
    """Made up here; yours come from files. Inputs are raw, as a device gets them."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, len(CLASSES), count)
    time = np.arange(LENGTH) / LENGTH
    phase = random.uniform(0, 2 * np.pi, (count, 3, 1))
    steps = np.array([0.0, 2.0, 5.0])[labels][:, None, None]
    swing = np.sin(2 * np.pi * steps * time + phase) * (steps > 0)
    readings = swing + random.normal(0, 0.5, (count, 3, LENGTH))
    return torch.from_numpy(readings.astype(np.float32)), torch.from_numpy(labels)
