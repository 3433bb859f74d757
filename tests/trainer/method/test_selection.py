# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import TrainingError
from trainer.method.selection import random_masks, select_top_k

torch.set_num_threads(1)

MLP = {
    "1.weight": torch.zeros(512, 784),
    "2.weight": torch.zeros(512, 512),
    "3.weight": torch.zeros(10, 512),
}
FLOAT_TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Few distinct values, so that most examples have ties at the threshold.
VALUES = st.sampled_from(
    [0.0, -0.0, 1.0, 1.0, -1.0, 2.5, 1e-45, -1e-45, 3e38, float("inf"), float("-inf")]
) | st.floats(width=32, allow_nan=False)


def by_argsort(scores, k):
    """The plain way: one stable sort of everything."""
    flat = torch.cat([score.reshape(-1).double() for score in scores.values()])
    chosen = torch.argsort(flat, descending=True, stable=True)[:k]
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[chosen] = True
    parts = mask.split([score.numel() for score in scores.values()])
    return {
        n: part.view(scores[n].shape) for n, part in zip(scores, parts, strict=True)
    }


def same(masks, expected):
    return masks.keys() == expected.keys() and all(
        torch.equal(masks[name], expected[name]) for name in expected
    )


@settings(max_examples=150)
@given(
    tensors=st.lists(st.lists(VALUES, max_size=30), min_size=1, max_size=4),
    dtypes=st.lists(st.sampled_from(FLOAT_TYPES), min_size=4, max_size=4),
    share=st.floats(0, 1),
)
def test_top_k_equals_a_stable_argsort(tensors, dtypes, share):
    scores = {
        str(i): torch.tensor(values, dtype=torch.float64).to(dtype)
        for i, (values, dtype) in enumerate(zip(tensors, dtypes, strict=False))
    }
    total = sum(map(len, tensors))
    if not total:
        return
    k = max(1, round(share * total))
    masks = select_top_k(scores, k)
    assert same(masks, by_argsort(scores, k))
    assert sum(int(mask.sum()) for mask in masks.values()) == k


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("k", [1, 999, 300_000, 600_000])
def test_top_k_of_large_tensors_equals_a_stable_argsort(dtype, k):
    generator = torch.Generator().manual_seed(k)
    scores = {
        "a": torch.randn(600, 700, generator=generator).to(dtype),
        "b": torch.randn(3, 200, 300, generator=generator).to(dtype) * 1e-3,
    }
    assert same(select_top_k(scores, k), by_argsort(scores, k))


def test_equal_scores_are_taken_in_tensor_order_across_chunks():
    scores = {"first": torch.zeros(500, 600), "second": torch.zeros(500, 600)}
    masks = select_top_k(scores, 300_001)
    assert masks["first"].all()
    assert masks["second"].view(-1).nonzero().tolist() == [[0]]


def test_order_of_entries_is_c_order_whatever_the_memory_layout():
    score = torch.ones(4, 3, 2, 2).to(memory_format=torch.channels_last)
    mask = select_top_k({"conv": score}, 5)["conv"]
    assert mask.flatten().nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


def test_float64_scores_beside_float32_ones_are_compared_without_rounding():
    above = torch.tensor([1 + 1e-12], dtype=torch.float64)
    scores = {"a": torch.tensor([1.0]), "b": above}
    assert select_top_k(scores, 1)["b"].all()


@pytest.mark.parametrize("k", [0, -1, 7])
def test_rejects_a_k_outside_of_the_tensors(k):
    with pytest.raises(TrainingError, match=r"1 to 6 weights, found"):
        select_top_k({"w": torch.ones(2, 3)}, k)


@pytest.mark.parametrize(
    ("score", "found"),
    [(torch.tensor([1.0, float("nan")]), "NaN"), (torch.tensor([1, 2]), "torch.int64")],
)
def test_rejects_scores_without_an_order(score, found):
    with pytest.raises(TrainingError, match=f"found {found} in 'w'"):
        select_top_k({"w": score}, 1)


def test_random_masks_take_the_papers_share_of_every_tensor():
    masks = random_masks(MLP, 0.005, torch.Generator().manual_seed(3))
    again = random_masks(MLP, 0.005, torch.Generator().manual_seed(3))
    assert [int(mask.sum()) for mask in masks.values()] == [2007, 1311, 26]
    assert same(masks, again)
    assert all(masks[name].shape == MLP[name].shape for name in MLP)


@pytest.mark.parametrize("ratio", [0, -0.5, 1.5, float("nan")])
def test_random_masks_reject_a_ratio_out_of_range(ratio):
    with pytest.raises(TrainingError, match="above 0 and at most 1"):
        random_masks(MLP, ratio)


def test_random_masks_reject_a_ratio_that_selects_nothing():
    with pytest.raises(TrainingError, match="selects no weight"):
        random_masks({"w": torch.zeros(10)}, 0.01)
