# SPDX-License-Identifier: Apache-2.0
"""Metrics give what other people's give, in batches too, and refuse what misfits."""

import math

import numpy as np
import pytest
from sklearn import metrics as reference

from edge_runtime.errors import ContractError
from edge_runtime.formats.contract import METRICS as NAMES
from edge_runtime.formats.contract import check_bound
from edge_runtime.update.metrics import METRICS

RANDOM = np.random.default_rng(3)
LOGITS = RANDOM.normal(size=(60, 4)).astype(np.float32)
CLASSES = RANDOM.integers(0, 4, 60)
MAPS = RANDOM.normal(size=(60, 3, 5, 6)).astype(np.float32)
MAP_LABELS = RANDOM.integers(0, 3, (60, 5, 6))
VALUES = RANDOM.normal(size=(60, 2)).astype(np.float32)
CASES = {
    "top1": (LOGITS, CLASSES),
    "element_accuracy": (LOGITS, RANDOM.integers(0, 2, (60, 4)).astype(np.float32)),
    "iou": (MAPS, MAP_LABELS),
    "mae": (VALUES, RANDOM.normal(size=(60, 2))),
    "cosine": (VALUES, RANDOM.normal(size=(60, 2))),
}


def test_every_metric_is_tried_here():
    assert CASES.keys() == METRICS.keys() == NAMES.keys()


def test_they_are_what_scikit_learn_computes():
    def score(name):
        return METRICS[name].score(*CASES[name])

    answers = LOGITS.argmax(1)
    assert score("top1") == reference.accuracy_score(CLASSES, answers)
    logits, bits = CASES["element_accuracy"]
    wrong = reference.hamming_loss(bits.astype(int), (logits > 0).astype(int))
    assert score("element_accuracy") == pytest.approx(1 - wrong)
    answers = MAPS.argmax(1).ravel()
    wanted = reference.jaccard_score(MAP_LABELS.ravel(), answers, average="macro")
    assert score("iou") == pytest.approx(wanted)
    values, labels = CASES["mae"]
    assert score("mae") == pytest.approx(
        reference.mean_absolute_error(labels, values), rel=1e-6
    )
    values, labels = CASES["cosine"]
    each = reference.pairwise.cosine_similarity(values, labels).diagonal()
    assert score("cosine") == pytest.approx(each.mean(), rel=1e-6)


@pytest.mark.parametrize("name", METRICS)
def test_batches_add_up_to_the_whole(name):
    metric, (output, labels) = METRICS[name], CASES[name]
    parts = [metric.sums(output[s], labels[s]) for s in (slice(7), slice(7, None))]
    assert metric.value(sum(parts)) == pytest.approx(metric.score(output, labels))


@pytest.mark.parametrize("name", METRICS)
def test_a_models_own_answers_are_all_right(name):
    metric, (output, _) = METRICS[name], CASES[name]
    best = metric.score(output, metric.labels(output, 0.0))
    assert best == pytest.approx(metric.range[1] if metric.higher else 0.0)


def test_one_number_a_sample_never_becomes_a_table_of_all_pairs():
    values, labels = np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 2.0, 3.0])
    for output, wanted in ((values, labels), (labels, values)):
        assert METRICS["mae"].score(output, wanted) == pytest.approx(1 / 3)
    yes = np.array([[-1.0], [2.0], [0.5]])
    assert METRICS["element_accuracy"].score(yes, np.array([0, 1, 0])) == 2 / 3


def test_a_threshold_is_for_probabilities():
    shares, bits = np.array([[0.4, 0.6]]), np.array([[0, 1]])
    assert METRICS["element_accuracy"].score(shares, bits) == 0.5
    assert METRICS["element_accuracy"].score(shares, bits, 0.5) == 1.0


def test_classes_may_stand_on_the_last_axis():
    output, labels = MAPS.transpose(0, 2, 3, 1), MAP_LABELS
    found = METRICS["iou"].score(np.ascontiguousarray(output), labels)
    assert found == METRICS["iou"].score(MAPS, labels)


def test_negative_labels_of_maps_do_not_count():
    output = np.zeros((1, 2, 1, 4), np.float32)
    output[0, 1, 0, :2] = 1.0
    labels = np.array([[[1, 0, 0, -100]]])
    assert METRICS["element_accuracy"].score(output, labels) == 2 / 3
    assert METRICS["iou"].score(output, labels) == pytest.approx(0.5)


def test_a_class_that_does_not_occur_is_no_part_of_the_mean():
    output = np.eye(5, dtype=np.float32)[[0, 1]]
    assert METRICS["iou"].score(output, np.array([0, 1])) == 1.0


def test_vectors_of_zeros_are_like_nothing():
    values = np.array([[0.0, 0.0], [1.0, 0.0]])
    assert METRICS["cosine"].score(values, values) == 0.5


@pytest.mark.parametrize(
    ("name", "output", "labels", "words"),
    [
        ("top1", LOGITS, CLASSES.astype(float), "float64"),
        ("top1", LOGITS, CLASSES[:-1], "shape"),
        ("iou", MAPS, MAP_LABELS[:, :4], "shape"),
        ("iou", MAPS, MAP_LABELS + 1, "classes 0 to 2"),
        ("element_accuracy", MAPS, MAP_LABELS + 0.5, "fraction"),
        ("mae", VALUES, np.zeros(60), "shape"),
        ("mae", np.float32(1), np.float32(1), "shape"),
        ("cosine", VALUES, np.array(["a"]), "numbers"),
        ("mae", VALUES[:0], np.zeros((0, 2)), "no labels"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name, output, labels, words):
    with pytest.raises(ContractError, match=words):
        METRICS[name].score(np.asarray(output), labels)


@pytest.mark.parametrize(
    ("name", "bound"),
    [("top1", 1.5), ("iou", -0.1), ("mae", -1.0), ("cosine", -2.0), ("mae", math.nan)],
)
def test_a_bound_outside_of_the_range_is_refused(name, bound):
    with pytest.raises(ContractError, match=r"values from .*bound is"):
        check_bound(name, bound)
    check_bound(name, METRICS[name].range[0])


def test_bounds_are_reached_in_the_metrics_own_direction():
    assert METRICS["mae"].reaches(0.5, 0.5)
    assert not METRICS["mae"].reaches(0.6, 0.5)
    assert METRICS["top1"].reaches(0.6, 0.5)
    assert not METRICS["top1"].reaches(0.4, 0.5)
    assert not any(metric.reaches(math.nan, 0.5) for metric in METRICS.values())
