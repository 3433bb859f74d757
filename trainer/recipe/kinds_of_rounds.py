# SPDX-License-Identifier: Apache-2.0
"""Which rounds of a recipe train every weight, begin anew, or train on unseen."""

from trainer.recipe.schema import PARTIAL_METHODS, Config, UpdateConfig


def is_full(config: Config, number: int) -> bool:
    """Tell whether a round trains every weight: by its method, or as the first."""
    update = config.update
    return update.method == "fu" or (number == 0 and update.first == "full")


def begins_anew(config: Config) -> bool:
    """Tell whether rounds after the first one may start from the init weights."""
    update = config.update
    if update.reinit == "auto" and update.method == "subspace":
        # A few coefficients do not lead from there.
        return bool(update.anew_budget or update.first_budget)
    return update.reinit != "never"


def trains_unseen(update: UpdateConfig) -> bool:
    """Tell whether a re-initialised model that falls short is trained on unseen.

    In a subspace with a budget: no. Each unseen round adds coefficients, and those of
    the first fill the budget.
    """
    grows = update.method == "subspace" and bool(update.budget)
    partial = update.method in PARTIAL_METHODS and not grows
    return partial and update.chain == "shadow"
