# SPDX-License-Identifier: Apache-2.0
"""Detection with a loss and a metric of one's own: what lies there, and where.

    cd examples/tasks && dpu-train run boxes.toml

The network returns two tensors, and the targets are two tensors by name; devices get
both outputs.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

CLASSES = ["bright", "striped"]
SIZE = 16  # pixels a side


class Finder(nn.Module):
    """Gives logits of the classes, and left, top, right, bottom as shares of a side."""

    def __init__(self, channels, classes, width):
        super().__init__()
        self.look = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(width * (SIZE // 4) ** 2, 64),
            nn.ReLU(),
        )
        self.what, self.where = nn.Linear(64, classes), nn.Linear(64, 4)

    def forward(self, images):
        """Return logits and boxes."""
        seen = self.look(images)
        return self.what(seen), self.where(seen).sigmoid()


def network(shape, classes, *, width=8):
    """Return a network for images of ``shape``."""
    return Finder(shape[0], classes, width)


def loss(outputs, targets):
    """Return the mean loss of a batch, of what the network returns."""
    logits, boxes = outputs
    what = functional.cross_entropy(logits, targets["class"])
    return what + 10 * functional.smooth_l1_loss(boxes, targets["box"])


def overlap(outputs, targets):
    """Return the mean overlap of boxes, 0 where the class is wrong."""
    logits, boxes = outputs
    wanted = targets["box"]
    low = torch.maximum(boxes[:, :2], wanted[:, :2])
    high = torch.minimum(boxes[:, 2:], wanted[:, 2:])
    both = (high - low).clamp(min=0).prod(1)
    areas = [(box[:, 2:] - box[:, :2]).clamp(min=0).prod(1) for box in (boxes, wanted)]
    shares = both / (sum(areas) - both)
    return (shares * (logits.argmax(1) == targets["class"])).mean()


def data():
    """Return training samples, test samples, the classes, and how raw values scale."""
    return _images(500, seed=1), _images(150, seed=2), CLASSES, {"scale": 1 / 255}


def _images(count, seed):
    random = np.random.default_rng(seed)
    labels = random.integers(0, len(CLASSES), count)
    sides = random.integers(4, 9, (count, 2))
    corners = (random.random((count, 2)) * (SIZE - sides + 1)).astype(int)
    images = random.integers(0, 60, (count, 1, SIZE, SIZE)).astype(np.uint8)
    for image, label, (x, y), (width, height) in zip(
        images[:, 0], labels, corners, sides, strict=True
    ):
        image[y : y + height : 1 + label, x : x + width] = 220
    boxes = np.concatenate([corners, corners + sides], axis=1) / SIZE
    return torch.from_numpy(images), {"class": labels, "box": boxes}
