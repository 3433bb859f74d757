# SPDX-License-Identifier: Apache-2.0
"""The phases of a round, and that calls come in their order."""

from enum import StrEnum

from edge_runtime.errors import TrainingError


class Phase(StrEnum):
    """Where an updater is."""

    FULL = "full"  # every weight trains and is measured
    SPARSE = "sparse"  # only the selected weights train
    DONE = "done"  # verified and detached

    def expect(self, wanted: "Phase", rule: str) -> None:
        """Refuse a call that belongs to another phase.

        Raises:
            TrainingError: It does; the message says the rule.
        """
        if self is not wanted:
            raise TrainingError(
                f"expected to be in the {wanted} phase, found {self}: {rule}"
            )
