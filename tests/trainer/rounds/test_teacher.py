# SPDX-License-Identifier: Apache-2.0
"""What a teacher answers stays the same, and is asked for as seldom as can be."""

import numpy as np
import pytest
import torch
from torch import nn

from trainer.data.samples import Samples, batches
from trainer.rounds import teacher as module
from trainer.rounds.teacher import Teacher

SIZE = 4


class Counting(nn.Module):
    """Sums of whole numbers, exact in any order; counts what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    def forward(self, inputs):
        self.asked += len(inputs)
        return torch.stack([inputs.sum(1), 2 * inputs[:, 0]], 1)


def epochs_of(teacher, count, epochs, *, augmented=False):
    """Yield inputs and answers of every batch of some epochs."""
    random = torch.Generator().manual_seed(3)
    inputs = torch.randint(-9, 9, (count, 3), generator=random).float()
    samples = Samples(inputs, torch.arange(count))
    for _ in range(epochs):
        order = torch.randperm(count, generator=random)
        epoch = batches(samples, SIZE, order)
        for batch, (labels, answers) in teacher.beside(
            epoch, None if augmented else order, np.random.default_rng(0)
        ):
            assert torch.equal(batch, inputs[labels])
            yield batch, answers


@pytest.mark.parametrize("count", [8, 9, 11])
def test_answers_that_are_kept_are_those_that_would_be_given_anew(count):
    asked = Counting()
    found = list(epochs_of(Teacher(asked, count), count, 5))
    assert all(torch.equal(answers, Counting()(batch)) for batch, answers in found)


def test_samples_of_whole_batches_are_answered_once():
    asked = Counting()
    list(epochs_of(Teacher(asked, 8), 8, 5))
    assert asked.asked == 8


def test_a_last_batch_of_another_size_is_answered_every_time():
    asked = Counting()
    list(epochs_of(Teacher(asked, 6), 6, 40))
    # Once the whole batches have seen all, two of six samples an epoch are left.
    assert 6 + 39 * 2 <= asked.asked < 40 * 6 / 2


def test_augmented_samples_are_answered_every_time():
    asked = Counting()
    list(epochs_of(Teacher(asked, 8), 8, 5, augmented=True))
    assert asked.asked == 5 * 8


def test_the_teacher_answers_for_mixtures_of_two_samples():
    inputs = torch.arange(12.0).view(6, 2)
    labels, seen = torch.arange(6), []
    teacher = Teacher(Counting(), 6, mix=1.0)
    for _ in range(50):
        epoch = [(inputs[:4], labels[:4]), (inputs[4:], labels[4:])]
        random = np.random.default_rng(len(seen))
        for mixed, (_, answers) in teacher.beside(epoch, labels, random):
            assert torch.equal(answers, Counting()(mixed))
            seen.append(mixed)
    found = torch.cat(seen)
    # On the line between two samples of a batch: both columns moved alike.
    assert torch.allclose(found[:, 1] - found[:, 0], torch.ones(len(found)))
    assert found.min() >= 0
    assert found.max() <= 11
    assert len(found.unique()) > len(found)


def test_answers_that_fill_memory_are_not_kept(monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 63)
    asked = Counting()  # 8 answers of two float32 are 64 bytes
    list(epochs_of(Teacher(asked, 8), 8, 2))
    assert asked.asked == 16
