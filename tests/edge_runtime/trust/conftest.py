# SPDX-License-Identifier: Apache-2.0
import pytest

from edge_runtime.store import state
from edge_runtime.update import device


@pytest.fixture
def clock(monkeypatch):
    """Set what the board's own clock says."""

    real = state.utc

    def set_clock(now):
        def utc(seconds=None):
            return now if seconds is None else real(seconds)

        for module in (state, device):
            monkeypatch.setattr(module, "utc", utc)

    return set_clock
