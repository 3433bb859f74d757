import pytest

from edge_runtime.store import state
from edge_runtime.update import device


@pytest.fixture
def clock(monkeypatch):
    """Set what the board's own clock says."""

    def set_clock(now):
        for module in (state, device):
            monkeypatch.setattr(module, "utc", lambda seconds=None: now)

    return set_clock
