# SPDX-License-Identifier: Apache-2.0
"""A device: a store, and the rules by which it moves from one round to the next.

Example::

    device = Device.open("/var/lib/dpu")
    device.update("round_06.dpu")
    scores = device.predictor().predict(image)
"""

from contextlib import suppress
from dataclasses import asdict, replace
from enum import StrEnum
from os import PathLike
from typing import Any

from edge_runtime.errors import (
    DpuError,
    HeldError,
    ListExpiredError,
    RoundNotFoundError,
    StoreError,
    TrustError,
)
from edge_runtime.files import Files
from edge_runtime.formats.bundle import Bundle, read_bundle
from edge_runtime.formats.header import PatchHeader
from edge_runtime.formats.patch import Patch, open_patch
from edge_runtime.formats.signing import FirstUse, Trust
from edge_runtime.inference.session import RunOptions
from edge_runtime.live.store_predictor import LOOK_S, StorePredictor
from edge_runtime.reading import Source
from edge_runtime.store import admission
from edge_runtime.store.slots import build_slot, restore_slot, retire, target_slot
from edge_runtime.store.state import Slot
from edge_runtime.store.store import Store
from edge_runtime.times import utc
from edge_runtime.trust import KeyList, Root, first_root, read_root
from edge_runtime.update.hooks import run_hooks
from edge_runtime.update.trial import Expected, Trial, run_trial
from edge_runtime.update.tries import try_release

StrPath = str | PathLike[str]
KEPT_SLOTS = 2


class UpdateResult(StrEnum):
    """How an update ended, where it did not fail."""

    APPLIED = "applied"
    ALREADY_CURRENT = "already current"


