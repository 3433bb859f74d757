"""Your network and your data, as recipe.toml names them.

It trains as it is, on handwritten digits; put yours in place of them.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

Samples = tuple[Tensor, Tensor]  # inputs and labels


def network(shape: tuple[int, ...], classes: int, *, hidden: int = 64) -> nn.Module:
    """Build the network.

    Args:
        shape: Of one input, here (1, 8, 8).
        classes: How many there are; one output for each.
        hidden: An option, from section [model] of the recipe.
    """
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * height * width, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )


def data() -> tuple[Samples, Samples, list[str], dict[str, float]]:
    """Return training samples, test samples, class names, and how raw values scale.

    Inputs are (N, channels, height, width), raw as a device gets them; the network sees
    them times ``scale``. Labels count from 0. A map-style torch Dataset will do in
    place of a pair of tensors.
    """
    digits = load_digits()
    inputs = torch.from_numpy(digits.images[:, None].astype(np.uint8))  # 0 to 16
    labels = torch.from_numpy(digits.target)
    train, test = (inputs[:1400], labels[:1400]), (inputs[1400:], labels[1400:])
    return train, test, [str(digit) for digit in range(10)], {"scale": 1 / 16}
