# SPDX-License-Identifier: Apache-2.0
"""What the end of a trial means for its release: whether the try counts, and how."""

from pathlib import Path

from edge_runtime.errors import BackendError, BlockedError, TrialCutOffError, TrialError
from edge_runtime.store.state import MAX_TRIES, Slot, State
from edge_runtime.store.store import Store
from edge_runtime.update.trial import Expected, Trial


def try_release(
    store: Store, trial: Trial, slot: Slot, folder: Path, outputs: bytes
) -> State:
    """Try a slot's weights; the try is counted for now.

    Args:
        store: The store, locked.
        trial: Called as :func:`edge_runtime.update.trial.run_trial`.
        slot: The release.
        folder: Its weights.
        outputs: As :attr:`Patch.outputs`.

    Returns:
        The state without this try.

    Raises:
        TrialError: The weights did not prove themselves: no more tries.
        TrialCutOffError: The trial crashed or hung: one try.
        BackendError: No runtime here can try them; nothing is counted.
        BlockedError: This device cannot try them now; nothing is counted.
        OSError: The disk is full or refuses; nothing is counted.
    """
    # Counted before: a trial that takes the whole device down must count too.
    before = store.state
    store.commit(before.tried(slot.target))
    try:
        trial(folder, store.model_folder, expected=Expected(values=outputs))
    except (BackendError, BlockedError) as err:
        # The device is at fault: no try of the release, however often it happens.
        store.commit(before.noted_once("blocked", slot, str(err)))
        raise
    except (OSError, MemoryError):
        store.commit(before)
        raise
    except TrialCutOffError as err:
        # It stays counted, and is no verdict: perhaps somebody killed it.
        store.commit(store.state.noted("cut off", slot, str(err)))
        raise
    except TrialError as err:
        state = before.tried(slot.target, MAX_TRIES)
        store.commit(state.noted("refused", slot, str(err)))
        raise
    return before