class Device:
    """An installed model that can be updated, asked and proved.

    Attributes:
        store: The files.
    """

    def __init__(self, store: Store, trial: Trial = run_trial) -> None:
        """Use :meth:`open` or :meth:`install`; ``trial`` tries new weights."""
        self.store = store
        self._trial = trial

    @classmethod
    def open(
        cls, root: StrPath, *, files: Files | None = None, trial: Trial = run_trial
    ) -> "Device":
        """Open an installed device.

        Args:
            root: The store's directory.
            files: The seam to the disk.
            trial: Called as :func:`edge_runtime.update.trial.run_trial`.

        Raises:
            StoreError: Nothing is installed there, or it is damaged.
        """
        return cls(Store.open(root, files), trial)

    @classmethod
    def install(
        cls,
        root: StrPath,
        bundle: StrPath | bytes,
        *,
        trust: Trust | FirstUse | Root | None = None,
        files: Files | None = None,
        trial: Trial = run_trial,
    ) -> "Device":
        """Install a bundle into a new store.

        The init weights are regenerated, the bundle's patch is applied to them, and
        the outputs for the golden inputs are compared with the server's.

        Args:
            root: The store's directory.
            bundle: A bundle file, or its bytes.
            trust: Whose signatures the bundle, and every patch after it, needs, how
                many of the keys that it carries, or the key list that says so; by
                default nobody's.
            files: The seam to the disk.
            trial: Called as :func:`edge_runtime.update.trial.run_trial`.

        Raises:
            OSError: The bundle cannot be read, or the disk is full or refuses.
            BundleError: The bundle is damaged or contradicts itself.
            TrustError: The trusted keys did not sign it, or their list has expired.
            DpuError: Its patch is refused; nothing is installed then.
            StoreError: Something is installed there already, or lies there.
        """
        key_list = KeyList.begin(trust, utc()) if isinstance(trust, Root) else None
        if key_list and (expired := key_list.problem(utc())):
            raise ListExpiredError(expired)
        keys = trust.releases if isinstance(trust, Root) else trust or Trust()
        content = read_bundle(bundle, keys)
        device = cls(Store(root, files), trial)
        device.store.insist_free()  # before there is a lock in somebody's folder
        with device.store.lock(), open_patch(content.patch) as patch:
            size = patch.header.file_size
            device.store.create(content.files, content.trust, size)
            if key_list:
                device.store.state = device.store.state.trusting(key_list)
            device._install(content, patch)
        return device

    def _install(self, content: Bundle, patch: Patch) -> None:
        state, header = self.store.state, patch.header
        content.check(header)
        if error := self._refusal(header):
            raise error
        folder = build_slot(self.store, header.parent, [patch], header.target)
        self._trial(folder, self.store.model_folder, expected=Expected(golden=True))
        slot = Slot(header.target, header.round, header.counter)
        self.store.commit(state.activated(slot, "installed"))

    # Moving on ----------------------------------------------------------------------

    def update(self, source: Source, *, force: bool = False) -> UpdateResult:
        """Apply a patch: check, write beside, try, switch. Or change nothing.

        Args:
            source: A patch file, its bytes, or the open file.
            force: Try a release again that failed its trial before, or take one whose
                counter is far ahead.

        Raises:
            OSError: The patch cannot be read, or the disk is full or refuses.
            PatchError: The patch is at fault.
            WrongModelError: It is for another network.
            WrongParentError: It leads from weights that this device does not have.
            TrustError: The trusted keys did not sign it, the release is older than one
                that was active, it failed its trial before, or the key list expired.
            VerificationError: The result is not the promised one.
            TrialError: The new weights did not prove themselves.
            TrialCutOffError: Their trial crashed or hung: one try.
            BackendError: No runtime here can try them; the release stays welcome.
            BlockedError: This device cannot try them now; the release stays welcome.
            HeldError: The device is pinned, or a hook refused.
            StoreError: The device's own files are at fault.
        """
        # The lock first: whom to trust is part of the state.
        with (
            self.store.lock(),
            open_patch(source, trust=self.store.state.trust) as patch,
        ):
            return self._update(patch, force=force)

    def take_bundle(self, source: Source) -> UpdateResult:
        """Move to the round of a bundle, from the init weights: full weights.

        By the same rules as :meth:`update`; the bundle is signed as a whole.

        Args:
            source: A bundle file, its bytes, or the open file.

        Raises:
            BundleError: The bundle is damaged or contradicts itself.
            DpuError: As :meth:`update`.
            OSError: As :meth:`update`.
        """
        with self.store.lock():
            content = read_bundle(source, self.store.state.trust)
            with open_patch(content.patch) as patch:
                content.check(patch.header)
                return self._update(patch)

    def _update(self, patch: Patch, *, force: bool = False) -> UpdateResult:
        header = patch.header
        if admission.is_current(self.store.state, header):
            return UpdateResult.ALREADY_CURRENT
        # No release is judged by files of this device that are damaged.
        self.store.check_model()
        if error := self._refusal(header, force=force):
            raise error
        slot = Slot(header.target, header.round, header.counter)
        self._run_hooks("before-apply", "updated", slot)
        folder = target_slot(self.store, patch)
        before = try_release(self.store, self._trial, slot, folder, patch.outputs)
        try:
            self._activate(slot, "updated", header.signed_at)
        except BaseException:
            # The release passed its trial: what came then is no fault of its own.
            with suppress(OSError, StoreError):
                if slot.target in self.store.reload().tries:
                    self.store.commit(before)
            raise
        return UpdateResult.APPLIED

    def rollback(self, to: int | None = None) -> Slot:
        """Go back to earlier weights; the release floor stays where it is.

        Args:
            to: The round to go to, any that :meth:`status` says is within reach; by
                default the one released before the active.

        Returns:
            The slot that is active now.

        Raises:
            RoundNotFoundError: There is no way back to it.
            StoreError: It is damaged, or the store is locked.
            OSError: The disk is full or refuses.
        """
        with self.store.lock():
            state = self.store.state
            slot = state.earlier(to)
            if slot is None:
                raise RoundNotFoundError(
                    ("there is no earlier slot" if to is None else f"no round {to}")
                    + f" to go back to; rounds within reach: {state.reach_words}"
                )
            if state.slot(slot.target):
                self.store.check_slot(slot.target)
            else:
                restore_slot(self.store, slot)
            self._activate(slot, "rolled back")
        return slot

    def pin(self, *, held: bool = True) -> None:
        """Hold every update back, or allow updates again; rollbacks are never held.

        Raises:
            StoreError: Another process is writing.
            OSError: The disk is full or refuses.
        """
        with self.store.lock():
            state, event = self.store.state, "pinned" if held else "unpinned"
            state = replace(state, pinned=held)
            self.store.commit(state.noted(event, state.active_slot))

    def _refusal(self, header: PatchHeader, *, force: bool = False) -> DpuError | None:
        state = self.store.state
        return admission.refusal(
            state, header, force=force, identity=self.store.read_identity
        ) or admission.parent_refusal(state, header)

    def add_list(
        self, data: bytes, *, lapsed: bool = False, first_use: bool = False
    ) -> UpdateResult:
        """Take a key list: from its commit on, whom it does not name is not trusted.

        A device that trusts single keys so far takes its first list if enough of these
        signed it. A pin does not hold it back: a stolen key has to stop at once.

        Args:
            data: The content of the file.
            lapsed: Take it although the present list expired before it was signed.
            first_use: Take it although this device trusts nobody so far who could
                have signed it.

        Raises:
            KeyListError: Damaged, or not a key list.
            TrustError: It may not follow, or too few keys signed it.
            StoreError: Another process is writing.
            OSError: The disk is full or refuses.
        """
        with self.store.lock():
            state, at = self.store.state, utc()
            if key_list := state.key_list:
                if read_root(data).root.sha256 == key_list.root.sha256:
                    return UpdateResult.ALREADY_CURRENT
                key_list = key_list.follow(data, at, lapsed=lapsed)
            elif not state.trust.keys and not first_use:
                raise TrustError(
                    "this device checks no signatures, so nothing tells whose list "
                    "this is; if you know, use 'dpu-edge trust add "
                    "--trust-on-first-use'"
                )
            else:
                present = state.trust if state.trust.keys else None
                key_list = KeyList.begin(first_root(data, present), at)
            self.store.commit(state.trusting(key_list))
        return UpdateResult.APPLIED

    def _activate(self, slot: Slot, event: str, signed_at: int | None = None) -> None:
        state = self.store.state.activated(slot, event).dated(signed_at)
        while len(state.slots) > KEPT_SLOTS:
            state = retire(self.store, state, state.slots[-1])
        self.store.commit(state)
        try:
            self._run_hooks("after-apply", event, slot)
        except HeldError as err:
            # The update counts all the same.
            with suppress(OSError):
                self.store.commit(state.noted("hook failed", slot, str(err)))

    def _run_hooks(self, when: str, event: str, slot: Slot) -> None:
        run_hooks(self.store.root, when, event, slot)

    # Asking -------------------------------------------------------------------------

    def predictor(
        self, options: RunOptions | None = None, *, follow: bool | float = False
    ) -> StorePredictor:
        """Return a predictor with the active weights.

        Args:
            options: Threads, backend, swap policy.
            follow: Whether it moves on by itself when any process installs an update,
                or how many seconds may pass between two looks for one.

        Raises:
            DpuError: ``follow`` is no number of seconds.
            StoreError: They cannot be loaded.
            BackendError: The backend is not installed, or cannot run this graph.
        """
        every = LOOK_S if follow is True else float(follow)
        return StorePredictor(self.store.root, options, follow=every)

    def verify(self) -> str:
        """Hash the active weights on disk and check the graph beside them.

        Returns:
            Their fingerprint.

        Raises:
            StoreError: They are not what the state says.
        """
        state = self.store.state
        self.store.check_slot(state.active)
        self.store.check_current()
        self.store.check_model()
        return state.active

    def status(self) -> dict[str, Any]:
        """Return what is installed, as plain data."""
        state, run = self.store.state, self.store.run
        return self.store.summary() | {
            "run": asdict(run) if run else None,
            "store": str(self.store.root),
            "weights": str(self.store.slot_folder(state.active)),
            "weights_bytes": self.store.layout.file_size,
            "trusted_keys": list(state.trust.ids),
            "signatures_needed": state.trust.threshold if state.trust.keys else 0,
            "key_list": state.key_list and state.key_list.summary(utc()),
            "kept_rounds": [slot.round for slot in state.slots],
            "reachable_rounds": [slot.round for slot in state.reachable],
            "skipped": state.skipped,
            "blocked": asdict(state.blocked) if state.blocked else None,
            "history": [asdict(event) for event in state.history],
        }
