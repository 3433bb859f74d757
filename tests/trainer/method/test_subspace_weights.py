# SPDX-License-Identifier: Apache-2.0
"""Weights follow their coefficients without an optimizer, and as a device has them."""

import numpy as np
import pytest
import torch

from trainer.method.movement import Movement
from trainer.method.signs import SignTable
from trainer.method.subspace_weights import SubspaceWeights

COUNT, BITS, TAPS, SEED = 64, 3, 2, 7


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.fixture
def base():
    return {"a": drawn(12, 8), "b": drawn(5, 3, 3)}


def of(base, int8_scales=None):
    signs = SignTable(base, COUNT, TAPS, SEED)
    return SubspaceWeights(base, signs, BITS, int8_scales or {})


def test_gradients_fold_as_free_coefficients_move(base):
    weights, coefficients = of(base), drawn(COUNT)
    gradients = [torch.ones(12, 8), drawn(5, 3, 3)]
    moved = {name: torch.empty_like(tensor) for name, tensor in base.items()}
    weights.write(moved, coefficients)
    by_weights = sum(
        float((gradient * (moved[name] - base[name])).sum())
        for name, gradient in zip(base, gradients, strict=True)
    )
    by_coefficients = float(weights.fold(gradients) @ coefficients)
    assert by_coefficients == pytest.approx(by_weights, rel=1e-4)


@pytest.mark.parametrize("int8", [False, True])
def test_settled_weights_are_those_of_a_device_to_the_bit(base, int8):
    scales = {"b": np.full(5, 0.02, np.float32)} if int8 else {}
    if int8:
        base["b"] = (base["b"] / 0.02).round().clamp(-127, 127) * torch.tensor(0.02)
    weights, coefficients = of(base, scales), drawn(COUNT)
    weights.settle(coefficients)
    written = {name: torch.empty_like(tensor) for name, tensor in base.items()}
    weights.write(written, coefficients)
    codes = weights.rounded(coefficients).numpy().astype(np.int16)
    kind = {"bits": BITS, "taps": TAPS, "seed": SEED}
    movement = Movement(base, weights.scales, codes, **kind)
    for name, expected in weights.on_device(movement):
        assert not torch.equal(written[name], base[name])
        assert torch.equal(written[name], expected)
