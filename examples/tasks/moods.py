# SPDX-License-Identifier: Apache-2.0
"""Text: a sentence as whole numbers, one for each word; an Embedding and a GRU.

cd examples/tasks && dpu-train run moods.toml
"""

import numpy as np
import torch
from torch import nn

CLASSES = ["bad", "good"]
WORDS = [
    "",
    "not",
    "the",
    "a",
    "soup",
    "was",
    "room",
    "and",
    "bad",
    "dull",
    "good",
    "fine",
]
BAD, GOOD = (8, 9), (10, 11)
LENGTH = 8  # words; shorter sentences end in 0


class Reader(nn.Module):
    """Reads word after word, and answers after the last one."""

    def __init__(self, classes, width):
        super().__init__()
        self.words = nn.Embedding(len(WORDS), width)
        self.memory = nn.GRU(width, width, batch_first=True)
        self.answer = nn.Linear(width, classes)

    def forward(self, sentences):
        """Return logits of the classes."""
        read, _ = self.memory(self.words(sentences))
        return self.answer(read[:, -1])


def network(shape, classes, *, width=16):
    """Return a network for sentences of ``shape`` words; any length will do."""
    del shape
    return Reader(classes, width)


def data():
    """Return training samples, test samples and the classes; nothing is scaled."""
    return _sentences(600, seed=1), _sentences(200, seed=2), CLASSES


def _sentences(count, seed):
    """Make sentences; "not" turns the word that comes after it around."""
    random = np.random.default_rng(seed)
    labels, turned = random.integers(0, 2, (2, count))
    words = random.integers(2, 8, (count, LENGTH))
    place = random.integers(1, LENGTH, count)
    rows = np.arange(count)
    mood = np.array([BAD, GOOD])[labels ^ turned, random.integers(0, 2, count)]
    words[rows, place] = mood
    words[rows[turned == 1], place[turned == 1] - 1] = WORDS.index("not")
    return torch.from_numpy(words), torch.from_numpy(labels)
