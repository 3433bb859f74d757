# SPDX-License-Identifier: Apache-2.0
"""Somebody's own networks and data, for --model and --data."""

import torch
from torch import nn
from torch.utils.data import Dataset


class Rows(Dataset):
    """A data set that says its labels only sample by sample."""

    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(count, 6, generator=generator)
        self.reads = []

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        self.reads.append(index)
        return self.inputs[index], int(self.inputs[index, :3].argmax())


def tensors():
    train, test = Rows(300, 0), Rows(60, 1)
    halves = [(h.inputs, h.inputs[:, :3].argmax(1)) for h in (train, test)]
    return *halves, ["a", "b", "c"]


def dataset():
    return Rows(300, 0), Rows(60, 1), ["a", "b", "c"], {"mean": [0.1], "std": [2.0]}


def small(shape, classes, *, width=12):
    return nn.Sequential(nn.Linear(*shape, width), nn.ReLU(), nn.Linear(width, classes))


class Tied(nn.Module):
    """Two layers with one matrix."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 3)

    def forward(self, inputs):
        """Return logits."""
        return self.head(self.second(self.first(inputs).relu()).relu())


def tied():
    return Tied()


def frozen():
    model = small((6,), 3)
    model[0].weight.requires_grad_(False)
    return model


class Drifting(nn.Module):
    """Training changes what it keeps outside of its state dict."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = small((6,), 3), 1.0

    def forward(self, inputs):
        """Return logits, larger after every step."""
        if self.training:
            self.scale *= 1.01
        return self.inner(inputs) * self.scale


def drifting():
    return Drifting()


class Drawn(nn.Module):
    """Each build draws what the state dict does not hold."""

    def __init__(self):
        super().__init__()
        self.inner = small((6,), 3)
        self.register_buffer("noise", torch.rand(6), persistent=False)

    def forward(self, inputs):
        """Return logits."""
        return self.inner(inputs * self.noise)


def drawn():
    return Drawn()


def wrong_head():
    return small((6,), 5)


def needs_more(a, b, c):
    return small((6,), 3)


def nothing():
    return None


def wrong_labels():
    train, test, _ = tensors()
    return train, test, ["a", "b"]
