# SPDX-License-Identifier: Apache-2.0
"""A predictor that keeps up with its store, whichever process installs the updates."""

import logging
import math
import os
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from edge_runtime.errors import DpuError, StoreError
from edge_runtime.inference.predictor import Predictor
from edge_runtime.inference.session import RunOptions
from edge_runtime.live.entries import Entry, Status, measure
from edge_runtime.store.state import State
from edge_runtime.store.store import Store
from edge_runtime.text import printable

LOOK_S = 1.0  # between two looks at the state
MAX_LOOK_S = 300.0  # after failures the looks get rarer, up to this
LONGEST_S = 366 * 86_400.0  # time.sleep takes no number of seconds that is far larger

_log = logging.getLogger("edge_runtime")


class StorePredictor(Predictor):
    """Answers with the active weights of a store.

    :meth:`refresh` moves to what is active now. With ``follow`` a background thread
    does so. It looks by one ``stat`` of ``state.json``, whose inode and time change
    with every commit; calls never look, so they cost the same.

    A forked child has no such thread: make the predictor after the fork.

    It tells proofs (:mod:`edge_runtime.live.entries`) what its session was made from.
    The files are hashed before the old session goes and after the new one answers, so
    that no call waits for it.

    Attributes:
        store: The store, as of the last refresh.
    """

    def __init__(
        self, root: Path, options: RunOptions | None = None, *, follow: float = 0.0
    ) -> None:
        """Load the active weights.

        Args:
            root: The store.
            options: How to run them.
            follow: Seconds between two looks at the state; 0 for none.

        Raises:
            DpuError: ``follow`` is no number of seconds.
            StoreError: Nothing is installed there, or it cannot be loaded.
            BackendError: The backend is not installed, or cannot run this graph.
        """
        if not 0 <= follow < math.inf:
            raise DpuError(
                f"follow is {follow}, expected the seconds between two looks at the "
                "store, True for one second, or False"
            )
        self.store = Store.open(root)
        self._stamp = self.store.stamp()
        state = self.store.reload()
        folder = self.store.slot_folder(state.active)
        self._installed, self._active = state, state.active
        self._entry = Entry(self.store)
        self._sources = {folder: measure(folder)}
        super().__init__(folder, self.store.contract, options)
        self._tell()
        self._refreshing = threading.RLock()
        if follow:
            # By a weak reference: a predictor that nobody holds ends its thread.
            work = (weakref.ref(self), min(follow, LONGEST_S))
            threading.Thread(target=_follow, args=work, daemon=True).start()

    def refresh(self) -> bool:
        """Move to the active weights, if they are others than at the last look.

        Costs one ``stat`` where nothing was committed. What was chosen with
        :meth:`swap` stays until an update or a rollback makes others active.

        Returns:
            Whether the weights changed.

        Raises:
            StoreError: The state or the new slot cannot be loaded, or another model was
                installed there; the old session stays in use, and the next call tries
                again.
            BlockedError: The system lacks memory or the like for it; likewise.
        """
        with self._refreshing:
            if self._entry.pending:
                self._entry.try_again()
            former, stamp = self.folder, self.store.stamp()
            if stamp != self._stamp:
                state = self.store.reload()
                if _is_another(state, self._installed):
                    raise StoreError(
                        f"another model was installed in {self.store.root}; make a new "
                        "predictor"
                    )
                if state.active != self._active or self._session is None:
                    self.swap(self.store.slot_folder(state.active))
                self._active, self._stamp = state.active, stamp
            return self.folder != former

    def swap(self, folder: str | os.PathLike[str]) -> None:
        """Move to another slot, as :meth:`Predictor.swap` does, and record it.

        Args:
            folder: The slot, or a link to it, such as ``STORE/current``.

        Raises:
            StoreError: The new slot cannot be loaded; the old one stays in use.
            BlockedError: The system lacks memory or the like for it; likewise.
        """
        folder = Path(os.path.realpath(folder))  # a link may lead elsewhere later
        with self._refreshing:
            former = self.folder
            self._sources = {former: self._sources[former], folder: measure(folder)}
            self._entry.declare(former, Status.LOADING)
            try:
                super().swap(folder)
            finally:
                self._tell()

    def _load(self, folder: Path) -> Any:
        try:
            return super()._load(folder)
        except StoreError:
            # Of damaged files a runtime says that the graph is wrong.
            for slot in self.store.state.slots:
                if self.store.slot_folder(slot.target).resolve() == folder.resolve():
                    self.store.check_slot(slot.target)
            raise

    def _tell(self) -> None:
        before, after = self._sources[self.folder], measure(self.folder)
        if not self._session:
            self._entry.declare(self.folder, Status.EMPTY)
        elif before is None or before != after:
            self._entry.declare(self.folder, Status.CHANGED)
        else:
            self._entry.declare(self.folder, Status.LOADED, before)


def _is_another(found: State, former: State) -> bool:
    """Return whether a state is of another model, or of other inputs and outputs."""
    known = {found.contract, former.contract} - {""}  # which older runtimes keep not
    return found.model != former.model or len(known) > 1


def _follow(target: "weakref.ref[StorePredictor]", every: float) -> None:
    wait = every
    while True:
        time.sleep(wait)
        predictor = target()
        if predictor is None:
            return
        try:
            predictor.refresh()
            wait = every
        except Exception as err:  # noqa: BLE001 - no fault may end this thread
            # The old weights would answer from then on, and nobody would know. Memory
            # that ran out may come back.
            wait = min(2 * wait, max(every, MAX_LOOK_S))
            words = printable(err) or type(err).__name__
            is_odd = not isinstance(err, DpuError | OSError | MemoryError)
            at = predictor.folder.name
            _log.warning("still at %s: %s", at, words, exc_info=is_odd)
        del predictor  # else it would be held during the wait
