# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from trainer.networks import linear
from trainer.networks.linear import Linear

fast = pytest.mark.skipif(not linear._PAYS, reason="needs a CPU with AVX-512")


def gradients(layer, inputs):
    """Gradients of a curved loss, by all that has one."""
    inputs = inputs.clone().requires_grad_()
    (layer(inputs) ** 3).mean().backward()
    return [inputs.grad, *(p.grad for p in layer.parameters())]


def distance(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


@fast
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 128])
def test_it_is_as_exact_as_torchs_own_layer(rows, bias):
    torch.manual_seed(0)
    ours = Linear(300, 70, bias=bias)
    plain = nn.Linear(300, 70, bias=bias)
    plain.load_state_dict(ours.state_dict())
    inputs = torch.randn(rows, 300)
    exact = gradients(copy.deepcopy(ours).double(), inputs.double())
    for mine, theirs, truth in zip(
        gradients(ours, inputs), gradients(plain, inputs), exact, strict=True
    ):
        assert distance(mine, truth) < 2e-6  # bfloat16 would be at about 3e-3
        assert distance(mine, truth) < 4 * distance(theirs, truth) + 1e-7


@fast
def test_second_derivatives_go_through_it():
    torch.manual_seed(0)
    layer, inputs = Linear(5, 4), torch.randn(3, 5)
    found = []
    for module in (layer, copy.deepcopy(layer).double()):
        x = inputs.to(module.weight.dtype).requires_grad_()
        (slope,) = torch.autograd.grad((module(x) ** 3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad((slope**2).sum(), module.weight)[0])
    assert distance(found[0], found[1]) < 1e-5


@pytest.mark.parametrize(
    "inputs", [torch.randn(3, 5).double(), torch.randn(2, 3, 5).double()]
)
def test_what_it_is_not_faster_for_goes_torchs_way(inputs):
    layer = Linear(5, 4).double()
    assert torch.equal(
        layer(inputs), functional.linear(inputs, layer.weight, layer.bias)
    )


def test_mixed_precision_keeps_its_type():
    with torch.autocast("cpu", torch.bfloat16):
        assert Linear(5, 4)(torch.randn(3, 5)).dtype == torch.bfloat16


def test_frozen_weights_get_no_gradient():
    layer = Linear(5, 4)
    layer.weight.requires_grad_(False)
    layer(torch.randn(3, 5)).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None
