# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from edge_runtime.errors import TrainingError
from trainer.method.scores import (
    DPU,
    GCPU,
    LCPU,
    DPUScore,
    Evidence,
    fisher_scores,
    magnitude_scores,
)

torch.set_num_threads(1)


def evidence(base, current, loss_drop):
    named = [{"w": torch.tensor(values)} for values in (base, current, loss_drop)]
    return Evidence(*named)


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


class Apart(nn.Module):
    """One of its layers has no part in the loss, another has sparse gradients."""

    def __init__(self):
        super().__init__()
        self.words, self.unused = nn.Embedding(5, 4, sparse=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.words(x)


def test_parameters_without_a_part_in_the_loss_have_no_fisher_information():
    batches = [(torch.tensor([1, 1, 2]), torch.tensor([0, 1, 2]))]
    scores = fisher_scores(Apart(), batches, ["words.weight", "unused.weight"])
    assert not scores["unused.weight"].any()
    assert scores["words.weight"].any(1).tolist() == [False, True, True, False, False]
