# SPDX-License-Identifier: Apache-2.0
"""Audio, one axis: what a microphone hears.

cd examples/tasks && dpu-train run tones.toml
"""

import numpy as np
import torch
from torch import nn

CLASSES = ["noise", "hum", "whistle", "siren"]
RATE, LENGTH = 4000, 256  # readings a second, of one clip


def network(shape, classes, *, channels=8):
    """Return a network for clips of any length."""
    return nn.Sequential(
        nn.Conv1d(shape[0], channels, 16, stride=4),
        nn.ReLU(),
        nn.Conv1d(channels, 2 * channels, 8, stride=2),
        nn.ReLU(),
        nn.AdaptiveMaxPool1d(1),
        nn.Flatten(),
        nn.Linear(2 * channels, classes),
    )


def data():
    """Return training samples, test samples, the classes, and how raw values scale."""
    return _clips(500, seed=1), _clips(200, seed=2), CLASSES, {"scale": 1 / 32768}


def _clips(count, seed):
    """Make clips of 16 bits, as microphones give them."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, len(CLASSES), count)
    seconds = np.arange(LENGTH) / RATE
    low, high = np.array([0, 100, 900, 300])[labels], random.uniform(0.9, 1.1, count)
    rising = np.array([0, 0, 0, 9000])[labels][:, None]
    hertz = (low * high)[:, None] + rising * seconds
    start = random.uniform(0, 2 * np.pi, (count, 1))
    sound = np.sin(2 * np.pi * hertz * seconds + start) * (labels > 0)[:, None]
    sound = 6000 * sound + random.normal(0, 2500, (count, LENGTH))
    # torch has no unsigned types of 16 bits; these are signed, and stay so.
    clips = torch.from_numpy(sound.astype(np.int16)[:, None])
    return clips, torch.from_numpy(labels)
