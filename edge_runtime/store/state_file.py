# SPDX-License-Identifier: Apache-2.0
"""Reading a store's state alone: without NumPy, for processes of little memory."""

import shlex
from contextlib import suppress
from pathlib import Path

from edge_runtime.errors import StoreError
from edge_runtime.reading import read_bounded
from edge_runtime.store.state import State, decode_state

STATE_NAME, COPY_NAME = "state.json", "state.copy"


def read_state(root: Path) -> State:
    """Read ``state.json``, or its copy if it is damaged.

    Raises:
        StoreError: Nothing is installed there, or both are damaged.
        OSError: It cannot be read, and there is no copy.
    """
    try:
        return decode_state(state_bytes(root / STATE_NAME))
    except (FileNotFoundError, NotADirectoryError) as err:
        raise StoreError(
            f"nothing is installed in {root}; run 'dpu-edge --store "
            f"{shlex.quote(str(root))} init BUNDLE' first"
        ) from err
    except (OSError, StoreError):
        # The copy is never older, so its release floor is never lower.
        with suppress(OSError, StoreError):
            state = decode_state(state_bytes(root / COPY_NAME))
            return state.noted("mended", state.active_slot, "state.json was damaged")
        raise


def state_bytes(path: Path) -> bytes:
    """Read the file of a state, and no more of it than one may have.

    Raises:
        StoreError: It is larger.
        OSError: It cannot be read.
    """
    return read_bounded(path, "state_bytes", path.name, StoreError)
