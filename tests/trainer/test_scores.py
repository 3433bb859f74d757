import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import TrainingError
from trainer.scores import (
    DPU,
    GCPU,
    LCPU,
    DPUScore,
    Evidence,
    magnitude_scores,
    random_masks,
    random_scores,
    select_top_k,
)

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


def evidence(base, current, loss_drop):
    named = [{"w": torch.tensor(values)} for values in (base, current, loss_drop)]
    return Evidence(*named)


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


def test_dpu_mixes_normalised_global_and_local_contributions():
    seen = evidence([0.0, 0, 0], [1.0, -2, 0], [3.0, -1, 2])
    gc = torch.tensor([1.0, 4, 0]) / 5
    lc = torch.tensor([3.0, -1, 2]) / 4
    torch.testing.assert_close(DPU(seen)["w"], 0.5 * gc + 0.5 * lc)
    torch.testing.assert_close(DPUScore(0.2)(seen)["w"], 0.2 * gc + 0.8 * lc)
    torch.testing.assert_close(GCPU(seen)["w"], gc)
    torch.testing.assert_close(LCPU(seen)["w"], lc)


def test_sums_run_over_all_tensors():
    zeros = {"a": torch.zeros(2), "b": torch.zeros(1)}
    now = {"a": torch.tensor([1.0, 1]), "b": torch.tensor([2.0])}
    scores = GCPU(Evidence(zeros, now, zeros))
    torch.testing.assert_close(scores["a"], torch.tensor([1 / 6, 1 / 6]))
    torch.testing.assert_close(scores["b"], torch.tensor([4 / 6]))


def test_scoring_leaves_the_evidence_as_it_was():
    seen = evidence([1.0, 2], [3.0, 4], [5.0, 6])
    DPU(seen)
    assert seen.current["w"].tolist() == [3, 4]
    assert seen.loss_drop["w"].tolist() == [5, 6]


def test_half_precision_weights_are_scored_in_float32():
    tiny = {"w": torch.tensor([0.0, 1e-4], dtype=torch.float16)}
    base = {"w": torch.zeros(2, dtype=torch.float16)}
    scores = GCPU(Evidence(base, tiny, {"w": torch.zeros(2)}))["w"]
    assert scores.dtype == torch.float32  # in float16 the square would be 0
    assert scores.tolist() == [0, 1]


def test_a_term_that_adds_up_to_zero_contributes_nothing():
    assert DPU(evidence([1.0, 1], [1.0, 1], [1.0, 3]))["w"].tolist() == [0.125, 0.375]
    assert DPU(evidence([0.0, 0], [1.0, 1], [2.0, -2]))["w"].tolist() == [0.25, 0.25]


@pytest.mark.parametrize(
    ("score", "current", "loss_drop"),
    [
        (DPU, [0.0, 0], [0.0, 0]),
        (GCPU, [0.0, 0], [1.0, 1]),
        (LCPU, [1.0, 1], [0.0, 0]),
    ],
)
def test_refuses_to_rank_when_no_term_is_left(score, current, loss_drop):
    with pytest.raises(TrainingError, match="nothing to rank"):
        score(evidence([0.0, 0], current, loss_drop))


def test_a_loss_that_rose_does_not_turn_the_ranking_upside_down():
    scores = LCPU(evidence([0.0] * 3, [1.0] * 3, [-5.0, 1.0, 0.0]))["w"]
    assert scores.argsort(descending=True).tolist() == [1, 2, 0]


@pytest.mark.parametrize("score", [DPU, GCPU, LCPU])
def test_refuses_weights_that_diverged(score):
    with pytest.raises(TrainingError, match="lower the learning rate"):
        score(evidence([0.0, 0], [float("nan"), 1], [1.0, 1]))


def test_refuses_local_contributions_that_diverged():
    with pytest.raises(TrainingError, match="local contribution of 'w'"):
        DPU(evidence([0.0, 0], [1.0, 1], [float("inf"), 1]))


@pytest.mark.parametrize("lam", [-0.1, 1.1, float("nan")])
def test_rejects_a_share_outside_of_0_to_1(lam):
    with pytest.raises(TrainingError, match="from 0 to 1"):
        DPUScore(lam)


def test_magnitude_ignores_the_sign():
    assert magnitude_scores({"w": torch.tensor([-2.0, 1])})["w"].tolist() == [2, 1]


def test_random_scores_depend_on_the_generator_alone():
    first = random_scores(MLP, torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    again = random_scores(list(MLP.items()), torch.Generator().manual_seed(3))
    other = random_scores(MLP, torch.Generator().manual_seed(4))
    assert same(first, again)
    assert not same(first, other)


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
