# SPDX-License-Identifier: Apache-2.0
"""Segmentation: which pixels are of a disc, which of a square.

cd examples/tasks && dpu-train run shapes.toml
"""

import numpy as np
import torch
from torch import nn

CLASSES = ["background", "disc", "square"]
SIZE = 16  # pixels a side


def network(shape, classes, *, width=8):
    """Return a network that gives one logit for each class, for every pixel."""
    channels = shape[0]
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=2, dilation=2),
        nn.ReLU(),
        nn.Conv2d(2 * width, classes, 3, padding=1),
    )


def data():
    """Return training samples, test samples, the classes, and how raw values scale."""
    return _images(300, seed=1), _images(100, seed=2), CLASSES, {"scale": 1 / 255}


def _images(count, seed):
    """Draw noisy pictures of one disc and one square; labels are maps of classes."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    labels = np.zeros((count, SIZE, SIZE), np.int64)
    for label in labels:
        (row, column), radius = random.integers(3, SIZE - 3, 2), random.integers(2, 4)
        label[(y - row) ** 2 + (x - column) ** 2 <= radius**2] = 1
        (row, column), side = random.integers(0, SIZE - 5, 2), random.integers(3, 6)
        label[row : row + side, column : column + side] = 2
    values = np.array([60, 130, 190])[labels] + random.normal(0, 15, labels.shape)
    images = values.clip(0, 255).astype(np.uint8)[:, None]
    return torch.from_numpy(images), torch.from_numpy(labels)
