# SPDX-License-Identifier: Apache-2.0
"""Variants beside full updating and the paper's method: pairs of one seed."""

import pytest

from tools.paper.variants import (
    BASELINE,
    REFERENCE,
    VARIANTS,
    VariantResult,
    compare,
    table,
    train,
)


def outcomes(**by_variant):
    names = {"full": REFERENCE, "base": BASELINE}
    return {
        names.get(name, name): {
            seed: VariantResult((accuracy, accuracy + 2), (0, size))
            for seed, (accuracy, size) in enumerate(runs)
        }
        for name, runs in by_variant.items()
    }


def test_differences_are_taken_seed_by_seed():
    rows = compare(
        outcomes(
            full=[(90, 900), (70, 700)],
            base=[(88, 50), (69, 30)],
            mine=[(89, 20), (72, 0)],
        )
    )
    full, base, mine = rows
    assert (full.difference, full.error) == (0, 0)
    assert base.difference == pytest.approx(-1.5)
    assert base.error == pytest.approx(0.5)  # of -2 and -1
    assert (base.gain, base.gain_error) == (0, 0)
    assert (mine.gain, mine.gain_error) == pytest.approx((2, 1))  # of +1 and +3
    assert (mine.last, mine.patch_bytes) == pytest.approx((82.5, 10))


def test_the_table_names_every_variant_with_its_errors():
    rows = compare(outcomes(full=[(90, 9), (80, 9)], base=[(88, 5), (79, 5)]))
    text = table("digits", 2, rows, {"cores": 2})
    assert f"| {BASELINE} | -1.50 ± 0.50 | +0.00 ± 0.00 | 85.50 | 5 |" in text


def test_a_variant_is_a_change_of_the_recipe_that_trains_and_packs(tmp_path):
    overrides = [*VARIANTS["7 mantissa bits"], "run.rounds=2", "train.epochs=2"]
    outcome = train("digits", overrides, 1, tmp_path)
    assert len(outcome.accuracy) == len(outcome.patch_bytes) == 2
    assert outcome.accuracy[0] > 50
    assert train("digits", overrides, 1, tmp_path) == outcome  # goes on, does nothing
