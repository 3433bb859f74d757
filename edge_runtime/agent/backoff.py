# SPDX-License-Identifier: Apache-2.0
"""When the agent tries again what failed: after a pause that grows each time."""

import math
from collections.abc import Callable

from edge_runtime.errors import BlockedError, TrialCutOffError

BACKOFF_S, MAX_BACKOFF_S = 10.0, 600.0  # before what failed is tried again
# Each try of a release writes all its weights: what this device cannot do is tried four
# times a day in the end. Another file, or a change of the store, is looked at at once.
MAX_BLOCKED_BACKOFF_S = 6 * 3600.0


class Backoff:
    """The pause before the next try; it doubles with each failure in a row."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Begin without a failure; ``clock`` returns seconds."""
        self._clock, self._delay, self._retry_at = clock, 0.0, math.inf

    @property
    def is_over(self) -> bool:
        """Whether something failed, and it is time to try it again."""
        return self._clock() >= self._retry_at

    def reset(self) -> None:
        """Forget earlier failures: all went well."""
        self._delay, self._retry_at = 0.0, math.inf

    def extend(self, error: Exception | None = None) -> None:
        """Wait longer than the last time, because of a failure."""
        # After a cut-off longer: what killed it may go on for some minutes, and three
        # tries in a row are all that a release has.
        if isinstance(error, TrialCutOffError):
            self._delay = MAX_BACKOFF_S
        is_blocked = isinstance(error, BlockedError)
        longest = MAX_BLOCKED_BACKOFF_S if is_blocked else MAX_BACKOFF_S
        self._delay = min(max(2 * self._delay, BACKOFF_S), longest)
        self._retry_at = self._clock() + self._delay
