# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.nn import functional

from trainer import distill_loss

torch.set_num_threads(1)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(6, 5, generator=generator, requires_grad=True)
    return outputs, torch.arange(6) % 5, torch.randn(6, 5, generator=generator)


def test_without_weight_it_is_cross_entropy(batch):
    outputs, labels, teacher = batch
    found = distill_loss(outputs, labels, teacher, weight=0.0)
    torch.testing.assert_close(found, functional.cross_entropy(outputs, labels))


def test_gradients_of_both_parts_have_one_size_whatever_the_temperature(batch):
    """By the formula: T * (softmax(z / T) - softmax(t / T)) / batch."""
    outputs, labels, teacher = batch
    loss = distill_loss(outputs, labels, teacher, weight=1.0, temperature=4.0)
    (found,) = torch.autograd.grad(loss, outputs)
    expected = functional.softmax(outputs / 4, 1) - functional.softmax(teacher / 4, 1)
    torch.testing.assert_close(found, 4 * expected.detach() / 6)


def test_the_teachers_own_answers_are_best_and_no_gradient_goes_to_it(batch):
    outputs, labels, teacher = batch
    teacher.requires_grad_()
    own = distill_loss(teacher, labels, teacher, weight=1.0)
    assert float(own.detach()) == pytest.approx(0, abs=1e-6)
    distill_loss(outputs, labels, teacher).backward()
    assert teacher.grad is None


def test_one_answer_a_pixel_is_a_mean_over_pixels(batch):
    outputs, labels, teacher = batch
    wide = [x.detach()[:, :, None].expand(6, 5, 3) for x in (outputs, teacher)]
    found = distill_loss(wide[0], labels[:, None].expand(6, 3), wide[1])
    torch.testing.assert_close(found, distill_loss(outputs, labels, teacher).detach())
